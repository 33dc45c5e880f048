"""Which sites a model has, found from its modules and never from its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from nest.errors import LayoutError
from nest.models.binding import FLOATS, bind_all
from nest.models.blocks import enclosing_blocks
from nest.models.sites import NeuronSite
from nest.models.wrappers import named_modules, named_parameters

GATED_MLP = ("gate_proj", "up_proj", "down_proj")
"""Children of an MLP whose first two projections hold neurons, row i of both being neuron i."""

PLAIN_MLPS = (
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
)
"""Children of an MLP without a gate; the first one holds the neurons."""

FUSED_NAMES = ("gate_up_proj", "gate_and_up_proj", "w1_w3", "w12")
"""Names that fused gate and up projections go by, for a better message only."""


def find_sites(
    model: nn.Module, layout: Sequence[NeuronSite] | None = None
) -> tuple[NeuronSite, ...]:
    """The sites of a model, in the order of its blocks.

    A gated MLP gives two sites a block (`gate_proj`, `up_proj`), a plain one gives one (its first
    projection). With `layout` nothing is searched: the sites given are checked against the model.

    Args:
        model: Any module; its weights are not read.
        layout: The sites, for models whose neurons cannot be found from their modules.

    Returns:
        At least one site; all names differ and no two sites share a weight's row.

    Raises:
        LayoutError: no MLP is known, it is fused, transposed, a mixture of experts, quantised or on
            the meta device, the model has several towers, or the layout does not fit the model.
    """
    sites = _check_layout_argument(layout) if layout is not None else _search(model)
    _check_weights(model, sites)
    return sites


def _check_layout_argument(layout: Sequence[NeuronSite]) -> tuple[NeuronSite, ...]:
    if isinstance(layout, NeuronSite) or not isinstance(layout, Sequence):
        raise LayoutError(f"layout must be a list of nest.NeuronSite, not {type(layout).__name__}")
    for site in layout:
        if not isinstance(site, NeuronSite):
            raise LayoutError(
                f"layout holds a {type(site).__name__}; every entry must be a nest.NeuronSite"
            )
    if not layout:
        raise LayoutError("layout is empty; list at least one nest.NeuronSite(...)")
    return tuple(layout)


def _search(model: nn.Module) -> tuple[NeuronSite, ...]:
    sites: list[NeuronSite] = []
    stacks: dict[str, str] = {}
    for path, module in named_modules(model):
        projections = _neuron_projections(path, module)
        if not projections:
            continue
        stack, layer = _block_of(model, path)
        if layer is None:
            continue
        stacks.setdefault(stack, path)
        for name, linear in projections:
            module_path = f"{path}.{name}" if path else name
            sites.append(NeuronSite(layer, name, module_path, linear.out_features))
    _refuse_experts(model)
    if not sites:
        raise LayoutError(_nothing_found(model))
    if len(stacks) > 1:
        example = ", ".join(
            f"nest.{next(site for site in sites if site.module.startswith(path))!r}"
            for path in stacks.values()
        )
        raise LayoutError(
            f"the model has MLPs in {len(stacks)} stacks of blocks ({', '.join(sorted(stacks))}), "
            "as "
            "models with an encoder or a vision tower have; list the sites of the one to use with "
            f"layout=[...]. Their first sites are {example}"
        )
    return tuple(sites)


def _neuron_projections(path: str, module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Projections that hold an MLP's neurons, by name; empty for other modules."""
    children = dict(module.named_children())
    if all(name in children for name in GATED_MLP):
        gate, up, down = (_linear(path, name, children[name]) for name in GATED_MLP)
        if gate is None or up is None or down is None:
            return []
        if gate.weight.shape != up.weight.shape or down.in_features != gate.out_features:
            raise LayoutError(
                f"{path} has gate_proj {tuple(gate.weight.shape)}, up_proj "
                f"{tuple(up.weight.shape)} and "
                f"down_proj {tuple(down.weight.shape)}, which do not form a gated MLP; describe "
                "its projections with layout=[nest.NeuronSite(...), ...]"
            )
        return [("gate_proj", gate), ("up_proj", up)]
    for first_name, second_name in PLAIN_MLPS:
        if first_name not in children or second_name not in children:
            continue
        first = _linear(path, first_name, children[first_name])
        second = _linear(path, second_name, children[second_name])
        if first is None or second is None:
            continue
        if first.out_features == second.in_features:
            return [(first_name, first)]
    return []


def _linear(path: str, name: str, module: nn.Module) -> nn.Linear | None:
    """The module where it is a plain linear layer; None where it is another kind of layer.

    Raises:
        LayoutError: a linear layer wrapped by an adapter library.
    """
    if isinstance(module, nn.Linear):
        return module
    if isinstance(getattr(module, "base_layer", None), nn.Linear):
        raise LayoutError(
            f"{path}.{name} is wrapped by an adapter ({type(module).__name__}); merge it first, "
            "for example with model.merge_and_unload()"
        )
    return None


def _block_of(model: nn.Module, path: str) -> tuple[str, int | None]:
    """The list of blocks an MLP is in, and the block's index; None outside of any list."""
    found = enclosing_blocks(model, path)
    if len(found) > 1:
        raise LayoutError(
            f"{path} is one of several MLPs inside a block (a list inside a list, as mixtures of "
            f"experts have); {_way_out(model)}"
        )
    return found[0] if found else ("", None)


def _refuse_experts(model: nn.Module) -> None:
    for name, parameter in named_parameters(model):
        if parameter.ndim == 3 and "expert" in name:
            raise LayoutError(
                f"{name} has shape {tuple(parameter.shape)}: a mixture of experts, whose neurons "
                f"are in three-dimensional tensors that are not supported yet; {_way_out(model)}"
            )


def _way_out(model: nn.Module) -> str:
    """An example of a layout for a two-dimensional weight that this very model has."""
    for path, module in named_modules(model):
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in path.split(".")):
            site = NeuronSite(0, path.rpartition(".")[2], path, module.out_features)
            return f"two-dimensional weights can be used by hand: layout=[nest.{site!r}, ...]"
    return "two-dimensional weights can be used by hand with layout=[nest.NeuronSite(...), ...]"


def _nothing_found(model: nn.Module) -> str:
    """What the model has in place of a known MLP, and the layout that describes it."""
    for path, module in named_modules(model):
        name, weight = path.rpartition(".")[2], getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or ".0." not in f".{path}.":
            continue
        if isinstance(module, nn.Linear) and name in FUSED_NAMES:
            length = module.out_features // 2
            halves = (
                NeuronSite(0, "gate_proj", path, length),
                NeuronSite(0, "up_proj", path, length, offset=length),
            )
            return (
                f"{path} holds gate and up projection in one weight {tuple(weight.shape)}; "
                "describe its "
                "halves, for every block: "
                f"layout=[{', '.join(f'nest.{half!r}' for half in halves)}, ...]"
            )
        if type(module).__name__ == "Conv1D" and name in {first for first, _ in PLAIN_MLPS}:
            site = NeuronSite(0, name, path, weight.shape[1], axis=1)
            return (
                f"{path} is a Conv1D, whose weight {tuple(weight.shape)} is transposed; describe "
                f"it, for every block: layout=[nest.{site!r}, ...]"
            )
    known = ", ".join("/".join(names) for names in (GATED_MLP, *PLAIN_MLPS))
    return (
        f"no MLP was found in {type(model).__name__}; known are blocks in a ModuleList with linear "
        f"layers named {known}. {_way_out(model)[0].upper()}{_way_out(model)[1:]}"
    )


def _check_weights(model: nn.Module, sites: Sequence[NeuronSite]) -> None:
    """Each site's weight is there, dense, floating and nobody else's.

    Raises:
        LayoutError: otherwise.
    """
    twice = [name for name, n in Counter(site.name for site in sites).items() if n > 1]
    if twice:
        raise LayoutError(
            f"the site {twice[0]} is listed twice in the layout; list every site once"
        )
    parameters = dict(named_parameters(model, remove_duplicate=False))
    taken: dict[int, list[NeuronSite]] = {}
    for bound in bind_all(model, sites):
        site, module, weight = bound.site, bound.module, bound.weight
        if weight.device.type == "meta":
            raise LayoutError(
                f"{site.parameter} is on the meta device (offloaded); load the model with a device "
                "or device_map that holds all of it"
            )
        if weight.dtype not in FLOATS:
            raise LayoutError(
                f"{site.parameter} is {weight.dtype}; its rows cannot take an update. Load the "
                "model unquantised, with dtype bfloat16, float16 or float32"
            )
        transposed = type(module).__name__ == "Conv1D"
        if site.axis != int(transposed) and (transposed or isinstance(module, nn.Linear)):
            raise LayoutError(
                f"{site.module} is a {type(module).__name__}, whose outputs are counted by axis "
                f"{int(transposed)} of its weight; the site says axis {site.axis}"
            )
        if parameters.get(site.parameter) is not weight:
            raise LayoutError(
                f"{site.parameter} is computed and no parameter of the model; remove the "
                "parametrization, or name the parameter with NeuronSite(tensor=...)"
            )
        for other in taken.setdefault(id(weight), []):
            if any(True for _ in _shared(site, other)):
                raise LayoutError(
                    f"{site.name} and {other.name} share rows of one weight ({site.parameter}); "
                    "sites must not overlap, tied weights can be listed once only"
                )
        taken[id(weight)].append(site)


def _shared(site: NeuronSite, other: NeuronSite) -> Iterator[int]:
    """Indices that two sites of one weight have in common; all, where they run along two axes."""
    if site.axis != other.axis:
        yield 0
        return
    start, stop = (
        max(site.offset, other.offset),
        min(site.offset + site.length, other.offset + other.length),
    )
    yield from range(start, stop)
