"""Prompts and dialogues as token ids, and answers as text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from nest.conversations.conversation import Conversation, Prompt, as_conversation
from nest.conversations.template import ChatTemplate, special_tokens
from nest.conversations.thoughts import TAGS
from nest.errors import InputError
from nest.models.calls import context_tokens, n_embeddings
from nest.models.wrappers import unwrapped


@runtime_checkable
class Encoder(Protocol):
    """Turns prompts and dialogues into token ids, and ids back into text."""

    @property
    def pad_id(self) -> int:
        """Id that fills batches up; always masked."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a response; may be empty."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """The model's context in tokens; None where there is no limit."""
        ...

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids up to where the model's answer begins, or goes on from its prefill."""
        ...

    def dialogue(self, prompt: Prompt, response: str) -> tuple[list[int], int]:
        """Token ids of prompt and response, and how many of them are the prompt's."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, up to its end and without special tokens."""
        ...


@runtime_checkable
class TurnEncoder(Protocol):
    """An encoder that can tell all turns of the assistant in a conversation."""

    def turns(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation that the assistant's turn ends, and which of them it says."""
        ...


class ChatEncoder:
    """Encoder of a tokenizer's chat template.

    A dialogue's tokens are those of the whole chat, cut where the prompt's end: what is trained on is what
    the model is asked at generation, followed by the very tokens that it would say. The completion ends
    with the first token that ends a response: the tokenizer's, the model's, or the one that the template
    writes after an answer.

    Args:
        tokenizer: A transformers tokenizer; without a chat template a plain-text form is used,
            with a warning.
        model: For its context length, its vocabulary and its end-of-response ids; optional.
        system: System prompt put before every prompt.
        template_kwargs: Passed to the chat template, such as `{"enable_thinking": False}`.

    Raises:
        InputError: the template drops the system prompt, or refuses every prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module | None = None,
        *,
        system: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        _check_unicode("the system prompt", system or "")
        self._template = ChatTemplate(tokenizer, system, template_kwargs)
        self.eos_ids = _eos_ids(tokenizer, model, self._template.turn_end)
        self._n_vocabulary = n_embeddings(model)
        self.pad_id = _pad_id(tokenizer, self.eos_ids, self._n_vocabulary)
        self.max_tokens = context_tokens(model)
        ends = tokenizer.convert_ids_to_tokens(sorted(self.eos_ids))
        self._control = sorted((self._template.control | set(map(str, ends))) - {""})
        tags = {tag for pair in TAGS for tag in pair}
        self._hidden = frozenset(
            token for token, text in special_tokens(tokenizer).items() if text not in tags
        )

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of what was said in its template, with the generation prompt and the prefill.

        Raises:
            InputError: longer than the model's context, refused by the template, no Unicode text, not
                ending with a user turn, with a part that is no text, or with a token that the model has
                no embedding for.
        """
        conversation = _checked(prompt)
        ids = self._prompt_ids(self._template.prompt(conversation))
        self._check(ids, conversation.asked)
        return ids

    def dialogue(self, prompt: Prompt, response: str) -> tuple[list[int], int]:
        """Token ids of prompt and response, and the number of prompt tokens.

        Raises:
            InputError: as `prompt`; a response that is empty, or holds a token that would end it or begin
                another turn.
        """
        conversation = _checked(prompt)
        self._check_answer(conversation.asked, response)
        before, completion = (
            self._template.prompt(conversation),
            self._template.completion(conversation, response),
        )
        prompt_ids = self._prompt_ids(before)
        answer = self._answer_ids(before, prompt_ids, completion)
        ids = prompt_ids + answer
        self._check(ids, conversation.asked)
        return ids, len(prompt_ids)

    def turns(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation that the assistant's turn ends, and which of them it says.

        Raises:
            InputError: as `dialogue`; or the template writes earlier turns otherwise once others follow.
        """
        _checked(conversation)
        for turn in conversation.turns:
            if turn.role == "assistant":
                self._check_answer(conversation.asked, turn.text)
        ids: list[int] = []
        said: list[bool] = []
        text = ""
        for before, completion in self._template.turns(conversation):
            prompt_ids = self._prompt_ids(before)
            known = prompt_ids[: len(ids)] == ids
            new = prompt_ids[len(ids) :] if known else self._tokens(before.removeprefix(text))
            answer = self._answer_ids(before, prompt_ids, completion)
            ids += new + answer
            said += [False] * len(new) + [True] * len(answer)
            text = before + completion
        self._check(ids, conversation.asked)
        return ids, said

    def _answer_ids(self, before: str, prompt_ids: list[int], completion: str) -> list[int]:
        """The tokens that the model would say after a prompt, up to the first that ends its turn."""
        whole = self._prompt_ids(before + completion)
        if whole[: len(prompt_ids)] == prompt_ids:
            answer = whole[len(prompt_ids) :]
        else:  # the last characters of the prompt and the first of the answer are one token
            answer = self._tokens(completion)
        ends = [i for i, token in enumerate(answer) if token in self.eos_ids]
        if ends:
            answer = answer[: ends[0] + 1]
        elif self._tokenizer.eos_token_id is not None:
            answer.append(int(self._tokenizer.eos_token_id))
        return answer

    def _check_answer(self, asked: str, response: str) -> None:
        _check_response(asked, response)
        _check_unicode("the response", response)
        for token in self._control:
            if token in response:
                raise InputError(
                    f"the response to {asked[:60]!r} holds {token!r}, which the chat template ends or "
                    "begins turns with; take it out of the response"
                )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, up to its end and without special tokens or outer white space.

        The tags of a thought stay, and where the prompt has opened one, so does that tag: a thought that
        was cut off is told from an answer by it.
        """
        kept = [token for token in _before_end(ids, self.eos_ids) if token not in self._hidden]
        decoded = self._tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = str(decoded).strip()
        opened = self._template.opened
        if opened is not None and not text.startswith(opened[0]):
            text = f"{opened[0]}{text}"
        return text

    def _prompt_ids(self, text: str) -> list[int]:
        ids = self._tokens(text)
        return ids if self._template.is_given else [*self._leading_ids(), *ids]

    def _tokens(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def _leading_ids(self) -> list[int]:
        """The begin-of-text token, where the tokenizer puts one before plain text."""
        bos = self._tokenizer.bos_token_id
        ids = self._tokenizer.encode("", add_special_tokens=True)
        return [int(bos)] if bos is not None and list(ids[:1]) == [bos] else []

    def _check(self, ids: Sequence[int], prompt: str) -> None:
        _check_length(ids, prompt, self.max_tokens)
        largest = max(ids, default=0)
        if self._n_vocabulary is not None and largest >= self._n_vocabulary:
            raise InputError(
                f"the prompt {prompt[:60]!r} holds the token {largest}, "
                f"{self._tokenizer.convert_ids_to_tokens(largest)!r}, and the model has embeddings for "
                f"{self._n_vocabulary} tokens only; use the tokenizer that the model was trained with, or "
                "grow the embeddings (model.resize_token_embeddings)"
            )


class CallableEncoder:
    """Encoder of a custom model: the user's own functions.

    Args:
        encode: Text to token ids.
        decode: Token ids to text; needed to evaluate, not to select or tune.
        eos_id: Ends a response; appended to every trained one.
        pad_id: Fills batches up.
        max_tokens: The model's context.
        n_vocabulary: For how many tokens the model has embeddings.
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str] | None = None,
        *,
        eos_id: int | None = None,
        pad_id: int = 0,
        max_tokens: int | None = None,
        n_vocabulary: int | None = None,
    ) -> None:
        self._encode, self._n_vocabulary = encode, n_vocabulary
        self._decode = decode
        self._eos_id = eos_id
        self.pad_id = pad_id
        self.eos_ids: frozenset[int] = frozenset() if eos_id is None else frozenset({eos_id})
        self.max_tokens = max_tokens

    def prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt.

        Raises:
            InputError: no ids, something else than ids, more than the context holds, or a conversation
                of more than one user turn.
        """
        text, prefill = _only_turn(prompt)
        ids = self._ids(text) + (self._ids(prefill) if prefill else [])
        _check_length(ids, text, self.max_tokens)
        return ids

    def dialogue(self, prompt: Prompt, response: str) -> tuple[list[int], int]:
        """Token ids of prompt and response, and the number of prompt tokens.

        Raises:
            InputError: an empty response, or as `prompt`.
        """
        text, prefill = _only_turn(prompt)
        _check_response(text, response)
        _check_begins(response, prefill)
        prompt_ids = self.prompt(prompt)
        ending = [] if self._eos_id is None else [self._eos_id]
        ids = prompt_ids + self._ids(response.removeprefix(prefill)) + ending
        _check_length(ids, text, self.max_tokens)
        return ids, len(prompt_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, up to its end.

        Raises:
            InputError: there is no `decode` function.
        """
        if self._decode is None:
            raise InputError("responses cannot be read: give the encoder a decode=... function")
        return self._decode(_before_end(ids, self.eos_ids))

    def _ids(self, text: str) -> list[int]:
        values = self._encode(text)
        values = values.tolist() if isinstance(values, Tensor) else values
        ids = list(values)
        if not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise InputError(
                f"encode({text[:40]!r}) gave {str(ids)[:60]}; expected a list of at least one "
                "token id"
            )
        if self._n_vocabulary is not None and max(ids) >= self._n_vocabulary:
            raise InputError(
                f"encode({text[:40]!r}) gave the token {max(ids)}, and the model has embeddings for "
                f"{self._n_vocabulary} tokens only"
            )
        return ids


def encoder_for(
    model: nn.Module,
    tokenizer: Any = None,
    encode: Callable[[str], Sequence[int]] | Encoder | None = None,
    system: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoder:
    """The encoder of a model: its tokenizer's chat template, or the user's own function or encoder.

    Raises:
        InputError: neither a tokenizer nor `encode` was given, or a system prompt with `encode`.
    """
    model = unwrapped(model)
    if encode is not None:
        for what, value in (("a system prompt", system), ("template_kwargs", template_kwargs)):
            if value:
                raise InputError(f"{what} needs a tokenizer; with encode=, put it in yourself")
        if isinstance(encode, (ChatEncoder, CallableEncoder)):
            return encode
        if isinstance(encode, Encoder):
            return (
                _OwnTurnEncoder(encode) if isinstance(encode, TurnEncoder) else _OwnEncoder(encode)
            )
        return CallableEncoder(
            encode, max_tokens=context_tokens(model), n_vocabulary=n_embeddings(model)
        )
    if tokenizer is None:
        raise InputError("give a tokenizer, or encode=... (a function from text to token ids)")
    return ChatEncoder(tokenizer, model, system=system, template_kwargs=template_kwargs)


class _OwnEncoder:
    """A user's own encoder, which gets plain prompts as texts."""

    def __init__(self, own: Encoder) -> None:
        self._own = own
        self.pad_id, self.eos_ids, self.max_tokens = own.pad_id, own.eos_ids, own.max_tokens

    def prompt(self, prompt: Prompt) -> list[int]:
        return self._own.prompt(_plain(prompt))

    def dialogue(self, prompt: Prompt, response: str) -> tuple[list[int], int]:
        return self._own.dialogue(_plain(prompt), response)

    def decode(self, ids: Sequence[int]) -> str:
        return self._own.decode(ids)


class _OwnTurnEncoder(_OwnEncoder):
    """One that can tell several turns, too."""

    def turns(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        assert isinstance(self._own, TurnEncoder)
        return self._own.turns(conversation)


def _plain(prompt: Prompt) -> Prompt:
    return prompt.asked if isinstance(prompt, Conversation) and prompt.is_plain else prompt


def _only_turn(prompt: Prompt) -> tuple[str, str]:
    """The text of the one user turn, and the prefill.

    Raises:
        InputError: there is more.
    """
    conversation = as_conversation(prompt)
    if replace(conversation, prefill="").is_plain:
        return conversation.asked, conversation.prefill
    raise InputError(
        f"the conversation that ends with {conversation.asked[:40]!r} has more than one user turn (or a "
        "system turn), and encode=... takes a single text; give an encoder of your own with "
        "prompt(conversation) and dialogue(conversation, response)"
    )


def _check_begins(response: str, prefill: str) -> None:
    if not response.startswith(prefill):
        raise InputError(
            f"the response {response[:40]!r} does not begin with the prefill {prefill[:40]!r}"
        )


def _checked(prompt: Prompt) -> Conversation:
    """The conversation, of Unicode text.

    Raises:
        InputError: a lone surrogate.
    """
    conversation = as_conversation(prompt)
    names = {"user": "the prompt", "assistant": "the response"}
    for turn in conversation.turns:
        _check_unicode(names.get(turn.role, f"the {turn.role} prompt"), turn.text)
    _check_unicode("the prefill", conversation.prefill)
    return conversation


def rendered_hash(sequences: Iterable[Sequence[int]]) -> str:
    """sha256 of prompts as the model gets them: template, system prompt, date and all."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(json.dumps(list(ids)).encode() + b"\n")
    return digest.hexdigest()


def _check_response(prompt: str, response: str) -> None:
    if not response.strip():
        raise InputError(
            f"the response to {prompt[:60]!r} is empty; give it a text or leave it out"
        )


def _check_length(ids: Sequence[int], prompt: str, max_tokens: int | None) -> None:
    if max_tokens is not None and len(ids) > max_tokens:
        raise InputError(
            f"the prompt {prompt[:60]!r} comes to {len(ids)} tokens, but the model's context is "
            f"{max_tokens}; shorten it or leave it out"
        )


def _before_end(ids: Sequence[int], eos_ids: frozenset[int]) -> list[int]:
    kept: list[int] = []
    for token in ids:
        if int(token) in eos_ids:
            break
        kept.append(int(token))
    return kept


def _eos_ids(tokenizer: Any, model: nn.Module | None, turn_end: str | None) -> frozenset[int]:
    """Ids that end a response: the tokenizer's, those of the model that are no ordinary words, and the
    one that the chat template writes after an answer.

    A model's config can hold a default id (2, say) that is a word in this very tokenizer.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    found: set[int] = set()
    for source in (tokenizer, getattr(model, "generation_config", None)):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    if turn_end is not None:
        found.add(int(tokenizer.convert_tokens_to_ids(turn_end)))
    return frozenset(found & special)


def _pad_id(tokenizer: Any, eos_ids: frozenset[int], n_vocabulary: int | None) -> int:
    """The tokenizer's, if the model has an embedding for it: what fills up is masked, but looked up."""
    pad = getattr(tokenizer, "pad_token_id", None)
    fits = [
        int(token)
        for token in (pad, *sorted(eos_ids))
        if token is not None and (n_vocabulary is None or token < n_vocabulary)
    ]
    return fits[0] if fits else 0


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise InputError(
            f"{what} {text[:60]!r} holds half a character (a lone surrogate, at {fault.start}); save the "
            "text as UTF-8"
        ) from None
