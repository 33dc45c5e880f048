"""Answers do not depend on the batch, on padding or on who else is in it."""

import warnings
from collections import Counter

import pytest
import torch
from tiny_decoders import EOS, Recurrent, number_prompts, tiny, words_encoder

from nest.errors import InputError
from nest.generation import static as generation
from nest.generation.paged import pays, why_not_paged
from nest.generation.static import generate, generate_tokens

FAMILIES = ["llama", "gptneox", "qwen3", "gemma3", "gpt2"]
NEW = 12


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def plain_greedy(model, prompt, new, eos=EOS):
    """The oracle: one prompt, no cache, no mask."""
    ids, answer = list(prompt), []
    for _ in range(new):
        with torch.no_grad():
            output = model(torch.tensor([ids]))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        token = int(logits[0, -1].argmax())
        if token == eos:
            break
        ids.append(token)
        answer.append(token)
    return answer


@pytest.mark.parametrize("family", [*FAMILIES, "custom"])
@pytest.mark.parametrize("lengths", [(3, 24), (6, 8)], ids=["padded", "grouped"])
def test_every_batch_size_gives_the_oracles_tokens(family, lengths):
    model = Recurrent() if family == "custom" else tiny(family)
    prompts = number_prompts(40, *lengths)
    endless = [plain_greedy(model, prompt, NEW, eos=None) for prompt in prompts]
    # the token most often said ends an answer, so that some end early whatever the random weights
    eos = Counter(token for answer in endless for token in answer).most_common(1)[0][0]
    expected = [answer[: answer.index(eos)] if eos in answer else answer for answer in endless]
    assert len({len(answer) for answer in expected}) > 1
    assert len({tuple(answer) for answer in expected}) > 10  # or every answer would look right
    encoder = words_encoder(eos_id=eos)
    for batch_size in (1, 7, 256):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = generate_tokens(model, encoder, prompts, NEW, batch_size)
        assert found == expected, batch_size


def test_agrees_with_transformers_generate():
    model = tiny("llama")
    prompts = number_prompts(16, 9, 9)
    ids = torch.tensor(prompts)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    found = generate_tokens(model, words_encoder(), prompts, NEW)
    for answer, row in zip(found, out[:, 9:].tolist(), strict=True):
        assert answer == (row[: row.index(EOS)] if EOS in row else row)


def test_text_order_progress_and_duplicates():
    model, encoder, calls = tiny("llama"), words_encoder(), []
    prompts = ["9 8 7", "10 11 12 13", "9 8 7", "30 31"]
    answers = generate(model, encoder, prompts, 4, progress=lambda *call: calls.append(call))
    assert answers[0] == answers[2]
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = plain_greedy(model, encoder.prompt(prompt), 4)
        assert answer == " ".join(map(str, tokens))
    assert calls[-1] == ("generate", 4, 4)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert generate(model, encoder, [], 4) == []


def test_answers_end_with_the_context_and_others_are_not_cut():
    model, encoder = tiny("llama"), words_encoder(max_tokens=20, eos_id=None)
    prompts = number_prompts(12, 4, 19)
    found = generate_tokens(model, encoder, prompts, NEW)
    for prompt, answer in zip(prompts, found, strict=True):
        assert len(answer) == min(NEW, 20 - len(prompt))
        assert answer == plain_greedy(model, prompt, len(answer), eos=None)
    with pytest.raises(InputError, match="20 tokens and the model's context 20"):
        generate_tokens(model, encoder, [list(range(6, 26))], NEW)


def test_nothing_else_changes():
    model = tiny("llama")
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generate_tokens(model, words_encoder(), number_prompts(4, 3, 5), 3)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_is_off_even_for_a_model_in_training_mode():
    model = tiny("gptneox")
    model.config.hidden_dropout = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    prompts = number_prompts(6, 4, 6)
    expected = generate_tokens(model, words_encoder(), prompts, NEW)
    assert generate_tokens(model.train(), words_encoder(), prompts, NEW) == expected


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_counts_below_one(sizes):
    with pytest.raises(InputError, match="at least 1"):
        generate_tokens(tiny("llama"), words_encoder(), [[7]], *sizes)


# --- shared beginnings ----------------------------------------------------------------------------


def wrapped_prompts():
    """Three beginnings, two of them with one in common, and prompts of many lengths after them."""
    head, long, other = ([7, 9, 11] * 6, [13, 8] * 5, [20, 21, 22] * 7)
    tails = number_prompts(48, 1, 9, seed=3)
    starts = [head, [*head, *long], other, []]
    return [[*starts[row % 4], *tail] for row, tail in enumerate(tails)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_is_run_once_and_changes_no_token(family, monkeypatch):
    monkeypatch.setitem(generation.BATCH_COST_TOKENS, "cpu", 30)
    model, prompts, sizes = tiny(family), wrapped_prompts(), []
    expected = [plain_greedy(model, prompt, NEW) for prompt in prompts]
    model.register_forward_pre_hook(
        lambda _module, _args, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    for batch_size in (2, 5, 256):
        sizes.clear()
        found = generate_tokens(model, words_encoder(), prompts, NEW, batch_size)
        assert found == expected, batch_size
    answered = sum(len(answer) + 1 for answer in expected)
    n_tokens = sum(len(prompt) for prompt in prompts)
    if family != "gemma3":  # its windows forbid it
        assert sum(sizes) - answered < 0.6 * n_tokens


def test_half_precision_shares_and_grows_too(monkeypatch):
    monkeypatch.setitem(generation.BATCH_COST_TOKENS, "cpu", 30)
    model = tiny("llama").to(torch.bfloat16)
    found = generate_tokens(model, words_encoder(eos_id=None), wrapped_prompts(), 40)
    assert all(len(answer) == 40 for answer in found)  # past the room that the buffers begin with
    assert len({tuple(answer) for answer in found}) > 10


def test_a_peft_model_is_decoded_as_the_model_in_it(monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setitem(generation.BATCH_COST_TOKENS, "cpu", 30)
    expected = generate_tokens(tiny("llama"), words_encoder(), wrapped_prompts(), NEW)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=True)
    wrapped = peft.get_peft_model(tiny("llama"), config)
    for engine in ("static", "paged"):
        found = generate_tokens(wrapped, words_encoder(), wrapped_prompts(), NEW, engine=engine)
        assert found == expected, engine


# --- engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_say_the_same(family):
    model = tiny(family)
    prompts = [*number_prompts(20, 3, 24), *wrapped_prompts()[:12]]
    expected = [plain_greedy(model, prompt, NEW) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) > 10
    for batch_size in (3, 256):
        calls = []
        found = generate_tokens(
            model,
            words_encoder(),
            prompts,
            NEW,
            batch_size,
            lambda *call, calls=calls: calls.append(call),
            engine="paged",
        )
        assert found == expected, batch_size
        assert calls[-1] == ("generate", 32, 32)
    assert generate_tokens(model, words_encoder(), prompts, NEW, engine="static") == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_paging_leaves_the_model_and_the_random_state_as_they_were(attention):
    model = tiny("llama")
    model.set_attn_implementation(attention)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    state, attributes = torch.get_rng_state(), set(vars(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generation_config = model.generation_config.to_dict()
    prompts = number_prompts(5, 3, 9)
    expected = generate_tokens(model, words_encoder(), prompts, NEW, engine="static")
    assert generate_tokens(model, words_encoder(), prompts, NEW, engine="paged") == expected
    assert model.config._attn_implementation == attention
    assert model.generation_config.to_dict() == generation_config
    assert set(vars(model)) == attributes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_paged_answers_end_with_the_context():
    model, encoder = tiny("llama"), words_encoder(max_tokens=20, eos_id=None)
    prompts = number_prompts(12, 4, 19)
    expected = generate_tokens(model, encoder, prompts, NEW, engine="static")
    assert generate_tokens(model, encoder, prompts, NEW, engine="paged") == expected
    assert {len(answer) for answer in expected} != {NEW}


def test_a_model_that_cannot_be_paged_says_why_and_auto_does_without():
    prompts = number_prompts(3, 4, 6)
    with pytest.raises(InputError, match="Recurrent is no transformers model"):
        generate_tokens(Recurrent(), words_encoder(), prompts, 3, engine="paged")
    assert len(generate_tokens(Recurrent(), words_encoder(), prompts, 3, engine="auto")) == 3
    assert why_not_paged(tiny("llama")) is None
    assert not pays(tiny("llama"))  # on the CPU


def test_a_failure_of_the_paged_engine_is_one_known_error(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"paged engine .* failed .*division.*static"):
        generate_tokens(model, words_encoder(), [[7, 8, 9]], 3, engine="paged")
    assert model.config._attn_implementation == "sdpa"
