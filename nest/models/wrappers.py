"""Models that stand inside other objects: torch.compile's, DataParallel's, checkpointing's, PEFT's.

A weight has one name, that of the checkpoint, however the model is held while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch.compile, activation checkpointing and FSDP 1 hold the module they wrap."""

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, out of whatever wraps it; its forward pass is the wrapper's, uncompiled."""
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def uncompiled(model: nn.Module) -> nn.Module:
    """The model out of torch.compile's, DataParallel's and DDP's wrappers: the same forward pass."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, _PARALLEL):
            inner = model.module
        if inner is None:
            return model
        model = inner


def wrapped_in(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether one of the wrappers around a model is of this kind."""
    module: nn.Module | None = model
    while module is not None and not isinstance(module, kind):
        module = _inner(module)
    return module is not None


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path that names no wrappers, found inside and between wrappers.

    Raises:
        AttributeError: there is none.
    """
    module = unwrapped(model)
    for part in clean_path(path).split(".") if path else ():
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            raise AttributeError(f"{type(module).__name__} has no module {part!r}")
        module = unwrapped(child)
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its path without wrappers, the wrappers themselves left out."""
    for path, module in unwrapped(model).named_modules():
        if _inner(module) is None:
            yield clean_path(path), module


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by its name in the checkpoint."""
    found = unwrapped(model).named_parameters(remove_duplicate=remove_duplicate)
    for name, parameter in found:
        yield clean_path(name), parameter


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every buffer by its name in the checkpoint."""
    for name, value in unwrapped(model).named_buffers():
        yield clean_path(name), value


def clean_path(path: str) -> str:
    """A path without the parts that wrappers put into it."""
    return ".".join(part for part in path.split(".") if part not in _INNER)


def _inner(module: nn.Module) -> nn.Module | None:
    for name in _INNER:
        held = module._modules.get(name)
        if held is not None:
            return held
    if isinstance(module, _PARALLEL):
        inner: nn.Module = module.module
        return inner
    base: Any = getattr(module, "get_base_model", None)  # PEFT's outermost wrapper
    if callable(base) and hasattr(module, "peft_config"):
        held = base()
        return held if isinstance(held, nn.Module) and held is not module else None
    return None
