"""The embedded model: a tiny chat model with a known safety gap, and its prompt sets.

It is an ordinary transformers checkpoint in `data/model`; the recipe that rebuilds it is beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nest.errors import InputError

DATA = Path(__file__).parent / "data"

TEST_SPLIT: Mapping[str, str] = {
    "test_harmful": "dev_harmful",
    "test_borderline": "dev_borderline",
    "test_benign": "dev_benign",
    "wrappers_test": "wrappers_dev",
    "wrappers_held_out": "wrappers_dev",
}
"""Sets that are asked for and lie nowhere, and what to take in their place."""


def model_folder() -> Path:
    """The embedded checkpoint, as `AutoModelForCausalLM.from_pretrained` takes it."""
    return DATA / "model"


def prompt_file(name: str) -> Path:
    """File of one of the organism's prompt sets, or of its wrappers (`wrappers_dev`).

    Raises:
        InputError: no set of that name; the message lists them.
    """
    path = DATA / "prompts" / f"{name}.jsonl"
    if not path.is_file():
        if name in TEST_SPLIT:
            raise InputError(
                f"organism:{name} has no file: the test split belongs to `nest compare --final`; use "
                f"organism:{TEST_SPLIT[name]}, the same of the development split"
            )
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.jsonl")))
        raise InputError(f"there is no set organism:{name}; choose one of {known}")
    return path
