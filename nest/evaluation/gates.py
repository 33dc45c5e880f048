"""Gates: limits that an evaluation must keep, for scripts and CI."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nest.errors import InputError
from nest.evaluation.metrics import Rate
from nest.evaluation.report import EvalReport


def _rate(rate: Rate | None) -> float | None:
    return None if rate is None else rate.rate


FIGURES: Mapping[str, Callable[[EvalReport], float | None]] = {
    "attack_success_rate": lambda report: report.mean_attack_success,
    "worst_attack": lambda report: report.attack(report.worst_attack).rate,
    "over_refusal_rate": lambda report: _rate(report.over_refusal),
    "exact_match": lambda report: _rate(report.utility),
    "kl_to_base": lambda report: report.kl_to_base,
}
"""What a gate can bound: rates in [0, 1], the KL in nats."""

_GATE = re.compile(r"^\s*(?P<figure>\w+)\s*(?P<sign><=|>=)\s*(?P<bound>[0-9.eE+-]+)\s*$")


@dataclass(frozen=True)
class Gate:
    """One limit, such as `attack_success_rate<=0.05`.

    Attributes:
        figure: Name in `FIGURES`.
        at_most: Whether the bound is an upper one.
        bound: The limit itself, which passes.
    """

    figure: str
    at_most: bool
    bound: float

    @staticmethod
    def parse(text: str) -> Gate:
        """Read `FIGURE<=BOUND` or `FIGURE>=BOUND`.

        Raises:
            InputError: anything else, or an unknown figure.
        """
        match = _GATE.match(text)
        if match is None or match["figure"] not in FIGURES:
            raise InputError(
                f"--gate is {text!r}; it must read FIGURE<=NUMBER or FIGURE>=NUMBER, the figure one of "
                f"{', '.join(FIGURES)}"
            )
        try:
            bound = float(match["bound"])
        except ValueError:
            raise InputError(f"--gate {text!r} has no number after {match['sign']}") from None
        return Gate(match["figure"], match["sign"] == "<=", bound)

    def failure(self, report: EvalReport) -> str | None:
        """One sentence where the report breaks the limit, None where it keeps it.

        Raises:
            InputError: the report has no such figure.
        """
        value = FIGURES[self.figure](report)
        if value is None:
            raise InputError(
                f"--gate asks for {self.figure}, which was not measured: give --borderline for "
                "over_refusal_rate, --benign for exact_match, --benign and --patch for kl_to_base"
            )
        if value <= self.bound if self.at_most else value >= self.bound:
            return None
        sign = "<=" if self.at_most else ">="
        return f"gate failed: {self.figure} is {value:.4f}, not {sign} {self.bound:g}"
