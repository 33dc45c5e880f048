"""Attack success, over-refusal, usefulness and drift of a model, in one pass of generation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from nest.artifacts.unfinished import Unfinished
from nest.conversations.conversation import Conversation
from nest.conversations.encoders import Encoder, rendered_hash
from nest.errors import InputError
from nest.evaluation.config import Engine
from nest.evaluation.divergence import kl_to_base
from nest.evaluation.metrics import clustered_interval
from nest.evaluation.report import EvalReport, Response
from nest.generation.static import generate_tokens
from nest.judging.judge import SUCCESSES, Exchange, Judge, Judgement, Verdict
from nest.judging.texts import exact_match
from nest.models.fingerprint import weights_hash
from nest.progress import ProgressCallback
from nest.prompts.attacks import NO_ATTACK, Attack, attacked, attacks_hash
from nest.prompts.prompt_set import PromptSet

JUDGED_AT_ONCE = 64
"""Answers that go to the judge together where what is done is kept."""


@dataclass(frozen=True)
class _Request:
    """A prompt to be answered, and what it is answered for."""

    kind: str
    attack: Attack
    asked: Conversation
    reference: str | None = None

    @property
    def prompt(self) -> str:
        """What the user says last, before the attack."""
        return self.asked.asked


def evaluate(
    model: nn.Module,
    encoder: Encoder,
    *,
    harmful: PromptSet,
    borderline: PromptSet | None = None,
    benign: PromptSet | None = None,
    attacks: Sequence[Attack] = (NO_ATTACK,),
    judge: Judge,
    removed: Callable[[], AbstractContextManager[object]] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 256,
    seed: int = 0,
    bootstrap_resamples: int = 2000,
    benign_twin_prompts: int = 50,
    counted: Sequence[str] = (),
    engine: Engine = "auto",
    progress: ProgressCallback | None = None,
    work: Unfinished | None = None,
) -> EvalReport:
    """Answer every prompt greedily, judge the answers and count.

    Attack success is judged against the original request, never the transformed one. The benign
    twin puts harmless prompts through the same attacks: where their exact match is low too, the
    model cannot read the attack, and a low success says nothing about safety. The model ends
    bit-identical.

    Args:
        model: Evaluated as it is.
        encoder: Of the model.
        harmful: Requests; their responses, if any, are what compliance would say.
        borderline: Harmless requests that sound harmful, for the over-refusal rate.
        benign: Harmless dialogues, for the exact match, the benign twin and the KL.
        attacks: `resolve_attacks(...)`; the names are unique.
        judge: `make_judge(...)`, or the caller's own.
        removed: The base model for the time of a block, to measure the drift from it.
        max_new_tokens, batch_size, seed, bootstrap_resamples, benign_twin_prompts, engine: As in
            `EvaluationConfig`.
        counted: Names of the attacks that the mean is over; all of them if empty.
        progress: Called as `progress(stage, done, total)`, stages `generate` and `kl`.
        work: Keeps answers and verdicts, so that a later run goes on from there.

    Raises:
        InputError: no attacks or one name twice, benign prompts without responses, an attack that
            makes a prompt longer than the context (named), or a judge that lacks references.

    Source:
        METHOD.md, section 1 (evaluation); the intervals are of this project's own choice.
    """
    started = time.perf_counter()
    if not attacks or len({attack.name for attack in attacks}) != len(attacks):
        names = ", ".join(attack.name for attack in attacks) or "none at all"
        raise InputError(f"the attacks are {names}; expected at least one and each name once")
    requests = _requests(harmful, borderline, benign, attacks, benign_twin_prompts)
    encoded = [_encoded(encoder, request) for request in requests]
    rendered = rendered_hash(encoded)
    if removed is not None and benign is not None:
        for asked, answer in benign.chats():  # what cannot be a dialogue is said before the work
            encoder.dialogue(asked, answer)
    if work is not None:
        work.begin(
            "report",
            {
                "rendered prompts": rendered,
                "judged prompts": _hash_of(requests),
                "judge": [judge.name, judge.sha256],
                "max_new_tokens": max_new_tokens,
                "batch_size": batch_size,
                "engine": engine,
                "end": sorted(encoder.eos_ids),
                "model": weights_hash(model),
            },
        )
    answers = generate_tokens(
        model, encoder, encoded, max_new_tokens, batch_size, progress, engine=engine, work=work
    )
    generation_seconds = time.perf_counter() - started
    texts = [encoder.decode(answer) for answer in answers]
    responses = _judged(requests, texts, judge, work)
    kl = None
    if removed is not None and benign is not None:
        kl = kl_to_base(model, encoder, benign.chats(), removed, batch_size, progress)
    n_tokens = sum(len(answer) for answer in answers)
    settings = _settings(harmful, borderline, benign, attacks, judge) | {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "mean_response_tokens": _mean_harmful_tokens(requests, answers),
        "rendered_sha256": rendered,
    }
    timing = {
        "generation": {
            "responses": len(answers),
            "tokens": n_tokens,
            "seconds": generation_seconds,
            # of answers that an earlier run has left, nobody knows how long they took
            "tokens_per_second": None
            if work is not None and work.goes_on
            else n_tokens / generation_seconds,
        },
        "seconds": time.perf_counter() - started,
    }
    return EvalReport(
        judge=judge.name,
        attacks=tuple(attack.name for attack in attacks),
        responses=tuple(responses),
        mean_ci95=clustered_interval(
            _outcomes(responses, attacks, counted), seed, bootstrap_resamples
        ),
        kl_to_base=kl,
        settings=settings,
        counted=tuple(counted),
        timing=timing,
    )


def _requests(
    harmful: PromptSet,
    borderline: PromptSet | None,
    benign: PromptSet | None,
    attacks: Sequence[Attack],
    twin_prompts: int,
) -> list[_Request]:
    references: Sequence[str | None] = harmful.responses or [None] * len(harmful)
    requests = [
        _Request("harmful", attack, prompt, reference)
        for attack in attacks
        for prompt, reference in zip(harmful.conversations, references, strict=True)
    ]
    if borderline is not None:
        requests += [
            _Request("borderline", NO_ATTACK, prompt) for prompt in borderline.conversations
        ]
    if benign is not None:
        dialogues = benign.chats()
        requests += [_Request("benign", NO_ATTACK, prompt, answer) for prompt, answer in dialogues]
        twins = [dialogues[index] for index in _spread(len(dialogues), twin_prompts)]
        requests += [
            _Request("twin", attack, prompt, answer)
            for attack in attacks
            for prompt, answer in twins
        ]
    return requests


def _spread(n: int, at_most: int) -> list[int]:
    """At most so many indices, evenly spread: a sorted file is sampled from end to end."""
    count = min(n, at_most)
    return [index * n // count for index in range(count)]


def _encoded(encoder: Encoder, request: _Request) -> list[int]:
    try:
        return encoder.prompt(attacked(request.attack, request.asked))
    except InputError as error:
        if request.attack is NO_ATTACK:
            raise
        raise InputError(
            f"attack {request.attack.name!r}: {error} (or leave this attack out)"
        ) from None


def _judged(
    requests: Sequence[_Request], texts: Sequence[str], judge: Judge, work: Unfinished | None
) -> list[Response]:
    """Responses in the requests' order: harmful and borderline ones judged, the others compared."""
    judgements = _kept_judgements(work)
    for kind in ("harmful", "borderline"):
        rows = [i for i, request in enumerate(requests) if request.kind == kind]
        rows = [index for index in rows if index not in judgements]
        size = JUDGED_AT_ONCE if work is not None else max(1, len(rows))
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            found = judge.judge([_exchange(requests[i], texts[i]) for i in part])
            judgements |= zip(part, found, strict=True)
            if work is not None:
                entry = {str(i): asdict(judged) for i, judged in zip(part, found, strict=True)}
                work.journal.add({"judgements": entry})
    return [
        Response(
            kind=request.kind,
            attack=request.attack.name,
            prompt=request.prompt,
            response=text,
            matches=None if index in judgements else exact_match(text, request.reference or ""),
            **_said_of(judgements.get(index)),
        )
        for index, (request, text) in enumerate(zip(requests, texts, strict=True))
    ]


def _said_of(judgement: Judgement | None) -> dict[str, Any]:
    return {} if judgement is None else asdict(judgement)


def _kept_judgements(work: Unfinished | None) -> dict[int, Judgement]:
    """What the judge said in an earlier run, by the request's number."""
    entries = () if work is None else work.journal.entries
    found = (entry["judgements"] for entry in entries if "judgements" in entry)
    return {
        int(i): Judgement(**{**said, "verdict": Verdict(said["verdict"])})
        for several in found
        for i, said in several.items()
    }


def _hash_of(requests: Sequence[_Request]) -> str:
    """Of what the judge gets beside the answers."""
    rows = [
        [r.kind, r.attack.name, r.prompt if r.asked.is_plain else r.asked.messages(), r.reference]
        for r in requests
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _exchange(request: _Request, text: str) -> Exchange:
    return Exchange(
        request.asked,
        text,
        reference=request.reference,
        harmless=request.kind == "borderline",
    )


def _outcomes(
    responses: Sequence[Response], attacks: Sequence[Attack], counted: Sequence[str]
) -> np.ndarray:
    """(B behaviours, A attacks that count) of whether the attack succeeded."""
    success = [
        response.verdict in SUCCESSES for response in responses if response.kind == "harmful"
    ]
    outcomes = np.array(success, dtype=bool).reshape(len(attacks), -1)
    keep = [not counted or attack.name in counted for attack in attacks]
    return outcomes[keep].T


def _mean_harmful_tokens(requests: Sequence[_Request], answers: Sequence[Sequence[int]]) -> float:
    lengths = [
        len(answer)
        for request, answer in zip(requests, answers, strict=True)
        if request.kind == "harmful"
    ]
    return sum(lengths) / len(lengths)


def _settings(
    harmful: PromptSet,
    borderline: PromptSet | None,
    benign: PromptSet | None,
    attacks: Sequence[Attack],
    judge: Judge,
) -> dict[str, Any]:
    sets = {"harmful": harmful, "borderline": borderline, "benign": benign}
    return {
        "decoding": "greedy, one sample a prompt",
        "judge_sha256": judge.sha256,
        "attacks_sha256": attacks_hash(attacks),
        "prompt_sets": {
            kind: prompts.to_manifest() for kind, prompts in sets.items() if prompts is not None
        },
    }
