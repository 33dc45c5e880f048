"""A tokenizer's chat template: how a prompt is put, and how an answer goes on from it to its end."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nest.conversations.conversation import Conversation, Prompt, as_conversation
from nest.conversations.thoughts import TAGS, opened_at_end
from nest.errors import InputError

# What a probe of the template asks and answers: words that no template changes.
_TAKEN = frozenset(
    "chat_template continue_final_message conversation add_generation_prompt max_length messages "
    "padding return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs "
    "truncation".split()
)
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
        self._kwargs = _switches(template_kwargs or {}, getattr(tokenizer, "chat_template", None))
        self._takes_system = False
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
        if system is not None:
            self._check_system(system)
        self.opened = opened_at_end(self._probe(system))
        whole = self._probe(system, answered=True)
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

    def prompt(self, prompt: Prompt) -> str:
        """What was said up to where the answer begins, or up to the end of its prefill.

        Raises:
            InputError: it does not end with a user turn, or the template refuses it.
        """
        conversation = self._of(prompt)
        conversation.require_open()
        if not self.is_given:
            return f"{_plain_text(conversation)}\nAssistant:{self._prefill(conversation)}"
        text = self._render(conversation.messages(), add_generation_prompt=True)
        return text + self._prefill(conversation)

    def completion(self, prompt: Prompt, response: str) -> str:
        """What follows `prompt(prompt)` when the model gives this response, to the end of its turn.

        A thought that the prompt has opened is closed, or is the response's own. A response begins with
        the prefill, which is the prompt's.
        """
        conversation = self._of(prompt)
        if conversation.prefill:
            open_end = replace(conversation, prefill="")
            if not response.startswith(conversation.prefill):
                raise InputError(
                    f"the response {response[:40]!r} does not begin with the prefill "
                    f"{conversation.prefill[:40]!r}"
                )
            whole = self.completion(open_end, response)
            return whole.removeprefix(self._prefill(conversation))
        if not self.is_given:
            return f" {response}"
        before = self.prompt(conversation)
        answer = {"role": "assistant", "content": response}
        whole = self._render([*conversation.messages(), answer], add_generation_prompt=False)
        rest = whole[len(before) :] if whole.startswith(before) else response + self._tail
        if self.opened is None:
            return rest
        opening, closing = self.opened
        on_new_line = before.endswith("\n")
        if rest.lstrip().startswith(opening):
            rest = rest.lstrip().removeprefix(opening)
            return rest.removeprefix("\n") if on_new_line else rest
        if closing in rest or response.lstrip().startswith(opening):
            return rest
        return f"{on_new_line * chr(10)}{closing}\n\n{rest}"

    def turns(self, conversation: Conversation) -> list[tuple[str, str]]:
        """For each of the assistant's turns what was said up to it, and how it completes that.

        Raises:
            InputError: it does not end with the assistant's turn, or the template writes earlier turns
                otherwise once later ones follow (as it drops thoughts), so that they are not what the
                model would say.
        """
        conversation = self._of(conversation)
        answered = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        if not answered or answered[-1] != len(conversation.turns) - 1:
            raise InputError("the conversation has no answer of the assistant's at its end")
        text, pieces = "", []
        for place in answered:
            if not any(turn.role == "user" for turn in conversation.turns[:place]):
                raise InputError(
                    f"the conversation that ends with {conversation.asked[:40]!r} is begun by the "
                    "assistant, whose first turn answers nothing; train on the last one (--train-on last)"
                )
            so_far = replace(conversation, turns=conversation.turns[:place])
            before = self.prompt(so_far)
            said = self.completion(so_far, conversation.turns[place].text)
            if not before.startswith(text):
                raise InputError(
                    "the chat template writes earlier turns of the assistant otherwise once later ones "
                    f"follow (before {conversation.turns[place - 1].text[:40]!r}): they cannot all be "
                    "trained on; train on the last one (--train-on last)"
                )
            pieces.append((before, said))
            text = before + said[: self._end_of_turn(said)]
        return pieces

    def _end_of_turn(self, said: str) -> int:
        """Where a turn's text ends: with the token that the template writes after it."""
        if self.turn_end is None:
            return len(said.rstrip("\n"))
        return said.rfind(self.turn_end) + len(self.turn_end)

    def _of(self, prompt: Prompt) -> Conversation:
        """With the encoder's system prompt, once it is known that the template takes it."""
        conversation = as_conversation(prompt)
        for turn in conversation.turns:
            if turn.other_kinds:
                raise InputError(
                    f"the {turn.role} turn {turn.text[:40]!r} holds a part of the kind "
                    f"{', '.join(turn.other_kinds)}, and this model is given text only; take it out"
                )
        conversation = conversation.with_system(self._system)
        if conversation.system is not None and self.is_given:
            self._check_system(conversation.system)
        return conversation

    def _prefill(self, conversation: Conversation) -> str:
        """The beginning of the answer as the template would write it."""
        if not conversation.prefill:
            return ""
        if not self.is_given:
            return f" {conversation.prefill}"
        said = conversation.prefill.strip()
        if self.opened is not None:  # its tag stands in the prompt already
            said = said.removeprefix(self.opened[0]).lstrip()
            if not said:
                return ""
        if not said:
            return conversation.prefill
        whole = self.completion(replace(conversation, prefill=""), conversation.prefill)
        own = whole.removesuffix(self._tail)  # what ends a turn may hold the same letters
        begun = own[: own.rindex(said) + len(said)] if said in own else said
        return begun + conversation.prefill[len(conversation.prefill.rstrip()) :]

    def _check_system(self, system: str) -> None:
        """What the template writes must depend on what the system prompt says."""
        if self._takes_system:
            return
        said, otherwise = (self._probe(text) for text in (system, f"{system} {_ANSWERED}"))
        if said == otherwise:
            raise InputError(
                "the chat template drops system prompts: what it writes is the same with and without; "
                "leave out --system, and put what it says into the prompts"
            )
        self._takes_system = True

    def _probe(self, system: str | None, *, answered: bool = False) -> str:
        conversation = Conversation.of(_ASKED, system=system)
        if answered:
            conversation = conversation.answered(_ANSWERED)
        return self._render(conversation.messages(), add_generation_prompt=not answered)

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
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


def _plain_text(conversation: Conversation) -> str:
    """Turns as plain text, where the tokenizer has no template."""
    names = {"user": "User: ", "assistant": "Assistant: ", "tool": "Tool: "}
    lead = "" if conversation.system is None else f"{conversation.system}\n\n"
    said = [f"{names[turn.role]}{turn.text}" for turn in conversation.turns if turn.role in names]
    return lead + "\n".join(said)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that are not text: those with a role, and added ones that are marked as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {int(number): str(token) for number, token in added.items() if token.special}
    roles = tokenizer.all_special_ids
    texts = tokenizer.convert_ids_to_tokens(roles)
    return marked | {int(n): str(text) for n, text in zip(roles, texts, strict=True)}


def _switches(template_kwargs: Mapping[str, Any], template: Any) -> dict[str, Any]:
    """The template's switches; a warning for those that it does not know.

    Raises:
        InputError: a name that transformers itself takes.
    """
    taken = sorted(set(template_kwargs) & _TAKEN)
    if taken:
        raise InputError(
            f"the template's switches hold {', '.join(taken)}, which nest sets itself; leave it out"
        )
    strange = [name for name in template_kwargs if not isinstance(name, str)]
    if strange:
        raise InputError(f"the template's switches have the name {strange[0]!r}; expected texts")
    try:
        json.dumps(dict(template_kwargs))
    except (TypeError, ValueError) as fault:
        raise InputError(
            f"the template's switches cannot be written down ({fault}); expected plain values"
        ) from None
    unknown = sorted(set(template_kwargs) - _names_in(template))
    if unknown:
        warnings.warn(
            f"the chat template does not know {', '.join(unknown)}: it has no effect", stacklevel=6
        )
    return dict(template_kwargs)


def _names_in(template: Any) -> set[str]:
    """What a template asks from outside, by name; it may be several templates, or none that can be read."""
    from jinja2 import Environment, TemplateError, meta

    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    names: set[str] = set()
    for text in texts:
        try:
            # transformers' own extension to the language, which says nothing of names
            plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", str(text))
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
            names |= meta.find_undeclared_variables(parsed)
        except TemplateError:
            names |= set(re.findall(r"\w+", str(text)))
    return names


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
