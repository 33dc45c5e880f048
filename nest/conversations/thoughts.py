"""Reasoning before an answer: the tags around it, and the answer without it."""

from __future__ import annotations

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""(opening, closing), as families of models write them: Qwen and R1, others after them, Mistral, Cohere."""


def opened_at_end(text: str) -> tuple[str, str] | None:
    """The tags of a thought that a text opens with its last word, as some generation prompts do."""
    return next((tags for tags in TAGS if text.rstrip().endswith(tags[0])), None)


def strip_thinking(response: str) -> str:
    """The answer without its reasoning: what follows the last closing tag.

    Reasoning that was never closed has no answer, so an unclosed tag cuts off the rest.
    """
    for opening, closing in TAGS:
        if closing in response:
            return response.rpartition(closing)[2].strip()
        if opening in response:
            return response.partition(opening)[0].strip()
    return response.strip()
