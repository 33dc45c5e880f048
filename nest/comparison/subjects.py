"""The worlds of a comparison: models with what may be learned from and what is measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest.comparison.plan import HeldOut, OwnWorld, Plan, Split
from nest.errors import InputError, MissingInputError
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

REFUSED = ("harmful", "unsafe", "plain", "complying")
"""Of what may be learned from, the prompts that should be refused."""


@dataclass(frozen=True)
class Measured:
    """A split: what a treated model is measured on.

    Attributes:
        harmful: Prompts that should be refused.
        borderline: Harmless prompts that sound harmful.
        benign: Dialogues with the one good answer.
        attacks: The bare prompt first.
        groups: For `harmful`, `borderline` and `benign` what each prompt is about, as a number from 0;
            prompts about the same are no trials of their own.
    """

    harmful: PromptSet
    borderline: PromptSet
    benign: PromptSet
    attacks: tuple[Attack, ...]
    groups: Mapping[str, tuple[int, ...]]

    def sets(self) -> dict[str, PromptSet]:
        """The prompts by what they are."""
        return {"harmful": self.harmful, "borderline": self.borderline, "benign": self.benign}

    def identity(self) -> dict[str, Any]:
        """Hashes of all of it."""
        return {name: one.sha256 for name, one in self.sets().items()} | {
            "attacks": attacks_hash(self.attacks),
            "groups": [list(numbers) for numbers in self.groups.values()],
        }

    def cut(self, behaviours: int) -> Measured:
        """With at most so many harmful prompts, evenly spread; borderline and benign ones likewise."""
        kept = {name: spread(len(one), behaviours) for name, one in self.sets().items()}
        return Measured(
            _some(self.harmful, kept["harmful"]),
            _some(self.borderline, kept["borderline"]),
            _some(self.benign, kept["benign"]),
            self.attacks,
            {name: numbered([own[i] for i in kept[name]]) for name, own in self.groups.items()},
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

    def splits(self) -> dict[str, Measured]:
        """The splits that were read, by name."""
        both = {"development": self.development, "test": self.test}
        return {name: split for name, split in both.items() if split is not None}

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
        identity: Hashes of the model and of all prompts.
        overlaps: Near-duplicates between what is learned from and what is measured on.
    """

    name: str
    role: str
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

        with _named(f"[world.{name}] model"):
            folder = checkpoint_folder(_model_name(own.model), revision=own.revision)
        model: Any = {"files": _folder_hash(Path(folder)), "settings": _model_settings(own)}
    else:
        raised = grown(name, progress=progress)
        where = str(raised.folder / "model")
        model = {"recipe": recipe_hash(raised.recipe), "files": _folder_hash(Path(where))}
    identity: dict[str, Any] = {
        "model": model,
        "training": {key: one.sha256 for key, one in material.training.items()},
        "development": material.development.identity(),
    }
    if material.test is not None:
        identity["test"] = material.test.identity()
    return WorldFacts(name, plan.role_of(name), identity, _overlaps(material))


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
    with _named(f"[world.{name}]"):
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
    chosen = sets["plain" if harmful == "plain" else "harmful"]
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
        splits[split] = Measured(
            _rows(rows["harmful"], f"{name} {split} harmful"),
            _rows(rows["borderline"], f"{name} {split} borderline"),
            _rows(rows["benign"], f"{name} {split} benign"),
            (NO_ATTACK, *(TemplateAttack(key, text) for key, text in wrappers)),
            # what is about no object, such as a sum, is about itself
            {
                kind: numbered([row.thing or f"row {i}" for i, row in enumerate(rows[kind])])
                for kind in ("harmful", "borderline", "benign")
            },
        )
    return Material(name, training, splits["development"], splits.get("test"))


def numbered(names: Sequence[Any]) -> tuple[int, ...]:
    """For each name its number from 0, the same for the same name."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)


def _rows(rows: Sequence[Any], name: str) -> PromptSet:
    return from_values([(row.prompt, row.response) for row in rows], name)


def _layout(raised: Grown, model: Any) -> Any:
    return raised.recipe.layout(model)


# --- worlds of the user's -------------------------------------------------------------------------


def _own_material(name: str, own: OwnWorld, final: bool) -> Material:
    training = {}
    for key in ("unsafe", "safe", "harmful", "benign", "complying"):
        file = getattr(own, key)
        if file is not None:
            with _named(f"[world.{name}] {key}"):
                training[key] = load_prompts(file, need_response=key not in ("unsafe", "safe"))
    if final and own.test is None:
        raise InputError(
            f"[world.{name}] has no test split; give [world.{name}.test] for --final, or leave --final out"
        )
    test = None
    if final and own.test is not None:
        test = _held_out(f"[world.{name}.test]", own.test, own.prompts)
    development = _held_out(f"[world.{name}.development]", own.development, own.prompts)
    return Material(name, training, development, test)


def _held_out(table: str, files: HeldOut, prompts: int | None) -> Measured:
    sets = {}
    for key in ("harmful", "borderline", "benign"):
        with _named(f"{table} {key}"):
            sets[key] = load_prompts(getattr(files, key), need_response=key == "benign")
    with _named(f"{table} attacks"):
        attacks, _ = asked_attacks(files.attacks)
    ordered = tuple(sorted(attacks, key=lambda attack: attack.name != NO_ATTACK.name))
    groups = {name: tuple(range(len(one))) for name, one in sets.items()}
    measured = Measured(**sets, attacks=ordered, groups=groups)
    return measured if prompts is None else measured.cut(prompts)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say of a fault which entry of the plan it is in.

    Raises:
        InputError: the fault.
    """
    try:
        yield
    except MissingInputError as fault:
        raise MissingInputError(f"{what}: {fault}") from None
    except InputError as fault:
        raise InputError(f"{what}: {fault}") from None


def _model_name(name: str) -> str:
    from nest.organism import model_folder

    return str(model_folder()) if name == "organism" and not Path(name).exists() else name


def _model_settings(own: OwnWorld) -> dict[str, Any]:
    kept = ("layers", "dtype", "system", "template_kwargs")
    values = asdict(own)
    return {name: values[name] for name in kept}


def _folder_hash(folder: Path) -> str:
    """sha256 of a checkpoint's files, by name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
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
    training = material.training
    refused = [(f"training {key}", training[key]) for key in REFUSED if key in training]
    answered = [(f"training {key}", training[key]) for key in ("benign", "safe")]
    for name, split in material.splits().items():
        refused.append((f"{name} harmful", split.harmful))
        answered += [(f"{name} borderline", split.borderline), (f"{name} benign", split.benign)]
    known = {name: frozenset(one.conversations) for name, one in answered}
    for first, harmful in refused:
        for second, harmless in answered:
            both = [c for c in dict.fromkeys(harmful.conversations) if c in known[second]]
            if both:
                raise InputError(
                    f"in the world {material.name} {len(both)} prompts are both {first} ({harmful.name}) "
                    f"and {second} ({harmless.name}), such as {both[0].asked[:60]!r}; leave them out on "
                    "one side"
                )


def _overlaps(material: Material) -> dict[str, Any]:
    """Near-duplicates of what is measured on in all that is learned from, and between both splits."""
    found: dict[str, Overlap] = {}
    for split, measured in material.splits().items():
        for kind, held_out in measured.sets().items():
            for name, learned in material.training.items():
                what = f"{split} {kind} in training {name}"
                found[what] = near_duplicates(learned, held_out)
    if material.test is not None:
        chosen_on = material.development.sets()
        for kind, held_out in material.test.sets().items():
            for name, one in chosen_on.items():
                found[f"test {kind} in development {name}"] = near_duplicates(one, held_out)
    return {what: _told(overlap) for what, overlap in found.items() if overlap.n}


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
