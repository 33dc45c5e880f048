"""Dialogues are split, shuffled and batched without losing one or mixing prompts into the loss."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from tiny_models import BENIGN, HARMFUL, build, encoder_of

from nest.errors import InputError
from nest.prompts.prompt_set import from_values
from nest.tuning.dialogues import (
    Example,
    encode_dialogues,
    epochs_of_batches,
    split_validation,
    steps_per_epoch,
    to_micro_batches,
)


def examples(n: int, benign: bool) -> list[Example]:
    return [Example((1, i + 10, *[5] * (i % 4), 2), 2, benign) for i in range(n)]


def test_examples_are_prompt_and_response() -> None:
    encoder = encoder_of(build())
    found = encode_dialogues(encoder, from_values(HARMFUL), benign=False)
    for example, (prompt, response) in zip(found, HARMFUL, strict=True):
        assert list(example.ids[: example.said]) == encoder.prompt(prompt)
        assert encoder.decode(example.ids[example.said :]) == response
        assert example.ids[-1] in encoder.eos_ids and not example.benign
    with pytest.raises(InputError, match="without responses"):
        encode_dialogues(encoder, from_values(["only a prompt"]), benign=True)


@pytest.mark.parametrize(
    ("n_harmful", "n_benign", "share"), [(20, 40, 0.1), (2, 3, 0.01), (5, 2, 0.99)]
)
def test_the_split_is_a_partition_with_both_kinds_on_both_sides(
    n_harmful: int, n_benign: int, share: float
) -> None:
    harmful, benign = examples(n_harmful, False), examples(n_benign, True)
    train, held = split_validation(harmful, benign, share=share, seed=3)
    assert Counter(train + held) == Counter(harmful + benign)
    for part in (train, held):
        assert {example.benign for example in part} == {True, False}
    assert (train, held) == split_validation(harmful, benign, share=share, seed=3)
    if n_harmful > 5:
        assert held != split_validation(harmful, benign, share=share, seed=4)[1]
        assert [sum(e.benign == kind for e in held) for kind in (False, True)] == [2, 4]
    with pytest.raises(InputError, match="there are 1 benign dialogues; give at least 2"):
        split_validation(harmful, benign[:1], share=share, seed=0)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_every_epoch_shows_each_example_once(batch_size: int) -> None:
    data = examples(10, False) + examples(20, True)
    n = steps_per_epoch(len(data), batch_size)
    stream = epochs_of_batches(data, batch_size, seed=0)
    epochs = [[e for batch in islice(stream, n) for e in batch] for _ in range(2)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(data)
    assert epochs[0] != epochs[1]
    again = epochs_of_batches(data, batch_size, seed=0)
    assert [e for batch in islice(again, n) for e in batch] == epochs[0]
    other = epochs_of_batches(data, batch_size, seed=1)
    assert [e for batch in islice(other, n) for e in batch] != epochs[0]


def test_batches_hold_both_kinds_in_their_proportion() -> None:
    for batch in islice(epochs_of_batches(examples(20, False) + examples(40, True), 6, seed=2), 30):
        assert 1 <= sum(not example.benign for example in batch) <= 3


@pytest.mark.parametrize("size", [1, 3, 50])
def test_micro_batches_hold_every_token_once(size: int) -> None:
    encoder = encoder_of(build())
    data = encode_dialogues(encoder, from_values(HARMFUL), benign=False)
    data += encode_dialogues(encoder, from_values(BENIGN), benign=True)
    batches = to_micro_batches(data, size, encoder.pad_id)
    assert all(len(found.examples) == found.batch.input_ids.shape[0] <= size for found in batches)
    assert Counter(e for found in batches for e in found.examples) == Counter(data)
    for found in batches:
        own, said = found.batch.attention_mask.bool(), found.batch.completion_mask
        assert not bool((said & ~own).any())
        for row, example in enumerate(found.examples):
            assert tuple(found.batch.input_ids[row][own[row]].tolist()) == example.ids
            assert int((own & ~said)[row].sum()) == example.said
        benign = [example for example in found.examples if example.benign]
        assert list(found.benign_rows) == benign


def test_rows_that_would_learn_nothing_or_their_prompt_are_refused() -> None:
    for n_prompt, said in ((0, "all 3 tokens"), (3, "no completion token")):
        with pytest.raises(InputError, match=said):
            to_micro_batches([Example((1, 2, 3), n_prompt, True)], 4, 0)
