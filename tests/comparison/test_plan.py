"""A plan is checked before any work, and its faults are told in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nest.comparison.plan import Plan
from nest.comparison.plan_file import read_plan
from nest.comparison.subjects import facts_of, material_of
from nest.errors import InputError, MissingInputError


def test_values_make_the_same_plan(values: dict[str, Any]) -> None:
    plan = Plan(**values)
    assert Plan(**plan.values()) == plan
    assert plan.compared_with == "neurons" and plan.choosing() == ("one",)
    assert plan.worlds_of("front") == ("one", "two") and plan.worlds_of("anytime") == ("one",)
    assert plan.seeds_of("robustness") == (0,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": ["neurones"]}, "there is no arm 'neurones'; did you mean neurons"),
        ({"worlds": ["bazar"]}, "there is no world 'bazar'; did you mean bazaar"),
        ({"arms": ["neurons", "neurons"]}, "arms names neurons twice"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 1000]}, "seed 1000, which is reported, too"),
        ({"reference": "lora_r16"}, "there is no arm 'lora_r16'"),
        ({"sweep": {"worlds": ["two"]}}, "two, which settings may not be chosen on"),
        ({"front": {"worlds": ["three"]}}, "there is no world 'three'"),
        ({"front": {"seeds": [7]}}, r"\[front\] has the seeds \[7\]"),
        ({"front": {"weights": [1.0, 3.0]}}, r"and the weights \[1.0, 3.0\]"),
        ({"front": {"weights": [3.0, 3.0]}}, r"\[front\] weights names 3.0 twice"),
        ({"anytime": {"seeds": [-1]}}, "anytime.seeds is -1"),
        ({"seeds": [0, True]}, "seeds is True"),
        ({"arms": ["plain"]}, "the arm plain learns from bare prompts alone"),
        (
            {"world": {"one": {"model": "m"}}},
            r"\[world.one\] lacks unsafe, safe, harmful, benign, development$",
        ),
        ({"world": {"one": 3}}, "world.one is 3; it must be a table"),
        ({"front": {"wieghts": [2.0]}}, "no such setting: front.wieghts; did you mean weights"),
        ({"tuning": {"seed": 3}}, r"\[tuning\] sets seed"),
        ({"tuning": {"epoch": 3}}, "no such setting: epoch"),
        ({"selecting": {"z_threshold": "high"}}, "z_threshold is 'high'"),
        ({"evaluation": {"samples": 4}}, r"\[evaluation\] sets samples"),
        ({"evaluation": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ({"arm": {"neurons": {"rank": 1}}}, r"\[arm.neurons\] has no method"),
        ({"arm": {"neurons": {"method": "lora", "harmful": "all"}}}, "must be wrapped or plain"),
        ({"arm": {"neurons": {"method": "magic"}}}, "has the method 'magic'; there are neurons"),
        ({"arm": {"neurons": {"method": "lora", "kind": "best"}}}, "must be ours or baseline or"),
        ({"arm": {"neurons": {"method": "lora", "tuning": {"seed": 1}}}}, "sets a seed"),
        ({"arm": {"neurons": {"method": "lora", "tuning": 1}}}, "must be a table"),
        ({"arm": {"mine": {"method": "lora", "rnk": 3}}}, "setting 'rnk'; did you mean rank"),
        ({"arm": {"mine": {"method": "lora", "rank": "high"}}}, r"\[arm.mine\]: .*rank is 'high'"),
        ({"arm": {"mine": {"method": "lora", "tuning": {"foo": 1}}}}, r"\[arm.mine\]: .*foo"),
        (
            {"arm": {"mine": {"method": "lora", "tuning": {"mode": "live"}}}},
            "no use for; leave it out",
        ),
        ({"resamples": 3}, "resamples is 3"),
        ({"unknown": 3}, "no such setting: unknown"),
    ],
)
def test_what_cannot_be(values: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Plan(**{**values, **changes})


def test_a_sweep_needs_a_world_to_choose_on(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="needs a world to choose on"):
        Plan(**{**values, "worlds": ["two"]})


def test_files_are_meant_from_the_plans_folder(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "p"}\n', encoding="utf-8")
    (folder / "plan.toml").write_text(
        """
worlds = ["mine"]
arms = ["neurons"]
[world.mine]
model = "organism"
unsafe = "prompts.jsonl"
safe = "prompts.jsonl:text"
harmful = "organism:harmful"
benign = "organism:benign"
[world.mine.development]
harmful = "prompts.jsonl"
borderline = "prompts.jsonl"
benign = "elsewhere.jsonl"
""",
        encoding="utf-8",
    )
    own = read_plan(folder / "plan.toml").world["mine"]
    assert own.unsafe == str(folder / "prompts.jsonl")
    assert own.safe == f"{folder / 'prompts.jsonl'}:text"
    assert own.development.harmful == str(folder / "prompts.jsonl")
    assert own.harmful == "organism:harmful" and own.development.benign == "elsewhere.jsonl"


def test_only_paths_are_paths(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "plan.toml").write_text(
        f"""
worlds = ["a"]
arms = ["neurons"]
[world.a]
model = "m"
role = "final"
system = "{"Be careful. " * 50}"
template_kwargs = {{ date = 2026-01-01 }}
unsafe = "u"
safe = "s"
harmful = "h"
benign = "b"
development = {{ harmful = "h", borderline = "o", benign = "b" }}
""",
        encoding="utf-8",
    )
    plan = read_plan(tmp_path / "plan.toml")
    assert plan.world["a"].role == "final"
    assert plan.values()["world"]["a"]["template_kwargs"] == {"date": "2026-01-01"}


def test_a_rate_of_ones_own_is_not_swept(values: dict[str, Any]) -> None:
    table = {"method": "neurons", "tuning": {"learning_rate": 0.1}}
    plan = Plan(**{**values, "arms": ["mine"], "arm": {"mine": table}})
    assert plan.tried_by("mine") == ("rate_factor", ())
    assert len(Plan(**values).tried_by("neurons")[1]) == 4


def test_what_holds_for_every_world(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(
        """
worlds = ["a", "b"]
arms = ["neurons"]
[every_world]
unsafe = "u"
safe = "s"
harmful = "h"
benign = "b"
dtype = "bfloat16"
[every_world.development]
harmful = "h"
borderline = "o"
benign = "b"
[world.a]
model = "a"
[world.b]
model = "b"
dtype = "float32"
""",
        encoding="utf-8",
    )
    worlds = read_plan(file).world
    assert [worlds[name].dtype for name in "ab"] == ["bfloat16", "float32"]
    assert worlds["a"].development.borderline == "o" and worlds["b"].model == "b"
    file.write_text('worlds = ["a"]\narms = ["neurons"]\nevery_world = 3\n', encoding="utf-8")
    with pytest.raises(InputError, match="every_world is 3; it must be a table"):
        read_plan(file)


def test_an_arm_with_settings_of_its_own(values: dict[str, Any]) -> None:
    table = {"method": "neurons", "selecting": {"z_threshold": 2.0}, "tuning": {"epochs": 7}}
    plan = Plan(**{**values, "arms": ["mine"], "arm": {"mine": table}})
    made: Any = plan.arm_of("mine").made(
        tuning=plan.tuning_config(0), selecting=plan.selection_config(0), seed=5
    )
    assert (made.selecting.z_threshold, made.tuning.epochs, made.tuning.seed) == (2.0, 7, 5)


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="name the TOML file of a comparison"):
        read_plan(tmp_path / "none.toml")
    file = tmp_path / "plan.toml"
    file.write_text("worlds = [", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read as TOML"):
        read_plan(file)
    file.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"plan.toml: the comparison: .*worlds"):
        read_plan(file)


def test_what_a_nested_table_lacks_or_has_too_much(values: dict[str, Any]) -> None:
    """The key and its table are named, and nothing of what else is in the table."""
    one = {**values["world"]["one"], "harmfull": "h"}
    del one["harmful"]
    split = {key: file for key, file in one["development"].items() if key != "borderline"}
    with pytest.raises(InputError) as raised:
        Plan(**{**values, "world": {**values["world"], "one": {**one, "development": split}}})
    said = str(raised.value)
    assert "[world.one] lacks harmful; [world.one.development] lacks borderline; " in said
    assert "no such setting: world.one.harmfull; did you mean harmful? There are model" in said
    assert one["unsafe"] not in said


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("[every_world]", r"\[every_world\] holds worlds, arms, since in TOML"),
        ("[every_world.test]", r"move \[every_world.test\] below them"),
        ("[sweep]", r"\[sweep\] holds arms, since in TOML"),
        ("[world.mine]", r"\[world.mine\] holds worlds, arms"),
    ],
)
def test_a_table_above_the_plain_keys(tmp_path: Path, head: str, said: str) -> None:
    """In TOML the table takes them."""
    file = tmp_path / "plan.toml"
    file.write_text(f'{head}\nworlds = ["bazaar"]\narms = ["neurons"]\n', encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_plan(file)


@pytest.mark.parametrize(
    ("places", "content", "said"),
    [
        (("harmful",), None, r"\[world.one\] harmful: there is no file"),
        (("development", "borderline"), "", r"\[world.one.development\] borderline: .* is empty"),
        (("unsafe",), '{"text": "a"}\n', r"\[world.one\] unsafe: .*column"),
        (("benign",), '{"prompt": "a"}\n', r"\[world.one\] benign: .*responses?"),
        (("development", "attacks"), None, r"\[world.one.development\] attacks: "),
        (("model",), None, r"\[world.one\] model: "),
    ],
)
def test_a_fault_in_a_worlds_file_names_its_key(
    values: dict[str, Any], tmp_path: Path, places: tuple[str, ...], content: str | None, said: str
) -> None:
    file = tmp_path / "of_ours.jsonl"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    table = values["world"]["one"]
    for place in places[:-1]:
        table = table[place]
    table[places[-1]] = str(file)
    plan = Plan(**values)
    with pytest.raises(InputError, match=said) as raised:
        facts_of(plan, material_of(plan, "one", final=False))
    assert isinstance(raised.value, MissingInputError) == (
        content is None and places[-1] in ("harmful", "model")
    )


def test_keys_tell_what_is_run(values: dict[str, Any]) -> None:
    """Left open, said or another: equal where the run is the same, and nowhere else."""

    def key(arm: str = "neurons", **changes: Any) -> dict[str, Any]:
        return Plan(**{**values, "arms": [arm], **changes}).settings_of(arm, 0)

    assert key() == key(selecting={"neurons": "5%"})
    assert key() == key(selecting={"neurons": "5%", "scorer": "gradient"})
    assert key() == key(tuning={**values.get("tuning", {}), "start": "zero_loadings"})
    others = [
        key(selecting={"z_threshold": 3.0}),
        key(selecting={"neurons": "6%"}),
        key(selecting={"scorer": "effect"}),
        key(tuning={**values.get("tuning", {}), "start": "zero_vectors"}),
        key("probe"),
        key("shared"),
    ]
    assert all(one != key() for one in others)
    # a start that the shared form has not is left out there, and so is what no baseline uses
    assert key("shared") == key(
        "shared", tuning={**values.get("tuning", {}), "start": "zero_loadings"}
    )
    for arm in ("lora_r1", "full"):
        assert key(arm) == key(arm, selecting={"z_threshold": 3.0})
    assert key("lora_matched") != key("lora_matched", selecting={"z_threshold": 3.0})
