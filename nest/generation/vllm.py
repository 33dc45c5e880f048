"""Answers by vLLM in this process. vLLM is an extra, and imported when an engine is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from nest.conversations.conversation import Conversation
from nest.conversations.prompting import Prompting
from nest.conversations.thoughts import opened_at_end
from nest.errors import EngineError, InputError
from nest.generation.engine import Completion, Finish, require_unicode
from nest.generation.sampling import Sampling, request_seed
from nest.progress import ProgressCallback

ASKED_AT_ONCE = 1024
"""Answers that vLLM is asked for together: enough to keep it busy, and few to lose in an interruption."""

_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length"}


class _Wanted(NamedTuple):
    number: int
    sample: int
    conversation: Conversation


class VllmEngine:
    """Answers of a model that vLLM loads into this process.

    Each answer is a request of its own with a seed of its own; vLLM runs a prompt that several share once.
    Its batches round, so that an answer can differ with others beside it.

    Args:
        model_path: Folder or name of a checkpoint; a folded one of ours is one.
        revision: Of a name.
        dtype: As vLLM takes it: `auto`, `bfloat16`, ...
        system: System prompt for conversations without one.
        template_kwargs: Passed to the chat template, such as `{"enable_thinking": False}`.
        progress: Called as `progress("generate", answers done, answers)`.
        **engine_args: Further arguments of `vllm.LLM`, such as `max_model_len` or `tensor_parallel_size`.

    Raises:
        InputError: vLLM is not installed, or refuses the model or an argument.
        EngineError: vLLM cannot run here.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        system: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        progress: ProgressCallback | None = None,
        **engine_args: Any,
    ) -> None:
        try:
            self._vllm: Any = import_module(
                "vllm"
            )  # by name: it has no types where it is not installed
        except ImportError as fault:
            raise InputError(
                f"the vllm engine needs vLLM, which cannot be imported ({fault}); pip install vllm, or use "
                "the static engine or a server"
            ) from fault
        self._settings = {"model": model_path, "revision": revision, "dtype": dtype, **engine_args}
        self._system, self._kwargs = system, dict(template_kwargs or {})
        self._progress = progress
        try:
            self._llm = self._vllm.LLM(**self._settings)
        except (ValueError, TypeError, OSError) as fault:
            raise InputError(f"vLLM refuses {model_path!r}: {_line(fault)}") from fault
        except RuntimeError as fault:
            raise EngineError(f"vLLM cannot run {model_path!r} here: {_line(fault)}") from fault
        self._opened = self._opened_thought()

    @property
    def prompting(self) -> Prompting:
        """How it puts prompts, as far as it decides; the template is the checkpoint's."""
        return Prompting(self._system, self._kwargs)

    @property
    def identity(self) -> str:
        """sha256 of what vLLM was told to load, and of what is sent with every conversation.

        A folder's content is not read: one that has changed since is the caller's to tell.
        """
        version = getattr(self._vllm, "__version__", None)
        parts = [self._settings, self._system, self._kwargs, version]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

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
            InputError: a conversation that ends with another turn, or that vLLM refuses.
            EngineError: vLLM failed.
        """
        require_unicode(conversations)
        for conversation in conversations:
            conversation.require_open()
        wanted = [
            _Wanted(number, sample, conversation.with_system(self._system))
            for number, conversation in enumerate(conversations)
            for sample in range(sampling.n)
            if (number, sample) not in skip
        ]
        return self._completions(wanted, sampling, len(conversations) * sampling.n)

    def _completions(
        self, wanted: Sequence[_Wanted], sampling: Sampling, total: int
    ) -> Iterator[Completion]:
        done = total - len(wanted)
        for first in range(0, len(wanted), ASKED_AT_ONCE):
            part = wanted[first : first + ASKED_AT_ONCE]
            found: dict[tuple[int, int], Completion] = {}
            for goes_on in (False, True):  # one call of vLLM's takes one or the other
                own = [one for one in part if bool(one.conversation.prefill) == goes_on]
                outputs = self._asked(own, sampling, goes_on) if own else []
                for one, output in zip(own, outputs, strict=True):
                    found[one.number, one.sample] = self._completion(one, output)
            done += len(part)
            if self._progress is not None:
                self._progress("generate", done, total)
            yield from (found[one.number, one.sample] for one in part)

    def _asked(self, wanted: Sequence[_Wanted], sampling: Sampling, goes_on: bool) -> Sequence[Any]:
        """vLLM's output for each of these.

        Raises:
            InputError: vLLM refuses one.
            EngineError: vLLM failed.
        """
        messages = [one.conversation.messages() for one in wanted]
        if goes_on:
            for turns, one in zip(messages, wanted, strict=True):
                turns.append({"role": "assistant", "content": one.conversation.prefill})
        try:
            outputs: Sequence[Any] = self._llm.chat(
                messages,
                sampling_params=[self._params(one, sampling) for one in wanted],
                use_tqdm=False,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                chat_template_kwargs=self._kwargs or None,
            )
        except ValueError as fault:
            raise InputError(f"vLLM refuses a conversation: {_line(fault)}") from fault
        except RuntimeError as fault:
            raise EngineError(
                f"vLLM failed: {_line(fault)}; see its log, or give it less (max_model_len, "
                "gpu_memory_utilization)"
            ) from fault
        return outputs

    def _params(self, one: _Wanted, sampling: Sampling) -> Any:
        """vLLM's own settings for one answer; all of them are said, so that none is taken from a file."""
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,  # 0 is for all in newer versions only
            seed=None
            if sampling.is_greedy
            else request_seed(sampling, one.conversation, one.sample),
            stop=list(sampling.stop) or None,
            max_tokens=sampling.max_new_tokens,
        )

    def _completion(self, one: _Wanted, output: Any) -> Completion:
        if not output.outputs or output.outputs[0].finish_reason == "abort":
            raise EngineError(
                f"vLLM gave up the answer to {one.conversation.asked[:60]!r}; see its log, or give it less "
                "(max_model_len, gpu_memory_utilization)"
            )
        said = output.outputs[0]
        token_ids = tuple(int(token) for token in said.token_ids)
        # stop_reason is the text that ended it; without one the last token did
        if said.finish_reason == "stop" and not isinstance(said.stop_reason, str):
            token_ids = token_ids[:-1]
        prefill = one.conversation.prefill
        text = prefill + said.text.rstrip() if prefill else said.text.strip()
        if self._opened is not None and not prefill and not text.startswith(self._opened):
            text = self._opened + text
        return Completion(
            conversation=one.number,
            sample=one.sample,
            text=text,
            n_tokens=len(token_ids),
            finish=_FINISHES.get(str(said.finish_reason), "unknown"),
            token_ids=token_ids,
        )

    def _opened_thought(self) -> str | None:
        """The tag of a thought that the template opens before every answer: vLLM's text lacks it."""
        probe = [{"role": "user", "content": "Hello"}]
        try:
            rendered = self._llm.get_tokenizer().apply_chat_template(
                probe, tokenize=False, add_generation_prompt=True, **self._kwargs
            )
        except ValueError:  # no template, of which vLLM makes an error when it is asked
            return None
        tags = opened_at_end(str(rendered))
        return None if tags is None else tags[0]


def _line(fault: BaseException) -> str:
    text = " ".join(str(fault).split())
    return text if len(text) <= 300 else f"{text[:300]}..."
