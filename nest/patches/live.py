"""The selected rows of a model in memory: read, written, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from nest.errors import LayoutError, PatchError
from nest.models.sites import read_rows, site_weight, write_rows
from nest.selection.selection import NeuronSelection

Rows = dict[str, Tensor]
"""Rows (N, D) of the selected neurons by site name, on the CPU."""


def touched_weights(model: nn.Module, selection: NeuronSelection) -> dict[str, Tensor]:
    """The touched weights of a model, by parameter.

    Raises:
        PatchError: the model has no such weight, or one of another shape.
    """
    weights: dict[str, Tensor] = {}
    for part in selection.sites:
        try:
            weight = site_weight(model, part.site)
        except LayoutError as fault:
            raise PatchError(f"the patch is of another model: {fault}") from None
        if weight.shape[1 - part.site.axis] != part.width:
            raise PatchError(
                f"the patch is of another model: the rows of {part.site.parameter} have "
                f"{weight.shape[1 - part.site.axis]} entries, those of the patch {part.width}"
            )
        weights[part.site.parameter] = weight
    return weights


def read_selected(model: nn.Module, selection: NeuronSelection) -> Rows:
    """A copy of the selected rows as they are now.

    Raises:
        PatchError: the model has no such rows.
    """
    weights = touched_weights(model, selection)
    return {
        part.site.name: read_rows(weights[part.site.parameter], part.site, part.neurons).cpu()
        for part in selection.sites
    }


def write_selected(model: nn.Module, selection: NeuronSelection, rows: Rows) -> None:
    """Replace the selected rows in place."""
    for part in selection.sites:
        write_rows(site_weight(model, part.site), part.site, part.neurons, rows[part.site.name])


@contextmanager
def restored(model: nn.Module, selection: NeuronSelection) -> Iterator[Rows]:
    """Whatever the block writes into the selected rows is undone after it; gives the rows."""
    current = read_selected(model, selection)
    try:
        yield current
    finally:
        write_selected(model, selection, current)


@contextmanager
def restored_on_failure(model: nn.Module, selection: NeuronSelection) -> Iterator[Rows]:
    """As `restored`, but only if the block does not end well."""
    current = read_selected(model, selection)
    try:
        yield current
    except BaseException:
        write_selected(model, selection, current)
        raise
