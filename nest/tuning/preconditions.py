"""What must hold of a model before an update can be trained on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from nest.errors import InputError, SelectionError
from nest.models.binding import BoundSite
from nest.models.fingerprint import config_hash, fingerprint
from nest.models.wrappers import wrapped_in
from nest.selection.selection import NeuronSelection
from nest.tuning.config import UpdateMode, UpdateStart
from nest_kernels.backend import VARIABLE, use_triton


def check_settings(update: str, mode: str, dtype: torch.dtype, start: str) -> None:
    """Known words, and a dtype that an update can have.

    Raises:
        InputError: otherwise.
    """
    if update not in ("shared", "loaded"):
        raise InputError(f"update is {update!r}; choose shared or loaded")
    if mode not in get_args(UpdateMode):
        raise InputError(f"mode is {mode!r}; choose live or branch")
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"dtype is {dtype}; an update is trained in torch.float32 or float64")
    if start not in get_args(UpdateStart):
        raise InputError(f"start is {start!r}; choose {' or '.join(get_args(UpdateStart))}")
    if start == "zero_loadings" and update == "shared":
        raise InputError(
            "start is zero_loadings, and the shared form has no loadings; leave start out, or choose "
            "update='loaded'"
        )


def check_not_distributed(model: nn.Module) -> None:
    """The model is not in DDP already, which reduces the gradients of parameters it knows from the start.

    Raises:
        InputError: it is, among several processes.
    """
    wrapped = wrapped_in(model, nn.parallel.DistributedDataParallel)
    if wrapped and torch.distributed.get_world_size() > 1:
        raise InputError(
            "the model is wrapped in DistributedDataParallel already, which would not reduce the update's "
            "gradient; wrap it inside the block of nest.trainable"
        )


def check_writable(model: nn.Module, bound: Sequence[BoundSite]) -> None:
    """The rows can be written, and nothing but the sites' own modules computes with them.

    Raises:
        SelectionError: a weight that is tied to another module, quantised or elsewhere.
    """
    owners: dict[int, str] = {}
    modules = {one.module for one in bound}
    for path, module in model.named_modules():
        for name, parameter in (
            module.named_parameters(recurse=False) if module not in modules else ()
        ):
            owners[id(parameter)] = f"{path}.{name}"
    for one in bound:
        weight, name = one.held, one.site.parameter
        if id(weight) in owners:
            raise SelectionError(
                f"{name} is tied to {owners[id(weight)]}: writing its rows would change "
                "that module, too. Untie them, or train with mode='branch' (nest tune --mode branch)"
            )
        if isinstance(weight, Tensor) and not one.is_plain:
            what = "on the meta device" if weight.device.type == "meta" else f"{weight.dtype}"
            if type(weight) not in (Tensor, nn.Parameter):
                what += f", a {type(weight).__name__}"
            raise SelectionError(
                f"{name} is {what}: its rows cannot be written. Load the model "
                "unquantised and with its weights in memory, or train with mode='branch' "
                "(nest tune --mode branch)"
            )


def check_same_model(
    model: nn.Module, selection: NeuronSelection, bound: Sequence[BoundSite], mode: UpdateMode
) -> None:
    """Same architecture, and the same bits in every weight that can be read.

    Raises:
        SelectionError: it is another model, or its weights have another dtype.
    """
    readable = [one.site for one in bound if one.is_plain]
    base = fingerprint(model, readable) if readable else selection.base
    if mode == "live" and base.dtype != selection.base.dtype:
        raise SelectionError(
            f"the selection was made on this model in {selection.base.dtype}, and its weights are "
            f"{base.dtype}; select and tune with the same --dtype"
        )
    found = base.tensors if readable else {}
    same_bits = all(found[name] == selection.base.tensors.get(name) for name in found)
    # Of a custom model the shapes of all parameters are the architecture, and quantising changes them.
    comparable = mode == "live" or hasattr(model, "config")
    same_shape = not comparable or config_hash(model) == selection.base.config_hash
    if not same_bits or not same_shape:
        raise SelectionError(
            "the selection was made on another model, or on this one before its weights changed; run "
            "`nest select` on this model"
        )


def check_backend(packed: Tensor) -> None:
    """The kernels that the environment asks for can run where the update is.

    Raises:
        InputError: they cannot, or have no such name.
    """
    try:
        triton = use_triton(packed)
    except ValueError as fault:
        raise InputError(f"{VARIABLE}: {fault}") from None
    if triton and not packed.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"{VARIABLE}=triton needs the model on a CUDA GPU; leave {VARIABLE} out, or set it to reference"
        )
