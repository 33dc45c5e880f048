"""Whether dialogues say what they are given for: harmful prompts refused, benign ones answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nest.errors import InputError
from nest.judging.judge import Verdict
from nest.judging.phrases import PhraseJudge
from nest.prompts.prompt_set import PromptSet, text_columns

# Of harmful dialogues at least this share must be refusals, and of benign ones at most this share may be.
LEAST_REFUSALS = MOST_REFUSALS = 0.5
# Beyond these a warning: what phrases don't see is some few percent of refusals in plain English.
USUAL_REFUSALS, USUAL_BENIGN_REFUSALS = 0.9, 0.1


@dataclass(frozen=True)
class RefusalCount:
    """How many of a set's responses are refusals, by their phrases."""

    n_refusals: int
    n: int

    @property
    def share(self) -> float:
        return self.n_refusals / self.n

    def __str__(self) -> str:
        return f"{self.n_refusals} of {self.n}"


def count_refusals(dialogues: PromptSet, judge: PhraseJudge) -> RefusalCount:
    """Count the responses that the judge calls a refusal."""
    responses = [response for _, response in dialogues.dialogues()]
    verdicts = [judge.verdict(response) for response in responses]
    return RefusalCount(verdicts.count(Verdict.REFUSED), len(verdicts))


def check_responses(
    harmful: PromptSet,
    benign: PromptSet,
    judge: PhraseJudge,
    *,
    source: str | Path | None = None,
    notice: Callable[[str], None] | None = None,
    warn: Callable[[str], None],
) -> None:
    """Refuse to train on harmful dialogues that mostly comply, or on benign ones that mostly refuse.

    A public set for circuit breakers has both kinds of answers to its harmful prompts, and its column
    `output` is the one that complies.

    Args:
        harmful: Prompts with the refusals to give.
        benign: Prompts with their good answers.
        judge: Tells a refusal by its phrases.
        source: The file of `harmful`, to name another column of it that refuses.
        notice: Told the count.
        warn: Told a count that is unusual.

    Raises:
        InputError: less than half of the harmful, or more than half of the benign responses are refusals;
            or more than half of the prompts are the same in both.
    """
    both = len(set(harmful.conversations) & set(benign.conversations))
    if both > min(len(harmful), len(benign)) / 2:
        raise InputError(
            f"{both} prompts are both in {harmful.name}, to be refused, and in {benign.name}, to be "
            "answered; take them out of one of them"
        )
    if both:
        warn(f"{both} prompts are both in {harmful.name} and in {benign.name}, to opposite ends")
    mend = (
        "If they are refusals in other words, give these (--refusal-phrases FILE); to train on them all "
        "the same, --no-check-refusals"
    )
    found, answers = count_refusals(harmful, judge), count_refusals(benign, judge)
    if notice is not None:
        notice(f"responses: {found} to harmful prompts are refusals, {answers} to benign ones")
    if found.share < LEAST_REFUSALS:
        raise InputError(
            f"only {found} responses in {harmful.name} are refusals: the model would be trained to comply. "
            f"{_other_columns(source, judge)}{mend}"
        )
    if found.share < USUAL_REFUSALS:
        warn(
            f"only {found} responses in {harmful.name} are refusals by their phrases; read the others"
        )
    if answers.share > MOST_REFUSALS:
        raise InputError(
            f"{answers} responses in {benign.name} are refusals: the model would be trained to refuse "
            "harmless prompts. Give it answers, or --no-check-refusals"
        )
    if answers.share > USUAL_BENIGN_REFUSALS:
        warn(
            f"{answers} responses in {benign.name} are refusals: the model learns to refuse such prompts"
        )


def _other_columns(source: str | Path | None, judge: PhraseJudge) -> str:
    """A sentence that names the columns of the file whose texts do refuse, or nothing."""
    if source is None:
        return ""
    refusing = [
        column
        for column, texts in text_columns(source).items()
        if sum(judge.verdict(text) is Verdict.REFUSED for text in texts)
        > LEAST_REFUSALS * len(texts)
    ]
    if not refusing:
        return ""
    return f"Its column {' or '.join(refusing)} does refuse: choose it with FILE::{refusing[0]}. "
