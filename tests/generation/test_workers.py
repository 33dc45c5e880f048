"""Batches on several threads give what one after the other gives, and leave torch as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from tiny_models import build, encoder_of, prompts
from torch import nn

from nest.generation.static import generate_tokens
from nest.generation.workers import n_workers, run_each


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gpt2"])
def test_answers_do_not_depend_on_the_threads(family: str, two_threads: None) -> None:
    model = build(family)
    encoder = encoder_of(model)
    encoded = [encoder.prompt(prompt) for prompt in prompts(["bread", "bomb"], n=40)]
    assert n_workers(model) == 2
    found = generate_tokens(model, encoder, encoded, 6, batch_size=4)
    torch.set_num_threads(1)
    assert found == generate_tokens(model, encoder, encoded, 6, batch_size=4)


def test_jobs_run_at_once_without_gradients_and_on_one_core_each(two_threads: None) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def run(job: int) -> tuple[int, bool, int]:
        if job < 2:
            meeting.wait()  # would time out if they ran one after the other
        return 10 * job, torch.is_grad_enabled(), torch.get_num_threads()

    done = dict(run_each(range(5), run, 2))
    assert done == {job: (10 * job, False, 1) for job in range(5)}
    assert torch.get_num_threads() == 2


def test_results_come_in_the_jobs_order(two_threads: None) -> None:
    last_first = threading.Event()

    def run(job: int) -> int:
        if job == 0:
            assert last_first.wait(20)
        if job == 9:
            last_first.set()
        return 10 * job

    assert list(run_each(range(10), run, 2)) == [(job, 10 * job) for job in range(10)]


def test_an_error_does_not_wait_for_earlier_jobs(two_threads: None) -> None:
    ended = threading.Event()

    def run(job: int) -> bool:
        if job == 1:
            raise RuntimeError("job 1")
        return ended.wait(20)

    with pytest.raises(RuntimeError, match="job 1"):
        list(run_each(range(2), run, 2, ended))


def test_an_error_ends_all(two_threads: None) -> None:
    begun: list[int] = []

    def run(job: int) -> None:
        begun.append(job)
        raise RuntimeError(f"job {job}")

    with pytest.raises(RuntimeError, match="job"):
        list(run_each(range(50), run, 2))
    assert len(begun) <= 2
    assert torch.get_num_threads() == 2


def test_who_still_works_is_told_that_nobody_waits(two_threads: None) -> None:
    ended = threading.Event()

    def run(job: int) -> bool:
        return job == 0 or ended.wait(20)

    for _ in run_each(range(2), run, 2, ended):
        break  # as an interruption would
    assert ended.is_set()


def test_who_gets_one_worker(two_threads: None) -> None:
    model = build()
    assert n_workers(nn.Linear(2, 2)) == 1
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert n_workers(model) == 1
    handle.remove()
    assert n_workers(model) == 2
    torch.set_num_threads(1)
    assert n_workers(model) == 1
