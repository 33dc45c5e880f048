"""A forward pass ends with the module it is needed for, and leaves nothing behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from nest.models.partial import run_until


class Steps(nn.Module):
    """Linear layers that note when they run; catches every `Exception` like a careless model."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(n))
        self.ran: list[int] = []
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(lambda *_, index=index: self.ran.append(index))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                x = layer(x)
            except RuntimeError:
                raise
            except Exception:
                x = torch.zeros_like(x)
        return x


def hooks(model: nn.Module) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]


@pytest.mark.parametrize("last", [0, 2, 3])
def test_nothing_runs_after_the_last_module(last: int) -> None:
    model, x = Steps(), torch.ones(1, 3)
    before, seen = hooks(model), []
    handle = model.layers[last].register_forward_hook(lambda _m, _i, output: seen.append(output))
    assert run_until(model.layers[last], lambda: model(x))
    assert model.ran == list(range(last + 1))
    handle.remove()
    assert hooks(model) == before
    expected = x
    for layer in model.layers[: last + 1]:
        expected = layer(expected)
    assert torch.equal(seen[0], expected)
    model.ran.clear()
    model(x)  # as if nothing had been
    assert model.ran == [0, 1, 2, 3]


def test_the_module_itself_may_be_spared() -> None:
    model, seen = Steps(), []
    handle = model.layers[2].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    assert run_until(model.layers[2], lambda: model(torch.ones(1, 3)), before=True)
    handle.remove()
    assert model.ran == [0, 1] and len(seen) == 1
    assert not model.layers[2]._forward_pre_hooks


def test_a_module_that_does_not_run_lets_the_call_end() -> None:
    model, results = Steps(), []
    assert not run_until(nn.Linear(3, 3), lambda: results.append(model(torch.ones(1, 3))))
    assert len(results) == 1 and model.ran == [0, 1, 2, 3]


def test_an_error_passes_and_the_hook_is_gone() -> None:
    model = Steps()
    before = hooks(model)
    with pytest.raises(RuntimeError, match="shapes"):
        run_until(model.layers[2], lambda: model(torch.ones(1, 5)))
    assert hooks(model) == before


def test_one_call_within_another_ends_only_itself() -> None:
    model, inner = Steps(), Steps()

    def call() -> None:
        assert run_until(inner.layers[1], lambda: inner(torch.ones(1, 3)))
        model(torch.ones(1, 3))

    assert run_until(model.layers[0], call)
    assert inner.ran == [0, 1] and model.ran == [0]
    model.ran.clear()
    # the outer end is reached within the inner call, which must let it pass
    assert run_until(
        model.layers[1],
        lambda: run_until(model.layers[3], lambda: model(torch.ones(1, 3))),
    )
    assert model.ran == [0, 1]


def test_no_tensor_is_kept() -> None:
    model, kept = Steps(), []

    def call() -> None:
        x = torch.ones(1, 3)
        kept.append(weakref.ref(x))
        model(x)

    gc.disable()  # freed by reference counts alone: on a GPU a cycle would hold its memory
    try:
        run_until(model.layers[1], call)
        assert kept[0]() is None
    finally:
        gc.enable()
