"""How much memory tuning will take, and how many dialogues a forward pass there is room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from nest.errors import NoMemoryError

T = TypeVar("T")

# Share of the free memory that a plan may fill: the estimate leaves out what kernels borrow.
USABLE = 0.8
# Logits, log-softmax, the gradients of both and the terms of the KL are alive together: peaks measured
# on the CPU were 3.0 times the logits without the KL, and 5.0 with it and benign answers alone.
LOGIT_COPIES = 5
_GIB = 1024**3
# Where Linux shows the limits of the container that a process is in.
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryEstimate:
    """What tuning will hold, in bytes.

    Attributes:
        weights: The model's parameters and buffers, in memory already.
        update: Packed parameters, gradient, two moments, and the original rows.
        activations: Saved for the backward pass, at `micro_batch_size` of the longest dialogues.
        logits: Of that many dialogues' responses, in fp32.
        micro_batch_size: Dialogues a forward pass.
        free: Free on the device before tuning; None where it cannot be known.
    """

    weights: int
    update: int
    activations: int
    logits: int
    micro_batch_size: int
    free: int | None

    @property
    def needed(self) -> int:
        """Beyond the weights."""
        return self.update + self.activations + self.logits

    def sentence(self) -> str:
        """One line for a person."""
        free = "" if self.free is None else f"; {self.free / _GIB:.1f} GiB are free"
        return (
            f"memory: weights {self.weights / _GIB:.2f} GiB, and about {self.needed / _GIB:.2f} GiB "
            f"more for tuning {self.micro_batch_size} dialogues at a time (activations "
            f"{self.activations / _GIB:.2f}, logits {self.logits / _GIB:.2f}, update "
            f"{self.update / _GIB:.3f}){free}"
        )


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for its backward pass, the model's own tensors left out.

    Args:
        model: Whose parameters and buffers do not count.
        run: One forward pass with gradients.
    """
    own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            seen[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        held = run()
    del held
    return sum(seen.values())


def estimate(
    *,
    model: nn.Module,
    update_bytes: int,
    activation_bytes: int,
    logit_bytes: int,
    batch_size: int,
    device: torch.device,
    micro_batch_size: int | None,
) -> MemoryEstimate:
    """Plan the forward passes of a step.

    Args:
        model: For the size of its weights.
        update_bytes: Of the update and its optimizer.
        activation_bytes: Saved for one dialogue, the longest.
        logit_bytes: Of that dialogue's response, in fp32, once.
        batch_size: Dialogues an optimizer step.
        device: Where the step runs.
        micro_batch_size: Dialogues a forward pass; None takes the largest half, quarter, ... of the
            batch that fits.
    """
    free = free_bytes(device)

    def at(size: int) -> MemoryEstimate:
        return MemoryEstimate(
            weights=sum(
                t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())
            ),
            update=update_bytes,
            activations=size * activation_bytes,
            logits=size * LOGIT_COPIES * logit_bytes,
            micro_batch_size=size,
            free=free,
        )

    if micro_batch_size is not None:
        return at(min(micro_batch_size, batch_size))
    size = batch_size
    while free is not None and size > 1 and at(size).needed > USABLE * free:
        size = -(-size // 2)
    return at(size)


def free_bytes(device: torch.device) -> int | None:
    """Free memory where the device keeps its tensors; None where it cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    import psutil

    available = int(psutil.virtual_memory().available)
    granted = _left_in_container(CGROUPS)
    return available if granted is None else min(available, granted)


def _left_in_container(cgroups: Path) -> int | None:
    """What a container's limit leaves; None where there is none. Version 2 of cgroups, and version 1."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            numbers = [
                (cgroups / name).read_text(encoding="ascii").strip() for name in (limit, used)
            ]
        except OSError:
            continue
        if all(number.isdecimal() for number in numbers):  # `max` is no limit
            return max(0, int(numbers[0]) - int(numbers[1]))
    return None


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(fault, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(fault)
    return isinstance(fault, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def in_memory(run: Callable[[int], T], size: int, mend: str) -> T:
    """What `run` gives with so many dialogues a forward pass, or with half as many until it fits.

    Args:
        run: Is given the number of dialogues; begins anew each time.
        size: To begin with.
        mend: What to do where there is no memory for one.

    Raises:
        NoMemoryError: there is none for a single dialogue.
    """
    while True:
        try:
            return run(size)
        except (RuntimeError, MemoryError) as fault:
            if not is_out_of_memory(fault):
                raise
            if size == 1:
                raise NoMemoryError(f"there is no memory for a single dialogue; {mend}") from fault
        size = -(-size // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
