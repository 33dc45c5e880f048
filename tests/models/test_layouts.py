"""Sites are found from the modules; everything else is refused with a layout that works."""

from __future__ import annotations

import re

import pytest
import torch
from families import GATED, LAYERS, PLAIN, D, F, build
from torch import nn

from nest.errors import LayoutError
from nest.models.binding import bind
from nest.models.layouts import find_sites
from nest.models.sites import NeuronSite, read_rows, write_rows


@pytest.mark.parametrize("family", GATED)
def test_gated_mlps_give_gate_and_up_of_every_block(family: str) -> None:
    sites = find_sites(build(family))
    assert [(s.layer, s.projection) for s in sites] == [
        (layer, name) for layer in range(LAYERS) for name in ("gate_proj", "up_proj")
    ]
    assert {s.length for s in sites} == {F}


@pytest.mark.parametrize("family", PLAIN)
def test_plain_mlps_give_their_first_projection(family: str) -> None:
    sites = find_sites(build(family))
    assert [s.layer for s in sites] == list(range(LAYERS))
    assert {s.length for s in sites} == {F}
    assert len({s.projection for s in sites}) == 1


@pytest.mark.parametrize("family", [*GATED, *PLAIN])
def test_a_sites_module_puts_out_its_neurons(family: str) -> None:
    model = build(family)
    for site in find_sites(model):
        outputs: list[torch.Tensor] = []
        hook = bind(model, site).module.register_forward_hook(
            lambda _m, _i, output, outputs=outputs: outputs.append(output)
        )
        model(torch.tensor([[1, 5, 6]]))
        hook.remove()
        assert outputs[0].shape[-1] == site.length
        assert bind(model, site).weight.shape == (F, D)


@pytest.mark.parametrize(
    ("family", "said"),
    [("gpt2", "Conv1D"), ("phi3", "gate and up"), ("mixtral", "expert"), ("qwen3_moe", "expert")],
)
def test_what_is_unknown_is_refused_with_a_layout_that_works(family: str, said: str) -> None:
    model = build(family)
    with pytest.raises(LayoutError, match=said) as raised:
        find_sites(model)
    shown = re.findall(r"nest\.(NeuronSite\(.*?\))", str(raised.value))
    assert shown
    layout = [eval(text, {"NeuronSite": NeuronSite}) for text in shown]
    assert find_sites(model, layout) == tuple(layout)


def test_rows_of_every_kind_of_site_round_trip() -> None:
    fused = build("phi3").model.layers[0].mlp.gate_up_proj
    conv = build("gpt2").transformer.h[0].mlp.c_fc
    for module, site in (
        (fused, NeuronSite(0, "up_proj", "", F, offset=F)),
        (conv, NeuronSite(0, "c_fc", "", F, axis=1)),
    ):
        before = module.weight.detach().clone()
        ids = torch.tensor([0, 3, F - 1])
        rows = read_rows(module.weight, site, ids)
        assert rows.shape == (3, D)
        write_rows(module.weight, site, ids, rows + 1)
        assert int((module.weight != before).sum()) == 3 * D
        assert torch.equal(read_rows(module.weight, site, ids), rows + 1)
        write_rows(module.weight, site, ids, rows)
        assert torch.equal(module.weight, before)


class _Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_plain_block() for _ in range(2))


def _plain_block(dtype: torch.dtype = torch.float32) -> nn.Module:
    block = nn.Module()
    block.fc1 = nn.Linear(4, 8, dtype=dtype)
    block.fc2 = nn.Linear(8, 4, dtype=dtype)
    return block


def test_two_towers_are_refused_naming_them() -> None:
    model = nn.ModuleDict({"vision": _Tower(), "text": _Tower()})
    with pytest.raises(LayoutError, match=r"text\.layers, vision\.layers"):
        find_sites(model)


def test_lists_of_experts_are_refused() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([_Tower()])})
    with pytest.raises(LayoutError, match="experts"):
        find_sites(model)


def test_a_model_without_mlps_says_what_is_known() -> None:
    with pytest.raises(LayoutError, match=r"no MLP was found in Linear.*gate_proj"):
        find_sites(nn.Linear(2, 2))


def test_offloaded_quantised_and_computed_weights_are_refused() -> None:
    site = NeuronSite(0, "fc1", "fc1", 8)
    meta = _plain_block().to("meta")
    with pytest.raises(LayoutError, match="meta device"):
        find_sites(meta, [site])
    quantised = _plain_block()
    quantised.fc1.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LayoutError, match=r"int8.*unquantised"):
        find_sites(quantised, [site])
    computed = _plain_block()
    torch.nn.utils.parametrizations.weight_norm(computed.fc1)
    with pytest.raises(LayoutError, match="no parameter"):
        find_sites(computed, [site])


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ([], "empty"),
        ([NeuronSite(0, "a", "nowhere", 8)], "no module"),
        ([NeuronSite(0, "a", "fc1", 9)], "8 neurons"),
        ([NeuronSite(0, "a", "fc1", 8, tensor="w")], "no tensor"),
        ([NeuronSite(0, "a", "fc1", 8, axis=2)], "axis 2"),
        ([NeuronSite(0, "a", "fc1", 8)] * 2, "twice"),
        ([NeuronSite(0, "a", "fc1", 5), NeuronSite(0, "b", "fc1", 4, offset=4)], "share rows"),
        (
            [NeuronSite(0, "a", "fc1", 8), NeuronSite(0, "b", "fc1", 3, axis=1, offset=1)],
            "counted by axis 0",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: list[NeuronSite], said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        find_sites(_plain_block(), layout)


def test_tied_weights_can_be_listed_once_only() -> None:
    model = _Tower()
    model.layers[1].fc1.weight = model.layers[0].fc1.weight
    with pytest.raises(LayoutError, match="tied"):
        find_sites(model)


def test_values_of_a_wrong_type_are_refused() -> None:
    # TypeError, which LayoutError is: jaxtyping's hook, where it is on, sees these first.
    with pytest.raises(TypeError, match="length"):
        NeuronSite(0, "a", "fc1", "8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="NeuronSite"):
        find_sites(_plain_block(), ["fc1"])  # type: ignore[list-item]
