"""Pooled activations are those of each prompt alone, whatever the batch and its padding."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import (
    SAFE,
    UNSAFE,
    F,
    build,
    encoder_of,
    layout_of,
    same_bits,
    state_of,
)
from torch import Tensor, nn

from nest.activations import reader as reader_module
from nest.activations.capture import capture
from nest.activations.config import Pool
from nest.activations.pooling import pool_tokens
from nest.conversations.encoders import CallableEncoder
from nest.errors import ActivationError, InputError, LayoutError
from nest.models.binding import bind
from nest.models.layouts import find_sites
from nest.models.sites import NeuronSite

PROMPTS = [*UNSAFE[:9], *SAFE[:9]]
POOLS: tuple[Pool, ...] = ("max", "mean", "last")


def alone(model: nn.Module, family: str, pool: Pool) -> list[np.ndarray]:
    """Oracle: one prompt at a time, no padding, hooks of its own."""
    encoder, rows = encoder_of(model), []
    sites = find_sites(model, layout_of(family))
    for prompt in PROMPTS:
        seen: dict[str, Tensor] = {}
        handles = [
            bind(model, site).module.register_forward_hook(
                lambda _m, _i, output, site=site, seen=seen: seen.__setitem__(
                    site.name,
                    output.flatten(0, -2)[:, site.offset : site.offset + site.length].double(),
                )
            )
            for site in sites
        ]
        with torch.no_grad():
            model(torch.tensor([encoder.prompt(prompt)]))
        for handle in handles:
            handle.remove()
        pooled = {
            "max": lambda v: v.amax(0),
            "mean": lambda v: v.mean(0),
            "last": lambda v: v[-1],
        }[pool]
        rows.append([pooled(seen[site.name]).numpy() for site in sites])
    return [np.stack(columns) for columns in zip(*rows, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi3", "gpt2", "opt"])
def test_equal_to_each_prompt_alone(family: str, pool: Pool, batch_size: int) -> None:
    model = build(family)
    encoder = encoder_of(model)
    with torch.no_grad():  # where padding leaks, it is seen
        model.get_input_embeddings().weight[encoder.pad_id] = 30.0
    sites = find_sites(model, layout_of(family))
    found = capture(model, encoder, PROMPTS, sites, pool=pool, batch_size=batch_size)
    assert found.sites == tuple(sites)
    for values, expected in zip(found.pooled, alone(model, family, pool), strict=True):
        assert values.shape == (len(PROMPTS), F) and values.dtype == np.float32
        # fp32 products of other shapes: some roundings on activations of about ten
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_sees_no_padding_on_either_side(pool: Pool) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, 5, generator=draw)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0]]
    ).bool()
    expected = []
    for row in range(4):
        own = values[row][mask[row]]
        expected.append({"max": own.amax(0), "mean": own.mean(0), "last": own[-1]}[pool])
    for poison in (1e30, -1e30, float("nan"), float("inf")):
        spoiled = values.masked_fill(~mask[:, :, None], poison)
        found = pool_tokens(spoiled, mask, pool)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-6)
    # negative activations everywhere: zeros from padding would win a maximum
    below = -values.abs() - 1
    assert float(pool_tokens(below, mask, "max").max()) <= -1


def test_half_precision_is_pooled_in_fp32() -> None:
    values = torch.full((1, 3000, 1), 1.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 3000, dtype=torch.bool)
    assert pool_tokens(values, mask, "mean").item() == 1.0
    assert all(pool_tokens(values, mask, pool).dtype == torch.float32 for pool in POOLS)


def test_a_custom_module_without_masks_or_input_ids() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 4)
            self.wide = nn.Linear(4, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.wide(self.embedding(tokens))

    torch.manual_seed(0)
    model = Net()
    prompts = ["1 2 3", "4", "5 6 7 8 9", "3 3"]
    encoder = CallableEncoder(lambda text: [int(word) for word in text.split()])
    found = capture(model, encoder, prompts, [NeuronSite(0, "wide", "wide", 8)], batch_size=4)
    for row, prompt in zip(found.pooled[0], prompts, strict=True):
        own = model(torch.tensor([[int(word) for word in prompt.split()]]))[0].amax(0)
        np.testing.assert_allclose(row, own.detach().numpy(), rtol=1e-5)


def test_past_the_memory_bound_activations_lie_on_disk() -> None:
    model = build()
    encoder, sites = encoder_of(model), find_sites(model)
    n_bytes = 4 * len(PROMPTS) * F * len(sites)
    inside = capture(model, encoder, PROMPTS, sites, memory_bound_bytes=n_bytes)
    spilt = capture(model, encoder, PROMPTS, sites, memory_bound_bytes=n_bytes - 1)
    assert inside.folder is None and spilt.folder is not None
    folder = Path(spilt.folder.name)
    assert sum(file.stat().st_size for file in folder.iterdir()) == n_bytes
    for first, second in zip(inside.pooled, spilt.pooled, strict=True):
        assert isinstance(second, np.memmap) and np.array_equal(first, second)
    del spilt, second
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_name_the_site(poison: float, dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    model.model.layers[1].mlp.gate_proj.weight.data[3] = poison
    before = state_of(model)
    with pytest.raises(
        ActivationError, match=r"at model\.layers\.1\.mlp\.gate_proj are not finite"
    ):
        capture(model, encoder_of(model), PROMPTS, find_sites(model))
    assert same_bits(before, state_of(model))
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("batch_size", [4, 100])
def test_a_lone_negative_infinity_is_seen_below_the_maximum(batch_size: int) -> None:
    model = build()
    encoder, sites = encoder_of(model), find_sites(model)
    encoded = {prompt: encoder.prompt(prompt) for prompt in PROMPTS}
    said = Counter(token for ids in encoded.values() for token in set(ids))
    spoilt, word = next(
        (prompt, token) for prompt, ids in encoded.items() for token in ids if said[token] == 1
    )
    last = bind(model, sites[-1]).module
    tokens: list[Tensor] = []
    embed = model.get_input_embeddings().register_forward_hook(
        lambda _m, inputs, _o: tokens.append(inputs[0])
    )

    def spoil(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output.masked_fill((tokens[-1] == word)[..., None], float("-inf"))

    handle = last.register_forward_hook(spoil)
    with pytest.raises(ActivationError) as caught:
        capture(model, encoder, PROMPTS, sites, batch_size=batch_size)
    assert sites[-1].name in str(caught.value) and repr(spoilt[:60]) in str(caught.value)
    for hook in (embed, handle):
        hook.remove()
    assert all(not module._forward_hooks for module in model.modules())


def test_padding_that_is_not_finite_is_no_fault() -> None:
    model = build()
    encoder, sites = encoder_of(model), find_sites(model)
    expected = capture(model, encoder, PROMPTS, sites)
    seen: list[Tensor] = []
    embed = model.get_input_embeddings().register_forward_hook(
        lambda _m, inputs, _o: seen.append(inputs[0])
    )
    spoil = bind(model, sites[-1]).module.register_forward_hook(
        lambda _m, _i, output: output.masked_fill(
            (seen[-1] == encoder.pad_id)[..., None], float("nan")
        )
    )
    found = capture(model, encoder, PROMPTS, sites)
    embed.remove()
    spoil.remove()
    for first, second in zip(expected.pooled, found.pooled, strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "phi3", "gpt2", "opt"])
def test_stopping_after_the_last_site_changes_no_bit(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    encoder, sites = encoder_of(model), find_sites(model, layout_of(family))
    early = [site for site in sites if site.layer == 0]
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
    ]
    for chosen in (sites, early):
        ran.clear()
        found = capture(model, encoder, PROMPTS, chosen, batch_size=5)
        stopped = len(ran)
        with monkeypatch.context() as patch:
            patch.setattr(reader_module, "run_until", lambda _last, call: bool(call()) or True)
            ran.clear()
            full = capture(model, encoder, PROMPTS, chosen, batch_size=5)
        for first, second in zip(found.pooled, full.pooled, strict=True):
            assert np.array_equal(first, second)
        # four batches, of which the first shows the order
        n_modules = len(ran) // 4
        assert stopped < len(ran)
        if chosen is early:
            assert stopped < n_modules * 3
    for handle in handles:
        handle.remove()


class Ordered(nn.Module):
    """Runs its two layers in another order where a batch begins with an odd token, or one twice."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.twice = twice

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        layers = [self.first, self.second]
        if int(tokens[0, 0]) % 2:
            layers.reverse()
        if self.twice:
            layers.append(layers[-1])
        for layer in layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("twice", [False, True])
def test_an_order_that_changes_and_a_layer_that_runs_twice(twice: bool) -> None:
    model = Ordered(twice)
    sites = [NeuronSite(0, "first", "first", 4), NeuronSite(1, "second", "second", 4)]
    encoder = CallableEncoder(lambda text: [int(word) for word in text.split()])
    prompts = ["2 3", "3 2 1", "4 5 6 7", "5 4 3 2 1"]
    together = capture(model, encoder, prompts, sites, batch_size=1)
    for row, prompt in enumerate(prompts):
        single = capture(model, encoder, [prompt], sites)
        for values, expected in zip(together.pooled, single.pooled, strict=True):
            assert np.array_equal(values[row], expected[0])


def test_the_model_is_left_as_it_was() -> None:
    model = build()
    model.train()
    model.model.layers[0].eval()
    before, modes = state_of(model), [module.training for module in model.modules()]
    told: list[tuple[str, int, int]] = []
    capture(
        model,
        encoder_of(model),
        PROMPTS,
        find_sites(model),
        batch_size=5,
        progress=lambda *step: told.append(step),
    )
    assert same_bits(before, state_of(model))
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    assert [done for _, done, _ in told] == [5, 10, 15, 18] and told[0][2] == 18


def test_what_cannot_be_captured_is_refused() -> None:
    model = build()
    encoder, sites = encoder_of(model), find_sites(model)
    with pytest.raises(InputError, match="no prompts"):
        capture(model, encoder, [], sites)
    with pytest.raises(InputError, match=r"comes to \d+ tokens, but the model's context is 48"):
        capture(model, encoder, ["how " * 50], sites)
    model.spare = nn.Linear(4, 8)
    with pytest.raises(LayoutError, match="spare did not run"):
        capture(model, encoder, PROMPTS, [NeuronSite(0, "spare", "spare", 8)])
    assert all(not module._forward_hooks for module in model.modules())
