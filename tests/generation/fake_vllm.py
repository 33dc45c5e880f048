"""What of vLLM our engine calls, with its names of parameters: others are a TypeError, as with vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

EOS = 99


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = 16


@dataclass
class CompletionOutput:
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class Tokenizer:
    """Writes turns as lines; opens a thought where it is told to."""

    def apply_chat_template(
        self, messages: Any, *, tokenize: bool, add_generation_prompt: bool, thinks: bool = False
    ) -> str:
        lines = [f"{turn['role']}: {turn['content']}" for turn in messages]
        return "\n".join([*lines, "assistant: " + "<think>\n" * thinks])


class LLM:
    """Says words that hang on all it is asked."""

    made: list[LLM]

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
    ) -> None:
        if dtype not in ("auto", "bfloat16"):
            raise ValueError(f"unknown dtype {dtype}")
        self.settings = (model, revision, dtype, max_model_len)
        self.calls: list[dict[str, Any]] = []
        self.fault: Exception | None = None
        LLM.made.append(self)

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def chat(
        self,
        messages: list[list[dict[str, Any]]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        assert add_generation_prompt != continue_final_message
        assert isinstance(sampling_params, list) and len(sampling_params) == len(messages)
        if self.fault is not None:
            raise self.fault
        self.calls.append({"messages": messages, "params": sampling_params, "use_tqdm": use_tqdm})
        pairs = zip(messages, sampling_params, strict=True)
        return [RequestOutput([_said(turns, params)]) for turns, params in pairs]


def words_for(asked: Any, seed: int | None, n_words: int = 12) -> list[str]:
    """Words that hang on what was asked and on the seed."""
    digest = hashlib.sha256(f"{asked} {seed}".encode()).digest()
    return [f"w{byte}" for byte in digest[:n_words]]


def _said(turns: list[dict[str, Any]], params: SamplingParams) -> CompletionOutput:
    words, stop, cap = words_for(turns, params.seed), params.stop or [], params.max_tokens or 16
    text, ids = " " + " ".join(words), list(range(len(words)))
    hits = [one for one in stop if one in text]
    if hits:
        first = min(hits, key=text.find)
        said = text[: text.find(first)]
        return CompletionOutput(said, ids[: len(said.split()) + 1], "stop", first)
    if len(words) > cap:
        return CompletionOutput(" " + " ".join(words[:cap]), ids[:cap], "length")
    return CompletionOutput(text, [*ids, EOS], "stop")


def module() -> ModuleType:
    """A fresh module `vllm`."""
    made = ModuleType("vllm")
    made.LLM, made.SamplingParams, made.__version__ = LLM, SamplingParams, "0.0"  # type: ignore[attr-defined]
    LLM.made = []
    return made
