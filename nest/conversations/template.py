"""A tokenizer's chat template: how a prompt is put, and how an answer goes on from it to its end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from nest.conversations.thoughts import TAGS, opened_at_end
from nest.errors import InputError

# What a probe of the template asks and answers: words that no template changes.
_ASKED, _ANSWERED = "question", "nestanswer"


class ChatTemplate:
    """Renders prompts and dialogues; without a template of the tokenizer's, as plain text, with a warning.

    Args:
        tokenizer: A transformers tokenizer.
        system: System prompt put before every prompt.
        template_kwargs: Passed to the template, such as `{"enable_thinking": False}`.

    Attributes:
        is_given: Whether the tokenizer has a template.
        turn_end: The token, as text, that the template writes after an answer; None where it writes none.
        opened: (opening, closing) tag of the thought that the generation prompt opens; None where it
            opens none.
        control: Tokens, as text, that tell turns and roles apart: none of them may stand in an answer.

    Raises:
        InputError: the template drops the system prompt, or is not the one template of the tokenizer.
    """

    def __init__(
        self, tokenizer: Any, system: str | None, template_kwargs: Mapping[str, Any] | None
    ) -> None:
        self._tokenizer, self._system = tokenizer, system
        self._kwargs = dict(template_kwargs or {})
        given = getattr(tokenizer, "chat_template", None)
        self.is_given = bool(given)
        self.turn_end: str | None = None
        self._tail = ""
        self.control: frozenset[str] = frozenset()
        if not self.is_given:
            warnings.warn(
                "the tokenizer has no chat template; prompts are put as plain text, 'User: ... "
                "Assistant:'. Set tokenizer.chat_template for the form the model was trained with",
                stacklevel=4,
            )
            self.opened = None
            return
        _warn_of(given)
        self._check_system()
        self.opened = opened_at_end(self._probe(answered=False))
        whole = self._probe(answered=True)
        if system is not None:  # what it says is no part of the template
            whole = whole.replace(system, "")
        if _ANSWERED in whole:
            self._tail = whole.rpartition(_ANSWERED)[2]
        added = [token for token in tokenizer.get_added_vocab() if token.strip()]
        # Not every added token: some vocabularies add line feeds and ordinary words.
        tags = {tag for pair in TAGS for tag in pair}
        self.control = frozenset(
            token
            for token in special_tokens(tokenizer).values()
            if token in whole and token not in tags
        )
        # the longest: one token's text may begin another's
        ends = [token for token in added if self._tail.lstrip().startswith(token)]
        self.turn_end = max(ends, key=len, default=None)

    def prompt(self, prompt: str) -> str:
        """The prompt up to where the answer begins.

        Raises:
            InputError: the template refuses it.
        """
        if self.is_given:
            return self._render(self._messages(prompt), add_generation_prompt=True)
        lead = "" if self._system is None else f"{self._system}\n\n"
        return f"{lead}User: {prompt}\nAssistant:"

    def completion(self, prompt: str, response: str) -> str:
        """What follows `prompt(prompt)` when the model gives this response, to the end of its turn.

        A thought that the prompt has opened is closed, or is the response's own.
        """
        if not self.is_given:
            return f" {response}"
        before = self.prompt(prompt)
        answer = {"role": "assistant", "content": response}
        whole = self._render([*self._messages(prompt), answer], add_generation_prompt=False)
        rest = whole[len(before) :] if whole.startswith(before) else response + self._tail
        if self.opened is None:
            return rest
        opening, closing = self.opened
        on_new_line = before.endswith("\n")
        if rest.lstrip().startswith(opening):
            rest = rest.lstrip().removeprefix(opening)
            return rest.removeprefix("\n") if on_new_line else rest
        return rest if closing in rest else f"{on_new_line * chr(10)}{closing}\n\n{rest}"

    def _check_system(self) -> None:
        """What the template writes must depend on what the system prompt says."""
        if self._system is None:
            return
        said, system = self._probe(answered=False), self._system
        try:
            self._system = f"{system} {_ANSWERED}"
            said_otherwise = self._probe(answered=False)
        finally:
            self._system = system
        if said == said_otherwise:
            raise InputError(
                "the chat template drops system prompts: what it writes is the same with and without; "
                "leave out --system, and put what it says into the prompts"
            )

    def _probe(self, *, answered: bool) -> str:
        messages = self._messages(_ASKED)
        if answered:
            messages.append({"role": "assistant", "content": _ANSWERED})
        return self._render(messages, add_generation_prompt=not answered)

    def _messages(self, prompt: str) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, {"role": "user", "content": prompt}]

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._kwargs,
            )
        # A template is a program: beside what it raises itself, it may add texts to None, or look into
        # what is not there; and several templates without a default are a ValueError.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as fault:
            hint = "" if self._system is None else "; it may know no system prompt: leave it out"
            said = " ".join(str(fault).split())
            raise InputError(
                f"the tokenizer's chat template refuses a prompt ({said}){hint}"
            ) from fault
        return str(text)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that are not text: those with a role, and added ones that are marked as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {int(number): str(token) for number, token in added.items() if token.special}
    roles = tokenizer.all_special_ids
    texts = tokenizer.convert_ids_to_tokens(roles)
    return marked | {int(n): str(text) for n, text in zip(roles, texts, strict=True)}


def _warn_of(template: Any) -> None:
    text = template if isinstance(template, str) else ""
    if text.startswith("\ufeff"):
        warnings.warn(
            "the chat template begins with a byte order mark, which will stand before every prompt; save "
            "chat_template.jinja as UTF-8 without one",
            stacklevel=5,
        )
    if "strftime_now" in text:
        warnings.warn(
            "the chat template can write today's date into every prompt: the same command may give other "
            "prompts tomorrow. Their hash is recorded as rendered_sha256",
            stacklevel=5,
        )
