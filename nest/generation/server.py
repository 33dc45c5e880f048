"""Answers of any OpenAI-compatible chat server: vLLM, SGLang, llama.cpp."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nest.conversations.conversation import Conversation
from nest.conversations.prompting import Prompting
from nest.conversations.thoughts import TAGS
from nest.errors import EngineError, InputError
from nest.generation.engine import Completion, Finish, require_unicode
from nest.generation.sampling import Sampling, request_seed
from nest.generation.texts import before_stop
from nest.progress import ProgressCallback

TOP_LOGPROBS = 20
"""Of so many tokens a server tells the log-probabilities; vLLM tells no more unless it is told to."""

_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length"}
_OPENING, _CLOSING = TAGS[0]
_BLANKS = " \n\t\r\u0120\u010a\u2581"  # the last three as tokenizers write them


class _Wanted(NamedTuple):
    """Which answer a request is for."""

    number: int
    sample: int
    conversation: Conversation


class ServerEngine:
    """Answers of a model behind an OpenAI-compatible server, many requests in flight.

        engine = ServerEngine("http://localhost:8000/v1", "Qwen/Qwen3-8B", template_kwargs={...})
        for completion in engine.generate(conversations, Sampling(n=4, temperature=1.0)):
            ...

    Each answer is a request of its own with a seed of its own. How far an answer depends on it alone is the
    server's affair: vLLM's batches round, and what a request leaves out, a penalty say, the server takes
    from its own settings or from the model's generation_config.json.

    Answers come in the order of conversations and samples. Connections that fail, time out or are refused
    for the time being (408, 409, 429 and from 500 on) are tried again after growing pauses, or after the
    one that the server asks for.

    A prefill is sent as the beginning of the assistant's turn, with `continue_final_message` (vLLM, SGLang,
    llama.cpp since 2026); a server that does not know the switch answers to it as to a turn. A thought
    that the server has parsed out stands in its tags before the text. It needs a reasoning parser where the
    template opens the thought itself, or a thought that is cut off is taken for an answer.

    Args:
        url: Up to what the paths are added to: `http://localhost:8000/v1`.
        model: A name that the server serves.
        api_key: Sent as a bearer token; if None, OPENAI_API_KEY of the environment.
        in_flight: Most requests at once.
        timeout_seconds: For one attempt, to its last byte; with its retries a request may take four times
            as long.
        retries: Attempts after the first.
        template_kwargs: Sent as `chat_template_kwargs`, such as `{"enable_thinking": False}`.
        system: System prompt for conversations without one.
        answers_assistant_turns: Take conversations that end with the assistant's turn, and let the server's
            template go on from there: guards judge such ones. llama.cpp goes on with that turn instead,
            unless it runs with --no-prefill-assistant.
        progress: Called as `progress(stage, done, total)`, stages `generate` and `score`.

    Raises:
        InputError: an address, a key or a number that cannot be used.
    """

    name = "server"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        in_flight: int = 16,
        timeout_seconds: float = 120.0,
        retries: int = 6,
        template_kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
        answers_assistant_turns: bool = False,
        progress: ProgressCallback | None = None,
    ) -> None:
        from nest.generation.transport import Transport  # httpx draws a random number on import

        self._transport = Transport(
            url,
            api_key=os.environ.get("OPENAI_API_KEY") if api_key is None else api_key,
            in_flight=in_flight,
            timeout_seconds=timeout_seconds,
            retries=retries,
        )
        self._model, self._system = model, system
        self._template_kwargs = dict(template_kwargs or {})
        self._answers_assistant_turns = answers_assistant_turns
        self._progress = progress
        self._is_checked = False

    @property
    def prompting(self) -> Prompting:
        """How it puts prompts, as far as it decides; the template is the server's."""
        return Prompting(self._system, self._template_kwargs)

    @property
    def identity(self) -> str:
        """Model, address, and a hash of what is sent with every conversation."""
        sent = json.dumps([self._system, self._template_kwargs], sort_keys=True, default=str)
        return f"{self._model} at {self._transport.url}, {hashlib.sha256(sent.encode()).hexdigest()[:16]}"

    def check(self) -> None:
        """Whether the server is there and serves the model, as far as it says; before the first request.

        Raises:
            EngineError: nothing listens at the address, it gives no answer, or it refuses the key.
            InputError: other models than this are served.
        """
        status, reply = self._transport.get("/models")
        if status in (401, 403):
            raise EngineError(
                f"the server at {self._transport.url} refuses the key ({status}); give the right one as "
                "api_key, or in the environment as OPENAI_API_KEY"
            )
        served = reply.get("data") if status == 200 and isinstance(reply, Mapping) else None
        names = [
            str(entry[key])
            for entry in (served if isinstance(served, list) else [])
            if isinstance(entry, Mapping)
            for key in ("id", "root")
            if entry.get(key)
        ]
        if names and self._model not in names:
            listed = ", ".join(dict.fromkeys(names))
            raise InputError(
                f"the server at {self._transport.url} serves no model {self._model!r}; it has "
                f"{self._transport.shown(listed, 300)}"
            )
        self._is_checked = True

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        skip: Container[tuple[int, int]] = frozenset(),
    ) -> Iterator[Completion]:
        """Answers in the order of conversations and samples.

        Args:
            conversations: Each ends with a user turn.
            sampling: How.
            skip: (conversation, sample) pairs that are not wanted; nothing is asked for them.

        Raises:
            InputError: a conversation that ends with another turn, or one that the server refuses.
            EngineError: the server cannot be reached, stalls, or answers nonsense.
        """
        self._require_open(conversations)
        wanted = [
            _Wanted(number, sample, conversation)
            for number, conversation in enumerate(conversations)
            for sample in range(sampling.n)
            if (number, sample) not in skip
        ]
        return self._completions(wanted, sampling, len(conversations) * sampling.n)

    def _completions(
        self, wanted: Sequence[_Wanted], sampling: Sampling, total: int
    ) -> Iterator[Completion]:
        if wanted and not self._is_checked:
            self.check()
        bodies = ((one, self._body(one, sampling)) for one in wanted)

        def read(one: _Wanted, reply: Any) -> Completion:
            return self._completion(one, reply, sampling)

        answers = self._transport.post_each("/chat/completions", bodies, read)
        for done, (_, completion) in enumerate(answers, start=total - len(wanted) + 1):
            if self._progress is not None:
                self._progress("generate", done, total)
            yield completion

    def log_probs(
        self, conversations: Sequence[Conversation], candidates: Sequence[str]
    ) -> Float[np.ndarray, "B C"]:
        """Log-probability of each candidate's first token as the next one said.

        The server's tokenizer is not known here: a candidate's first token is the longest of the likeliest
        tokens that it begins with, blanks before it left out; -inf where there is none.

        Args:
            conversations: Each ends with a user turn, or has a prefill.
            candidates: Texts of which none begins another.

        Raises:
            InputError: as `generate`; no candidates, or two that begin with the same token.
            EngineError: as `generate`; or the server tells no log-probabilities.
        """
        self._require_open(conversations)
        _require_apart(candidates)
        if conversations and not self._is_checked:
            self.check()
        # temperature 1: some servers tell the probabilities after it
        first = Sampling(temperature=1.0, max_new_tokens=1)
        more = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        wanted = [_Wanted(number, 0, one) for number, one in enumerate(conversations)]
        bodies = ((one, self._body(one, first) | more) for one in wanted)

        def read(one: _Wanted, reply: Any) -> list[float]:
            return _scores(self._first_tokens(one, reply), candidates)

        found = np.full((len(conversations), len(candidates)), -np.inf)
        answers = self._transport.post_each("/chat/completions", bodies, read)
        for done, (one, scores) in enumerate(answers, start=1):
            found[one.number] = scores
            if self._progress is not None:
                self._progress("score", done, len(conversations))
        return found

    def _require_open(self, conversations: Sequence[Conversation]) -> None:
        require_unicode(conversations)
        for conversation in conversations:
            ends_answered = conversation.turns[-1].role == "assistant"
            if not (ends_answered and self._answers_assistant_turns):
                conversation.require_open()

    def _body(self, one: _Wanted, sampling: Sampling) -> dict[str, Any]:
        """What is posted for an answer."""
        conversation = one.conversation.with_system(self._system)
        body: dict[str, Any] = {
            "model": self._model,
            "messages": conversation.messages(),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if not sampling.is_greedy:
            body["top_p"] = sampling.top_p
            body["seed"] = request_seed(sampling, conversation, one.sample)
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if self._template_kwargs:
            body["chat_template_kwargs"] = self._template_kwargs
        if conversation.prefill:
            body["messages"] += [{"role": "assistant", "content": conversation.prefill}]
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        elif not conversation.awaits_answer:
            body |= {"continue_final_message": False, "add_generation_prompt": True}
        return body

    def _completion(self, one: _Wanted, reply: Any, sampling: Sampling) -> Completion:
        """What a reply says.

        Raises:
            EngineError: it is no answer.
        """
        choice, message = self._choice(one, reply)
        n_tokens = _count(reply)
        said = _said(message)
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        reasoning = _whole(reasoning) if isinstance(reasoning, str) else ""
        finish = choice.get("finish_reason")
        if said is None and not reasoning:
            # SGLang writes null for an answer that is over at once
            is_over = n_tokens is not None and (n_tokens <= 1 or bool(sampling.stop))
            if finish != "stop" or not is_over:
                raise self._nonsense(
                    one, f"no text ({json.dumps(choice)}); see what it is made to do"
                )
        text = _joined(one.conversation.prefill, reasoning, said or "")
        prefill = one.conversation.prefill if text.startswith(one.conversation.prefill) else ""
        kept = before_stop(
            text[len(prefill) :], sampling.stop
        )  # for servers that know no stop texts
        return Completion(
            conversation=one.number,
            sample=one.sample,
            text=text if kept is None else prefill + kept,
            n_tokens=n_tokens,
            finish="stop" if kept is not None else _FINISHES.get(str(finish), "unknown"),
        )

    def _choice(self, one: _Wanted, reply: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The reply's one choice, and the message in it.

        Raises:
            EngineError: there is none, or it is not the model's.
        """
        choices = reply.get("choices") if isinstance(reply, Mapping) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
            raise self._nonsense(one, f"no choice with a message ({json.dumps(reply)})")
        finish = choice.get("finish_reason")
        if finish == "content_filter":
            raise self._nonsense(
                one,
                "what its own filter has cut, which is not the model's answer; switch the filter off",
            )
        if finish == "abort":
            raise self._nonsense(one, "that it has given the request up; see its log")
        return choice, message

    def _first_tokens(self, one: _Wanted, reply: Any) -> dict[str, float]:
        """The likeliest first tokens, without blanks before them, and their log-probabilities.

        Raises:
            EngineError: the reply tells none.
        """
        choice, _ = self._choice(one, reply)
        try:
            told = [
                (str(entry["token"]).lstrip(_BLANKS), float(entry["logprob"]))
                for entry in choice["logprobs"]["content"][0]["top_logprobs"]
            ]
        except (KeyError, IndexError, TypeError, ValueError):
            raise EngineError(
                f"the server at {self._transport.url} tells no log-probabilities of first tokens; take one "
                "that knows logprobs and top_logprobs (vLLM, SGLang, llama.cpp), or a judge that reads "
                "what a model says"
            ) from None
        found: dict[str, float] = {}
        for token, log_prob in told:
            found[token] = max(log_prob, found.get(token, -np.inf))
        return found

    def _nonsense(self, one: _Wanted, what: str) -> EngineError:
        asked = one.conversation.asked[:60]
        return EngineError(
            f"the server at {self._transport.url} answers {asked!r} with "
            f"{self._transport.shown(what, 300)}"
        )


def _said(message: Mapping[str, Any]) -> str | None:
    """A message's text; None where it has none."""
    content = message.get("content")
    if isinstance(content, list):  # in parts
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(text for text in texts if isinstance(text, str)) or None
    if content is None:
        content = message.get("refusal")  # OpenAI's own place for one
    return _whole(content) if isinstance(content, str) else None


def _whole(text: str) -> str:
    """Half characters, which JSON can hold and no file, become question marks in a box."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _joined(prefill: str, reasoning: str, said: str) -> str:
    """An answer in one text: prefill, thought in its tags, and what follows."""
    if prefill and said.startswith(prefill):  # some servers send it back
        said = said[len(prefill) :]
    thinks_on = _OPENING in prefill and _CLOSING not in prefill.rpartition(_OPENING)[2]
    if not reasoning:
        return prefill + said.rstrip() if prefill else said.strip()
    if prefill and not thinks_on and not said.strip():
        # a parser that takes all for a thought up to a closing tag, which went before
        return prefill + reasoning.rstrip()
    thought = reasoning if thinks_on else f"{_OPENING}{reasoning}"
    if not said.strip():
        return prefill + thought.rstrip()  # cut off: without a closing tag, as the model left it
    return f"{prefill}{thought}{_CLOSING}{said.rstrip()}"


def _count(reply: Mapping[str, Any]) -> int | None:
    usage = reply.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def _require_apart(candidates: Sequence[str]) -> None:
    if not candidates or not all(text.strip() for text in candidates):
        raise InputError(
            f"the candidates are {list(candidates)}; expected at least one text, none empty"
        )
    for first, second in combinations((text.strip() for text in candidates), 2):
        if first.startswith(second) or second.startswith(first):
            raise InputError(
                f"one of the candidates {first!r} and {second!r} begins the other, and only first tokens "
                "are scored; choose words that part at once"
            )


def _scores(told: Mapping[str, float], candidates: Sequence[str]) -> list[float]:
    """The log-probability of the longest token that each candidate begins with."""
    begins = [
        max(
            (token for token in told if token and text.strip().startswith(token)),
            key=len,
            default="",
        )
        for text in candidates
    ]
    for (first, token), (second, other) in combinations(zip(candidates, begins, strict=True), 2):
        if token and token == other:
            raise InputError(
                f"the candidates {first!r} and {second!r} begin with the same token ({token!r}), and only "
                "first tokens are scored; choose words that part at once"
            )
    return [told.get(token, -np.inf) for token in begins]
