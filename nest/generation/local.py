"""Which of the engines in this process answers."""

from __future__ import annotations

from torch import nn

from nest.conversations.encoders import Encoder
from nest.errors import InputError
from nest.generation.engine import Engine, Which
from nest.generation.paged import PagedEngine, pays
from nest.generation.sampling import GREEDY, Sampling
from nest.generation.static import StaticEngine
from nest.progress import ProgressCallback


def local_engine(
    model: nn.Module,
    encoder: Encoder,
    which: Which = "auto",
    *,
    batch_size: int = 256,
    progress: ProgressCallback | None = None,
    sampling: Sampling = GREEDY,
) -> Engine:
    """An engine for a model in this process.

    Args:
        model: transformers decoder, or any module.
        encoder: Of the model.
        which: `auto` takes the paged engine for greedy answers where it should pay
            (`nest.generation.paged.pays`), else the static one.
        batch_size: Most answers decoded at once.
        progress: Called as `progress("generate", answers done, answers)`.
        sampling: What it will be asked for.

    Raises:
        InputError: an unknown name, or `paged` for a model or a sampling that it cannot take.
    """
    if which not in ("auto", "static", "paged"):
        raise InputError(f"engine is {which!r}; expected auto, static or paged")
    if which == "paged" and not sampling.is_greedy:
        raise InputError(
            f"the paged engine decodes greedily only, and the temperature is {sampling.temperature}; "
            "use engine static"
        )
    if which == "paged" or (which == "auto" and sampling.is_greedy and pays(model)):
        return PagedEngine(model, encoder, batch_size=batch_size, progress=progress)
    return StaticEngine(model, encoder, batch_size=batch_size, progress=progress)
