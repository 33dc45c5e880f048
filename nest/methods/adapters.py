"""PEFT's adapters in a model: put in for the time of a block, trained by our loop, merged on paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nest.errors import InputError

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER = "default"
"""PEFT's name for the only adapter."""


def peft_module(name: str) -> Any:
    """PEFT, imported when a method needs it.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError(
            f"the method `{name}` needs PEFT: pip install 'nest-safety[baselines]'"
        ) from None
    return peft


class Adapter:
    """An adapter as the training loop wants it.

    Args:
        model: The model that it is in.
        wrapper: PEFT's around that model.
        rows: For some paths of modules the outputs that their LoRA may change; the others' rows of B
            stay at zero.
    """

    def __init__(
        self, model: nn.Module, wrapper: nn.Module, rows: Mapping[str, Int[Tensor, " N"]]
    ) -> None:
        self._model, self._wrapper = model, wrapper
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._n_frozen = 0
        for path, kept in rows.items():
            layer: Any = model.get_submodule(path)
            up = layer.lora_B[ADAPTER].weight  # (F, rank)
            mask = torch.zeros_like(up[:, :1])
            mask[kept.to(up.device)] = 1.0
            self._n_frozen += up.numel() - int(mask.sum()) * up.shape[1]
            up.register_hook(mask.mul)

    @property
    def n_parameters(self) -> int:
        """Numbers that training can change."""
        return sum(parameter.numel() for parameter in self._named.values()) - self._n_frozen

    def parameters(self) -> list[nn.Parameter]:
        """See `Trainable`."""
        return list(self._named.values())

    @torch.no_grad()
    def disturb(self, share: float, generator: torch.Generator) -> None:
        """Give every LoRA's B normal noise, so that what it adds to a weight has this share of its norm.

        Args:
            share: Of the Frobenius norm of the weight.
            generator: Of the noise, on the CPU.
        """
        from peft.tuners.lora import LoraLayer

        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                layer: Any = module
                up = layer.lora_B[ADAPTER].weight  # (F, rank)
                up.copy_(torch.randn(up.shape, generator=generator))
                added = layer.get_delta_weight(ADAPTER).float().norm()
                up.mul_(share * layer.get_base_layer().weight.float().norm() / added)

    @contextmanager
    def removed(self) -> Iterator[None]:
        """See `Trainable`."""
        with self._wrapper.disable_adapter():  # type: ignore[operator]
            yield

    def gradients(self) -> Mapping[str, Tensor]:
        """See `Trainable`."""
        return {name: p.grad for name, p in self._named.items() if p.grad is not None}

    def snapshot(self) -> list[Tensor]:
        """See `Trainable`."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def load_snapshot(self, values: Sequence[Tensor]) -> None:
        """See `Trainable`."""
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The weights that a model without the adapter needs to do the same, by its own names."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        found = {}
        for path, module in self._model.named_modules():
            if isinstance(module, BaseTunerLayer):
                base = module.get_base_layer()
                for tensor, value in _merged(module, base).items():
                    if not torch.equal(value, getattr(base, tensor)):
                        found[f"{path}.{tensor}"] = value
        return found


def _merged(layer: Any, base: nn.Module) -> dict[str, Tensor]:
    """A layer's own weights with its adapter in them."""
    weight: Any = base.weight
    if not hasattr(layer, "ia3_l"):
        added = layer.get_delta_weight(ADAPTER)
        return {"weight": (weight + added.to(weight.device)).to(weight.dtype)}
    scale = layer.ia3_l[ADAPTER]  # (F, 1)
    by_row = scale.T if layer.fan_in_fan_out else scale
    merged = {"weight": (weight * by_row).to(weight.dtype)}
    bias: Any = base.bias
    if bias is not None:
        merged["bias"] = (bias * scale.reshape(bias.shape)).to(bias.dtype)
    return merged


@contextmanager
def adapted(
    model: nn.Module,
    shape: PeftConfig,
    *,
    seed: int,
    rows: Mapping[str, Int[Tensor, " N"]] | None = None,
) -> Iterator[Adapter]:
    """An adapter in the model's own modules for the time of the block; afterwards nothing of it is left.

    Args:
        model: In eval mode.
        shape: PEFT's config.
        seed: Of the adapter's start.
        rows: See `Adapter`.
    """
    from peft import get_peft_model

    # The very modules, in their order; PEFT's own `unload` is not there where putting in has failed.
    held = [(module, dict(module._modules)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    devices = sorted({parameter.device.index for parameter, _ in flags if parameter.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            wrapper: nn.Module = get_peft_model(model, shape)
        wrapper.eval()
        yield Adapter(model, wrapper, rows or {})
    finally:
        for module, children in held:
            module._modules.clear()
            module._modules.update(children)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name in set(vars(model)) - attributes:  # PEFT leaves its config
            delattr(model, name)
