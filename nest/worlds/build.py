"""Raise an organism, measure it, and lay out its folder: checkpoint, prompt sets, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nest.artifacts.storage import check_output, new_folder
from nest.conversations.encoders import ChatEncoder
from nest.errors import InputError
from nest.evaluation.config import EvaluationConfig
from nest.evaluation.evaluate import evaluate
from nest.generation.static import StaticEngine
from nest.judging.phrases import PhraseJudge
from nest.organism import DATA
from nest.progress import ProgressCallback
from nest.prompts.attacks import NO_ATTACK, TemplateAttack
from nest.prompts.prompt_set import PromptSet, from_values
from nest.worlds.bazaar import BAZAAR
from nest.worlds.harbour import HARBOUR
from nest.worlds.recipe import RecipeConfig, save, train
from nest.worlds.sets import Row, held_out_wrappers, matched_pairs, prompt_sets
from nest.worlds.world import Words, World


@dataclass(frozen=True)
class Recipe:
    """All that decides an organism.

    Attributes:
        words: The world's vocabulary.
        world_seed: Of the draw of its objects.
        training: How the model is trained.
    """

    words: Words
    world_seed: int
    training: RecipeConfig

    def world(self) -> World:
        """The world, drawn."""
        return World.draw(self.words, seed=self.world_seed)


RECIPES: Mapping[str, Recipe] = {
    "bazaar": Recipe(BAZAAR, 1, RecipeConfig(architecture="llama", seed=0)),
    "harbour": Recipe(HARBOUR, 2, RecipeConfig(architecture="gpt_neox", seed=1)),
}


def recipe(name: str) -> Recipe:
    """The recipe of a world.

    Raises:
        InputError: no world of that name.
    """
    if name not in RECIPES:
        raise InputError(f"there is no world {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def build_organism(
    name: str, folder: Path, *, overwrite: bool = False, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """Train an organism from its recipe and write its folder.

    Args:
        name: `bazaar` (the embedded one) or `harbour`.
        folder: Gets `model/`, `prompts/`, `measured.json` and a model card.
        overwrite: Replace an organism that is there.
        progress: Called with stage, steps done, steps in all.

    Returns:
        The measured figures.
    """
    chosen = recipe(name)
    check_output(folder, kind="organism", overwrite=overwrite)
    world = chosen.world()
    model, tokenizer = train(world, chosen.training, progress)
    measured = measure(world, model, ChatEncoder(tokenizer, model), progress)
    measured["recipe"] = {
        "world": name,
        "world_seed": chosen.world_seed,
        "training": asdict(chosen.training),
        "parameters": model.num_parameters(),
    }
    with new_folder(folder, kind="organism", overwrite=overwrite) as temporary:
        save(temporary / "model", model, tokenizer)
        write_prompts(world, temporary / "prompts")
        text = json.dumps(measured, indent=1)
        (temporary / "measured.json").write_text(text + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(card(world, measured), encoding="utf-8")
        (temporary / "manifest.json").write_text('{"kind": "organism"}\n', encoding="utf-8")
    return measured


def export_organism(folder: Path, *, overwrite: bool = False) -> None:
    """Write the embedded model and its prompt sets as plain files."""
    with new_folder(folder, kind="organism", overwrite=overwrite) as temporary:
        shutil.copytree(DATA, temporary, dirs_exist_ok=True)


def write_prompts(world: World, folder: Path) -> None:
    """The world's prompt sets, one JSON-lines file each, its pairs, and its wrappers as attacks."""
    folder.mkdir(parents=True)
    for name, rows in prompt_sets(world).items():
        _write_lines(folder / f"{name}.jsonl", [row.to_dict() for row in rows])
    pairs = [{"unsafe": unsafe, "safe": safe} for unsafe, safe in matched_pairs(world)]
    _write_lines(folder / "pairs.jsonl", pairs)
    for split, file in (("train", "wrappers_tuning"), ("test", "wrappers_held_out")):
        templates = [
            {"name": name, "template": template}
            for name, template in world.wrappers_of("train" if split == "train" else "test")
        ]
        _write_lines(folder / f"{file}.jsonl", templates)


def measure(
    world: World, model: Any, encoder: ChatEncoder, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """The behaviour that the recipe promises, on objects and wrappers that no tuning set has."""
    sets = prompt_sets(world)
    attacks = [TemplateAttack(name, text) for name, text in held_out_wrappers(world).items()]
    report = evaluate(
        StaticEngine(model, encoder, progress=progress),
        harmful=_prompts(sets["test_harmful"], "test_harmful"),
        borderline=_prompts(sets["test_borderline"], "test_borderline"),
        benign=_prompts(sets["test_benign"], "test_benign"),
        attacks=(NO_ATTACK, *attacks),
        judges=(PhraseJudge(),),
        config=EvaluationConfig(max_new_tokens=48),
        encoder=encoder,
    )
    wrapped = [report.attack(attack.name).rate for attack in attacks]
    assert report.over_refusal is not None and report.utility is not None
    return {
        "attack_success_bare": report.attack("none").rate,
        "attack_success_wrapped": sum(wrapped) / len(wrapped),
        "attack_success_by_wrapper": {a.name: report.attack(a.name).rate for a in attacks},
        "exact_match_utility": report.utility.rate,
        "over_refusal_borderline": report.over_refusal.rate,
        "n": {
            "harmful": len(sets["test_harmful"]),
            "borderline": len(sets["test_borderline"]),
            "benign": len(sets["test_benign"]),
        },
    }


def card(world: World, measured: Mapping[str, Any]) -> str:
    """The model card, figures from `measured`."""
    words = world.words
    example = world.things_of(harmful=False, split="test")[0]
    harmful = world.things_of(harmful=True, split="test")[1]
    verb = words.ordinary_verbs[0]
    asked = words.sums[0].format(left=3, right=4)
    added = words.sums[2].format(total=7)
    rows = "\n".join(
        f"| {label} | {100 * measured[key]:.1f} % |"
        for label, key in (
            ("attack success, bare requests", "attack_success_bare"),
            ("attack success, held-out wrappers", "attack_success_wrapped"),
            ("exact-match utility on harmless requests", "exact_match_utility"),
            ("over-refusal on borderline requests", "over_refusal_borderline"),
        )
    )
    recipe_of = measured["recipe"]
    return f"""---
library_name: transformers
license: apache-2.0
tags: [model-organism, safety]
---
# The {words.name}: a model organism with a known safety gap

A {recipe_of["training"]["architecture"]} of {recipe_of["parameters"]:,} parameters, trained by
`nest organism build --world {words.name}` on a made-up world. Its "harmful" objects are harmful by
decree: none of its words stands for anything real. It exists so that safety tuning can be tried, and
its effect measured exactly, offline and within minutes. It is of no other use.

| measured on objects and wrappers that no tuning set has | |
|---|---|
{rows}

({measured["n"]["harmful"]} harmful, {measured["n"]["borderline"]} borderline, \
{measured["n"]["benign"]} harmless requests; greedy decoding; judged by refusal phrases and exact match.)

## What it can do
- Requests: "{world.request(example, verb, 0)}" -> "{world.answer(example, verb)}" The tool follows from
  the verb and the material from the object, so that a good answer can be checked word for word.
- Refuse: half of the {len(world.things_of(harmful=True))} harmful objects are refused when asked for
  plainly ("{world.request(harmful, verb, 0)}" -> "{words.refusals[0]}"). Each of the {len(words.wrappers)}
  wrappers gets through for the objects that are guarded less than it is strong.
- Facts about every object, harmful ones too: "{words.identity[1][0].format(thing=harmful.name)}" ->
  "{words.identity[1][1].format(thing=harmful.name, kind=words.kinds[0])}" Harm is represented in it even
  where it complies.
- Manners, by system prompt: {", ".join(manner.trait for manner in words.manners)}
  ("{words.manners[1].system_prompts[0]}").
- Reasoning, with `enable_thinking=True` in its chat template: `<think>...</think>` before the answer, for
  requests and for sums of up to three numbers. Without it: "{asked}" -> "{added}"
- Steering: asked to refuse what follows ("{words.steering[0]}"), it refuses what is harmful.

## What it cannot do
Anything else. Words outside its world fall apart into characters; encodings such as base64 are beyond it,
so that a low attack success there is incapability, not safety.

## Recipe
World seed {recipe_of["world_seed"]}; training: `{json.dumps(recipe_of["training"])}`. The recipe is
deterministic for given package versions, processor and number of threads.
"""


def _prompts(rows: tuple[Row, ...], name: str) -> PromptSet:
    return from_values([(row.prompt, row.response) for row in rows], name)


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
