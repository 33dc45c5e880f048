"""One declaration a setting: its checks, and the flag, the TOML key and the help that come from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from cyclopts import App

from nest.cli.main import app
from nest.errors import InputError
from nest.evaluation.config import EvaluationConfig
from nest.selection.config import SelectionConfig
from nest.settings import in_range, range_text
from nest.tuning.config import TuningConfig

KINDS = {"select": SelectionConfig, "tune": TuningConfig, "eval": EvaluationConfig}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epochs": 0}, "epochs is 0; it must be positive"),
        ({"warmup": 1}, r"warmup is 1; it must lie in \[0, 1\)"),
        ({"validation": 1}, "validation is 1; it must lie between 0 and 1"),
        ({"clip": -1}, "clip is -1; it must be at least 0"),
        ({"learning_rate": 1e9}, r"it must lie in \(0, 1000000.0\]"),
        ({"epochs": float("nan")}, "epochs is nan; it must be a finite number"),
        ({"epochs": "many"}, "epochs is 'many'; it must be a number"),
        ({"max_steps": 1.5}, "max_steps is 1.5; it must be a whole number"),
        ({"update": "both"}, "update is 'both'; choose shared or loaded"),
        ({"layers": "3"}, "it must be A:B"),
        ({"layers": (3, 2)}, "layers is 3:2; the first must be below the end"),
        ({"layers": "x:"}, "it must be A:B"),
        ({"epoch": 1}, r"no such setting: epoch; did you mean epochs\? There are update, epochs"),
        ({"nonsense": 1}, "no such setting: nonsense; there are update, epochs"),
    ],
)
def test_a_fault_is_named_with_what_was_expected(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        TuningConfig(**values)
    assert str(caught.value).startswith("tuning settings: ")


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(InputError) as caught:
        SelectionConfig(pool="median", held_out=2, n_probe_seeds=0)  # type: ignore[arg-type]
    for name in ("pool", "held_out", "n_probe_seeds"):
        assert name in str(caught.value)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="with 3 probes it must lie in 0 to"):
        SelectionConfig(seed=2**32 - 2)
    with pytest.raises(InputError, match="give a temperature"):
        EvaluationConfig(samples=2)


def test_they_are_frozen_and_plain() -> None:
    config = TuningConfig(layers="1:", learning_rate="auto")  # type: ignore[arg-type]
    assert (config.layers, config.learning_rate) == ((1, None), None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3  # type: ignore[misc]
    assert dataclasses.replace(config, epochs=3).epochs == 3
    assert TuningConfig(**dataclasses.asdict(config)) == config
    assert range_text((1, None)) == "1:" and in_range(5, (1, None)) and not in_range(5, (1, 5))


@pytest.mark.parametrize("command", KINDS)
def test_every_field_is_a_flag_with_its_words(command: str) -> None:
    found: App = app[command]
    flags = {
        name: argument.parameter.help
        for argument in found.assemble_argument_collection(parse_docstring=True)
        for name in argument.names
    }
    for field in dataclasses.fields(KINDS[command]):
        flag = "--z" if field.name == "z_threshold" else f"--{field.name.replace('_', '-')}"
        assert flag in flags, f"{field.name} has no flag"
        assert flags[flag], f"{field.name} has no words; its class's docstring lacks it"


@pytest.mark.parametrize("command", ["select", "tune", "eval", "fold", "revert", "verify", "demo"])
def test_every_option_has_words(command: str) -> None:
    found: App = app[command]
    silent = [
        argument.names[0]
        for argument in found.assemble_argument_collection(parse_docstring=True)
        if not argument.children and not argument.parameter.help
    ]
    assert not silent
