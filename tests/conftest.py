"""Shapes and types of `nest` are checked while tests run; slow, GPU and network tests skip themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Set before torch is imported: the suite shares its cores, and spinning threads only steal them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing is to be fetched: what a test needs, it builds. HF_HUB_OFFLINE=0 runs the network tests.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

assert not any(name == "nest" or name.startswith("nest.") for name in sys.modules)
# All of `nest` but its command line, whose functions cyclopts calls with what it made of the words.
# Nothing of nest_kernels: the hook breaks `@triton.jit` modules when they compile.
ROOMS = sorted(path.stem for path in (Path(__file__).parents[1] / "nest").glob("[!_]*"))
install_import_hook([f"nest.{room}" for room in ROOMS if room != "cli"], "beartype.beartype")

import pytest  # noqa: E402 - after the hook
import torch  # noqa: E402

torch.set_num_threads(1)
# Read by triton when it is imported: without a GPU the tests of the kernels run in its interpreter.
assert "triton" not in sys.modules
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = {
        "slow": None if config.getoption("--slow") else "takes minutes; run with --slow",
        "gpu": None if torch.cuda.is_available() else "needs a GPU",
        "network": None
        if os.environ["HF_HUB_OFFLINE"] == "0"
        else "needs the Hub; run with HF_HUB_OFFLINE=0",
    }
    for item in items:
        for marker, reason in absent.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer of words with a chat template."""
    from word_tokenizer import TEMPLATE, make_tokenizer

    return make_tokenizer(TEMPLATE)


@pytest.fixture
def plain_tokenizer() -> Any:
    """The same without a template."""
    from word_tokenizer import make_tokenizer

    return make_tokenizer(None)
