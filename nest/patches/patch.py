"""NeuronPatch: what users hold. Its data with the verbs that put it in and take it out exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nest.patches.applying import changed_rows, require_in
from nest.patches.archive import read_patch, write_patch
from nest.patches.data import PatchData
from nest.patches.making import make_patch
from nest.patches.tensors import changed_tensor
from nest.selection.selection import NeuronSelection


class NeuronPatch(PatchData):
    """A trained update with the model it belongs to: `PatchData`, and what can be done with it.

    with patch.applied(model):
        ...
    patch.fold_into(model)
    patch.revert(model)
    """

    @staticmethod
    def create(
        model: nn.Module,
        selection: NeuronSelection,
        vectors: Mapping[str, Tensor],
        loadings: Mapping[str, Tensor] | None = None,
        *,
        originals: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> NeuronPatch:
        """Make a patch of a trained update; the model is only read.

        Args:
            model: The model the selection is of.
            selection: The neurons that were trained.
            vectors: U (K, D) for each group of sites.
            loadings: s (N,) for each site, or None.
            originals: For each site the rows (N, D) as they were before training. Needed where the
                model's rows carry the update already.
            provenance: Goes into the manifest and the model card.

        Raises:
            PatchError: the update does not fit the selection, holds NaN or infinity, overflows the
                weights' dtype, or the model (with `originals`) is not the selection's.
        """
        made = make_patch(
            model, selection, vectors, loadings, originals=originals, provenance=provenance
        )
        return NeuronPatch(**vars(made))

    def fold_into(self, model: nn.Module) -> None:
        """Add the update to the model's rows, in place.

        What is checked is the rows that change, before and after, and the model's architecture;
        `nest verify` compares everything.

        Raises:
            PatchError: the model carries the patch already, or is another one, or the patch is
                damaged; the model is then left as it was.
        """
        with changed_rows(self, model, fold=True, back=False):
            pass

    def revert(self, model: nn.Module) -> None:
        """Take the update out of the model's rows, in place and bit by bit.

        Raises:
            PatchError: the model does not carry the patch, or the patch is damaged; the model is
                then left as it was.
        """
        with changed_rows(self, model, fold=False, back=False):
            pass

    def require_in(self, model: nn.Module) -> None:
        """Refuse a model that does not carry the patch in its rows.

        Raises:
            PatchError: it does not.
        """
        require_in(self, model)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model carries the patch inside the block, and is bit-identical after it."""
        with changed_rows(self, model, fold=True, back=True):
            yield model

    @contextmanager
    def removed(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model is without the patch inside the block, and carries it again after it."""
        with changed_rows(self, model, fold=False, back=True):
            yield model

    def fold_tensor(self, parameter: str, weight: Tensor) -> Tensor:
        """A copy of one touched weight with the patch in it, on the CPU.

        Raises:
            PatchError: it is not the weight without the patch.
        """
        return changed_tensor(self, parameter, weight, fold=True)

    def revert_tensor(self, parameter: str, weight: Tensor) -> Tensor:
        """A copy of one touched weight with the patch taken out, on the CPU.

        Raises:
            PatchError: it is not the weight with the patch, or the patch is damaged.
        """
        return changed_tensor(self, parameter, weight, fold=False)

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        evidence: Mapping[str, str | bytes] | None = None,
    ) -> None:
        """Write `manifest.json`, `patch.safetensors`, a model card, and `evidence/` if any.

        Raises:
            OutputExistsError: the folder is there and `overwrite` was not asked for.
            NestError: the disk would not take it.
        """
        write_patch(self, folder, overwrite=overwrite, evidence=evidence or {})

    @staticmethod
    def load(folder: str | Path) -> NeuronPatch:
        """Read what `save` wrote, trusting nothing in it.

        Raises:
            MissingInputError: no such folder, or a file of it is missing.
            PatchError: damaged, cut short, of an unknown version, or inconsistent.
        """
        return NeuronPatch(**read_patch(folder))
