"""Padded batches of token sequences, and which of their tokens are learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nest.errors import InputError


class Batch(NamedTuple):
    """Padded sequences.

    Attributes:
        input_ids: int64 (B, T).
        attention_mask: int64 (B, T), 1 at the sequences' own tokens.
        completion_mask: bool (B, T), True at the tokens of responses.
        indices: Which examples the rows are.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    indices: list[int]


def bucketed_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of sequences in batches of like lengths, shortest first; each index once.

    Raises:
        InputError: a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; expected at least 1")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def collate(
    sequences: Sequence[Sequence[int]],
    said: Sequence[int | Sequence[bool]] | None,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    indices: Sequence[int] | None = None,
) -> Batch:
    """Pad sequences to the longest of them.

    Args:
        sequences: Token ids, at least one sequence and each of at least one id.
        said: Which ids of each sequence are the assistant's, or how many are the prompt's; None for
            prompts alone, which leaves the completion mask empty.
        pad_id: Fills up.
        side: Where the padding goes.
        indices: Which examples these are; 0, 1, ... if None.
    """
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        start = longest - len(ids) if side == "left" else 0
        stop = start + len(ids)
        input_ids[row, start:stop] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, start:stop] = 1
        own = None if said is None else said[row]
        if isinstance(own, int):
            completion_mask[row, start + own : stop] = True
        elif own is not None:
            completion_mask[row, start:stop] = torch.tensor(own, dtype=torch.bool)
    which = list(range(len(sequences))) if indices is None else list(indices)
    return Batch(input_ids, attention_mask, completion_mask, which)


def check_completion_mask(batch: Batch) -> None:
    """Each row learns from some of its tokens and not from all of them.

    Raises:
        InputError: a row without any completion token, without any prompt token, or with a
            completion token on padding.
    """
    own = batch.attention_mask.bool()
    for row, index in enumerate(batch.indices):
        n_own = int(own[row].sum())
        n_completion = int(batch.completion_mask[row].sum())
        if bool((batch.completion_mask[row] & ~own[row]).any()):
            raise InputError(
                f"example {index} would be trained on padding; check its completion mask"
            )
        if n_completion == 0:
            raise InputError(
                f"example {index} has no completion token among its {n_own}: nothing would be "
                "learned from it; check that its response is not empty"
            )
        if n_completion == n_own:
            raise InputError(
                f"all {n_own} tokens of example {index} are completion: its prompt would be "
                "trained on; check that the encoder counts the prompt's tokens"
            )
