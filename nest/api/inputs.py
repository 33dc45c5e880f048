"""What callers may give: prompts in any form, settings by name, a batch size or `auto`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nest.errors import InputError

if TYPE_CHECKING:
    from nest.conversations.conversation import Prompt
    from nest.conversations.encoders import Encoder
    from nest.prompts.prompt_set import PromptSet

    Prompts = str | Path | Sequence[Prompt] | PromptSet
    Dialogues = str | Path | Sequence[tuple[Prompt, str]] | PromptSet
    EncodeLike = Callable[[str], Sequence[int]] | Encoder

BatchSize = int | Literal["auto"]


def resolved_batch_size(wanted: BatchSize, automatic: int) -> int:
    if wanted == "auto":
        return automatic
    if not isinstance(wanted, int) or wanted < 1:
        raise InputError(f"batch_size is {wanted!r}; it must be auto or at least 1")
    return wanted


def as_set(values: Any, name: str, *, need_response: bool = False) -> PromptSet:
    from nest.prompts.prompt_set import PromptSet, from_values, load_prompts

    if isinstance(values, PromptSet):
        found = values
    elif isinstance(values, (str, Path)):
        found = load_prompts(values, need_response)
    else:
        found = from_values(values, name)
    if need_response:
        found.dialogues()
    return found


def both_kinds(unsafe: Any, safe: Any, pairs: Any) -> tuple[PromptSet, PromptSet]:
    from nest.prompts.prompt_set import from_values, load_pairs

    if pairs is None:
        if unsafe is None or safe is None:
            raise InputError(
                "select needs unsafe and safe prompts (--unsafe and --safe), or pairs of them (--pairs)"
            )
        return as_set(unsafe, "unsafe"), as_set(safe, "safe")
    if unsafe is not None or safe is not None:
        raise InputError("give either pairs, or unsafe and safe prompts; not both")
    if isinstance(pairs, (str, Path)):
        return load_pairs(pairs)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise InputError("pairs must be (unsafe, safe) pairs of prompts, or a file of them")
    return (
        from_values([first for first, _ in pairs], "pairs:unsafe"),
        from_values([second for _, second in pairs], "pairs:safe"),
    )
