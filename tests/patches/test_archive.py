"""A saved patch reads back the same; a damaged one is refused with its own sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_patches import make_patch
from torch import nn

from nest.artifacts.storage import seal_of
from nest.errors import MissingInputError, OutputExistsError, PatchError
from nest.patches.patch import NeuronPatch


@pytest.fixture
def folder(patch: NeuronPatch, tmp_path: Path) -> Path:
    path = tmp_path / "patch"
    patch.save(path)
    return path


@pytest.mark.parametrize("loaded", [True, False])
def test_round_trip(model: nn.Module, tmp_path: Path, loaded: bool) -> None:
    patch = make_patch(model, loaded=loaded)
    patch.save(tmp_path / "p", evidence={"eval.json": "{}"})
    again = NeuronPatch.load(tmp_path / "p")
    assert (again.base, again.folded, again.revert_bits) == (
        patch.base,
        patch.folded,
        patch.revert_bits,
    )
    assert again.update == patch.update
    for name, values in patch.vectors.items():
        assert torch.equal(again.vectors[name], values)
    again.fold_into(model)
    patch.revert(model)
    assert (tmp_path / "p" / "evidence" / "eval.json").read_text() == "{}"


def test_the_card_tells_figures_and_limits(model: nn.Module, tmp_path: Path) -> None:
    patch = make_patch(model)
    provenance = {"model": "org/name", "figures": {"attack|success": 0.03125}}
    provenance["tuning"] = {"config": {"seed": 5}}
    told = NeuronPatch.create(
        model, patch.selection, patch.vectors, patch.loadings, provenance=provenance
    )
    told.save(tmp_path / "p")
    card = (tmp_path / "p" / "README.md").read_text()
    for text in ("`org/name`", r"| attack\|success | 0.03125 |", "| seed | 5 |", "subtract it"):
        assert text in card


def test_saving_twice_needs_overwrite(patch: NeuronPatch, folder: Path) -> None:
    with pytest.raises(OutputExistsError, match="--overwrite"):
        patch.save(folder)
    (folder / "marker").write_text("old")
    patch.save(folder, overwrite=True)
    assert not (folder / "marker").exists()
    assert NeuronPatch.load(folder).folded == patch.folded


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "patch.safetensors")
        change(tensors)
        save_file(tensors, folder / "patch.safetensors")

    return damage


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return damage


def _cut(folder: Path) -> None:
    file = folder / "patch.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("cut short", _cut, "damaged or cut short"),
    ("missing", _tensors(lambda t: t.pop("0.loadings")), "lacks the tensor '0.loadings'"),
    ("extra", _tensors(lambda t: t.update(x=torch.ones(1))), "unexpected tensor 'x'"),
    ("nan", _tensors(lambda t: t["0.vectors"].fill_(float("nan"))), "'0.vectors' holds NaN"),
    ("shape", _tensors(lambda t: t.update({"1.vectors": torch.ones(2, 3)})), "has shape"),
    ("dtype", _tensors(lambda t: t.update({"0.revert": torch.ones(9)})), "expected torch.uint8"),
    ("too large", _tensors(lambda t: t["0.neurons"].add_(1000)), "names 1023"),
    ("negative", _tensors(lambda t: t["0.neurons"].sub_(2)), "names -1"),
    ("twice", _tensors(lambda t: t["0.neurons"].fill_(3)), "ascending"),
    ("cluster", _tensors(lambda t: t["0.clusters"].add_(1)), "cluster ids"),
    ("major", _manifest(lambda m: m.update(format_version="2.0")), "format version 2.0"),
    ("no version", _manifest(lambda m: m.pop("format_version")), "format version None"),
    ("kind", _manifest(lambda m: m.update(kind="selection")), "is a selection; expected a patch"),
    ("no base", _manifest(lambda m: m.pop("base")), "entry 'base'"),
    ("base", _manifest(lambda m: m.update(base=3)), "entry 'base'"),
    ("hash", _manifest(lambda m: m["folded"].update(x="y")), "folded.x"),
    ("hashes", _manifest(lambda m: m["folded"].update(x="0" * 64)), "not as it was written"),
    ("update", _manifest(lambda m: m.update(update="other")), "entry 'update'"),
    ("site", _manifest(lambda m: m["selection"]["sites"][0].update(module=5)), "module"),
    ("sites", _manifest(lambda m: m["selection"].update(sites=[])), "lacks|unexpected"),
    ("n", _manifest(lambda m: m["selection"]["sites"][0].update(n_neurons="x")), "garbles"),
    ("width", _manifest(lambda m: m["selection"]["sites"][0].update(width=3)), "shape"),
    ("json", lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
    ("nested", lambda folder: (folder / "manifest.json").write_text("[" * 10**5), "damaged"),
    ("list", lambda folder: (folder / "manifest.json").write_text("[]"), "does not say"),
]


@pytest.mark.parametrize(("damage", "said"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damage_is_told_by_name(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(folder)
    with pytest.raises(PatchError, match=said):
        NeuronPatch.load(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no folder"):
        NeuronPatch.load(tmp_path / "none")
    with pytest.raises(MissingInputError, match=r"no manifest\.json"):
        NeuronPatch.load(tmp_path)
    (folder / "patch.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"patch\.safetensors is missing"):
        NeuronPatch.load(folder)


def test_a_newer_minor_version_is_read(folder: Path) -> None:
    _manifest(lambda m: m.update(format_version="1.7", news="x"))(folder)
    _manifest(lambda m: m.update(sha256=seal_of(m)))(folder)
    NeuronPatch.load(folder)


def test_a_patch_of_before_there_were_seals_is_read(folder: Path) -> None:
    _manifest(lambda m: (m.update(format_version="1.1"), m.pop("sha256"), m.pop("files")))(folder)
    NeuronPatch.load(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            _manifest(lambda m: m["provenance"].update(model="other")),
            "manifest.json is not as it was",
        ),
        (_manifest(lambda m: m.pop("sha256")), "manifest.json is not as it was"),
        (_manifest(lambda m: m.pop("files")), "manifest.json is not as it was"),
        (_tensors(lambda t: t["0.revert"][3:4].bitwise_not_()), "patch.safetensors is damaged"),
        (_tensors(lambda t: t["0.scores"].mul_(2)), "patch.safetensors is damaged"),
    ],
    ids=["edited", "no seal", "no hashes", "revert bits", "scores"],
)
def test_a_change_that_makes_sense_is_told_by_its_hash(
    folder: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(folder)
    with pytest.raises(PatchError, match=said):
        NeuronPatch.load(folder)
