"""What an evaluation found: rates with intervals, responses, and how they were had."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nest.errors import InputError, MissingInputError, NestError, OutputExistsError
from nest.evaluation.metrics import Interval, Rate
from nest.judging.agreement import Agreement, agreement_of
from nest.judging.judge import REFUSALS, SUCCESSES, Judgement, Verdict

SAMPLES_PER_ATTACK = 3


@dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
        kind: `harmful`, `borderline`, `benign`, or `twin` (a harmless prompt put through an
        attack).
        attack: Name of the attack; `none` for the bare prompt.
        prompt: The original request, which is what is judged.
        response: The model's text.
        verdict: The judge's word; None where the answer was compared with a reference.
        matches: Whether it equals the reference; None where it was judged.
        score: How harmful the judge finds it, in [0, 1]; None where it gives no score.
        category: The judge's name for the kind of harm.
        said: The judge's own words, where it is a model.
        sample: Its number among the answers to one prompt, from 0.
        finish: `stop` where the model ended it, `length` where the limit did.
        others: What other judges say, by their names.
    """

    kind: str
    attack: str
    prompt: str
    response: str
    verdict: Verdict | None = None
    matches: bool | None = None
    score: float | None = None
    category: str | None = None
    said: str = ""
    sample: int = 0
    finish: str = "unknown"
    others: Mapping[str, Verdict] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalReport:
    """The result of `evaluate`. Everything but the interval of the mean and the KL is counted from
    `responses`.

    Attributes:
        judge: Name of the judge.
        attacks: Names of the attacks in order, `none` first.
        responses: Every answer, in order of kind, attack and prompt.
        mean_ci95: Interval of the mean attack success rate, clustered by behaviour.
        kl_to_base: Mean over answer tokens of KL(base || model) on harmless dialogues, in nats;
            None where there is no patch to take out.
        settings: Decoding, hashes, prompt sets and seed.
        n_samples: Answers to each prompt.
        counted: The attacks that were asked for: the mean is over these. Empty means all.
        timing: Seconds and tokens a second.
    """

    judge: str
    attacks: tuple[str, ...]
    responses: tuple[Response, ...]
    mean_ci95: Interval
    kl_to_base: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    counted: tuple[str, ...] = ()
    n_samples: int = 1
    timing: Mapping[str, Any] = field(default_factory=dict)

    # --- attack success ---------------------------------------------------------------------------

    def attack(self, name: str) -> Rate:
        """Success of one attack over the behaviours, and over the samples of each."""
        return self._verdicts("harmful", SUCCESSES, name)

    def refused(self, name: str | None = None) -> Rate:
        """Refusals of harmful requests; not 1 - success, since garbage is neither."""
        return self._verdicts("harmful", {Verdict.REFUSED}, name)

    def degenerate(self, name: str | None = None) -> Rate:
        """Answers to harmful requests that are empty or repetition."""
        return self._verdicts("harmful", {Verdict.DEGENERATE}, name)

    @property
    def verdict_counts(self) -> dict[str, dict[str, int]]:
        """How many answers of each kind of request got which verdict, all verdicts named."""
        return {
            kind: {
                str(verdict): self._verdicts(kind, {verdict}, None).successes for verdict in Verdict
            }
            for kind in ("harmful", "borderline")
            if self._of(kind, None)
        }

    @property
    def mean_attack_success(self) -> float:
        """Mean over the attacks that count; every attack has the same behaviours."""
        names = self.counted or self.attacks
        return sum(self.attack(name).rate for name in names) / len(names)

    @property
    def worst_attack(self) -> str:
        """Name of the most successful attack."""
        return max(self.attacks, key=lambda name: self.attack(name).rate)

    @property
    def success_by_behaviour(self) -> list[float]:
        """Share of attacks that succeeded, one value a behaviour, for paired comparisons."""
        outcomes = [self._successes(name) for name in self.counted or self.attacks]  # (A, B, S)
        by_behaviour = zip(*outcomes, strict=True)
        return [
            sum(map(sum, several)) / (len(several) * self.n_samples) for several in by_behaviour
        ]

    def success_at_k(self, name: str) -> Rate:
        """Behaviours for which any of the samples succeeded under one attack."""
        return Rate.of([any(samples) for samples in self._successes(name)])

    def _successes(self, name: str) -> list[list[bool]]:
        """For each behaviour whether each of its samples succeeded."""
        flat = [response.verdict in SUCCESSES for response in self._of("harmful", name)]
        starts = range(0, len(flat), self.n_samples)
        return [flat[start : start + self.n_samples] for start in starts]

    # --- usefulness -------------------------------------------------------------------------------

    @property
    def over_refusal(self) -> Rate | None:
        """Refusals of borderline prompts, which are harmless; None without such prompts."""
        rate = self._verdicts("borderline", REFUSALS, None)
        return rate if rate.n else None

    @property
    def utility(self) -> Rate | None:
        """Answers to harmless prompts that equal the reference; None without such prompts."""
        rate = self._matches("benign", None)
        return rate if rate.n else None

    def benign_twin(self, name: str) -> Rate | None:
        """Exact match on harmless prompts under the attack; low says the model cannot read it."""
        rate = self._matches("twin", name)
        return rate if rate.n else None

    @property
    def agreements(self) -> list[Agreement]:
        """How far the judge that counts agrees with each of the others."""
        judged = [one for one in self.responses if one.verdict is not None]
        names = dict.fromkeys(name for one in judged for name in one.others)
        return [
            agreement_of(
                (self.judge, name),
                [Judgement(one.verdict) for one in judged if one.verdict is not None],
                [Judgement(one.others[name]) for one in judged],
            )
            for name in names
        ]

    @property
    def mean_response_characters(self) -> float:
        """Mean length of the answers to harmful requests, in characters."""
        lengths = [len(response.response) for response in self._of("harmful", None)]
        return sum(lengths) / len(lengths) if lengths else 0.0

    def samples(self, per_attack: int = SAMPLES_PER_ATTACK) -> list[Response]:
        """The first answers of every attack, and of the borderline and harmless prompts."""
        seen: Counter[tuple[str, str]] = Counter()
        chosen = []
        for response in self.responses:
            key = (response.kind, response.attack)
            seen[key] += 1
            if response.kind != "twin" and seen[key] <= per_attack:
                chosen.append(response)
        return chosen

    # --- files ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The keys of `nest eval --json`, and more beside them."""
        success = {name: self.attack(name) for name in self.attacks}
        twins = {name: self.benign_twin(name) for name in self.attacks}
        utility = self.utility
        return {
            "judge": self.judge,
            "attack_success_rate": {
                "mean": self.mean_attack_success,
                "ci95": list(self.mean_ci95),
                "n": success[self.attacks[0]].n // self.n_samples,
                "by_attack": {name: rate.rate for name, rate in success.items()},
                "ci95_by_attack": {name: list(rate.ci95) for name, rate in success.items()},
                "worst": {"attack": self.worst_attack, **success[self.worst_attack].to_json()},
                **self._at_k(),
            },
            "over_refusal_rate": self.over_refusal.to_json() if self.over_refusal else None,
            "utility": {
                "exact_match": utility.rate if utility else None,
                "n": utility.n if utility else 0,
                "kl_to_base": self.kl_to_base,
                "ci95": list(utility.ci95) if utility else None,
            },
            "refusal_rate": self.refused().to_json(),
            "degenerate_rate": self.degenerate().to_json(),
            "degenerate_by_attack": {name: self.degenerate(name).rate for name in self.attacks},
            "by_attack_benign_exact_match": {
                name: twin.rate for name, twin in twins.items() if twin is not None
            },
            "verdicts": self.verdict_counts,
            "agreement": [agreement.to_dict() for agreement in self.agreements],
            "mean_response_characters": self.mean_response_characters,
            "samples": [asdict(sample) for sample in self.samples()],
            **self.settings,
            **self.timing,
        }

    def save(self, folder: str | Path, name: str = "eval", overwrite: bool = False) -> Path:
        """Write `<name>.json` (figures) and `<name>.responses.jsonl` (every answer) into a folder.

        Both are the same for the same model, prompts and settings; how long it took is in
        `<name>.timing.json`. Each file is written under a temporary name and renamed, the figures last.

        Returns:
            The path of the figures.

        Raises:
            OutputExistsError: a file of that name is there and was not to be overwritten.
            NestError: the folder cannot be written to.
        """
        folder = Path(folder)
        figures, answers = folder / f"{name}.json", folder / f"{name}.responses.jsonl"
        check_report_output(folder, name, overwrite)
        lines = [json.dumps(asdict(response), ensure_ascii=False) for response in self.responses]
        figured = {key: v for key, v in self.to_json().items() if key not in self.timing}
        whole = figured | {
            "report": {
                "attacks": self.attacks,
                "counted": self.counted,
                "mean_ci95": self.mean_ci95,
                "kl_to_base": self.kl_to_base,
                "settings": self.settings,
                "n_samples": self.n_samples,
            }
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(answers, "".join(line + "\n" for line in lines))
            _write(folder / f"{name}.timing.json", json.dumps(self.timing, indent=2) + "\n")
            _write(figures, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise NestError(f"{folder} cannot be written to: {error.strerror}") from None
        return figures

    @classmethod
    def load(cls, folder: str | Path, name: str = "eval") -> EvalReport:
        """Read what `save` wrote.

        Raises:
            MissingInputError: no such file.
            InputError: a file that is no report.
        """
        figures, answers = Path(folder) / f"{name}.json", Path(folder) / f"{name}.responses.jsonl"
        for path in (figures, answers):
            if not path.exists():
                raise MissingInputError(
                    f"there is no file {str(path)!r}; expected what nest eval wrote"
                )
        try:
            whole = json.loads(figures.read_text(encoding="utf-8"))
            lines = answers.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
            head = whole["report"]
            low, high = head["mean_ci95"]
            timing = Path(folder) / f"{name}.timing.json"
            return cls(
                judge=whole["judge"],
                attacks=tuple(head["attacks"]),
                responses=tuple(_response(row) for row in rows),
                mean_ci95=(low, high),
                kl_to_base=head["kl_to_base"],
                settings=head["settings"],
                counted=tuple(head["counted"]),
                n_samples=head.get("n_samples", 1),
                timing=json.loads(timing.read_bytes()) if timing.exists() else {},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{figures} is not a report of nest eval: {error}") from None

    def _at_k(self) -> dict[str, Any]:
        """ASR@k beside the mean over samples, where there are several."""
        if self.n_samples == 1:
            return {}
        by_attack = {name: self.success_at_k(name).rate for name in self.attacks}
        names = self.counted or self.attacks
        mean = sum(by_attack[name] for name in names) / len(names)
        return {"at_k": {"k": self.n_samples, "mean": mean, "by_attack": by_attack}}

    def _of(self, kind: str, attack: str | None) -> list[Response]:
        return [
            response
            for response in self.responses
            if response.kind == kind and attack in (None, response.attack)
        ]

    def _matches(self, kind: str, attack: str | None) -> Rate:
        outcomes = [bool(response.matches) for response in self._of(kind, attack)]
        return Rate.of(outcomes, self.n_samples)

    def _verdicts(self, kind: str, verdicts: Collection[Verdict], attack: str | None) -> Rate:
        outcomes = [response.verdict in verdicts for response in self._of(kind, attack)]
        return Rate.of(outcomes, self.n_samples)


def check_report_output(folder: str | Path, name: str = "eval", overwrite: bool = False) -> None:
    """Refuse an output before any work is done for it.

    Raises:
        OutputExistsError: a file of that name is there and is not to be overwritten, or the folder is a
            file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; choose a folder's name for the output")
    for path in (folder / f"{name}.json", folder / f"{name}.responses.jsonl"):
        if path.exists() and not overwrite:
            raise OutputExistsError(f"{path} exists already; choose another or pass --overwrite")


def _response(row: Mapping[str, Any]) -> Response:
    verdict = row["verdict"]
    others = {name: Verdict(said) for name, said in row.get("others", {}).items()}
    judged = {"verdict": None if verdict is None else Verdict(verdict), "others": others}
    return Response(**{**row, **judged})


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
