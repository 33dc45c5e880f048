"""A plan holds every prompt once, within its bounds, and shares what is worth sharing."""

import pytest
from tiny_decoders import number_prompts

from nest.errors import InputError
from nest.generation import batches as planning
from nest.generation.batches import families, plan_batches

HEAD = [7, 8, 9] * 10
PROMPTS = [
    *number_prompts(60, 2, 40),
    *([*HEAD, *tail] for tail in number_prompts(30, 1, 8, seed=1)),
    *([*HEAD, 5, 5, 5, 5, *tail] for tail in number_prompts(30, 1, 8, seed=2)),
]
UNIQUE = list(dict.fromkeys(map(tuple, PROMPTS)))


def plan(prompts=UNIQUE, **changes):
    given = {
        "max_tokens": 64,
        "max_new_tokens": 20,
        "batch_size": 16,
        "may_pad": True,
        "batch_cost_tokens": 50,
    }
    return plan_batches(prompts, **given | changes)


@pytest.mark.parametrize("batch_size", [1, 16, 256])
@pytest.mark.parametrize("cost", [0, 50, 10**6])
@pytest.mark.parametrize("may_pad", [True, False])
def test_every_prompt_is_in_one_batch_within_bounds(batch_size, cost, may_pad):
    batches = plan(batch_size=batch_size, batch_cost_tokens=cost, may_pad=may_pad)
    indices = sorted(index for batch in batches for index in batch.indices)
    assert indices == list(range(len(UNIQUE)))
    for batch in batches:
        own = [UNIQUE[index] for index in batch.indices]
        lengths = [len(prompt) for prompt in own]
        assert len(own) <= batch_size
        assert lengths == sorted(lengths, reverse=True)
        assert len({prompt[: batch.n_shared] for prompt in own}) == 1
        assert batch.n_shared < min(lengths)
        assert batch.max_new_tokens == min(20, 64 - lengths[0])
        if not may_pad:
            assert len(set(lengths)) == 1 and batch.n_shared == 0
        assert sum(lengths[0] - length for length in lengths) <= cost


def test_a_long_common_beginning_is_shared_and_a_short_one_is_not():
    shared = {batch.n_shared for batch in plan(max_tokens=None)}
    assert {0, 30, 34} <= shared  # HEAD, and HEAD with the four tokens that the last thirty add
    assert {batch.n_shared for batch in plan(max_tokens=None, batch_cost_tokens=10**6)} == {0}


def test_families_spare_what_they_must():
    for least in (1, 40, 400):
        found = families(UNIQUE, range(len(UNIQUE)), least)
        assert sorted(i for _, members in found for i in members) == list(range(len(UNIQUE)))
        assert all(depth == 0 or (len(members) - 1) * depth >= least for depth, members in found)
    assert families(UNIQUE, [], 1) == []


def test_a_prompt_that_is_the_beginning_of_another():
    prompts = [tuple(range(6, 26)), tuple(range(6, 16))]
    assert families(prompts, [0, 1], 5) == [(9, [1, 0])]
    assert families(prompts, [0, 1], 10) == [(0, [1, 0])]


def test_a_prompt_that_fills_the_context():
    with pytest.raises(InputError, match="64 tokens and the model's context 64"):
        plan([tuple(range(64))])


# --- several answers to a prompt ------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [1, 3, 16, 100])
@pytest.mark.parametrize("batch_size", [1, 16, 256])
@pytest.mark.parametrize("cost", [0, 50, 10**6])
def test_every_answer_is_in_one_batch_within_bounds(n_samples, batch_size, cost):
    batches = plan(batch_size=batch_size, batch_cost_tokens=cost, n_samples=n_samples)
    answers = [(i, sample) for batch in batches for i in batch.indices for sample in batch.samples]
    assert sorted(answers) == [(i, s) for i in range(len(UNIQUE)) for s in range(n_samples)]
    for batch in batches:
        assert len(batch.indices) * len(batch.samples) <= batch_size
        # answers to a prompt part only where one batch does not hold them
        assert len(batch.samples) in (n_samples, min(n_samples, batch_size), n_samples % batch_size)


def test_a_prompt_of_many_answers_is_not_held_too_often(monkeypatch):
    monkeypatch.setattr(planning, "HELD_TOKENS", 400)
    for n_samples in (1, 4, 50):
        for batch in plan(n_samples=n_samples, batch_size=256, batch_cost_tokens=0):
            longest = len(UNIQUE[batch.indices[0]])
            held = len(batch.indices) * len(batch.samples) * longest
            assert held <= 400 or len(batch.indices) * len(batch.samples) == 1
