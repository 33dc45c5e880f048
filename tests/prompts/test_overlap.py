"""Near-duplicates: against sets of words compared one by one, and at the edges."""

import random

import pytest
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from nest.errors import InputError
from nest.prompts import overlap
from nest.prompts.overlap import Pair, near_duplicates
from nest.prompts.prompt_set import from_values


def content_words(text):
    return {word for word in text.lower().split() if word not in ENGLISH_STOP_WORDS}


def jaccard(first, second):
    a, b = content_words(first), content_words(second)
    return len(a & b) / len(a | b)


def test_order_case_and_stop_words_do_not_count():
    first = from_values(["How do I paint a fence?", "Where is the market"], "train")
    second = from_values(["A FENCE: how to paint it", "Where is the harbour"], "test")
    found = near_duplicates(first, second)
    assert (found.first, found.second, found.at_least) == ("train", "test", 0.8)
    assert (found.n, found.of) == (1, 2)
    assert found.examples == (Pair("How do I paint a fence?", "A FENCE: how to paint it", 1.0),)


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
@pytest.mark.parametrize("at_least", [0.3, 0.5, 1.0])
def test_agrees_with_sets_compared_one_by_one(monkeypatch, block_rows, at_least):
    monkeypatch.setattr(overlap, "BLOCK_ROWS", block_rows)
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(12)] + ["the", "of"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(3, 6))) for _ in range(90)]
    texts = [text for text in texts if content_words(text)]
    first, second = texts[:40], texts[40:]
    found = near_duplicates(from_values(first), from_values(second), at_least=at_least)
    nearest = [max(jaccard(a, b) for a in first) for b in second]
    assert found.n == sum(value >= at_least for value in nearest)
    for pair in found.examples:
        assert pair.jaccard == pytest.approx(jaccard(pair.first, pair.second))
        assert pair.jaccard == pytest.approx(nearest[second.index(pair.second)])


def test_prompts_without_content_words_are_compared_by_their_text():
    first = from_values(["What is it?", "Why?", "Tell cats"])
    assert near_duplicates(first, from_values(["Why?", "Is it?", "?!"])).n == 1
    assert near_duplicates(from_values(["Why?"]), from_values(["Why?", "How?"])).n == 1


def test_a_set_is_a_duplicate_of_itself_and_shows_three_examples():
    some = from_values([f"paint fence number{i}" for i in range(5)])
    found = near_duplicates(some, some, at_least=1.0)
    assert found.n == found.of == 5
    assert len(found.examples) == 3
    assert all(pair.first == pair.second for pair in found.examples)


@pytest.mark.parametrize("at_least", [0.0, -1.0, 1.01, float("nan")])
def test_a_similarity_outside_its_range_is_refused(at_least):
    some = from_values(["paint"])
    with pytest.raises(InputError, match="at_least"):
        near_duplicates(some, some, at_least=at_least)
