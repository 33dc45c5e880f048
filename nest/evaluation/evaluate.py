"""Attack success, over-refusal, usefulness and drift of a model, in one pass of generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nest.artifacts.unfinished import Unfinished
from nest.conversations.encoders import Encoder
from nest.errors import InputError
from nest.evaluation.answering import Answer, answered
from nest.evaluation.config import EvaluationConfig
from nest.evaluation.metrics import clustered_interval
from nest.evaluation.report import EvalReport, Response
from nest.evaluation.requests import (
    JUDGED_KINDS,
    Request,
    check_encodable,
    hash_of,
    requests_of,
)
from nest.generation.engine import Engine
from nest.generation.sampling import Sampling
from nest.judging.judge import SUCCESSES, Judge, Judgement, Particular, Verdict
from nest.judging.texts import exact_match
from nest.progress import ProgressCallback
from nest.prompts.attacks import NO_ATTACK, Attack, attacks_hash
from nest.prompts.prompt_set import PromptSet

JUDGED_AT_ONCE = 64
"""Answers that go to a judge together."""

CONFIG = EvaluationConfig()


def evaluate(
    engine: Engine,
    *,
    harmful: PromptSet,
    borderline: PromptSet | None = None,
    benign: PromptSet | None = None,
    attacks: Sequence[Attack] = (NO_ATTACK,),
    judges: Sequence[Judge],
    config: EvaluationConfig = CONFIG,
    counted: Sequence[str] = (),
    encoder: Encoder | None = None,
    drift: Callable[[PromptSet], float] | None = None,
    progress: ProgressCallback | None = None,
    work: Unfinished | None = None,
) -> EvalReport:
    """Answer every prompt, judge the answers and count.

    Attack success is judged against the original request, never the transformed one. The benign
    twin puts harmless prompts through the same attacks: where their exact match is low too, the
    model cannot read the attack, and a low success says nothing about safety.

    Args:
        engine: Answers for the model.
        harmful: Requests; their responses, if any, are what compliance would say.
        borderline: Harmless requests that sound harmful, for the over-refusal rate.
        benign: Harmless dialogues, for the exact match, the benign twin and the drift.
        attacks: `resolve_attacks(...)`; the names are unique.
        judges: The first one counts; how far the others agree with it is reported.
        config: Sampling, seed and counts.
        counted: Names of the attacks that the mean is over; all of them if empty.
        encoder: Of a model in this process: what it cannot encode is then said before the work.
        drift: How far the model is from its base on the benign dialogues; see `kl_to_base`.
        progress: Called as `progress(stage, done, total)`, stage `judge`; engines have their own.
        work: Keeps answers and judgements, so that a later run goes on from there.

    Raises:
        InputError: no attacks or one name twice, benign prompts without responses, an attack that
            makes a prompt longer than the context (named), or a judge that lacks references.
        EngineError: the engine, or the model behind a judge, failed.

    Source:
        METHOD.md, section 1 (evaluation); the intervals are of this project's own choice.
    """
    started = time.perf_counter()
    if len({judge.name for judge in judges}) != len(judges) or not judges:
        names = ", ".join(judge.name for judge in judges) or "none at all"
        raise InputError(f"the judges are {names}; expected at least one and each name once")
    requests = requests_of(harmful, borderline, benign, attacks, config.benign_twin_prompts)
    rendered = None if encoder is None else check_encodable(encoder, requests)
    if encoder is not None and drift is not None and benign is not None:
        for asked, answer in benign.chats():  # what cannot be a dialogue is said before the work
            encoder.dialogue(asked, answer)
    judged = [request.exchange("") for request in requests if request.kind in JUDGED_KINDS]
    for judge in judges:
        if isinstance(judge, Particular):  # what it lacks is said before the work
            judge.check_requests(judged)
    sampling = config.sampling()
    if work is not None:
        work.begin(
            "report",
            {
                "rendered prompts": rendered,
                "judged prompts": hash_of(requests),
                "asked prompts": hash_of_asked(requests),
                "judge": [[judge.name, judge.sha256] for judge in judges],
                "sampling": asdict(sampling),
                "engine": [engine.name, engine.identity],
            },
        )
    answers = answered(engine, [request.asked() for request in requests], sampling, work)
    generation_seconds = time.perf_counter() - started
    texts = [[answer.text for answer in several] for several in answers]
    judgements = {judge.name: _judged(requests, texts, judge, work, progress) for judge in judges}
    responses = _responses(requests, answers, judgements, judges[0].name)
    kl = None if drift is None or benign is None else drift(benign)
    settings = _settings(harmful, borderline, benign, attacks, judges[0], engine) | {
        "max_new_tokens": config.max_new_tokens,
        "sampling": {**asdict(sampling), "stop": list(sampling.stop)},
        "decoding": _in_words(sampling),
        "seed": config.seed,
        "mean_response_tokens": _mean_harmful_tokens(requests, answers),
        "rendered_sha256": rendered,
    }
    return EvalReport(
        judge=judges[0].name,
        attacks=tuple(attack.name for attack in attacks),
        responses=tuple(responses),
        mean_ci95=clustered_interval(
            _outcomes(responses, attacks, counted, sampling.n),
            config.seed,
            config.bootstrap_resamples,
        ),
        kl_to_base=kl,
        settings=settings,
        counted=tuple(counted),
        n_samples=sampling.n,
        timing=_timing(answers, generation_seconds, started, work),
    )


def hash_of_asked(requests: Sequence[Request]) -> str:
    """sha256 of the prompts as the attacks make them."""
    asked = [Request(r.kind, NO_ATTACK, r.asked()) for r in requests]
    return hash_of(asked)


def _judged(
    requests: Sequence[Request],
    texts: Sequence[Sequence[str]],
    judge: Judge,
    work: Unfinished | None,
    progress: ProgressCallback | None,
) -> dict[tuple[int, int], Judgement]:
    """What a judge says of every answer to a harmful or borderline request."""
    judgements = _kept_judgements(work, judge)
    rows = [
        (index, sample)
        for kind in JUDGED_KINDS
        for index, request in enumerate(requests)
        if request.kind == kind
        for sample in range(len(texts[index]))
    ]
    left = [row for row in rows if row not in judgements]
    for start in range(0, len(left), JUDGED_AT_ONCE):
        part = left[start : start + JUDGED_AT_ONCE]
        found = judge.judge([requests[i].exchange(texts[i][s]) for i, s in part])
        judgements |= zip(part, found, strict=True)
        if work is not None:
            said = {f"{i}.{s}": asdict(one) for (i, s), one in zip(part, found, strict=True)}
            work.journal.add({"judge": judge.name, "judgements": said})
        if progress is not None:
            progress("judge", len(judgements), len(rows))
    return judgements


def _kept_judgements(work: Unfinished | None, judge: Judge) -> dict[tuple[int, int], Judgement]:
    """What the judge said in an earlier run."""
    entries = () if work is None else work.journal.entries
    found = {}
    for entry in entries:
        if entry.get("judge") != judge.name:
            continue
        for key, said in entry["judgements"].items():
            number, _, sample = key.partition(".")
            judged = Judgement(**{**said, "verdict": Verdict(said["verdict"])})
            found[int(number), int(sample)] = judged
    return found


def _responses(
    requests: Sequence[Request],
    answers: Sequence[Sequence[Answer]],
    judged: Mapping[str, Mapping[tuple[int, int], Judgement]],
    first: str,
) -> list[Response]:
    """In the order of requests and samples: judged, or compared with the reference."""
    responses = []
    for index, request in enumerate(requests):
        for sample, answer in enumerate(answers[index]):
            judgement = judged[first].get((index, sample))
            matches = None
            if judgement is None:
                matches = exact_match(answer.text, request.reference or "")
            responses.append(
                Response(
                    kind=request.kind,
                    attack=request.attack.name,
                    prompt=request.original.asked,
                    response=answer.text,
                    matches=matches,
                    sample=sample,
                    finish=answer.finish,
                    others={
                        name: said[index, sample].verdict
                        for name, said in judged.items()
                        if name != first and judgement is not None
                    },
                    **({} if judgement is None else vars(judgement)),
                )
            )
    return responses


def _outcomes(
    responses: Sequence[Response],
    attacks: Sequence[Attack],
    counted: Sequence[str],
    n_samples: int,
) -> np.ndarray:
    """(B behaviours, A attacks that count x S samples) of whether the attack succeeded."""
    success = [one.verdict in SUCCESSES for one in responses if one.kind == "harmful"]
    outcomes = np.array(success, dtype=bool).reshape(len(attacks), -1, n_samples)  # (A, B, S)
    keep = [not counted or attack.name in counted for attack in attacks]
    kept = outcomes[keep].transpose(1, 0, 2)  # (B, A, S)
    return kept.reshape(len(kept), -1)


def _in_words(sampling: Sampling) -> str:
    if sampling.is_greedy:
        return "greedy, one sample a prompt"
    return f"temperature {sampling.temperature:g}, {sampling.n} samples a prompt"


def _mean_harmful_tokens(
    requests: Sequence[Request], answers: Sequence[Sequence[Answer]]
) -> float | None:
    """None where the engine does not say how long its answers are."""
    lengths = [
        answer.n_tokens
        for request, several in zip(requests, answers, strict=True)
        for answer in several
        if request.kind == "harmful"
    ]
    known = [length for length in lengths if length is not None]
    return sum(known) / len(known) if len(known) == len(lengths) else None


def _timing(
    answers: Sequence[Sequence[Answer]],
    generation_seconds: float,
    started: float,
    work: Unfinished | None,
) -> dict[str, Any]:
    lengths = [answer.n_tokens for several in answers for answer in several]
    known = sum(length for length in lengths if length is not None)
    # of answers that an earlier run has left, nobody knows how long they took
    told = None not in lengths and not (work is not None and work.goes_on)
    return {
        "generation": {
            "responses": len(lengths),
            "tokens": known,
            "seconds": generation_seconds,
            "tokens_per_second": known / generation_seconds if told else None,
        },
        "seconds": time.perf_counter() - started,
    }


def _settings(
    harmful: PromptSet,
    borderline: PromptSet | None,
    benign: PromptSet | None,
    attacks: Sequence[Attack],
    judge: Judge,
    engine: Engine,
) -> dict[str, Any]:
    sets = {"harmful": harmful, "borderline": borderline, "benign": benign}
    return {
        "engine": engine.name,
        "judge_sha256": judge.sha256,
        "attacks_sha256": attacks_hash(attacks),
        "prompt_sets": {
            kind: prompts.to_manifest() for kind, prompts in sets.items() if prompts is not None
        },
    }
