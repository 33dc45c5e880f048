"""How an update takes part in a forward and a backward pass: three autograd functions.

`SplitUpdate` hands each site its part of the packed parameters and gathers the parts' gradients into
one tensor. `ThroughRows` (live mode) and `AddBranch` (branch mode) stand behind a projection.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nest_kernels.cluster_grad import ClusterGradients, Members, cluster_gradients


class Part(NamedTuple):
    """A slice of the packed parameters.

    Attributes:
        first: Where it begins.
        shape: (K, D) for vectors, (N,) for loadings.
    """

    first: int
    shape: tuple[int, ...]

    def of(self, packed: Float[Tensor, " P"]) -> Tensor:
        """The slice, a view."""
        return packed[self.first : self.first + torch.Size(self.shape).numel()].view(self.shape)


class SplitUpdate(torch.autograd.Function):
    """The parts of the packed parameters as tensors that share its memory.

    Slices by autograd would give each part a gradient of the whole buffer's size. The parts serve any
    number of forward and backward passes: nothing is saved, so nothing is freed.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parts, ctx.like = parts, packed.detach()
        return tuple(part.of(packed.data) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        gathered = torch.zeros_like(ctx.like)
        for part, grad in zip(ctx.parts, grads, strict=True):
            if grad is not None:
                part.of(gathered).copy_(grad)
        return gathered, None


class ThroughRows(torch.autograd.Function):
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
        members: Members,
    ) -> Tensor:
        ctx.members = members
        ctx.save_for_backward(inputs, vectors, loadings)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inputs, vectors, loadings = ctx.saved_tensors
        found = _gradients(grad, inputs, vectors, loadings, ctx.members)
        return (grad if ctx.needs_input_grad[0] else None, None, *_like(found, vectors), None)


class AddBranch(torch.autograd.Function):
    """y[..., columns] += s (x U^T)[..., clusters], for weights that cannot be written."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        vectors: Tensor,
        loadings: Tensor | None,
        members: Members,
    ) -> Tensor:
        ctx.members = members
        ctx.save_for_backward(inputs, vectors, loadings)
        home = inputs.device
        projected = inputs @ vectors.to(home, inputs.dtype).T  # (..., K)
        added = projected.index_select(-1, members.clusters)  # (..., N)
        if loadings is not None:
            added = added * loadings.to(home, added.dtype)
        return output.index_add(-1, members.columns, added.to(output.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inputs, vectors, loadings = ctx.saved_tensors
        found = _gradients(grad, inputs, vectors, loadings, ctx.members)
        grad_inputs = None
        if ctx.needs_input_grad[1]:
            through = found.summed @ vectors.to(found.summed)
            grad_inputs = through.view(inputs.shape).to(inputs.dtype)
        return (
            grad if ctx.needs_input_grad[0] else None,
            grad_inputs,
            *_like(found, vectors),
            None,
        )


def _gradients(
    grad: Tensor, inputs: Tensor, vectors: Tensor, loadings: Tensor | None, members: Members
) -> ClusterGradients:
    return cluster_gradients(
        rearrange(grad, "... f -> (...) f"),
        rearrange(inputs.detach(), "... d -> (...) d"),
        vectors.detach().to(grad.device),
        members,
        None if loadings is None else loadings.detach().to(grad.device),
    )


def _like(found: ClusterGradients, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both gradients where the packed parameters live, and in their dtype."""
    own = None if found.loadings is None else found.loadings.to(vectors)
    return found.vectors.to(vectors), own
