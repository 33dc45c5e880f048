"""How an exchange is put to a guard: by its tokenizer's chat template, or by a template of the user's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from nest.conversations.conversation import SYSTEM_ROLES, Conversation, Turn
from nest.conversations.encoders import CallableEncoder
from nest.conversations.template import special_tokens
from nest.conversations.thoughts import strip_thinking
from nest.errors import InputError, MissingInputError
from nest.judging.families import Family
from nest.judging.judge import Exchange
from nest.models.calls import context_tokens
from nest.prompts.text import read_text

_PLACEHOLDER = re.compile(r"\{(prompt|behavior|response|generation)\}")
# What a probe of the template asks and answers: words that no template changes.
_ASKED, _ANSWERED = "nestquestion", "nestanswer"


class Rendered(NamedTuple):
    """An exchange as a guard gets it.

    Attributes:
        ids: Token ids; empty where it cannot be put to the guard.
        note: What is to be known of it: how much of the answer was left out, or why there is nothing.
    """

    ids: list[int]
    note: str = ""


class GuardEncoder:
    """Puts exchanges to a guard, and reads its tokens.

    The guard is given the final answer, without its thought, and the turns of user and assistant before
    it; a system prompt is left out, several turns of one side become one. Text that would be one of the
    guard's own control tokens is broken up, so that no answer can end its turn and go on as the guard. An
    answer too long for the guard's context is cut at its end, and `note` says so.

    Args:
        tokenizer: Of the guard.
        model: For its context and the ids that end its words.
        family: How it is asked.
        template: Text with placeholders `{prompt}` (or `{behavior}`) and `{response}` (or `{generation}`),
            in place of the tokenizer's chat template.

    Attributes:
        pad_id: Fills batches up.
        max_tokens: The guard's context.
        for_decoding: The same for `generate_tokens`, which also asks what ends the guard's words.

    Raises:
        InputError: there is no template; or it refuses an exchange, or drops what is said in one.
    """

    def __init__(
        self, tokenizer: Any, model: nn.Module, family: Family, template: str | None = None
    ) -> None:
        self._tokenizer, self._family, self._given = tokenizer, family, template
        self.max_tokens = context_tokens(model)
        ends: set[int] = set()
        for source in (tokenizer, getattr(model, "generation_config", None)):
            value = getattr(source, "eos_token_id", None)
            ends.update([value] if isinstance(value, int) else value or [])
        pad = tokenizer.pad_token_id
        self.pad_id = int(pad) if pad is not None else min(ends, default=0)
        self.for_decoding = CallableEncoder(
            self._ids, self.said, pad_id=self.pad_id, max_tokens=self.max_tokens
        )
        self.for_decoding.eos_ids = frozenset(ends)
        texts = {text for text in special_tokens(tokenizer).values() if len(text) > 1}
        self._control = sorted(texts, key=len, reverse=True)
        self._in_parts = False
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"the guard's tokenizer has no chat template, and how {family.name} is asked stands "
                "nowhere else; give its prompt format as a file: guard:FAMILY:PATH:TEMPLATE_FILE"
            )
        self._probe()

    @property
    def template(self) -> str:
        """What the exchanges are put into, for a hash."""
        return str(self._tokenizer.chat_template) if self._given is None else self._given

    def render(
        self, exchange: Exchange, variables: Mapping[str, Any], room_tokens: int, lead: str = ""
    ) -> Rendered:
        """Token ids of an exchange, up to where the guard speaks.

        Args:
            exchange: What is judged.
            variables: Of the template.
            room_tokens: What must be left of the context.
            lead: How the guard's words begin, unless the template ends so.
        """
        *turns, answer = guard_conversation(exchange, last_only=self._family.last_turn_only).turns

        def ids_of(said: str) -> list[int]:
            text = self._text([*turns, Turn("assistant", said)], variables)
            return self._ids(text if text.endswith(lead) else text + lead)

        try:
            return self._fitted(ids_of, answer.text, room_tokens)
        except InputError as fault:
            return Rendered([], f"[not asked: {fault}]")

    def _fitted(
        self, ids_of: Callable[[str], list[int]], answer: str, room_tokens: int
    ) -> Rendered:
        ids = ids_of(answer)
        if self.max_tokens is None or len(ids) + room_tokens <= self.max_tokens:
            return Rendered(ids)
        most = self.max_tokens - room_tokens
        answer_ids = self._tokenizer.encode(_unicode(answer), add_special_tokens=False)
        kept = len(answer_ids)
        while len(ids) > most:
            kept -= max(1, len(ids) - most)
            if kept < 1:
                raise InputError(
                    f"the request alone does not fit the guard's context of {self.max_tokens} tokens"
                )
            ids = ids_of(str(self._tokenizer.decode(answer_ids[:kept])))
        return Rendered(
            ids, f"[of the answer's {len(answer_ids)} tokens the first {kept} were read]"
        )

    def said(self, ids: Sequence[int]) -> str:
        """Text of the guard's words."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def first_tokens(self, words: Iterable[str]) -> list[list[int]]:
        """Ids that each word can begin with, with and without a space before it.

        Raises:
            InputError: two words begin with the same.
        """
        found = [{int(ids[0]) for ids in self._forms(word) if ids} for word in words]
        common = set.intersection(*found)  # the token of a bare space
        firsts = [sorted(ids - common) for ids in found]
        if not all(firsts):
            raise InputError(
                f"the tokenizer begins {' and '.join(map(repr, words))} with the same token, so that no "
                "score tells them apart; this is no tokenizer of such a guard"
            )
        return firsts

    def is_one_token(self, word: str) -> bool:
        """Whether a word is a token of its own: else its first letters may begin anything."""
        return any(len(ids) == 1 for ids in self._forms(word))

    def _forms(self, word: str) -> list[list[int]]:
        return [
            self._tokenizer.encode(form, add_special_tokens=False) for form in (word, f" {word}")
        ]

    def _text(self, turns: Sequence[Turn], variables: Mapping[str, Any]) -> str:
        from jinja2.exceptions import TemplateError

        inert = [Turn(turn.role, self._inert(turn.text)) for turn in turns]
        if self._given is not None:
            asked, answer = inert[-2].text, inert[-1].text
            values = {"prompt": asked, "behavior": asked, "response": answer, "generation": answer}
            return _PLACEHOLDER.sub(lambda found: values[found[1]], self._given)
        messages: list[dict[str, Any]] = [turn.to_dict() for turn in inert]
        if self._in_parts:
            messages = [
                {**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages
            ]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **variables
            )
        # a template is a program, and what it adds or looks into may not be there
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as fault:
            said = " ".join(str(fault).split())
            raise InputError(f"the guard's chat template refuses the exchange ({said})") from fault
        return str(text)

    def _probe(self) -> None:
        """See that what is said reaches the guard: as text, or in parts, or there is an error."""
        turns = [Turn("user", _ASKED), Turn("assistant", _ANSWERED)]
        _, variables = self._family.calls()[0]
        wanted = [_ASKED, _ANSWERED, *variables.values()]
        refusal: InputError | None = None
        for self._in_parts in (False, True):
            try:
                text = self._text(turns, variables)
            except InputError as fault:
                refusal = refusal or fault
                continue
            if all(part in text for part in wanted):
                return
        if refusal is not None:
            raise refusal
        raise InputError(
            "the guard's chat template drops what it is given (the request, the answer"
            f"{' or the ' + str(self._family.policy_kwarg) if variables else ''}): everything would be "
            f"called safe; it is not the template of {self._family.name}"
        )

    def _ids(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_token
        special = self._given is not None and not (bos and text.startswith(bos))
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=special)]

    def _inert(self, text: str) -> str:
        text = _unicode(text)
        for token in self._control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def read_template(path: str | Path) -> str:
    """The user's own template.

    Raises:
        InputError: no such file, or it lacks a placeholder.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingInputError(
            f"there is no file {str(path)!r}; expected the guard's prompt format, with {{prompt}} and "
            "{response}"
        )
    text = read_text(file)
    names = set(_PLACEHOLDER.findall(text))
    if not names & {"prompt", "behavior"} or not names & {"response", "generation"}:
        raise InputError(
            f"{file} has the placeholders {', '.join(sorted(names)) or 'none'}; expected {{prompt}} (or "
            "{behavior}) and {response} (or {generation})"
        )
    return text


def guard_conversation(exchange: Exchange, *, last_only: bool = False) -> Conversation:
    """What a guard is given: user and assistant by turns, and at the end the final answer.

    Args:
        exchange: What is judged.
        last_only: Leave out all but the last request and the answer.
    """
    turns: list[Turn] = []
    for turn in exchange.conversation.turns:
        if turn.role in SYSTEM_ROLES or not turn.text.strip():
            continue
        role = "assistant" if turn.role == "assistant" else "user"
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n\n{turn.text}")
        elif turns or role == "user":
            turns.append(Turn(role, turn.text))
    if not turns or turns[-1].role != "user":
        turns.append(Turn("user", exchange.conversation.asked))
    asked = turns[-1:] if last_only else turns
    return Conversation((*asked, Turn("assistant", strip_thinking(exchange.response))))


def _unicode(text: str) -> str:
    """With a question mark for half a character, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
