"""Every tap reads what the model computes, whatever the padding, and leaves the model as it was."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from families import build as family
from tiny_models import build, encoder_of, layout_of, prompts, same_bits, state_of
from torch import Tensor, nn

from nest.activations.capture import capture
from nest.activations.steering import ablating, adding
from nest.activations.taps import ResidualTap, SiteTap, Tap, as_tap, residual_taps
from nest.errors import InputError, LayoutError
from nest.generation.static import generate
from nest.models.layouts import find_sites

PROMPTS = prompts("make tea boil water be kind how do I".split(), n=9)
TAPS = {
    "a gate's neurons": ("qwen3", lambda model: SiteTap(find_sites(model)[0])),
    "a slice of a fused weight": ("phi3", lambda model: SiteTap((layout_of("phi3") or [])[1])),
    "a transposed weight": ("gpt2", lambda model: SiteTap((layout_of("gpt2") or [])[0])),
    "the stream after a block": ("qwen3", lambda model: residual_taps(model, [1])[0]),
}


def expected(model: nn.Module, tap: Tap, ids: list[int]) -> Tensor:
    """(T, F) of one prompt alone, by a hook of this test's own."""
    seen: list[Any] = []
    handle = tap.module_in(model).register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    values = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    if isinstance(tap, SiteTap):
        values = values[..., tap.site.offset : tap.site.offset + tap.site.length]
    return values.reshape(len(ids), -1)


@pytest.mark.parametrize("name", TAPS)
def test_a_tap_reads_what_the_model_computes(name: str) -> None:
    architecture, make = TAPS[name]
    model = build(architecture)
    tap, encoder, before = make(model), encoder_of(model), state_of(model)
    assert isinstance(tap, Tap) and as_tap(tap) is tap
    seen: list[Tensor] = []
    ids = encoder.prompt(PROMPTS[0])
    with tap.attach(model, seen.append), torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    assert seen[0].shape[-1] == tap.length
    torch.testing.assert_close(seen[0].reshape(len(ids), -1), expected(model, tap, ids))
    with pytest.raises(ZeroDivisionError), tap.attach(model, seen.append):
        raise ZeroDivisionError
    assert all(not module._forward_hooks for module in model.modules())
    assert same_bits(before, state_of(model))


@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.parametrize("name", TAPS)
def test_a_capture_of_any_tap_does_not_see_padding(name: str, batch_size: int) -> None:
    architecture, make = TAPS[name]
    model = build(architecture)
    tap, encoder = make(model), encoder_of(model)
    for pool in ("max", "mean", "last"):
        found = capture(model, encoder, PROMPTS, [tap], pool=pool, batch_size=batch_size)
        assert found.taps == (tap,)
        for row, prompt in zip(found.pooled[0], PROMPTS, strict=True):
            own = expected(model, tap, encoder.prompt(prompt))
            pooled = {"max": own.amax(0), "mean": own.mean(0), "last": own[-1]}[pool]
            np.testing.assert_allclose(row, pooled.numpy(), rtol=2e-4, atol=2e-5)


def test_sites_and_streams_are_captured_together() -> None:
    model = build()
    sites, streams = find_sites(model), residual_taps(model)
    found = capture(model, encoder_of(model), PROMPTS, [*sites, *streams])
    assert found.sites == sites
    assert [values.shape[1] for values in found.pooled] == [
        *(site.length for site in sites),
        *(stream.length for stream in streams),
    ]


def test_what_is_not_there_has_its_sentence() -> None:
    model = build()
    with pytest.raises(LayoutError, match="has the layers 0 to 1, and 7 was asked for"):
        residual_taps(model, [7])
    with pytest.raises(LayoutError, match=r"has no block 'model\.layers\.9'"):
        ResidualTap(9, "model.layers.9", 16).module_in(model)
    wrong = ResidualTap(0, "model.layers.0", 99)
    with pytest.raises(LayoutError, match="expected hidden states of width 99"):
        wrong.values(torch.zeros(1, 2, 16))


# --- steering -------------------------------------------------------------------------------------

FAMILIES = ["llama", "gpt_neox", "qwen3"]


def direction_for(model: nn.Module, seed: int = 0) -> Tensor:
    width = residual_taps(model)[0].length
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def streams(model: nn.Module, ids: list[int]) -> list[Tensor]:
    """What each block hands on. (transformers' own output_hidden_states is recorded by hooks of its own,
    which come before others once they are there.)"""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for tap in residual_taps(model):
            stack.enter_context(tap.attach(model, seen.append))
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_a_direction_is_added_after_the_block(name: str) -> None:
    model = family(name).eval()
    ids, direction = [3, 4, 5, 6], direction_for(model)
    plain = streams(model, ids)
    with adding(model, direction, 2.0, [0]):
        steered = streams(model, ids)
    torch.testing.assert_close(steered[0], plain[0] + 2.0 * direction)
    assert not torch.allclose(steered[1], plain[1])
    again = streams(model, ids)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_ablated_direction_is_nowhere_between_blocks(name: str) -> None:
    model = family(name).eval()
    direction = direction_for(model)
    unit = direction / direction.norm()
    plain = streams(model, [3, 4, 5, 6])
    with ablating(model, direction):
        ablated = streams(model, [3, 4, 5, 6])
    assert float((plain[0] @ unit).abs().max()) > 0.01
    assert all(float((states @ unit).abs().max()) < 1e-6 for states in ablated)
    with ablating(model, direction, [1]):
        last = streams(model, [3, 4, 5, 6])
    assert torch.equal(last[0], plain[0])
    assert float((last[1] @ unit).abs().max()) < 1e-6


def test_batches_and_caches_change_nothing_of_what_is_steered() -> None:
    model = build()
    encoder, direction = encoder_of(model), direction_for(model)
    plain = generate(model, encoder, PROMPTS, 8)
    for steer in (
        lambda: adding(model, direction, 6.0, [0, 1]),
        lambda: ablating(model, direction),
    ):
        with steer():
            alone = [generate(model, encoder, [prompt], 8)[0] for prompt in PROMPTS]
            together = generate(model, encoder, PROMPTS, 8, batch_size=9)
            recomputed = []
            for prompt in PROMPTS:
                ids = encoder.prompt(prompt)
                for _ in range(8):
                    with torch.no_grad():
                        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
                    ids = [*ids, int(logits[0, -1].argmax())]
                    if ids[-1] in encoder.eos_ids:
                        break
                recomputed.append(encoder.decode(ids[len(encoder.prompt(prompt)) :]))
        assert alone == together == recomputed
        assert together != plain
    assert generate(model, encoder, PROMPTS, 8) == plain


@pytest.mark.parametrize("moment", ["inside", "in the forward pass", "while it is attached"])
def test_whatever_goes_wrong_the_model_is_as_it_was(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    before, direction = state_of(model), direction_for(model)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    layers = [0, 1]
    if moment == "in the forward pass":
        monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    if moment == "while it is attached":
        monkeypatch.setattr(model.model.layers[1], "register_forward_hook", fail)
    for steer in (adding(model, direction, 2.0, layers), ablating(model, direction)):
        with pytest.raises(ZeroDivisionError), steer:
            streams(model, [3, 4, 5])
            fail()
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )
    assert same_bits(before, state_of(model))


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        (torch.ones(5), "has shape"),
        (torch.full((32,), float("nan")), "NaN or infinity"),
        (torch.zeros(32), "zero everywhere"),
    ],
)
def test_directions_that_cannot_be_have_their_sentence(direction: Tensor, said: str) -> None:
    model = build()
    if len(direction) == 32:
        direction = direction[:1].expand(residual_taps(model)[0].length)
    with pytest.raises(InputError, match=said), ablating(model, direction):
        pass
    if said != "zero everywhere":
        with pytest.raises(InputError, match=said), adding(model, direction, 1.0, [0]):
            pass


def test_no_layers_are_no_steering() -> None:
    model = build()
    with (
        pytest.raises(InputError, match="no layers were given"),
        adding(model, direction_for(model), 1.0, []),
    ):
        pass
