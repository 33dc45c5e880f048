"""NeuronPatch: a trained update with the model it belongs to, put in and taken out exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nest.artifacts.provenance import package_versions
from nest.errors import PatchError
from nest.models.binding import bind
from nest.models.fingerprint import ModelFingerprint, config_hash, dtype_name, tensor_hash
from nest.models.sites import read_rows, write_rows
from nest.patches.archive import read_patch, write_patch
from nest.patches.live import LiveBatch, LiveRows, checksum, touched_weights
from nest.patches.rows import delta_rows, pack_revert_bits, unpack_original_rows
from nest.selection.selection import NeuronSelection, SiteSelection
from nest_kernels.neuron_adamw import updated_rows


@dataclass(frozen=True, repr=False)
class NeuronPatch:
    """A trained update: W'[i] = cast(W[i] + s_i U[c(i)]) for the selected rows i.

    Attributes:
        selection: The neurons; its profiles are not kept.
        vectors: U, fp32 (K, D), for each group of sites.
        loadings: s, fp32 (N,), for each site; None for the shared form.
        base: Fingerprint of the model without the patch, touched tensors only.
        folded: For each touched parameter the sha256 of its bytes with the patch.
        revert_bits: For each site what restores the original rows exactly (see `rows.py`).
        row_checksums: Of all selected rows without and with the patch (`LiveRows.checksum`).
        provenance: How it was made: model, config, seeds, hashes, versions, figures.
    """

    selection: NeuronSelection
    vectors: Mapping[str, Tensor]
    loadings: Mapping[str, Tensor] | None
    base: ModelFingerprint
    folded: Mapping[str, str]
    revert_bits: Mapping[str, bytes]
    row_checksums: tuple[int, int]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"NeuronPatch({self.update}, {self.n_rows} rows at {len(self.selection.sites)} sites, "
            f"{self.trainable_parameters} trained parameters)"
        )

    def __post_init__(self) -> None:
        _check_update(self.selection, self.vectors, self.loadings)
        touched = set(self.parameters)
        if set(self.base.tensors) != touched or set(self.folded) != touched:
            raise PatchError(
                f"the patch changes {sorted(touched)} but carries hashes of "
                f"{sorted(self.base.tensors)} and {sorted(self.folded)}; write it again"
            )
        if set(self.revert_bits) != {part.site.name for part in self.selection.sites}:
            raise PatchError("the patch lacks the revert bits of some of its sites; write it again")

    # --- making one -------------------------------------------------------------------------------

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
        parts = tuple(replace(part, profiles=None) for part in selection.sites)
        vectors = {name: _plain(values) for name, values in vectors.items()}
        plain = None if loadings is None else {k: _plain(v) for k, v in loadings.items()}
        _check_update(selection, vectors, plain)
        base, folded, bits = {}, {}, {}
        dtypes = set()
        places = _places(parts)
        before = after = 0
        for parameter, touched in _by_parameter(parts).items():
            weight = bind(model, touched[0].site).weight.detach().cpu().clone()
            dtypes.add(dtype_name(weight.dtype))
            for part in touched if originals is not None else ():
                assert originals is not None
                write_rows(weight, part.site, part.neurons, originals[part.site.name].cpu())
            base[parameter] = tensor_hash(weight)
            if base[parameter] != selection.base.tensors.get(parameter):
                raise PatchError(
                    f"{parameter} is not the weight that the selection was made on; select the "
                    "neurons anew in this model"
                )
            for part in touched:
                name = part.site.name
                delta = _delta(part, vectors, plain)
                rows = read_rows(weight, part.site, part.neurons)
                new = _updated(part, rows, vectors, plain)
                bits[name] = pack_revert_bits(rows, new, delta)
                before += checksum(rows, places[name])
                after += checksum(new, places[name])
                write_rows(weight, part.site, part.neurons, new)
            folded[parameter] = tensor_hash(weight)
        return NeuronPatch(
            selection=NeuronSelection(parts, selection.base, selection.provenance),
            vectors=vectors,
            loadings=plain,
            base=ModelFingerprint(selection.base.config_hash, base, ",".join(sorted(dtypes))),
            folded=folded,
            revert_bits=bits,
            row_checksums=(before % 2**64, after % 2**64),
            provenance={"versions": package_versions(), **(provenance or {})},
        )

    # --- what it is -------------------------------------------------------------------------------

    @property
    def update(self) -> str:
        """`shared` (the paper's form) or `loaded`."""
        return "shared" if self.loadings is None else "loaded"

    @property
    def parameters(self) -> dict[str, tuple[SiteSelection, ...]]:
        """The touched parameters, each with its sites."""
        return _by_parameter(self.selection.sites)

    @property
    def has_effect(self) -> bool:
        """Whether any bit of any row changes."""
        return self.row_checksums[0] != self.row_checksums[1]

    @property
    def n_rows(self) -> int:
        """How many rows (neurons) the patch changes."""
        return self.selection.n_neurons

    @property
    def trainable_parameters(self) -> int:
        """How many numbers were trained."""
        return self.selection.trainable_parameters("shared" if self.loadings is None else "loaded")

    def delta(self, site: str) -> Float[Tensor, "N D"]:
        """What is added to each selected row of a site, fp32, by site name.

        Raises:
            PatchError: the patch has no such site.
        """
        for part in self.selection.sites:
            if part.site.name == site:
                return _delta(part, self.vectors, self.loadings)
        names = ", ".join(part.site.name for part in self.selection.sites)
        raise PatchError(f"the patch has no site {site!r}; it has {names}")

    # --- in a model -------------------------------------------------------------------------------

    def fold_into(self, model: nn.Module) -> None:
        """Add the update to the model's rows, in place.

        What is checked is the rows that change, before and after, and the model's architecture;
        `nest verify` compares everything.

        Raises:
            PatchError: the model carries the patch already, or is another one, or the patch is
                damaged; the model is then left as it was.
        """
        with self._changed_rows(model, fold=True, back=False):
            pass

    def revert(self, model: nn.Module) -> None:
        """Take the update out of the model's rows, in place and bit by bit.

        Raises:
            PatchError: the model does not carry the patch, or the patch is damaged; the model is
                then left as it was.
        """
        with self._changed_rows(model, fold=False, back=False):
            pass

    def require_in(self, model: nn.Module) -> None:
        """Refuse a model that does not carry the patch in its rows.

        Raises:
            PatchError: it does not.
        """
        live = LiveRows(model, self.selection)
        if live.checksum(live.read()) != self.row_checksums[1]:
            self._explain(model, self.folded)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model carries the patch inside the block, and is bit-identical after it."""
        with self._changed_rows(model, fold=True, back=True):
            yield model

    @contextmanager
    def removed(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model is without the patch inside the block, and carries it again after it."""
        with self._changed_rows(model, fold=False, back=True):
            yield model

    @contextmanager
    def _changed_rows(self, model: nn.Module, *, fold: bool, back: bool) -> Iterator[None]:
        live = LiveRows(model, self.selection)
        current = live.read()
        checksums = self.row_checksums if fold else self.row_checksums[::-1]
        if live.checksum(current) != checksums[0] or config_hash(model) != self.base.config_hash:
            self._explain(model, self.base.tensors if fold else self.folded)
        change = self._folded_batch if fold else self._original_batch
        with live.restored(current, always=back):
            new = [change(batch, rows) for batch, rows in zip(live.batches, current, strict=True)]
            if live.checksum(new) != checksums[1]:
                raise PatchError(
                    "the rows did not come out as the patch recorded them; the patch is damaged, "
                    "fetch it again. The model is as it was before"
                )
            live.write(new)
            yield

    def _folded_batch(self, batch: LiveBatch, rows: Tensor) -> Tensor:
        parts = [self.selection.sites[i] for i in batch.indices]
        starts, groups = 0, {}
        for part in parts:
            if part.group not in groups:
                groups[part.group] = starts
                starts += part.n_clusters
        vectors = torch.cat([self.vectors[group] for group in groups]).to(rows.device)
        clusters = torch.cat([part.clusters + groups[part.group] for part in parts])
        loadings = None
        if self.loadings is not None:
            loadings = torch.cat([self.loadings[part.site.name] for part in parts])
            loadings = loadings.to(rows.device)
        # Finite, since `create` refuses others, and the checksum knows these.
        return updated_rows(rows, vectors, clusters.to(rows.device), loadings)

    def _original_batch(self, batch: LiveBatch, rows: Tensor) -> Tensor:
        originals = [
            self._original_rows(self.selection.sites[i], own.cpu())
            for i, own in zip(batch.indices, batch.split(rows), strict=True)
        ]
        return torch.cat(originals).to(rows.device)

    def fold_tensor(self, parameter: str, weight: Tensor) -> Tensor:
        """A copy of one touched weight with the patch in it, on the CPU.

        Raises:
            PatchError: it is not the weight without the patch.
        """
        return self._changed(parameter, weight, fold=True)

    def revert_tensor(self, parameter: str, weight: Tensor) -> Tensor:
        """A copy of one touched weight with the patch taken out, on the CPU.

        Raises:
            PatchError: it is not the weight with the patch, or the patch is damaged.
        """
        return self._changed(parameter, weight, fold=False)

    def _changed(self, parameter: str, weight: Tensor, *, fold: bool) -> Tensor:
        before, after = (
            (self.base.tensors, self.folded) if fold else (self.folded, self.base.tensors)
        )
        parts = self.parameters[parameter]
        changed = weight.detach().cpu().clone()
        self._check_state({parameter: tensor_hash(changed)}, before, dtype_name(weight.dtype))
        for part in parts:
            rows = read_rows(changed, part.site, part.neurons)
            new = (
                _updated(part, rows, self.vectors, self.loadings)
                if fold
                else self._original_rows(part, rows)
            )
            write_rows(changed, part.site, part.neurons, new)
        if tensor_hash(changed) != after[parameter]:
            raise PatchError(
                f"{parameter} did not come out as the patch recorded it; the patch is damaged, "
                "fetch it again"
            )
        return changed

    def _original_rows(self, part: SiteSelection, rows: Tensor) -> Tensor:
        delta = _delta(part, self.vectors, self.loadings)
        return unpack_original_rows(rows, delta, self.revert_bits[part.site.name])

    def _explain(self, model: nn.Module, state: Mapping[str, str]) -> NoReturn:
        """Say why a model's rows are not those that the patch expects.

        Raises:
            PatchError: always.
        """
        weights = touched_weights(model, self.selection)
        dtypes = ",".join(sorted({dtype_name(weight.dtype) for weight in weights.values()}))
        found = {name: tensor_hash(weight) for name, weight in weights.items()}
        self._check_state(found, state, dtypes)
        if config_hash(model) != self.base.config_hash:
            raise PatchError(
                "the touched weights are the patch's, but the rest of the model has another shape "
                "(its config differs); use the model the patch was made for"
            )
        raise PatchError(
            "the touched weights are the patch's, but its checksums of their rows are not; the patch is "
            "damaged, fetch it again"
        )

    def _check_state(self, found: Mapping[str, str], state: Mapping[str, str], dtypes: str) -> None:
        wrong = [name for name, value in found.items() if value != state[name]]
        if not wrong:
            return
        if dtypes not in (self.base.dtype, *self.base.dtype.split(",")):
            raise PatchError(
                f"the model's weights are {dtypes}, but the patch was made for {self.base.dtype} "
                f"and is exact only there; load the model with dtype {self.base.dtype}"
            )
        other = self.folded if state is self.base.tensors else self.base.tensors
        if all(value == other[name] for name, value in found.items()):
            carries = state is self.base.tensors
            raise PatchError(
                "the model carries this patch already; revert it first, or go on without it"
                if carries
                else "the model does not carry this patch: its weights are those from before it"
            )
        raise PatchError(
            f"the patch is of another model: {len(wrong)} of {len(found)} weights it changes "
            f"differ, the first being {wrong[0]}; use the very checkpoint it was made for"
        )

    # --- as a folder ------------------------------------------------------------------------------

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


def _by_parameter(parts: Sequence[SiteSelection]) -> dict[str, tuple[SiteSelection, ...]]:
    touched: dict[str, tuple[SiteSelection, ...]] = {}
    for part in parts:
        touched[part.site.parameter] = (*touched.get(part.site.parameter, ()), part)
    return touched


def _places(parts: Sequence[SiteSelection]) -> dict[str, Tensor]:
    """For each site where its rows stand among all rows of the selection."""
    ends = list(itertools.accumulate(len(part.neurons) for part in parts))
    return {
        part.site.name: torch.arange(end - len(part.neurons), end)
        for part, end in zip(parts, ends, strict=True)
    }


def _plain(values: Tensor) -> Tensor:
    return values.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()


def _delta(
    part: SiteSelection, vectors: Mapping[str, Tensor], loadings: Mapping[str, Tensor] | None
) -> Tensor:
    own = None if loadings is None else loadings[part.site.name]
    return delta_rows(vectors[part.group], part.clusters, own)


def _updated(
    part: SiteSelection,
    rows: Tensor,
    vectors: Mapping[str, Tensor],
    loadings: Mapping[str, Tensor] | None,
) -> Tensor:
    own = None if loadings is None else loadings[part.site.name]
    new = updated_rows(rows, vectors[part.group], part.clusters, own)
    if not bool(torch.isfinite(new).all()):
        raise PatchError(
            f"the update at {part.site.name} gives rows that are not finite in {rows.dtype}; train "
            "it with a smaller learning rate, or in bfloat16 or float32"
        )
    return new


def _check_update(
    selection: NeuronSelection,
    vectors: Mapping[str, Tensor],
    loadings: Mapping[str, Tensor] | None,
) -> None:
    """Vectors and loadings are those of the selection: names, shapes, finite numbers.

    Raises:
        PatchError: otherwise.
    """
    wanted: dict[str, tuple[int, ...]] = {f"vectors of {g}": k for g, k in selection.groups.items()}
    given = {f"vectors of {name}": values for name, values in vectors.items()}
    if loadings is not None:
        wanted |= {f"loadings of {p.site.name}": (p.neurons.numel(),) for p in selection.sites}
        given |= {f"loadings of {name}": values for name, values in loadings.items()}
    for name in sorted(set(wanted) ^ set(given)):
        problem = "lacks the" if name in wanted else "has, beside its selection,"
        raise PatchError(f"the update {problem} {name}; make both from one selection")
    for name, values in given.items():
        if tuple(values.shape) != wanted[name]:
            raise PatchError(
                f"the {name} have shape {tuple(values.shape)}; the selection asks for "
                f"{wanted[name]}"
            )
        if not bool(torch.isfinite(values).all()):
            raise PatchError(f"the {name} hold NaN or infinity; train the update again")
