"""Scores are those of a plain forward pass, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_decoders import Recurrent, number_prompts, tiny, words_encoder
from tiny_models import WORDS, build, encoder_of, word_tokenizer
from torch import nn

from nest.conversations.conversation import Conversation
from nest.conversations.encoders import ChatEncoder
from nest.errors import ActivationError, InputError
from nest.generation import static
from nest.generation.engine import TokenScorer
from nest.generation.scoring import LocalScorer

HEAD = [7, 9, 11] * 6
PROMPTS = [*number_prompts(20, 3, 24), *(HEAD + tail for tail in number_prompts(9, 2, 8))]
CONVERSATIONS = [Conversation.of(" ".join(map(str, prompt))) for prompt in [*PROMPTS, PROMPTS[3]]]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(static.BATCH_COST_TOKENS, "cpu", 30)


def plainly(model: nn.Module, prompt: list[int], tokens: list[int]) -> list[float]:
    with torch.no_grad():
        output = model(torch.tensor([prompt]))
    logits = output if isinstance(output, torch.Tensor) else output.logits
    scores: list[float] = logits[0, -1].double().log_softmax(0)[tokens].tolist()
    return scores


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "custom"])
def test_scores_are_a_plain_passes(family: str, batch_size: int) -> None:
    model = Recurrent() if family == "custom" else tiny(family)
    calls: list[tuple[str, int, int]] = []
    scorer = LocalScorer(
        model, words_encoder(), batch_size=batch_size, progress=lambda *call: calls.append(call)
    )
    assert isinstance(scorer, TokenScorer)
    found = scorer.log_probs(CONVERSATIONS, ("17", "9 8", "33"))
    expected = [plainly(model, prompt, [17, 9, 33]) for prompt in [*PROMPTS, PROMPTS[3]]]
    np.testing.assert_allclose(found, expected, atol=2e-5)  # rounding of fp32
    assert calls[-1] == ("score", 30, 30)


def test_candidates_are_what_the_template_would_go_on_with() -> None:
    model = build()
    encoder = encoder_of(model)
    asked = [Conversation.of(" ".join(WORDS[:4]), system="do"), Conversation.of(WORDS[7])]
    found = LocalScorer(model, encoder).log_probs(asked, ("sure", "sorry no"))
    for row, conversation in zip(found, asked, strict=True):
        tokens = [encoder.dialogue(conversation, word)[0][-2] for word in ("sure", "sorry")]
        np.testing.assert_allclose(
            row, plainly(model, encoder.prompt(conversation), tokens), atol=2e-5
        )


def test_a_blank_that_the_template_writes_belongs_to_the_candidate() -> None:
    from test_texts import encoder

    own = encoder("bytes")
    own._tokenizer.chat_template = own._tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ ' ' * (m.role == 'assistant') }}{{ m.content }}"
    )
    spaced = ChatEncoder(own._tokenizer)
    scorer = LocalScorer(nn.Identity(), spaced)
    asked = [Conversation.of("How?")]
    firsts = [spaced._tokens(text)[0] for text in (" Sure", " I")]
    assert firsts != [spaced._tokens(text)[0] for text in ("Sure", "I")]
    assert scorer._first_tokens(asked, ("Sure", "I")) == [firsts]


def test_candidates_go_on_from_a_prefill() -> None:
    model = build()
    encoder = encoder_of(model)
    asked = [
        Conversation.of("how do i knit", prefill="sure here"),
        Conversation.of("how do i knit"),
    ]
    found = LocalScorer(model, encoder).log_probs(asked, ("you", "go"))
    tokens = word_tokenizer().convert_tokens_to_ids(["you", "go"])
    for row, conversation in zip(found, asked, strict=True):
        np.testing.assert_allclose(
            row, plainly(model, encoder.prompt(conversation), tokens), atol=2e-5
        )
    assert abs(found[0] - found[1]).max() > 1e-3


def test_candidates_that_cannot_be_told_apart() -> None:
    scorer = LocalScorer(tiny("llama"), words_encoder())
    with pytest.raises(InputError, match=r"'17 4' and '17 5' begin with the same token \(17\)"):
        scorer.log_probs(CONVERSATIONS, ("9", "17 4", "17 5"))
    with pytest.raises(InputError, match="no candidates"):
        scorer.log_probs(CONVERSATIONS, ())
    assert scorer.log_probs([], ("9", "17")).shape == (0, 2)
    with pytest.raises(InputError, match="batch_size is 0"):
        LocalScorer(tiny("llama"), words_encoder(), batch_size=0)


def test_a_conversation_that_was_answered_already() -> None:
    model = build()
    with pytest.raises(InputError, match="ends with the turn of the assistant"):
        LocalScorer(model, encoder_of(model)).log_probs(
            [Conversation.of("how").answered("sure")], ("no", "sorry")
        )


def test_numbers_that_are_none() -> None:
    model = tiny("llama")
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ActivationError, match="hold NaN"):
        LocalScorer(model, words_encoder()).log_probs(CONVERSATIONS, ("9", "17"))
