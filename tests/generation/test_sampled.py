"""Drawn answers hang on seed, prompt and sample number alone, and follow the model's distributions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from tiny_decoders import VOCABULARY, Recurrent, number_prompts, tiny, words_encoder
from torch import Tensor, nn

from nest.conversations.conversation import Conversation
from nest.errors import ActivationError, InputError
from nest.generation import static
from nest.generation.engine import Completion
from nest.generation.local import local_engine
from nest.generation.sampling import GREEDY, Sampling
from nest.generation.static import StaticEngine, generate_tokens

FAMILIES = ["llama", "gptneox", "gemma3", "gpt2", "custom"]
SAMPLINGS = {
    "all": Sampling(temperature=1.0, n=3, max_new_tokens=12, seed=5),
    "top_p": Sampling(temperature=0.8, top_p=0.9, n=2, max_new_tokens=12),
    "top_k": Sampling(temperature=1.2, top_k=6, n=3, max_new_tokens=12),
    "stop": Sampling(temperature=1.0, n=2, max_new_tokens=20, stop=("17", " 2", "5 9")),
}


def conversations(prompts: Sequence[Sequence[int]]) -> list[Conversation]:
    return [Conversation.of(" ".join(map(str, prompt))) for prompt in prompts]


PROMPTS = number_prompts(16, 3, 24)
# two beginnings in common, as attacks have them
HEADS = ([7, 9, 11] * 6, [20, 21, 22] * 7)
ASKED = conversations([*PROMPTS, *(HEADS[i % 2] + tail for i, tail in enumerate(PROMPTS[:10]))])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(static.BATCH_COST_TOKENS, "cpu", 30)
    yield
    torch.set_num_threads(1)


def made(family: str) -> nn.Module:
    model: nn.Module = Recurrent() if family == "custom" else tiny(family)
    return model


def found(
    model: nn.Module,
    sampling: Sampling,
    asked: Sequence[Conversation] = ASKED,
    batch_size: int = 64,
    skip: frozenset[tuple[int, int]] = frozenset(),
) -> list[Completion]:
    engine = StaticEngine(model, words_encoder(), batch_size=batch_size)
    return list(engine.generate(asked, sampling, skip=skip))


@pytest.mark.parametrize(
    ("family", "name"),
    [*product(["llama"], SAMPLINGS), *product(FAMILIES[1:], ["all"]), ("custom", "stop")],
)
def test_batch_size_order_and_threads_change_nothing(family: str, name: str) -> None:
    model, sampling = made(family), SAMPLINGS[name]
    expected = sorted(found(model, sampling))
    assert len({one.text for one in expected}) > len(expected) / 2
    assert {one.finish for one in expected} == {"stop", "length"} or family in ("gemma3", "custom")
    for batch_size, threads in ((1, 1), (7, 2), (64, 2)):
        torch.set_num_threads(threads)
        assert sorted(found(model, sampling, batch_size=batch_size)) == expected, batch_size
    turned = found(model, sampling, ASKED[::-1])
    last = len(ASKED) - 1
    assert sorted(one._replace(conversation=last - one.conversation) for one in turned) == expected
    some = found(model, sampling, ASKED[5:9])
    assert sorted(some) == [
        one._replace(conversation=one.conversation - 5)
        for one in expected
        if 5 <= one.conversation < 9
    ]
    more = found(model, replace(sampling, n=sampling.n + 2))
    assert sorted(one for one in more if one.sample < sampling.n) == expected


def test_a_longer_limit_goes_on_from_the_same_words() -> None:
    model = tiny("llama")
    short, long = (found(model, Sampling(temperature=1.0, max_new_tokens=n)) for n in (5, 15))
    for a, b in zip(sorted(short), sorted(long), strict=True):
        assert a.token_ids is not None and b.token_ids is not None
        assert b.token_ids[:5] == a.token_ids


@pytest.mark.parametrize("n_done", [1, 17, 50])
def test_a_run_that_is_gone_on_with_gives_the_same(n_done: int) -> None:
    model, sampling = tiny("llama"), SAMPLINGS["all"]
    engine = StaticEngine(model, words_encoder(), batch_size=7)
    whole = list(engine.generate(ASKED, sampling))
    begun = engine.generate(ASKED, sampling)
    kept = [next(begun) for _ in range(n_done)]
    begun.close()  # type: ignore[attr-defined]
    done = frozenset((one.conversation, one.sample) for one in kept)
    assert kept + list(engine.generate(ASKED, sampling, skip=done)) == whole


def test_skipped_batches_are_not_run() -> None:
    model, sampling, calls = tiny("llama"), SAMPLINGS["all"], []
    whole = found(model, sampling, batch_size=7)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    skip = frozenset((one.conversation, one.sample) for one in whole)
    assert found(model, sampling, batch_size=7, skip=skip) == []
    assert calls == []
    found(model, sampling, batch_size=7, skip=skip - {(0, 0)})
    assert 0 < len(calls) <= 2 * sampling.max_new_tokens


def test_equal_prompts_get_equal_answers_and_samples_differ() -> None:
    asked = [ASKED[0], ASKED[1], ASKED[0]]
    by_pair = {
        (a.conversation, a.sample): a.text for a in found(made("llama"), SAMPLINGS["all"], asked)
    }
    assert all(by_pair[0, sample] == by_pair[2, sample] for sample in range(3))
    assert len(set(by_pair.values())) == 6


@pytest.mark.parametrize("n_samples", [4, 40])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_prompt_is_run_once_for_all_of_its_samples(family: str, n_samples: int) -> None:
    model, n_tokens = made(family), []
    model.register_forward_pre_hook(
        lambda _module, _args, given: n_tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    asked = conversations(number_prompts(3, 20, 24))
    sampling = Sampling(temperature=1.0, n=n_samples, max_new_tokens=2)
    assert len(found(model, sampling, asked, batch_size=64)) == 3 * n_samples
    firsts = [size for size in n_tokens if size > n_samples * 3]
    n_batches = 1 if n_samples == 4 else 3
    assert sum(n_tokens) <= 3 * 24 + 3 * n_samples + 10
    assert len(firsts) <= n_batches


def test_more_samples_than_a_batch_holds() -> None:
    model, sampling = made("llama"), Sampling(temperature=1.0, n=23, max_new_tokens=6)
    assert sorted(found(model, sampling, ASKED[:4], batch_size=5)) == sorted(
        found(model, sampling, ASKED[:4], batch_size=256)
    )


def test_a_cache_that_cannot_be_repeated_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from nest.generation import decoding

    model, sampling = made("llama"), SAMPLINGS["all"]
    expected = found(model, sampling)
    monkeypatch.setattr(decoding, "_can_select", lambda _cache: False)
    assert found(model, sampling) == expected


# --- distributions --------------------------------------------------------------------------------


class Level(nn.Module):
    """The same logits whatever was said."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.6, 0, 1.0), (1.5, 0, 0.8), (1.5, 5, 1.0), (0.6, 5, 0.8)]
)
def test_frequencies_are_those_of_the_softmax(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    model, n = Level(logits), 3000
    sampling = Sampling(temperature, top_p, top_k, n=n, seed=11, max_new_tokens=2)
    encoder = words_encoder(eos_id=None)
    answers = StaticEngine(model, encoder).generate(conversations([[6, 7]]), sampling)
    pairs = Counter(one.token_ids for one in answers)
    probabilities = (logits.double() / sampling.temperature).softmax(0)
    if sampling.top_k:
        probabilities[probabilities.argsort(descending=True)[sampling.top_k :]] = 0
        probabilities /= probabilities.sum()
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    probabilities[order[before >= sampling.top_p]] = 0
    probabilities /= probabilities.sum()
    joint = torch.outer(probabilities, probabilities)  # first and second token are independent
    cells = [(int(a), int(b)) for a, b in joint.nonzero()]
    assert set(pairs) <= set(cells)
    # cells that come up seldom are counted together: the statistic is one of large numbers
    often = [cell for cell in cells if n * joint[cell] >= 5]
    observed = [pairs[cell] for cell in often]
    expected = [float(n * joint[cell]) for cell in often]
    if len(often) < len(cells):
        observed.append(n - sum(observed))
        expected.append(n - sum(expected))
    assert chisquare(observed, expected).pvalue > 1e-3


def test_the_second_word_follows_what_the_model_thinks_after_the_first() -> None:
    model, prompt, n = tiny("llama"), [9, 8, 7, 30], 4000
    encoder = words_encoder(eos_id=None)
    sampling = Sampling(temperature=0.7, n=n, max_new_tokens=2)
    said = [
        one.token_ids
        for one in StaticEngine(model, encoder).generate(conversations([prompt]), sampling)
    ]
    (first, count), *_ = Counter(ids[0] for ids in said if ids).most_common(1)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, first]])).logits[0, -1].double()
    expected = count * (logits / 0.7).softmax(0)
    seconds = Counter(ids[1] for ids in said if ids and ids[0] == first)
    often = [token for token in range(VOCABULARY) if expected[token] >= 5]
    observed = [*(seconds[token] for token in often)]
    rest = [count - sum(observed)], [count - float(expected[often].sum())]
    assert chisquare([*observed, *rest[0]], [*expected[often].tolist(), *rest[1]]).pvalue > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likeliest_token_alone_is_greedy_decoding(family: str) -> None:
    model = made(family)
    for sampling in (
        Sampling(temperature=1.0, top_k=1, max_new_tokens=12),
        Sampling(temperature=1.0, top_p=1e-9, max_new_tokens=12),
        Sampling(temperature=1e-9, max_new_tokens=12),
    ):
        greedy = sorted(found(model, Sampling(max_new_tokens=12)))
        assert sorted(found(model, sampling)) == greedy


# --- what else --------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_generate_tokens() -> None:
    model, encoder = tiny("llama"), words_encoder()
    encoded = [encoder.prompt(one) for one in ASKED]
    expected = generate_tokens(model, encoder, encoded, 12)
    answers = sorted(found(model, Sampling(max_new_tokens=12)))
    assert [list(one.token_ids or ()) for one in answers] == expected
    assert [one.text for one in answers] == [encoder.decode(ids) for ids in expected]
    ended = [one.finish == "stop" for one in answers]
    assert ended == [len(ids) < 12 for ids in expected] and len(set(ended)) == 2


def test_the_model_and_the_random_state_are_as_they_were() -> None:
    model = tiny("llama").train()
    state = torch.get_rng_state()
    answers = StaticEngine(model, words_encoder()).generate(ASKED, SAMPLINGS["all"])
    next(answers)
    assert torch.is_grad_enabled()
    answers.close()  # type: ignore[attr-defined]
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_progress_counts_answers() -> None:
    calls: list[tuple[str, int, int]] = []
    engine = StaticEngine(
        tiny("llama"), words_encoder(), batch_size=7, progress=lambda *call: calls.append(call)
    )
    asked = [*ASKED, ASKED[0]]
    skip = {(i, s) for i in range(4, len(asked)) for s in range(3)}
    list(engine.generate(asked, SAMPLINGS["all"]))
    assert calls[-1] == ("generate", 3 * len(asked), 3 * len(asked))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    calls.clear()
    list(engine.generate(asked, SAMPLINGS["all"], skip=skip))
    assert calls[-1] == ("generate", 3 * len(asked), 3 * len(asked))


def test_a_model_that_computes_nothing_sensible() -> None:
    model = tiny("llama")
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ActivationError, match="NaN or infinity"):
        found(model, SAMPLINGS["all"])


def test_half_precision_changes_a_few_tokens_at_most() -> None:
    """By how much batches of other shapes round in bf16; see the docstring of `StaticEngine`."""
    model = tiny("llama").to(torch.bfloat16)
    sampling = Sampling(temperature=1.0, n=4, max_new_tokens=30)
    one, many = (sorted(found(model, sampling, batch_size=size)) for size in (1, 64))
    assert sum(a.token_ids != b.token_ids for a, b in zip(one, many, strict=True)) < 0.5 * len(one)


def test_prompts_that_fill_the_context_and_answers_that_reach_its_end() -> None:
    model, encoder = tiny("llama"), words_encoder(max_tokens=20, eos_id=None)
    sampling = Sampling(temperature=1.0, n=2, max_new_tokens=12)
    asked = conversations(number_prompts(12, 4, 19))
    for one in StaticEngine(model, encoder).generate(asked, sampling):
        room = 20 - len(encoder.prompt(asked[one.conversation]))
        assert one.n_tokens == min(12, room) and one.finish == "length"
    full = conversations([list(range(6, 26))])
    for which in ("static", "paged"):
        engine = local_engine(model, encoder, which)
        with pytest.raises(InputError, match="20 tokens and the model's context 20"):
            engine.generate(full, GREEDY)


def test_which_engine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from nest.generation import local

    model, encoder, drawn = tiny("llama"), words_encoder(), SAMPLINGS["all"]
    assert local_engine(model, encoder).name == "static"
    assert local_engine(model, encoder, "paged").name == "paged"
    monkeypatch.setattr(local, "pays", lambda _model: True)
    assert local_engine(model, encoder).name == "paged"
    assert local_engine(model, encoder, sampling=drawn).name == "static"
    assert local_engine(model, encoder, "static").name == "static"
    with pytest.raises(InputError, match=r"greedily only.*1\.0.*engine static"):
        local_engine(model, encoder, "paged", sampling=drawn)
    with pytest.raises(InputError, match="Recurrent is no transformers model"):
        local_engine(Recurrent(), encoder, "paged")
    with pytest.raises(InputError, match="batch_size is 0"):
        local_engine(model, encoder, batch_size=0)


def test_identity_tells_models_and_templates_apart() -> None:
    model, other = tiny("llama"), tiny("llama")
    first = StaticEngine(model, words_encoder()).identity
    assert first == StaticEngine(other, words_encoder(), batch_size=3).identity
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert first != StaticEngine(other, words_encoder()).identity
    assert first != StaticEngine(model, words_encoder(eos_id=6)).identity
