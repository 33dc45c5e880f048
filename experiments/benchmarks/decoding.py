"""Greedy answers for evaluation against transformers' `generate` in one left-padded batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from experiments.benchmarks.protocol import interleaved, synchronise
from experiments.benchmarks.shapes import Shape
from nest.conversations.batches import collate
from nest.conversations.encoders import CallableEncoder
from nest.generation.static import generate_tokens

N_PROMPTS, SHORTEST, LONGEST, NEW_TOKENS, EOS = 256, 20, 300, 64, 2
BATCH_SIZES = (32, 64, 128, 256)
REPEATS, WARM_UP = 5, 1
# How far below the highest logit a greedy choice may lie, in standard deviations of the logits: batches
# of other shapes round differently. A random model's highest logits are at some four deviations, where
# bf16 has steps of 1/64 to 1/32, and of 128,256 tokens a handful lie this close to the highest.
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.15}

Answers = list[list[int]]


def decoding_times(shape: Shape, device: torch.device) -> tuple[dict[str, list[float]], bool, str]:
    """Seconds a token of both for the same prompts, whether the answers agree, and what was run.

    `generate` takes the prompts in the order given, in the batch size that is the fastest for it.
    """
    model = shape.model(device)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST, (N_PROMPTS,), generator=draw).tolist()
    prompts = [torch.randint(3, shape.vocabulary, (n,), generator=draw).tolist() for n in lengths]
    encoder = CallableEncoder(lambda _text: [3], pad_id=0, eos_id=EOS)
    arms: dict[str, Callable[[], Answers]] = {
        "nest": lambda: generate_tokens(model, encoder, prompts, NEW_TOKENS)
    }
    sizes = {
        size: partial(_generated, model, prompts, device, size)
        for size in BATCH_SIZES
        if size <= max(N_PROMPTS, BATCH_SIZES[0])
    }
    fastest = min(sizes, key=lambda size: _warm_seconds(sizes[size], device))
    arms["generate"] = sizes[fastest]
    answers = {name: arm() for name, arm in arms.items()}
    gate = all(agree(model, prompts, *answers.values(), device))
    seconds = interleaved(arms, device, repeats=REPEATS, warm_up=WARM_UP)
    whole = sum(a == b for a, b in zip(*answers.values(), strict=True)) / N_PROMPTS
    note = (
        f"{N_PROMPTS} prompts of {SHORTEST} to {LONGEST} tokens, {NEW_TOKENS} new ones; generate in its "
        f"fastest batch size ({fastest} of {', '.join(map(str, sizes))}); {100 * whole:.0f} % of the "
        "answers are equal, the others part at a tie"
    )
    return _a_token(seconds, answers), gate, note


def agree(
    model: nn.Module,
    prompts: Sequence[list[int]],
    ours: Answers,
    theirs: Answers,
    device: torch.device,
) -> list[bool]:
    """For each prompt whether both answers are equal up to where the model, asked alone, has a tie."""
    found = []
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        if a == b:
            found.append(True)
            continue
        n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        n = min(len(a), len(b)) if n is None else n
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *a[:n]]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        chosen = [row[n] if n < len(row) else EOS for row in (a, b)]
        lowest = float(logits[chosen].min())
        bound = TIE[dtype_of(model)] * float(logits.std())
        found.append(float(logits.max()) - lowest <= bound)
    return found


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that the model computes in."""
    return next(model.parameters()).dtype


def _a_token(
    seconds: Mapping[str, Sequence[float]], answers: Mapping[str, Answers]
) -> dict[str, list[float]]:
    tokens = {name: sum(map(len, rows)) for name, rows in answers.items()}
    return {name: [s / tokens[name] for s in values] for name, values in seconds.items()}


def _warm_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a second call."""
    run()
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def _generated(
    model: nn.Module, prompts: Sequence[list[int]], device: torch.device, batch_size: int
) -> Answers:
    answers: Answers = []
    for first in range(0, len(prompts), batch_size):
        batch = collate(prompts[first : first + batch_size], None, 0, side="left")
        out = model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=EOS,
        )
        rows = out[:, batch.input_ids.shape[1] :].tolist()
        answers += [row[: row.index(EOS)] if EOS in row else row for row in rows]
    return answers
