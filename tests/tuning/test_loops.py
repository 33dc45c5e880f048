"""An update in a loop of the user's own: whatever writes the parameter, the rows follow, and only they."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build, choose, loss_of, same_bits, state_of, tokens
from torch import Tensor, nn

from nest.errors import ActivationError, InputError, SelectionError
from nest.patches.patch import NeuronPatch
from nest.tuning.config import UpdateMode
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import PARAMETER, ClusterUpdate, trainable

RATE, STEPS = 0.05, 6


class Written:
    """Gradient descent by an outsider: it writes to `.data`, which raises no version counter."""

    def __init__(self, update: ClusterUpdate) -> None:
        self.packed = update.packed

    def step(self) -> None:
        assert self.packed.grad is not None
        version = self.packed._version
        self.packed.data.add_(self.packed.grad, alpha=-RATE)
        assert self.packed._version == version

    def zero_grad(self) -> None:
        self.packed.grad = None


def adamw(**how: bool) -> Callable[[ClusterUpdate], Any]:
    return lambda update: torch.optim.AdamW(
        update.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, **how
    )


def trained(
    make: Callable[[ClusterUpdate], Any],
    wrap: Callable[[nn.Module], Any] | None = None,
    mode: UpdateMode = "live",
) -> tuple[list[float], NeuronPatch, dict[str, Tensor]]:
    """Losses, the patch, and the model's state as a checkpoint of the last step would have it."""
    model = build()
    ids, losses, selection = tokens(), [], choose(model)
    before = state_of(model)
    with trainable(model, selection, mode=mode) as update:
        run = model if wrap is None else wrap(model)
        optimizer = make(update)
        for _ in range(STEPS):
            loss = loss_of(run, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        saved = state_of(model)
        patch = update.patch()
    assert same_bits(before, state_of(model))
    return losses, patch, saved


@pytest.fixture(scope="module")
def ours() -> tuple[list[float], NeuronPatch, dict[str, Tensor]]:
    return trained(NeuronAdamW_)


def NeuronAdamW_(update: ClusterUpdate) -> NeuronAdamW:
    return NeuronAdamW(update, lr=RATE)


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_torchs_own_adamw_trains_as_ours(how: dict[str, bool], ours: Any) -> None:
    losses, patch, _ = trained(adamw(**how))
    expected, same, _ = ours
    assert losses[-1] < losses[0]
    # Adam divides small numbers by small numbers: a few units in the last place grow over the steps.
    assert losses == pytest.approx(expected, rel=1e-5)
    for group, values in same.vectors.items():
        torch.testing.assert_close(patch.vectors[group], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [adamw(fused=True), Written], ids=["fused", "data"])
def test_a_checkpoint_after_the_last_step_holds_its_rows(make: Any) -> None:
    losses, patch, saved = trained(make)
    assert losses[-1] < losses[0]
    base = state_of(build())
    for name, value in saved.items():
        expected = patch.fold_tensor(name, base[name]) if name in patch.parameters else base[name]
        assert torch.equal(value, expected), name


# tracing raises warnings of its own inside torch, which as errors would end it
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["live", "branch"])
def test_a_compiled_model_trains_as_an_uncompiled_one(mode: UpdateMode, ours: Any) -> None:
    # The graph alone: generating machine code would take half a minute and test torch.
    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, backend="aot_eager")

    torch._dynamo.reset()
    losses, patch, _ = trained(adamw(fused=True), compiled, mode)
    expected, same, _ = ours
    assert losses == pytest.approx(expected, rel=1e-5)
    for group, values in same.vectors.items():
        torch.testing.assert_close(patch.vectors[group], values, rtol=1e-4, atol=1e-6)


def test_a_backbone_that_is_called_alone_sees_the_step_before() -> None:
    model = build()
    ids = tokens()
    with trainable(model, choose(model)) as update:
        optimizer = adamw(fused=True)(update)
        loss_of(model, ids).backward()
        optimizer.step()
        with torch.no_grad():
            alone = model.model(input_ids=ids, use_cache=False).last_hidden_state
            update.write()
            again = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(alone, again)


@pytest.mark.parametrize("make", [NeuronAdamW_, adamw(fused=True)], ids=["ours", "fused"])
def test_an_update_that_breaks_is_put_back(make: Any) -> None:
    model, ids = build(), tokens()
    with trainable(model, choose(model)) as update:
        optimizer = make(update)
        loss_of(model, ids).backward()
        optimizer.step()
        loss_of(model, ids)  # the rows are written by now, whoever wrote the parameter
        good, rows = update.packed.detach().clone(), state_of(model)
        assert update.packed.grad is not None
        update.packed.grad.fill_(float("nan"))
        with pytest.raises(ActivationError, match=r"not finite|no longer finite"):
            optimizer.step()
            loss_of(model, ids)
        assert torch.equal(update.packed.detach(), good)
        assert same_bits(rows, state_of(model))
        patch = update.patch()
    assert patch.has_effect


def test_a_patch_of_nothing_is_refused() -> None:
    model = build()
    with (
        trainable(model, choose(model), update="shared") as update,
        pytest.raises(InputError, match="changes no row"),
    ):
        update.patch()


def test_only_the_update_is_trainable_whatever_wraps_the_model() -> None:
    model = build()
    wrapped = nn.DataParallel(model)
    with trainable(wrapped, choose(wrapped)) as update:
        names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
        assert names == [f"module.{PARAMETER}.packed"]
        assert all("module" not in site.part.site.module.split(".") for site in update.sites)


@pytest.mark.parametrize("moved", ["weights", "packed"])
def test_what_was_moved_is_told_in_the_next_pass(moved: str) -> None:
    model, ids = build(), tokens()
    with trainable(model, choose(model)) as update:
        optimizer = adamw(fused=True)(update)
        loss_of(model, ids).backward()
        if moved == "packed":
            update.packed.data = update.packed.data.clone()
        else:
            weight = update.sites[0].module.weight
            weight.data = weight.data.clone()
        optimizer.step()
        with pytest.raises(SelectionError, match=r"replaced or moved|moved to other memory"):
            loss_of(model, ids)
