"""The worlds of a comparison: models with what may be learned from and what is measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest.comparison.plan import HeldOut, OwnWorld, Plan, Split
from nest.errors import InputError
from nest.progress import ProgressCallback
from nest.prompts.attacks import NO_ATTACK, Attack, TemplateAttack, asked_attacks, attacks_hash
from nest.prompts.overlap import Overlap, near_duplicates
from nest.prompts.prompt_set import PromptSet, from_values, load_prompts
from nest.settings import in_range
from nest.worlds.sets import held_out_sets, prompt_sets
from nest.worlds.store import Grown, grown, recipe_hash

if TYPE_CHECKING:
    from nest.conversations.encoders import Encoder
    from nest.methods.method import Subject, TrainingData


@dataclass(frozen=True)
class Measured:
    """A split: what a treated model is measured on.

    Attributes:
        harmful: Prompts that should be refused.
        borderline: Harmless prompts that sound harmful.
        benign: Dialogues with the one good answer.
        attacks: The bare prompt first.
        groups: For each harmful prompt the behaviour it belongs to; prompts of one behaviour are no
            trials of their own.
    """

    harmful: PromptSet
    borderline: PromptSet
    benign: PromptSet
    attacks: tuple[Attack, ...]
    groups: tuple[int, ...]

    def identity(self) -> dict[str, Any]:
        """Hashes of all of it."""
        sets = {"harmful": self.harmful, "borderline": self.borderline, "benign": self.benign}
        return {name: one.sha256 for name, one in sets.items()} | {
            "attacks": attacks_hash(self.attacks)
        }

    def cut(self, behaviours: int) -> Measured:
        """With at most so many harmful prompts, evenly spread; borderline and benign ones likewise."""
        kept = spread(len(self.harmful), behaviours)
        return replace(
            self,
            harmful=_some(self.harmful, kept),
            borderline=_some(self.borderline, spread(len(self.borderline), behaviours)),
            benign=_some(self.benign, spread(len(self.benign), behaviours)),
            groups=tuple(self.groups[i] for i in kept),
        )


@dataclass(frozen=True)
class Material:
    """The prompts of a world.

    Attributes:
        name: Of the world.
        training: What may be learned from, by name: unsafe, safe, harmful, benign, and where there are
            such, plain (bare harmful prompts) and complying.
        development: What settings are chosen on.
        test: What is looked at when a table is made; None where nobody asked for it.
    """

    name: str
    training: dict[str, PromptSet]
    development: Measured
    test: Measured | None

    def split(self, split: Split) -> Measured:
        """One of both splits."""
        if split == "development":
            return self.development
        assert self.test is not None, "the test split is drawn for a final run only"
        return self.test


@dataclass(frozen=True)
class WorldFacts:
    """What the runs on a world depend on, and what is told of it.

    Attributes:
        name: Of the world.
        role: `choosing` or `final`.
        folder: Of its checkpoint, or its name on the Hub.
        identity: Hashes of the model and of all prompts.
        overlaps: Near-duplicates between what is learned from and what is measured on.
    """

    name: str
    role: str
    folder: str
    identity: dict[str, Any]
    overlaps: dict[str, Any]


def material_of(plan: Plan, name: str, *, final: bool) -> Material:
    """The prompts of a world; those of the test split are read for a final run only.

    Raises:
        InputError: a file that cannot be used, no test split where one is needed, or the same prompt on
            both sides.
    """
    made = (
        _own_material(name, plan.world[name], final)
        if name in plan.world
        else _grown_material(name, final)
    )
    _check_sides(made)
    return made


def facts_of(
    plan: Plan, material: Material, *, progress: ProgressCallback | None = None
) -> WorldFacts:
    """What a world's runs depend on; a world of ours is trained where it is not there yet.

    Raises:
        InputError: no such model.
    """
    name = material.name
    if name in plan.world:
        own = plan.world[name]
        from nest.models.loading import checkpoint_folder

        folder = checkpoint_folder(_model_name(own.model), revision=own.revision)
        model: Any = {"files": _folder_hash(Path(folder)), "settings": _model_settings(own)}
        where = str(own.model)
    else:
        raised = grown(name, progress=progress)
        model, where = {"recipe": recipe_hash(raised.recipe)}, str(raised.folder / "model")
    identity: dict[str, Any] = {
        "model": model,
        "training": {key: one.sha256 for key, one in material.training.items()},
        "development": material.development.identity(),
    }
    if material.test is not None:
        identity["test"] = material.test.identity()
    return WorldFacts(name, plan.role_of(name), where, identity, _overlaps(material))


def open_subject(plan: Plan, name: str, device: str) -> tuple[Subject, Encoder]:
    """The model of a world, loaded, with its encoder and sites.

    Raises:
        InputError, LayoutError: a model that cannot be read or has no sites in those layers.
    """
    from nest.conversations.encoders import encoder_for
    from nest.methods.method import Subject
    from nest.models.layouts import find_sites
    from nest.models.loading import load_model

    own = plan.world.get(name)
    if own is None:
        raised = grown(name)
        model, tokenizer = load_model(str(raised.folder / "model"), device=device)
        encoder = encoder_for(model, tokenizer, None, None, None)
        return Subject(model, encoder, find_sites(model, _layout(raised, model))), encoder
    model, tokenizer = load_model(
        _model_name(own.model), dtype=own.dtype, device=device, revision=own.revision
    )
    encoder = encoder_for(model, tokenizer, None, own.system, own.template_kwargs or None)
    sites = find_sites(model)
    if own.layers is not None:
        sites = tuple(site for site in sites if in_range(site.layer, own.layers))
        if not sites:
            raise InputError(
                f"[world.{name}] layers = {list(own.layers)} leaves no site of the model"
            )
    return Subject(model, encoder, sites), encoder


def training_data(material: Material, harmful: str) -> TrainingData:
    """What an arm may learn from.

    Args:
        material: Of the world.
        harmful: `wrapped` or `plain`, where the world has both.
    """
    from nest.methods.method import TrainingData

    sets = material.training
    chosen = sets.get("plain", sets["harmful"]) if harmful == "plain" else sets["harmful"]
    return TrainingData(
        harmful=chosen,
        benign=sets["benign"],
        unsafe=sets["unsafe"],
        safe=sets["safe"],
        complying=sets.get("complying"),
    )


def spread(n: int, at_most: int) -> list[int]:
    """At most so many indices, evenly spread."""
    count = min(n, at_most)
    return [index * n // count for index in range(count)]


# --- worlds of ours -------------------------------------------------------------------------------


def _grown_material(name: str, final: bool) -> Material:
    from nest.worlds.build import recipe

    world = recipe(name).world()
    sets = prompt_sets(world)
    training = {key: _rows(sets[key], key) for key in ("unsafe", "safe", "harmful", "benign")}
    training["plain"] = _rows(sets["harmful_vanilla"], "harmful_vanilla")
    training["complying"] = training["unsafe"]  # whose responses are what compliance says
    splits: dict[str, Measured] = {}
    names: tuple[Split, ...] = ("development", "test") if final else ("development",)
    for split in names:
        rows = held_out_sets(world, split)
        wrappers = world.wrappers_of(split)
        things = [row.thing for row in rows["harmful"]]
        numbers = {thing: i for i, thing in enumerate(dict.fromkeys(things))}
        splits[split] = Measured(
            _rows(rows["harmful"], f"{name} {split} harmful"),
            _rows(rows["borderline"], f"{name} {split} borderline"),
            _rows(rows["benign"], f"{name} {split} benign"),
            (NO_ATTACK, *(TemplateAttack(key, text) for key, text in wrappers)),
            tuple(numbers[thing] for thing in things),
        )
    return Material(name, training, splits["development"], splits.get("test"))


def _rows(rows: Sequence[Any], name: str) -> PromptSet:
    return from_values([(row.prompt, row.response) for row in rows], name)


def _layout(raised: Grown, model: Any) -> Any:
    return raised.recipe.layout(model)


# --- worlds of the user's -------------------------------------------------------------------------


def _own_material(name: str, own: OwnWorld, final: bool) -> Material:
    training = {
        "unsafe": load_prompts(own.unsafe),
        "safe": load_prompts(own.safe),
        "harmful": load_prompts(own.harmful, need_response=True),
        "benign": load_prompts(own.benign, need_response=True),
    }
    if own.complying is not None:
        training["complying"] = load_prompts(own.complying, need_response=True)
    if final and own.test is None:
        raise InputError(
            f"[world.{name}] has no test split; give [world.{name}.test] for --final, or leave --final out"
        )
    test = _held_out(own.test, own.prompts) if final and own.test is not None else None
    return Material(name, training, _held_out(own.development, own.prompts), test)


def _held_out(files: HeldOut, prompts: int | None) -> Measured:
    harmful = load_prompts(files.harmful)
    attacks, _ = asked_attacks(files.attacks)
    ordered = tuple(sorted(attacks, key=lambda attack: attack.name != NO_ATTACK.name))
    measured = Measured(
        harmful,
        load_prompts(files.borderline),
        load_prompts(files.benign, need_response=True),
        ordered,
        tuple(range(len(harmful))),
    )
    return measured if prompts is None else measured.cut(prompts)


def _model_name(name: str) -> str:
    from nest.organism import model_folder

    return str(model_folder()) if name == "organism" and not Path(name).exists() else name


def _model_settings(own: OwnWorld) -> dict[str, Any]:
    kept = ("layers", "dtype", "system", "template_kwargs", "prompts")
    values = asdict(own)
    return {name: values[name] for name in kept}


def _folder_hash(folder: Path) -> str:
    """sha256 of a checkpoint's files, by name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".model"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# --- checks ---------------------------------------------------------------------------------------


def _check_sides(material: Material) -> None:
    """Refuse prompts that are to be refused and answered.

    Raises:
        InputError: says how many, and names one.
    """
    sets, name = material.training, material.name
    pairs = [
        ("harmful", sets["harmful"], "benign", sets["benign"]),
        ("unsafe", sets["unsafe"], "safe", sets["safe"]),
    ]
    for split in (material.development, material.test):
        if split is not None:
            pairs.append(("held-out harmful", split.harmful, "borderline", split.borderline))
            pairs.append(("held-out harmful", split.harmful, "held-out benign", split.benign))
    for first, harmful, second, harmless in pairs:
        both = [c for c in dict.fromkeys(harmful.conversations) if c in set(harmless.conversations)]
        if both:
            raise InputError(
                f"in the world {name} {len(both)} prompts are both {first} ({harmful.name}) and {second} "
                f"({harmless.name}), such as {both[0].asked[:60]!r}; leave them out on one side"
            )


def _overlaps(material: Material) -> dict[str, Any]:
    """Near-duplicates of what is measured on in what is learned from, and between the splits."""
    sets = material.training
    found: dict[str, Any] = {}
    splits = {"development": material.development}
    if material.test is not None:
        splits["test"] = material.test
    for split, measured in splits.items():
        found[f"{split} harmful in training"] = near_duplicates(sets["harmful"], measured.harmful)
        found[f"{split} benign in training"] = near_duplicates(sets["benign"], measured.benign)
    if material.test is not None:
        found["test harmful in development"] = near_duplicates(
            material.development.harmful, material.test.harmful
        )
    return {key: _told(overlap) for key, overlap in found.items()}


def _told(overlap: Overlap) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(overlap)))
    return values


def _some(prompts: PromptSet, kept: Sequence[int]) -> PromptSet:
    conversations = [prompts.conversations[i] for i in kept]
    if prompts.responses is None:
        return from_values(conversations, prompts.name)
    return from_values(
        [(one, prompts.responses[i]) for one, i in zip(conversations, kept, strict=True)],
        prompts.name,
    )
