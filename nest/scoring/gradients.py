"""What changing a neuron's weights would gain to first order, gathered in one backward pass a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nest.errors import ActivationError, LayoutError
from nest.models.binding import BoundSite, bind_all
from nest.models.sites import NeuronSite

N_DIRECTIONS = 128
"""Random directions that a row's gradient is kept along: its length comes out within some 12 %."""


@dataclass(eq=False)
class SiteGradient:
    """What a site's neurons gathered.

    Attributes:
        rows: Gradient of each neuron's weights along random directions (F, d), fp32. Lengths and inner
            products are those of the whole gradients (F, D) on average; to the bit where D is no more
            than `N_DIRECTIONS`.
        outputs: Gradient of each neuron's output, summed over tokens (F,), fp32.
    """

    rows: Float[Tensor, "F d"]
    outputs: Float[Tensor, " F"]


def gathered(
    model: nn.Module, sites: Sequence[NeuronSite], losses: Iterable[Tensor], *, seed: int = 0
) -> dict[str, SiteGradient]:
    """Gradients of a sum of losses at every site, by its name.

        rows = sum over tokens of dY^T (X R),  R a D x d matrix of N(0, 1/d)

    Nothing of size F x D is formed: of a batch only X R is kept until its backward pass. The model is
    left as it was; no parameter of it gets a gradient.

    Args:
        model: In the mode it is to run in.
        sites: Where.
        losses: Each is asked for inside, so that its forward pass is seen; its backward pass is run.
        seed: Of the directions.

    Raises:
        ActivationError: a gradient is not finite.
        LayoutError: a site's module is not called with a tensor or does not return one, or none takes part.

    Source: the random projection is Johnson and Lindenstrauss's.
    """
    bound = bind_all(model, sites)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, SiteGradient] = {}
    with _watched(model, bound, found, generator), torch.enable_grad():
        for loss in losses:
            if not loss.requires_grad:
                raise LayoutError(
                    "no site took part in what the model computes; name the projections themselves with "
                    "layout=[nest.NeuronSite(...)]"
                )
            loss.backward()
    for one in bound:
        site = one.site
        if site.name not in found:  # an expert that no token was routed to
            n = min(one.width, N_DIRECTIONS)
            found[site.name] = SiteGradient(torch.zeros(site.length, n), torch.zeros(site.length))
        if not math.isfinite(float(found[site.name].rows.sum())):
            raise ActivationError(
                f"the gradient at {site.name} is not finite; try --dtype float32, or check that the "
                "checkpoint is not damaged"
            )
    return found


@contextmanager
def _watched(
    model: nn.Module,
    bound: Sequence[BoundSite],
    found: dict[str, SiteGradient],
    generator: torch.Generator,
) -> Iterator[None]:
    """With hooks on the sites' modules and all parameters frozen, for the time of the block."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    by_module: dict[nn.Module, list[NeuronSite]] = {}
    for one in bound:
        by_module.setdefault(one.module, []).append(one.site)
    drawn: dict[int, Tensor] = {}
    directions: dict[tuple[int, torch.device], Tensor] = {}

    def projected(inputs: Tensor) -> Float[Tensor, "T d"]:
        flat = inputs.detach().flatten(0, -2).float()
        width = flat.shape[1]
        if width <= N_DIRECTIONS:
            return flat
        if width not in drawn:
            values = torch.randn(width, N_DIRECTIONS, generator=generator)
            drawn[width] = values / math.sqrt(N_DIRECTIONS)
        key = (width, flat.device)
        if key not in directions:
            directions[key] = drawn[width].to(flat.device)
        return flat @ directions[key]

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        if not inputs or not isinstance(output, Tensor):
            names = ", ".join(site.name for site in by_module[module])
            raise LayoutError(
                f"{names} is called without positional arguments, or does not return a tensor; name "
                "the projection itself with layout=[nest.NeuronSite(...)]"
            )
        if not torch.is_grad_enabled():
            return None
        is_first = not output.requires_grad
        watched = output.detach().requires_grad_(True) if is_first else output
        seen = projected(inputs[0])

        def gather(grad: Tensor) -> None:
            flat = grad.flatten(0, -2).float()
            for site in by_module[module]:
                own = flat[:, site.offset : site.offset + site.length]
                rows, outputs = own.T @ seen, own.sum(0)
                kept = found.get(site.name)
                if kept is None:
                    found[site.name] = SiteGradient(rows, outputs)
                else:
                    kept.rows += rows
                    kept.outputs += outputs

        watched.register_hook(gather)
        return watched.clone() if is_first else None  # a leaf may not be changed in place

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        handles += [module.register_forward_hook(hook) for module in by_module]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
