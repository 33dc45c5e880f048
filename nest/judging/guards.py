"""Guards that run here, through transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nest.conversations.batches import bucketed_batches, collate
from nest.errors import InputError
from nest.generation.static import generate_tokens
from nest.judging.families import Family, family_of, find_family
from nest.judging.judge import Exchange, Judgement
from nest.judging.known_pair import HARMFUL, HARMLESS, check_told_apart
from nest.judging.phrases import PhraseJudge
from nest.judging.readings import UNREAD, Reading, joined, judged
from nest.judging.rendering import GuardEncoder, Rendered, read_template
from nest.models.calls import logits_of, run_model
from nest.models.fingerprint import weights_hash
from nest.models.modes import eval_mode

TOKENS_PER_BATCH = 16_384
"""Most tokens of a batch that is scored: a guard's policy alone has some 700."""


class _Call(NamedTuple):
    """One policy asked about one exchange."""

    row: int
    policy: str | None
    rendered: Rendered


class _Word(NamedTuple):
    """What a guard's words begin with: whether that is harmful, None for another word, and its share."""

    harmful: bool | None
    score: float


class GuardModel:
    """A guard that runs here. Safe for any number of exchanges: what cannot be judged is unparsed.

    An exchange of which the guard's first word says all costs one pass over its prompt, without decoding
    (ShieldGemma and classifiers; Llama-Guard, where it says safe). A degenerate answer is not put to the
    guard; neither is an answer to a harmless request where the guard does not say whether it was refused:
    then the phrases say it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        family: How it is asked and read, by its name; told by the chat template if None.
        template: A text with placeholders in place of the tokenizer's chat template (`read_template`).
        phrases: Tells refusals where the guard does not.
        batch_size: Most exchanges in a batch.
        check: Judge a known pair first, and refuse a guard that does not tell it apart.
        where: The checkpoint's name, for the judge's own name and for errors.

    Raises:
        InputError: no template, none that is known, or one that does not take exchanges.
        EngineError: the known pair is not told apart.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        family: Family | str | None = None,
        *,
        template: str | None = None,
        phrases: PhraseJudge | None = None,
        batch_size: int = 16,
        check: bool = True,
        where: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}; expected at least 1")
        if family is None:
            kind = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
            template_of = getattr(tokenizer, "chat_template", None)
            family = find_family(template_of, kind, where or "the model")
        self.family = family_of(family) if isinstance(family, str) else family
        self.name = self.family.name if where is None else f"{self.family.name}:{Path(where).name}"
        self._model, self._batch_size = model, batch_size
        self._phrases = PhraseJudge() if phrases is None else phrases
        self._encoder = GuardEncoder(tokenizer, model, self.family, template)
        words = self.family.words
        self._firsts = self._encoder.first_tokens(words) if words else []
        self._word_decides = all(
            self._encoder.is_one_token(word) for word, harmful in words.items() if not harmful
        )
        if check:
            (bad, bad_words), (good, good_words) = self._read([HARMFUL, HARMLESS])
            check_told_apart(
                self.name, bad.harmful, good.harmful, f"{bad_words!r} and {good_words!r}"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        family: str | None = None,
        *,
        template: str | Path | None = None,
        phrases: PhraseJudge | None = None,
        batch_size: int = 16,
        check: bool = True,
        dtype: str = "auto",
        device: str = "auto",
    ) -> GuardModel:
        """A guard's checkpoint; code that comes with one is never run.

        Args:
            path: A local folder, or a Hub name.
            family: As in the class.
            template: File with the guard's prompt format.
            phrases, batch_size, check: As in the class.
            dtype, device: As in `load_model`.

        Raises:
            InputError: as `load_model`, and as the class.
            EngineError: as the class.
        """
        from nest.models.loading import load_model

        text = None if template is None else read_template(template)
        model, tokenizer = load_model(path, dtype=dtype, device=device)
        return cls(
            model,
            tokenizer,
            family,
            template=text,
            phrases=phrases,
            batch_size=batch_size,
            check=check,
            where=str(path),
        )

    @cached_property
    def sha256(self) -> str:
        """Hash of weights, template, family and phrases."""
        parts = (
            weights_hash(self._model),
            self._encoder.template,
            self.family.sha256,
            self._phrases.sha256,
            str(self._encoder.max_tokens),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """Judgements, one an exchange."""
        return judged(exchanges, self._read, self._phrases, says_refusals=self.family.says_refusals)

    def _read(self, exchanges: Sequence[Exchange]) -> list[tuple[Reading, str]]:
        """What the guard says of each exchange, and its own words."""
        calls = [
            _Call(row, policy, self._render(exchange, variables))
            for row, exchange in enumerate(exchanges)
            for policy, variables in self.family.calls()
        ]
        by_row: list[list[tuple[str | None, Reading]]] = [[] for _ in exchanges]
        words: list[list[str]] = [[] for _ in exchanges]
        with eval_mode(self._model), torch.no_grad():
            for call, (reading, said) in zip(calls, self._answers(calls), strict=True):
                by_row[call.row].append((call.policy, reading))
                heard = " ".join(part for part in (said.strip(), call.rendered.note) if part)
                words[call.row].append(heard if call.policy is None else f"{call.policy}: {heard}")
        return [
            (joined(readings), "\n".join(said))
            for readings, said in zip(by_row, words, strict=True)
        ]

    def _render(self, exchange: Exchange, variables: dict[str, Any]) -> Rendered:
        room = self.family.max_new_tokens
        return self._encoder.render(exchange, variables, room, self.family.lead)

    def _answers(self, calls: Sequence[_Call]) -> list[tuple[Reading, str]]:
        """What the guard says to each call: by its first word where that says all, else decoded."""
        found: dict[int, tuple[Reading, str]] = {
            i: (UNREAD, "") for i, call in enumerate(calls) if not call.rendered.ids
        }
        scores: dict[int, float] = {}
        asked = [i for i in range(len(calls)) if i not in found]
        if self._firsts:
            heard = self._first_words([calls[i].rendered.ids for i in asked])
            for i, word in zip(asked, heard, strict=True):
                if word.harmful is None and not self.family.is_decided_by_word:
                    continue
                if word.harmful is not None:
                    scores[i] = word.score
                if not self._word_decides:  # `No` may begin `Nonsense`: the text says which
                    continue
                if word.harmful is False or self.family.is_decided_by_word:
                    found[i] = self._of_word(word)
        for i, said in self._decoded(calls, [i for i in asked if i not in found]):
            reading = self.family.read(said)._replace(score=scores.get(i))
            found[i] = reading, said
        return [found[i] for i in range(len(calls))]

    def _of_word(self, word: _Word) -> tuple[Reading, str]:
        if word.harmful is None:
            return UNREAD, ""
        said = next(text for text, harmful in self.family.words.items() if harmful is word.harmful)
        return Reading(word.harmful, score=word.score), said

    def _first_words(self, prompts: Sequence[Sequence[int]]) -> list[_Word]:
        """Which of the family's words the guard would begin with, and the harmful one's share."""
        meanings = list(self.family.words.values())
        words: dict[int, _Word] = {}
        for indices, logits in last_logits(
            self._model, prompts, self._encoder.pad_id, self._batch_size
        ):
            for index, row in zip(indices, logits, strict=True):  # (V,)
                likeliest = int(row.argmax())
                which = next((n for n, ids in enumerate(self._firsts) if likeliest in ids), None)
                sums = torch.stack([row[ids].logsumexp(0) for ids in self._firsts])  # (words,)
                score = float(sums.softmax(0)[meanings.index(True)])
                words[index] = _Word(None if which is None else meanings[which], score)
        return [words[index] for index in range(len(prompts))]

    def _decoded(self, calls: Sequence[_Call], which: Sequence[int]) -> list[tuple[int, str]]:
        if not which:
            return []
        answers = generate_tokens(
            self._model,
            self._encoder.for_decoding,
            [calls[i].rendered.ids for i in which],
            self.family.max_new_tokens,
            self._batch_size,
        )
        return [(i, self._encoder.said(ids)) for i, ids in zip(which, answers, strict=True)]


@torch.no_grad()
def last_logits(
    model: nn.Module, sequences: Sequence[Sequence[int]], pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], Float[Tensor, "B V"]]]:
    """(which sequences, the logits after the last token of each) a batch, one pass over each sequence.

    Padded on the left with positions that begin at the first token, so that they don't depend on the
    batch but for rounding. Changes nothing in the model, which should be in eval mode.

    Args:
        model: A causal language model.
        sequences: Token ids, each of at least one.
        pad_id: Fills up.
        batch_size: Most sequences in a batch; long ones get smaller batches.

    Yields:
        Logits in fp32 on the CPU.
    """
    device = next(model.parameters()).device
    longest = max((len(ids) for ids in sequences), default=1)
    size = max(1, min(batch_size, TOKENS_PER_BATCH // longest))
    for indices in bucketed_batches([len(ids) for ids in sequences], size):
        batch = collate([sequences[i] for i in indices], None, pad_id, side="left")
        mask = batch.attention_mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = run_model(
            model,
            batch.input_ids.to(device),
            mask,
            position_ids=positions,
            logits_to_keep=1,
            use_cache=False,
        )
        yield indices, logits_of(output)[:, -1].float().cpu()
