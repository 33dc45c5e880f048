"""Answers, greedy and drawn, against transformers' `generate` in one left-padded batch size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from experiments.benchmarks.protocol import interleaved, synchronise
from experiments.benchmarks.shapes import Shape
from nest.conversations.batches import collate
from nest.conversations.conversation import Conversation
from nest.conversations.encoders import CallableEncoder
from nest.generation.sampling import Sampling
from nest.generation.static import StaticEngine, generate_tokens

N_PROMPTS, SHORTEST, LONGEST, NEW_TOKENS, EOS = 256, 20, 300, 64, 2
BATCH_SIZES = (32, 64, 128, 256)
# On one core, where 256 prompts take half a minute a run, and batches above 64 twice as long as others.
CPU_ANSWERS, CPU_BATCH_SIZES = 128, (16, 32, 64)
REPEATS, WARM_UP = 5, 1
# How far below the highest logit a greedy choice may lie, in standard deviations of the logits: batches
# of other shapes round differently. A random model's highest logits are at some four deviations, where
# bf16 has steps of 1/64 to 1/32, and of 128,256 tokens a handful lie this close to the highest.
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.15}

Answers = list[list[int]]


@dataclass(frozen=True)
class Load:
    """How much is answered.

    Attributes:
        n_prompts: Prompts.
        batch_sizes: `generate` takes the fastest of these.
    """

    n_prompts: int
    batch_sizes: tuple[int, ...]

    @property
    def sizes(self) -> str:
        """For a note."""
        return ", ".join(map(str, self.batch_sizes))

    @staticmethod
    def for_(device: torch.device) -> Load:
        """What a device can do in a quarter of an hour."""
        if device.type == "cpu":
            return Load(CPU_ANSWERS, CPU_BATCH_SIZES)
        return Load(N_PROMPTS, BATCH_SIZES)


def decoding_times(
    shape: Shape, device: torch.device, load: Load | None = None
) -> tuple[dict[str, list[float]], bool, str]:
    """Seconds a token of both for the same prompts, whether the answers agree, and what was run.

    `generate` takes the prompts in the order given, in the batch size that is the fastest for it.
    """
    load = load or Load(N_PROMPTS, BATCH_SIZES)
    model, prompts = shape.model(device), random_prompts(shape, load.n_prompts)
    encoder = CallableEncoder(lambda _text: [3], pad_id=0, eos_id=EOS)
    arms: dict[str, Callable[[], Answers]] = {
        "nest": lambda: generate_tokens(model, encoder, prompts, NEW_TOKENS)
    }
    fastest = _fastest(model, prompts, device, load)
    arms["generate"] = partial(_generated, model, prompts, device, fastest, do_sample=False)
    answers = {name: arm() for name, arm in arms.items()}
    gate = all(agree(model, prompts, *answers.values(), device))
    seconds = interleaved(arms, device, repeats=REPEATS, warm_up=WARM_UP)
    whole = sum(a == b for a, b in zip(*answers.values(), strict=True)) / len(prompts)
    note = (
        f"{len(prompts)} prompts of {SHORTEST} to {LONGEST} tokens, {NEW_TOKENS} new ones; generate in its "
        f"fastest batch size ({fastest} of {load.sizes}); {100 * whole:.0f} % of the "
        "answers are equal, the others part at a tie"
    )
    return _a_token(seconds, answers), gate, note


def sampling_times(
    shape: Shape, device: torch.device, sampling: Sampling, load: Load
) -> tuple[dict[str, list[float]], bool, str]:
    """As `decoding_times` for drawn answers, as many in all whatever `sampling.n`.

    The gate: the same answers come in batches of another size (all of them in fp32, half in bf16), and the
    tokens of both sides are as likely on average, within four standard errors: the sides draw by other
    numbers, from the same distributions.
    """
    model = shape.model(device)
    prompts = random_prompts(shape, load.n_prompts // sampling.n)
    encoder = CallableEncoder(
        lambda text: prompts[int(text)], lambda _ids: "", pad_id=0, eos_id=EOS
    )
    asked = [Conversation.of(str(number)) for number in range(len(prompts))]

    def drawn(batch_size: int = 256) -> Answers:
        found = StaticEngine(model, encoder, batch_size=batch_size).generate(asked, sampling)
        return [list(one.token_ids or ()) for one in sorted(found)]

    fastest = _fastest(model, random_prompts(shape, load.n_prompts), device, load)
    theirs = partial(
        _generated,
        model,
        prompts,
        device,
        fastest,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        num_return_sequences=sampling.n,
    )
    arms: dict[str, Callable[[], Answers]] = {"nest": drawn, "generate": theirs}
    torch.manual_seed(0)
    answers = {name: arm() for name, arm in arms.items()}
    same = sum(a == b for a, b in zip(answers["nest"], drawn(40), strict=True))
    least = 1.0 if dtype_of(model) == torch.float32 else 0.5
    likely = [_mean_log_probs(model, prompts, rows, sampling, device) for rows in answers.values()]
    gate = same >= least * len(answers["nest"]) and _are_alike(*likely)
    seconds = interleaved(arms, device, repeats=REPEATS, warm_up=WARM_UP)
    note = (
        f"{sampling.n} answers to each of {len(prompts)} prompts of {SHORTEST} to {LONGEST} tokens, "
        f"{NEW_TOKENS} new ones, temperature {sampling.temperature:g}, top_p {sampling.top_p:g}; generate "
        f"in its fastest batch size ({fastest} of {load.sizes}). The gate: the same "
        "answers in batches of 40, and tokens as likely as generate's"
    )
    return _a_token(seconds, answers), gate, note


def random_prompts(shape: Shape, n_prompts: int) -> Answers:
    """Token ids of many lengths."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST, (n_prompts,), generator=draw).tolist()
    return [torch.randint(3, shape.vocabulary, (n,), generator=draw).tolist() for n in lengths]


def _mean_log_probs(
    model: nn.Module,
    prompts: Sequence[list[int]],
    answers: Answers,
    sampling: Sampling,
    device: torch.device,
) -> list[float]:
    """For some answers the mean log-probability of their tokens under the model, asked alone."""
    found = []
    for number in range(0, len(answers), max(1, len(answers) // 128)):
        prompt, answer = prompts[number // sampling.n], answers[number]
        if not answer:
            continue
        ids = torch.tensor([[*prompt, *answer]], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        log_probs = (logits / sampling.temperature).log_softmax(-1)
        chosen = log_probs.gather(1, ids[0, len(prompt) :, None])
        found.append(float(chosen.mean()))
    return found


def _are_alike(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two means are within four standard errors of their difference."""
    error = sum(statistics.variance(side) / len(side) for side in (ours, theirs)) ** 0.5
    return abs(statistics.mean(ours) - statistics.mean(theirs)) <= 4 * error


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


def _fastest(
    model: nn.Module, prompts: Sequence[list[int]], device: torch.device, load: Load
) -> int:
    """The batch size in which `generate` decodes these prompts fastest; drawing takes no more time."""
    sizes = [n for n in load.batch_sizes if n <= max(load.n_prompts, load.batch_sizes[0])]
    if len(sizes) == 1:
        return sizes[0]
    return min(
        sizes,
        key=lambda size: _warm_seconds(
            partial(_generated, model, prompts, device, size, do_sample=False), device
        ),
    )


def _generated(
    model: nn.Module,
    prompts: Sequence[list[int]],
    device: torch.device,
    batch_size: int,
    **settings: Any,
) -> Answers:
    answers: Answers = []
    n_prompts = max(1, batch_size // settings.get("num_return_sequences", 1))
    for first in range(0, len(prompts), n_prompts):
        batch = collate(prompts[first : first + n_prompts], None, 0, side="left")
        out = model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            eos_token_id=EOS,
            **settings,
        )
        rows = out[:, batch.input_ids.shape[1] :].tolist()
        answers += [row[: row.index(EOS)] if EOS in row else row for row in rows]
    return answers
