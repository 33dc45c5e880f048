"""Tokens are drawn as a plain reference draws them, from numbers that hang on the answer alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nest.errors import ActivationError
from nest.generation.drawing import chances, drawn
from nest.generation.sampling import Sampling

SETTINGS = {
    "all": Sampling(temperature=1.0),
    "top_p": Sampling(temperature=0.7, top_p=0.9),
    "nearly all": Sampling(temperature=3.0, top_p=0.999),
    "top_k": Sampling(temperature=1.3, top_k=5),
    "both": Sampling(temperature=1.0, top_k=50, top_p=0.8),
    "more than there are": Sampling(temperature=1.0, top_k=10**6, top_p=0.95),
    "one": Sampling(temperature=1.0, top_k=1),
    "cold": Sampling(temperature=1e-300),
}


def kept(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """The reference: tokens that may be drawn and their weights, in the vocabulary's order."""
    largest = max(logits)
    weights = [math.exp((value - largest) / sampling.temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: sampling.top_k or len(order)]
    total, so_far, found = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if so_far >= sampling.top_p * total:
            break
        found.append(i)
        so_far += weights[i]
    return {i: weights[i] for i in sorted(found)}


def plainly_drawn(logits: list[float], chance: float, sampling: Sampling) -> int:
    weights = kept(logits, sampling)
    bound, so_far = chance * sum(weights.values()), 0.0
    for token, weight in weights.items():
        so_far += weight
        if so_far > bound:
            return token
    return token


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_vocabulary", [3, 256, 257, 700, 3000])
def test_tokens_are_the_references(
    sampling: Sampling, dtype: torch.dtype, n_vocabulary: int
) -> None:
    draw = torch.Generator().manual_seed(n_vocabulary)
    logits = (2 * torch.randn(60, n_vocabulary, generator=draw)).to(dtype)  # bf16: with many ties
    chance = torch.rand(60, generator=draw, dtype=torch.float64)
    expected = [
        plainly_drawn(row, float(number), sampling)
        for row, number in zip(logits.double().tolist(), chance, strict=True)
    ]
    found = drawn(logits, chance, sampling).tolist()
    # fp32 sums decide otherwise where the number lies within their rounding of a border
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= (dtype != torch.float64)
    for row, token in zip(logits.double().tolist(), found, strict=True):
        assert token in kept(row, sampling)


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=list(SETTINGS))
def test_exactly_the_kept_tokens_come_up(sampling: Sampling) -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 40, generator=draw).double()
    weights = kept(logits[0].tolist(), sampling)
    chance = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    counts = torch.bincount(drawn(logits.expand(20_000, -1), chance, sampling), minlength=40)
    assert set(counts.nonzero().squeeze(1).tolist()) == set(weights)
    for token, weight in weights.items():
        share = weight / sum(weights.values())
        assert counts[token] / 20_000 == pytest.approx(share, abs=1.1 / 20_000)


def test_of_equally_likely_tokens_the_first_are_kept() -> None:
    chance = torch.linspace(0, 0.999, 500, dtype=torch.float64)
    level = torch.zeros(500, 3000)
    for sampling in (Sampling(temperature=1.0, top_k=4), Sampling(temperature=1.0, top_p=4 / 3000)):
        assert set(drawn(level, chance, sampling).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("n_vocabulary", [1, 255, 256, 512, 513])
def test_the_ends_of_the_interval(n_vocabulary: int) -> None:
    logits = torch.full((2, n_vocabulary), -1.0)
    logits[:, -1:] = 1e-7 - 1  # the last one can be drawn
    chance = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=n_vocabulary)):
        assert drawn(logits, chance, sampling).tolist() == [0, n_vocabulary - 1]


def test_a_token_that_is_ruled_out_is_never_drawn() -> None:
    logits = torch.full((3, 600), -math.inf)
    logits[:, [7, 299, 300]] = torch.tensor([0.0, 1.0, -2.0])
    chance = torch.tensor([0.0, 0.5, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    for sampling in SETTINGS.values():
        assert set(drawn(logits, chance, sampling).tolist()) <= {7, 299, 300}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=list(SETTINGS))
def test_numbers_that_are_none(value: float, sampling: Sampling) -> None:
    logits = torch.zeros(2, 300)
    logits[1, 4] = value
    with pytest.raises(ActivationError, match="NaN or infinity"):
        drawn(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), sampling)
    with pytest.raises(ActivationError, match="NaN or infinity"):
        drawn(torch.full((1, 4), -math.inf), torch.tensor([0.5], dtype=torch.float64), sampling)


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=list(SETTINGS))
def test_rounding_noise_changes_next_to_no_token(sampling: Sampling) -> None:
    draw = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(4000, 500, generator=draw)
    noisy = logits + 1e-6 * torch.randn(4000, 500, generator=draw)
    chance = torch.rand(4000, generator=draw, dtype=torch.float64)
    assert (drawn(logits, chance, sampling) != drawn(noisy, chance, sampling)).sum() <= 1


def test_chances_are_uniform_and_hang_on_each_argument() -> None:
    numbers = chances(3, [5, 6, 7], 2, 20_000)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees, 1 in 1,000
    others = [chances(4, [5, 6, 7], 2, 9), chances(3, [5, 6, 8], 2, 9), chances(3, [5, 6, 7], 1, 9)]
    others += [chances(3, [5, 6], 2, 9), chances(3, [5, 6, 7, 0], 2, 9)]
    assert len({tuple(other) for other in [numbers[:9], *others]}) == 6
    assert (chances(3, (5, 6, 7), 2, 9) == numbers[:9]).all()


def test_chances_are_the_same_in_every_version() -> None:
    """A run that is repeated years later draws the same answers."""
    found = chances(2**63 - 1, [0, 151_935], 0, 3)
    assert found.tolist() == [0.7145132510544534, 0.6955198361243765, 0.6728564396510949]
