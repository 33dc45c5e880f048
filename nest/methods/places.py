"""Which modules an adapter goes on, and how large it may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from nest.errors import InputError
from nest.methods.method import Subject, TrainingData
from nest.methods.neurons import found_neurons
from nest.models.blocks import blocks_of
from nest.models.wrappers import submodule
from nest.progress import ProgressCallback
from nest.selection.config import SelectionConfig
from nest.tuning.config import TuningConfig

Modules = Literal["sites", "mlp", "all"]
Budget = Annotated[int, Field(ge=1)] | Literal["neurons"] | None
"""Of trainable parameters: a number, as many as the neurons' update would have here, or None."""
Shape = tuple[int, int]

MOST = 1.1
"""A budget is exceeded by a tenth at most."""


def linear_shape(module: nn.Module) -> Shape | None:
    """Inputs and outputs of a linear layer; None where it is none."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        weight: Any = module.weight
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, a linear layer whose weight counts inputs first."""
    return type(module).__name__ == "Conv1D"


def linear_modules(subject: Subject, which: Modules, name: str) -> dict[str, Shape]:
    """Paths and shapes of the modules that an adapter goes on.

    Args:
        subject: Whose modules.
        which: `sites`: those that the sites are in; `mlp`: also those beside them that read their
            neurons; `all`: every linear layer of the blocks.
        name: Of the method, for what is said.

    Raises:
        InputError: a site's module is no linear layer.
    """
    model = subject.model
    found: dict[str, Shape] = {}
    for site in subject.sites:
        module = submodule(model, site.module)
        shape = linear_shape(module)
        if shape is None or site.tensor != "weight":
            raise InputError(
                f"the method `{name}` adapts linear layers, and {site.parameter} is of a "
                f"{type(module).__name__}; leave the method out for this model"
            )
        found[site.module] = shape
    if which == "sites":
        return found
    if which == "mlp":
        parents = {site.module.rpartition(".")[0]: site.length for site in subject.sites}
        near = {path: shape for path, shape in _linear(model) if path.rpartition(".")[0] in parents}
        read = {p: s for p, s in near.items() if s[0] == parents[p.rpartition(".")[0]]}
        return {path: shape for path, shape in near.items() if path in found or path in read}
    blocks = blocks_of(model, subject.sites)
    inside = "" if blocks is None else f"{blocks.path}."
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path: shape
        for path, shape in _linear(model)
        if path.startswith(inside) and submodule(model, path) is not head
    }


def _linear(model: nn.Module) -> list[tuple[str, Shape]]:
    shapes = ((path, linear_shape(module)) for path, module in model.named_modules())
    return [(path, shape) for path, shape in shapes if shape is not None]


def budget_of(
    parameters: Budget,
    subject: Subject,
    data: TrainingData,
    selecting: SelectionConfig,
    tuning: TuningConfig,
    name: str,
    progress: ProgressCallback | None,
) -> int | None:
    """The number of parameters that is meant; for `neurons` they are selected to be counted.

    Raises:
        InputError: there are no unsafe and safe prompts to find neurons with.
        SelectionError: no neuron passes the threshold.
    """
    if parameters != "neurons":
        return parameters
    selection = found_neurons(subject, data, selecting, name, tuning=tuning, progress=progress)
    if tuning.layers is not None:
        selection = selection.in_layers(*tuning.layers)
    return selection.trainable_parameters(tuning.update)


def ranks_within(costs: Mapping[str, int], budget: int, name: str) -> dict[str, int]:
    """Ranks that come closest to a budget without exceeding it by more than a tenth.

    All modules get the same rank; what is left gives one rank more to some of them, evenly spread.
    Those that would have none are left out.

    Args:
        costs: For each module the parameters of rank 1.
        budget: Parameters in all.
        name: Of the method, for what is said.

    Raises:
        InputError: even one module of rank 1 is more than that.
    """
    rank = budget // sum(costs.values())
    best: dict[str, int] = {}
    for count in range(len(costs) + 1):
        more = set(_spread(list(costs), count))
        ranks = {path: rank + (path in more) for path in costs}
        if _is_closer(_size(costs, ranks), _size(costs, best), budget):
            best = {path: own for path, own in ranks.items() if own > 0}
    return _not_empty(best, costs, budget, name)


def rank_within(
    costs: Mapping[str, int], budget: int, largest: int, name: str
) -> tuple[int, tuple[str, ...]]:
    """The same with one rank for all modules that have any: that rank, and the modules.

    Args:
        costs: For each module the parameters of rank 1.
        budget: Parameters in all.
        largest: Highest rank that every module can have.
        name: Of the method, for what is said.

    Raises:
        InputError: see `ranks_within`.
    """
    best: dict[str, int] = {}
    for rank in range(1, largest + 1):
        if rank * min(costs.values()) > MOST * budget:
            break
        for count in range(len(costs), 0, -1):
            ranks = dict.fromkeys(_spread(list(costs), count), rank)
            if _is_closer(_size(costs, ranks), _size(costs, best), budget):
                best = ranks
    best = _not_empty(best, costs, budget, name)
    return max(best.values()), tuple(best)


def _size(costs: Mapping[str, int], ranks: Mapping[str, int]) -> int:
    return sum(costs[path] * rank for path, rank in ranks.items())


def _is_closer(size: int, than: int, budget: int) -> bool:
    return size <= MOST * budget and abs(size - budget) < abs(than - budget)


def _spread(paths: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly spread over each kind of projection, in the model's order."""
    by_kind = sorted(range(len(paths)), key=lambda i: (paths[i].rpartition(".")[2], i))
    chosen = {by_kind[i * len(paths) // count] for i in range(count)}
    return [path for i, path in enumerate(paths) if i in chosen]


def _not_empty(
    ranks: dict[str, int], costs: Mapping[str, int], budget: int, name: str
) -> dict[str, int]:
    if not ranks:
        raise InputError(
            f"the method `{name}` cannot be as small as {budget} parameters: on one module it has "
            f"{min(costs.values())}; give it more, or leave it out"
        )
    return ranks
