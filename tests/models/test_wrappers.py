"""A weight has one name however its model is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build, choose, loss_of, tokens
from torch import nn

from nest.models.fingerprint import config_hash, fingerprint
from nest.models.layouts import find_sites
from nest.models.wrappers import uncompiled, unwrapped
from nest.patches.patch import NeuronPatch
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import trainable


def with_compiled_layers(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


def with_an_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "compiled and parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "compiled layers": with_compiled_layers,
    "adapted": with_an_adapter,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_sites_and_fingerprints_are_the_plain_models(wrap: Callable[[Any], Any]) -> None:
    plain, held = build(), wrap(build())
    sites = find_sites(plain)
    assert find_sites(held) == sites
    assert fingerprint(held, sites) == fingerprint(plain, sites)
    assert choose(held).base == choose(plain).base


# tracing raises warnings of its own inside torch, which as errors would end it
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_patch_made_on_one_goes_into_the_other(wrap: Callable[[Any], Any]) -> None:
    held = wrap(build())
    with trainable(held, choose(held)) as update:
        loss_of(unwrapped(held), tokens()).backward()
        NeuronAdamW(update, lr=0.05).step()
        patch: NeuronPatch = update.patch()
    plain = build()
    patch.fold_into(plain)
    patch.fold_into(held)
    patch.require_in(held)
    patch.revert(held)
    patch.revert(plain)


def test_a_module_of_ones_own_is_told_by_names_without_wrappers() -> None:
    plain = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    assert config_hash(torch.compile(plain, backend="eager")) == config_hash(plain)


def test_uncompiled_leaves_an_adapter_in_place() -> None:
    adapted = with_an_adapter(build())
    assert uncompiled(torch.compile(adapted, backend="eager")) is adapted
    assert uncompiled(nn.DataParallel(adapted)) is adapted
