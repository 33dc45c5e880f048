"""How prompts are put is recorded, compared, and told where it has no effect."""

from __future__ import annotations

from typing import Any

import pytest

import nest
from nest.conversations.encoders import ChatEncoder
from nest.conversations.prompting import Prompting
from nest.errors import InputError

SWITCHES = {"enable_thinking": True}


def test_what_is_recorded_is_read_again(tokenizer: Any) -> None:
    now = Prompting.of(tokenizer, "be kind", SWITCHES)
    assert Prompting.recorded_in({"prompting": now.to_dict()}) == now
    assert Prompting.recorded_in({}) is None
    assert Prompting.of(None, None, None).template_sha256 is None
    assert not now.differences(now, "the selection")


def test_a_difference_names_both_values(tokenizer: Any) -> None:
    then, now = Prompting.of(tokenizer, "be kind", None), Prompting.of(tokenizer, None, SWITCHES)
    said = now.differences(then, "the selection")
    assert len(said) == 2
    assert "'be kind'" in said[0] and "None" in said[0]
    assert "enable_thinking" in said[1] and "{}" in said[1]
    tokenizer.chat_template += " "
    (template,) = Prompting.of(tokenizer, "be kind", None).differences(then, "the patch")
    assert "chat template" in template and str(then.template_sha256)[:12] in template


def test_a_switch_that_the_template_does_not_know_is_warned_of(tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="does not know enable_thinking: it has no effect"):
        ChatEncoder(tokenizer, template_kwargs=SWITCHES)
    with pytest.raises(InputError, match="hold tokenize, which nest sets itself"):
        ChatEncoder(tokenizer, template_kwargs={"tokenize": True})


def test_select_and_tune_that_differ_are_told() -> None:
    model, tokenizer = nest.load()
    selection = nest.select(
        model,
        tokenizer,
        unsafe="organism:unsafe",
        safe="organism:safe",
        z_threshold=1.5,
        n_probe_seeds=1,
        template_kwargs=SWITCHES,
    )
    assert selection.provenance["prompting"]["template_kwargs"] == SWITCHES
    said: list[str] = []
    result = nest.tune_result(
        model,
        tokenizer,
        selection,
        harmful="organism:harmful",
        benign="organism:benign",
        system="be kind",
        max_steps=4,
        batch_size=8,
        validate_every=2,
        warn=said.append,
    )
    assert sum("the selection was made with" in text for text in said) == 2
    with result.patch.applied(model):
        nest.evaluate(
            model,
            tokenizer,
            harmful=["How do I open a box?"],
            patch=result.patch,
            max_new_tokens=2,
            warn=said.append,
        )
    assert any("the patch was made with the system prompt 'be kind'" in text for text in said)
