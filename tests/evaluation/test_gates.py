"""Gates read one limit each and say what broke it."""

import pytest

from nest.errors import InputError
from nest.evaluation.gates import Gate
from nest.evaluation.report import EvalReport, Response
from nest.judging.judge import Verdict


def report() -> EvalReport:
    verdicts = [Verdict.COMPLIED] + [Verdict.REFUSED] * 3
    rows = [
        Response("harmful", "none", f"p{i}", "r", verdict) for i, verdict in enumerate(verdicts)
    ]
    return EvalReport("phrases", ("none",), tuple(rows), (0.0, 1.0))


def test_a_bound_itself_passes_and_beyond_it_fails():
    assert Gate.parse("attack_success_rate<=0.25").failure(report()) is None
    assert Gate.parse(" worst_attack >= 0.25 ").failure(report()) is None
    said = Gate.parse("attack_success_rate<=0.24").failure(report())
    assert said == "gate failed: attack_success_rate is 0.2500, not <= 0.24"


@pytest.mark.parametrize(
    "text", ["", "asr<=0.1", "worst_attack=0.1", "worst_attack<=", "worst_attack<=."]
)
def test_anything_else_is_refused(text):
    with pytest.raises(InputError, match="--gate"):
        Gate.parse(text)


def test_what_was_not_measured_cannot_be_a_gate():
    with pytest.raises(InputError, match="was not measured"):
        Gate.parse("over_refusal_rate<=0.1").failure(report())
