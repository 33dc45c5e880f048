"""The cluster update on live weights: after each step the model's own rows carry it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nest.errors import InputError, SelectionError
from nest.models.fingerprint import fingerprint
from nest.models.sites import read_rows, site_module, site_weight, write_rows
from nest.patches.patch import NeuronPatch
from nest.selection.config import UpdateForm
from nest.selection.selection import NeuronSelection, SiteSelection
from nest_kernels.cluster_grad import cluster_gradients
from nest_kernels.neuron_adamw import updated_rows

# Loadings start at one plus this much noise: all equal, they would be the shared form.
LOADING_NOISE = 0.01
_MARK = "_nest_update"


@dataclass(frozen=True)
class SiteUpdate:
    """The part of an update that lives at one site.

    Attributes:
        part: The chosen neurons.
        weight: The model's own tensor.
        original: Its rows before any update, (N, D), in the weight's dtype.
        vectors: U of the site's group, (K, D), a view of the packed parameters.
        loadings: s, (N,), a view of the packed parameters; None in the shared form.
        columns: The neurons' columns in the module's output, (N,).
        clusters: Their clusters, (N,), on the weight's device.
    """

    part: SiteSelection
    weight: Tensor
    original: Float[Tensor, "N D"]
    vectors: Float[Tensor, "K D"]
    loadings: Float[Tensor, " N"] | None
    columns: Int[Tensor, " N"]
    clusters: Int[Tensor, " N"]


class ClusterUpdate:
    """U (and s) of every site, packed in one fp32 buffer, and the rows that carry them.

    Made by `trainable`. The gradient of the packed parameters gathers in `packed.grad`, and stays
    there until the optimizer clears it.

    Attributes:
        selection: The neurons.
        form: `shared` or `loaded`.
        packed: All vectors, then all loadings, fp32 (P,): the one trainable parameter.
        n_vector_parameters: How many of them belong to vectors.
        sites: The update, site by site.
    """

    def __init__(
        self, model: nn.Module, selection: NeuronSelection, form: UpdateForm, seed: int
    ) -> None:
        self.model = model
        self.selection = selection
        self.form = form
        self.n_vector_parameters = selection.trainable_parameters("shared")
        n = selection.trainable_parameters(form)
        device = site_weight(model, selection.sites[0].site).device
        values = torch.zeros(n, dtype=torch.float32)
        if form == "loaded":
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(n - self.n_vector_parameters, generator=generator)
            values[self.n_vector_parameters :] = 1.0 + LOADING_NOISE * noise
        self.packed = nn.Parameter(values.to(device))
        self.packed.grad = torch.zeros_like(self.packed)
        self._leaves: dict[str, nn.Parameter] = {}
        self.sites = tuple(self._site_updates())

    def _site_updates(self) -> Iterator[SiteUpdate]:
        first = 0
        for group, (n_clusters, width) in self.selection.groups.items():
            self._leaves[group] = self._view(first, (n_clusters, width))
            first += n_clusters * width
        for part in self.selection.sites:
            weight = site_weight(self.model, part.site)
            loadings = None
            if self.form == "loaded":
                loadings = self._view(first, (part.neurons.numel(),))
                first += part.neurons.numel()
            yield SiteUpdate(
                part=part,
                weight=weight,
                original=read_rows(weight, part.site, part.neurons),
                vectors=self._leaves[part.group],
                loadings=loadings,
                columns=(part.neurons + part.site.offset).to(weight.device),
                clusters=part.clusters.to(weight.device),
            )
        assert first == self.packed.numel()  # the views are an exact partition of the buffer

    def _view(self, first: int, shape: tuple[int, ...]) -> nn.Parameter:
        """A leaf that shares its memory, and its gradient's, with the packed buffers."""
        assert self.packed.grad is not None
        last = first + torch.Size(shape).numel()
        leaf = nn.Parameter(self.packed.data[first:last].view(shape))
        leaf.grad = self.packed.grad[first:last].view(shape)
        return leaf

    def row_scale(self) -> float:
        """Root mean square of the selected rows as they were before the update."""
        squares = sum(float(site.original.float().square().sum()) for site in self.sites)
        return math.sqrt(squares / sum(site.original.numel() for site in self.sites))

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer gets: the packed parameter alone."""
        return [self.packed]

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Clear the gradient in place; the views stay views."""
        assert self.packed.grad is not None
        self.packed.grad.zero_()

    def gradients(self) -> dict[str, Float[Tensor, "K D"]]:
        """Gradient of the vectors by group (which is the site's name unless clusters span a layer)."""
        return {
            group: leaf.grad.clone()
            for group, leaf in self._leaves.items()
            if leaf.grad is not None
        }

    @torch.no_grad()
    def write(self) -> None:
        """Put cast(W0 + s U[c]) into the model's rows."""
        for site in self.sites:
            device = site.weight.device
            loadings = None if site.loadings is None else site.loadings.to(device)
            rows = updated_rows(site.original, site.vectors.to(device), site.clusters, loadings)
            write_rows(site.weight, site.part.site, site.part.neurons, rows)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original rows back, bit for bit."""
        for site in self.sites:
            write_rows(site.weight, site.part.site, site.part.neurons, site.original)

    @contextmanager
    def removed(self) -> Iterator[None]:
        """The base model for the time of the block."""
        try:
            self.restore()
            yield
        finally:
            self.write()

    def snapshot(self) -> list[Tensor]:
        """A copy of all vectors and loadings."""
        return [self.packed.detach().clone()]

    @torch.no_grad()
    def load_snapshot(self, values: Sequence[Tensor]) -> None:
        """Set all vectors and loadings, and the rows with them."""
        (packed,) = values
        self.packed.copy_(packed)
        self.write()

    def patch(self, provenance: Mapping[str, Any] | None = None) -> NeuronPatch:
        """The update as it stands, frozen; the model is not changed by this."""
        vectors = {group: leaf.detach().cpu().clone() for group, leaf in self._leaves.items()}
        loadings = None
        if self.form == "loaded":
            loadings = {
                site.part.site.name: site.loadings.detach().cpu().clone()
                for site in self.sites
                if site.loadings is not None
            }
        with self.removed():
            return NeuronPatch.create(
                self.model,
                self.selection,
                vectors=vectors,
                loadings=loadings,
                provenance=dict(provenance or {}),
            )


class _ThroughRows(torch.autograd.Function):
    """Identity on a projection's output that sends the update its gradients.

    The output already carries the update, because the weight's rows do; the frozen projection's own
    backward gives the input's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        vectors: Tensor,
        loadings: Tensor | None,
        columns: Tensor,
        clusters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(inputs, vectors, loadings, columns, clusters)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inputs, vectors, loadings, columns, clusters = ctx.saved_tensors
        home = vectors.device
        grad_vectors, grad_loadings = cluster_gradients(
            rearrange(grad, "... f -> (...) f"),
            rearrange(inputs.detach(), "... d -> (...) d"),
            vectors.to(grad.device),
            columns,
            clusters,
            None if loadings is None else loadings.to(grad.device),
        )
        if grad_loadings is not None:
            grad_loadings = grad_loadings.to(home)
        return grad, None, grad_vectors.to(home), grad_loadings, None, None


@contextmanager
def trainable(
    model: nn.Module,
    selection: NeuronSelection,
    *,
    update: UpdateForm = "loaded",
    seed: int = 0,
) -> Iterator[ClusterUpdate]:
    """Make a selection's cluster update trainable in any loop for the time of the block.

    Every parameter of the model is frozen; the forward pass runs the model's own modules on rows that
    carry the update, and backward leaves the update's gradient in `update.packed.grad`. After the
    block the model is bit for bit as it was; take `update.patch()` before it ends.

    Args:
        model: Any module; its selected rows change while the block lasts.
        selection: Of this very model.
        update: `shared` (the paper's form) or `loaded` (a learned scalar a neuron).
        seed: Of the loadings' start.

    Raises:
        SelectionError: the selection belongs to another model, or rows are on the meta device.
        InputError: the model carries a trainable update already, or an unknown form.
    """
    if update not in ("shared", "loaded"):
        raise InputError(f"update is {update!r}; choose shared or loaded")
    if hasattr(model, _MARK):
        raise InputError("this model has a trainable update already; leave that block first")
    _check_same_model(model, selection)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles: list[torch.utils.hooks.RemovableHandle] = []
    live = ClusterUpdate(model, selection, update, seed)
    try:
        setattr(model, _MARK, True)
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for site in live.sites:
            module = site_module(model, site.part.site)
            handles.append(module.register_forward_hook(_hook(site)))
        yield live
    finally:
        for handle in handles:
            handle.remove()
        live.restore()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if hasattr(model, _MARK):
            delattr(model, _MARK)


def _hook(site: SiteUpdate) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    def attach(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        attached: Tensor = _ThroughRows.apply(
            output, inputs[0], site.vectors, site.loadings, site.columns, site.clusters
        )
        return attached

    return attach


def _check_same_model(model: nn.Module, selection: NeuronSelection) -> None:
    for part in selection.sites:
        weight = site_weight(model, part.site)
        if weight.device.type == "meta":
            raise SelectionError(
                f"{part.site.parameter} has no values (it is on the meta device); load the model with "
                "its weights in memory"
            )
    found = fingerprint(model, [part.site for part in selection.sites])
    if found != selection.base:
        raise SelectionError(
            "the selection was made on another model, or on this one before its weights changed; run "
            "`nest select` on this model"
        )
