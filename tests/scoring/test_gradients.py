"""What is gathered at the sites are the weights' own gradients, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, layout_of, loss_of, same_bits, state_of, tokens
from torch import Tensor, nn

from nest.errors import ActivationError, LayoutError
from nest.models.binding import bind
from nest.models.layouts import find_sites
from nest.models.sites import NeuronSite
from nest.scoring import gradients
from nest.scoring.gradients import gathered


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi3", "gpt2"])
def test_rows_are_the_gradient_of_the_weights(family: str) -> None:
    model = build(family)
    sites = find_sites(model, layout_of(family))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batches = [tokens(seed=0), tokens(n_rows=2, length=5, seed=1)]
    before = state_of(model)
    found = gathered(model, sites, (loss_of(model, batch) for batch in batches))
    assert same_bits(before, state_of(model))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())

    weights = {site.name: bind(model, site).weight for site in sites}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        loss_of(model, batch).backward()
    for site in sites:
        whole = weights[site.name].grad
        assert whole is not None
        if site.axis == 1:
            whole = whole.T
        own = whole[site.offset : site.offset + site.length]
        # the same sums over tokens, batch by batch, in fp32
        torch.testing.assert_close(found[site.name].rows, own, rtol=1e-4, atol=1e-6)


def test_outputs_are_what_moving_a_neuron_does() -> None:
    model = build().double()
    sites, batch, step = find_sites(model)[:2], tokens(), 3e-3
    found = gathered(model, sites, (loss_of(model, batch) for _ in range(1)))

    def moved(site: NeuronSite, neuron: int, by: float) -> float:
        def add(_m: nn.Module, _i: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.clone()
            output[..., site.offset + neuron] += by
            return output

        handle = model.get_submodule(site.module).register_forward_hook(add)
        with torch.no_grad():
            loss = float(loss_of(model, batch))
        handle.remove()
        return loss

    for site in sites:
        for neuron in (0, site.length // 2, site.length - 1):
            slope = (moved(site, neuron, step) - moved(site, neuron, -step)) / (2 * step)
            told = float(found[site.name].outputs[neuron])
            # the model's own loss is fp32: a difference of its last bits over the step
            assert told == pytest.approx(slope, rel=1e-2, abs=3e-4)


class Wide(nn.Module):
    """One wide projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1000, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x)


def test_lengths_and_angles_outlive_the_projection() -> None:
    torch.manual_seed(0)
    model = Wide()
    site = NeuronSite(0, "fc1", "fc1", 64)
    x, target = torch.randn(40, 1000), torch.randn(40, 64)
    found = gathered(model, [site], (((model(x) - target) ** 2).sum() for _ in range(1)))
    assert found["fc1"].rows.shape == (64, gradients.N_DIRECTIONS)
    model.fc1.weight.grad = None
    ((model(x) - target) ** 2).sum().backward()
    whole = model.fc1.weight.grad
    assert whole is not None
    ratio = found["fc1"].rows.norm(dim=1) / whole.norm(dim=1)
    # standard deviation of a length along 128 directions: 1 / sqrt(2 * 128) = 0.0625
    assert float((ratio - 1).abs().max()) < 0.25
    assert abs(float(ratio.mean()) - 1) < 0.05
    angles = [nn.functional.cosine_similarity(g[:1], g[1:]) for g in (found["fc1"].rows, whole)]
    assert float((angles[0] - angles[1]).abs().max()) < 0.35


def test_a_gradient_that_is_not_finite_names_its_site() -> None:
    model = build()
    sites = find_sites(model)
    with pytest.raises(ActivationError, match=r"the gradient at model\.layers\.0"):
        gathered(model, sites, (loss_of(model, tokens()) * float("nan") for _ in range(1)))
    assert not any(module._forward_hooks for module in model.modules())


def test_sites_that_take_no_part() -> None:
    model = build()
    sites = find_sites(model)
    unused = NeuronSite(9, "up_proj", "unused", 12)
    model.unused = nn.Linear(16, 12)
    found = gathered(model, [*sites, unused], (loss_of(model, tokens()) for _ in range(1)))
    # as of an expert that no token was routed to
    assert not found[unused.name].rows.any() and found[unused.name].rows.shape == (12, 16)
    with pytest.raises(LayoutError, match="no site took part"):
        gathered(model, [unused], (loss_of(model, tokens()) for _ in range(1)))


def test_an_activation_in_place_is_no_obstacle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    x = torch.randn(5, 6)
    found = gathered(
        model, [NeuronSite(0, "fc", "0", 8)], (model(x).square().sum() for _ in range(1))
    )
    model.requires_grad_(True)
    model(x).square().sum().backward()
    torch.testing.assert_close(found["0"].rows, model[0].weight.grad)
