"""Which rows of a model's weights an update writes, and where their vectors and loadings stand."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SiteRows:
    """The selected rows of one weight.

    Attributes:
        weight: The model's own memory as (F, D), one neuron a row; any strides, so that transposed
            weights, slices of fused ones and one expert of a three-dimensional one are views, too.
        neurons: Which rows, int64 (N,), on the weight's device.
        originals: Those rows before any update, contiguous, in the weight's dtype.
        clusters: Cluster of each, int64 (N,), in [0, K), on the packed parameters' device.
        n_clusters: K.
        first_vector: Where the vectors U (K, D) begin in the packed parameters. Sites that share
            their vectors have the same.
        first_loading: Where the loadings s (N,) begin; None where the form has none.
    """

    weight: Float[Tensor, "F D"]
    neurons: Int[Tensor, " N"]
    originals: Float[Tensor, "N D"]
    clusters: Int[Tensor, " N"]
    n_clusters: int
    first_vector: int
    first_loading: int | None

    def vectors(self, packed: Float[Tensor, " P"]) -> Float[Tensor, "K D"]:
        """The site's vectors, a view."""
        width = self.originals.shape[1]
        size = self.n_clusters * width
        return packed[self.first_vector : self.first_vector + size].view(self.n_clusters, width)

    def loadings(self, packed: Float[Tensor, " P"]) -> Float[Tensor, " N"] | None:
        """The site's loadings, a view; None where the form has none."""
        if self.first_loading is None:
            return None
        return packed[self.first_loading : self.first_loading + self.neurons.numel()]
