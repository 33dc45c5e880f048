"""The public API: complete, cheap to import, and enough for a custom module."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import types

import pytest
import torch
from tiny_models import UNSAFE_WORDS, same_bits, state_of, word_tokenizer
from torch import nn

import nest
from nest.conversations.encoders import CallableEncoder


def test_all_is_complete_and_importable() -> None:
    assert list(nest.__all__) == sorted(nest.__all__) and len(set(nest.__all__)) == len(
        nest.__all__
    )
    for name in nest.__all__:
        assert getattr(nest, name) is not None
    assert set(dir(nest)) == set(nest.__all__)
    homes = {name for names in nest._HOMES.values() for name in names}
    assert homes | {"__version__"} == set(nest.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nest.nothing


def test_the_public_functions_and_all_errors_are_exported() -> None:
    errors = importlib.import_module("nest.errors")
    members = vars(errors).items()
    own = {name for name, value in members if getattr(value, "__module__", "") == "nest.errors"}
    assert own <= set(nest.__all__)
    assert all(issubclass(getattr(errors, name), nest.NestError) for name in own)
    for name in ("load", "select", "tune", "evaluate", "fold", "revert", "verify"):
        assert isinstance(getattr(nest, name), types.FunctionType)


def test_everything_public_has_a_docstring() -> None:
    for name in set(nest.__all__) - {"__version__"}:
        value = getattr(nest, name)
        assert inspect.getdoc(value), name
        for method, function in vars(value).items() if isinstance(value, type) else ():
            if not method.startswith("_") and callable(getattr(value, method)):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method} of {function}"


@pytest.mark.parametrize("module", ["nest", "nest.cli.main", "nest.errors", "nest.api"])
def test_importing_costs_nothing(module: str) -> None:
    code = (
        f"import sys, {module}; heavy = ['torch', 'transformers', 'sklearn', 'numpy', 'matplotlib'];"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and not done.stderr


def test_nothing_is_logged_or_seeded_by_importing() -> None:
    code = (
        "import logging, random, warnings; warnings.simplefilter('error');"
        "before = random.getstate(), list(logging.root.handlers), list(warnings.filters);"
        "import nest; [getattr(nest, name) for name in nest.__all__];"
        "assert before[:2] == (random.getstate(), list(logging.root.handlers))"
    )
    env = {**os.environ, "PYTHONWARNINGS": "default"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


# --- a custom module ------------------------------------------------------------------------------


class TinyRecurrent(nn.Module):
    """All that nest needs of a model: token ids in, logits out, neurons in some `Linear`."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_words, 24)
        self.memory = nn.GRU(24, 24, batch_first=True)
        self.neurons = nn.Linear(24, 48)
        self.head = nn.Linear(48, n_words)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.memory(self.embedding(tokens))
        return self.head(self.neurons(hidden).relu())


def test_a_custom_module_from_select_to_revert() -> None:
    words = word_tokenizer().get_vocab()
    names = {number: word for word, number in words.items()}
    encode = CallableEncoder(
        lambda text: [words[word] for word in text.split()],
        lambda ids: " ".join(names[number] for number in ids),
        eos_id=words["[EOS]"],
    )
    torch.manual_seed(0)
    model = TinyRecurrent(len(words))
    layout = [nest.NeuronSite(layer=0, projection="neurons", module="neurons", length=48)]

    unsafe = [f"how to {word} now {end}" for word in UNSAFE_WORDS for end in ("please", "today")]
    safe = [
        prompt.replace(word, "bread")
        for word in UNSAFE_WORDS
        for prompt in unsafe
        if word in prompt
    ]
    safe = [f"{prompt} {end}" for prompt, end in zip(safe, ["slowly", "best"] * 6, strict=True)]
    before = state_of(model)

    selection = nest.select(
        model, unsafe=unsafe, safe=safe, layout=layout, encode=encode, z_threshold=0.5
    )
    patch = nest.tune(
        model,
        None,
        selection,
        harmful=[(prompt, "i cannot help with that") for prompt in unsafe],
        benign=[(prompt, "sure") for prompt in safe],
        encode=encode,
        epochs=150.0,
        learning_rate=0.1,
        kl_weight=0.0,
        start="zero_vectors",
    )
    report = nest.evaluate(
        model,
        harmful=unsafe,
        benign=[(prompt, "sure") for prompt in safe],
        encode=encode,
        patch=patch,
        max_new_tokens=8,
    ).to_json()
    tuned = state_of(model)
    patch.revert(model)

    assert report["attack_success_rate"]["mean"] <= 0.1
    assert report["utility"]["n"] == len(safe) and report["utility"]["kl_to_base"] > 0
    assert not same_bits(before, tuned) and same_bits(before, state_of(model))
    changed = {name for name in before if not torch.equal(before[name], tuned[name])}
    assert changed == {"neurons.weight"}
    rows = (before["neurons.weight"] != tuned["neurons.weight"]).any(dim=1).nonzero().flatten()
    assert rows.tolist() == selection.sites[0].neurons.tolist()


def test_a_plain_function_encodes_too() -> None:
    model = TinyRecurrent(50)
    layout = [nest.NeuronSite(0, "neurons", "neurons", 48)]
    prompts = [[chr(97 + i + j) for j in range(3)] for i in range(12)]
    texts = ["".join(prompt) for prompt in prompts]
    selection = nest.select(
        model,
        unsafe=texts[:6],
        safe=texts[6:],
        layout=layout,
        encode=lambda text: [ord(letter) - 96 for letter in text],
        z_threshold=0.5,
        scorer="contrast",  # twelve prompts are too few for a probe to be better than chance
    )
    assert selection.sites[0].site == layout[0]
