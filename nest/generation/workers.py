"""Independent batches on several cores: one batch a thread, one core a batch.

The matrices of a decoding step are too thin to be shared: the demo's evaluation of 4,824 requests took
9.2 s with two cores at work on every operation, and 7.7 s with a core for each batch (medians of three).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Future,
    InvalidStateError,
    ThreadPoolExecutor,
    wait,
)
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import nn

J = TypeVar("J")
R = TypeVar("R")


def n_workers(model: nn.Module) -> int:
    """How many batches may run through the model at once: as many as torch has cores, or one.

    One on a GPU, for modules that are not transformers' own (their forward pass may keep something
    on `self`), and where hooks are registered, which need not expect several threads.
    """
    known = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return torch.get_num_threads() if known and on_cpu and not hooked else 1


def run_each(
    jobs: Sequence[J],
    run: Callable[[J], R],
    workers: int,
    ended: threading.Event | None = None,
) -> Iterator[tuple[J, R]]:
    """Each job with its result, in the jobs' order; without gradients.

    A result waits for those before it, while the threads go on. An error of a job, or an interruption, ends
    all: jobs that have not begun are dropped, and those that have are told by `ended` that nobody waits for
    them any more.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, run(job)
        return

    failed: Future[None] = Future()

    def alone(job: J) -> R:
        if failed.done():
            raise CancelledError
        try:
            with torch.no_grad():  # a thread begins with gradients
                return run(job)
        except BaseException as fault:
            fail(failed, fault)
            raise

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        min(workers, len(jobs)), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        futures = [pool.submit(alone, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            yield job, next_result(future, failed)
    finally:
        if ended is not None:
            ended.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' one is also what new threads begin with


def fail(failed: Future[None], fault: BaseException) -> None:
    """Say that one of several jobs has failed; of several faults the first counts."""
    with suppress(InvalidStateError):
        failed.set_exception(fault)


def next_result(future: Future[R], failed: Future[None]) -> R:
    """A future's result, or the fault of whichever job `fail`s before it is there."""
    either: list[Future[Any]] = [future, failed]
    wait(either, return_when=FIRST_COMPLETED)
    if failed.done():
        failed.result()
    return future.result()
