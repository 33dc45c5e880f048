"""How far a step of the optimizer moves a projection's output, and the rate that moves it so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nest.errors import ActivationError
from nest.tuning.dialogues import MicroBatch
from nest.tuning.objective import Objective
from nest.tuning.update import ClusterUpdate, SiteUpdate


def output_share(
    update: ClusterUpdate, objective: Objective, micro_batches: Sequence[MicroBatch]
) -> float:
    """What an Adam step with rate 1 would add to the sites' outputs, as a share of these outputs.

        share = sqrt(mean over sites of |dY|^2 / |Y|^2),  dY = s (dU x)[c] + ds (U x)[c]

    dU and ds are the signs of the gradient, as in Adam's first step; both norms are over tokens (padding
    left out) and over all neurons of the site, so that a few neurons may move further than many. It is
    linear in the rate: a share that is wanted, divided by this one, is the rate.

    Args:
        update: Where it begins; left as it was, its gradient is gone.
        objective: Whose gradient.
        micro_batches: Of one step.

    Returns:
        The share; 0 where there is no gradient.

    Raises:
        ActivationError: the gradient is not finite; names the sites.
    """
    update.packed.grad = None
    with torch.enable_grad():
        for loss in objective.losses(micro_batches, 0):
            loss.backward()
    if update.packed.grad is None:
        return 0.0
    bad = [name for name, grad in update.gradients().items() if not bool(grad.isfinite().all())]
    if bad or not bool(update.packed.grad.isfinite().all()):
        where = f" at {', '.join(bad)}" if bad else ""
        update.packed.grad = None
        raise ActivationError(
            f"before the first step the gradient{where} is not finite; tune in --dtype float32, or check "
            "that the checkpoint is not damaged"
        )
    signs = update.packed.grad.sign()
    update.packed.grad = None
    moved = dict.fromkeys((site.part.site.name for site in update.sites), (0.0, 0.0))
    current: list[Bool[Tensor, "B T"]] = []

    def add(site: SiteUpdate, inputs: Tensor, output: Tensor) -> None:
        mask = current[-1].to(inputs.device)
        if inputs.ndim == 2 and inputs.shape[0] == mask.numel():  # some layers flatten their tokens
            mask = mask.flatten()
        elif (
            inputs.ndim != 3 or inputs.shape[:2] != mask.shape
        ):  # of an expert: padding is not told
            mask = torch.ones(inputs.shape[:-1], dtype=torch.bool, device=inputs.device)
        name = site.part.site.name
        dy, y = _moved(update, site, signs, inputs[mask], output[mask])
        moved[name] = moved[name][0] + dy, moved[name][1] + y

    with torch.no_grad(), _listening(update, add):
        for micro_batch in micro_batches:
            current.append(micro_batch.batch.attention_mask.bool())
            # one by one, so that the mask is that of the dialogues that go through
            next(iter(objective.losses([micro_batch], 0)))
    shares = [dy / y for dy, y in moved.values() if y > 0]
    return math.sqrt(sum(shares) / len(shares)) if shares else 0.0


def _moved(
    update: ClusterUpdate,
    site: SiteUpdate,
    signs: Float[Tensor, " P"],
    inputs: Float[Tensor, "T D"],
    output: Float[Tensor, "T F"],
) -> tuple[float, float]:
    """|dY|^2 and |Y|^2 of a site."""
    vectors, loadings = update.parts_of(site, signs)
    x, home = inputs.float(), inputs.device
    clusters = site.members.clusters.to(home)
    change = (x @ vectors.to(home, x.dtype).T)[:, clusters]  # (T, N)
    if loadings is not None and site.loadings is not None:
        along = (x @ site.vectors.detach().to(home, x.dtype).T)[:, clusters]
        change = change * site.loadings.detach().to(home, x.dtype)
        change = change + along * loadings.to(home, x.dtype)
    first, length = site.part.site.offset, site.part.site.length
    whole = output[:, first : first + length].float()
    return float(change.square().sum()), float(whole.square().sum())


@contextmanager
def _listening(
    update: ClusterUpdate, heard: Callable[[SiteUpdate, Tensor, Tensor], None]
) -> Iterator[None]:
    """Tell inputs and outputs of every site for the time of the block."""

    def hook(site: SiteUpdate) -> Callable[..., None]:
        def tell(_module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            heard(site, inputs[0].detach(), output.detach())

        return tell

    handles = []
    try:
        handles += [site.module.register_forward_hook(hook(site)) for site in update.sites]
        yield
    finally:
        for handle in handles:
            handle.remove()
