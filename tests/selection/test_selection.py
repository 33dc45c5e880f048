"""Selections are written and read whole, and nothing in a file is trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SAFE, UNSAFE, D, F, build, choose, same_bits, word_tokenizer

import nest
from nest.artifacts.storage import SEAL, seal_of
from nest.errors import MissingInputError, NestError, OutputExistsError, SelectionError
from nest.models.layouts import find_sites
from nest.models.sites import NeuronSite
from nest.selection.selection import NeuronSelection

GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module", params=["projection", "layer", "by hand"])
def selection(request: pytest.FixtureRequest) -> NeuronSelection:
    if request.param == "by hand":
        return choose(build())
    return nest.select(
        build(),
        word_tokenizer(),
        unsafe=UNSAFE,
        safe=SAFE,
        z_threshold=0.5,
        cluster_scope=request.param,
        max_profile_prompts=9,
        warn=lambda _text: None,
    )


def test_what_is_written_is_read(selection: NeuronSelection, tmp_path: Path) -> None:
    selection.save(tmp_path / "selection")
    assert sorted(file.name for file in (tmp_path / "selection").iterdir()) == [
        "manifest.json",
        "selection.safetensors",
    ]
    found = NeuronSelection.load(tmp_path / "selection")
    assert same_bits(found.tensors(), selection.tensors())
    assert found.manifest() == json.loads(json.dumps(selection.manifest()))
    assert found.base == selection.base and found.groups == selection.groups
    assert [part.site for part in found.sites] == [part.site for part in selection.sites]
    with pytest.raises(OutputExistsError):
        selection.save(tmp_path / "selection")
    selection.save(tmp_path / "selection", overwrite=True)


def test_counts(selection: NeuronSelection) -> None:
    n = sum(len(part.neurons) for part in selection.sites)
    groups = {part.group: part.n_clusters for part in selection.sites}
    assert selection.n_neurons == n
    assert selection.n_clusters == sum(groups.values())
    assert selection.trainable_parameters("shared") == D * sum(groups.values())
    assert selection.trainable_parameters("loaded") == D * sum(groups.values()) + n


def test_a_selection_written_down_by_hand() -> None:
    model = build()
    found = NeuronSelection.of(model, {GATE: ([9, 3, 5], [1, 0, 1])})
    (part,) = found.sites
    assert part.neurons.tolist() == [3, 5, 9] and part.clusters.tolist() == [0, 1, 1]
    assert (part.width, part.n_clusters, part.group) == (D, 2, GATE)
    assert list(found.base.tensors) == [f"{GATE}.weight"]
    for chosen, said in (
        ({"model.layers.9": ([1], [0])}, rf"is no site of this model; it has {GATE}, "),
        ({GATE: ([1, 2], [0])}, "2 neurons but 1 clusters"),
        ({GATE: ([], [])}, "has no neurons"),
        ({GATE: ([F], [0])}, rf"neurons 0 to {F - 1}, but the selection names {F}"),
        ({GATE: ([-1], [0])}, "names -1"),
        ({GATE: ([3, 3], [0, 0])}, "each once"),
        ({GATE: ([3], [-1])}, "cluster ids -1"),
        ({}, "at least one site"),
    ):
        with pytest.raises(SelectionError, match=said):
            NeuronSelection.of(model, chosen)


def test_sites_that_contradict_each_other_are_refused() -> None:
    selection = choose(build())
    first, second, *_ = selection.sites
    with pytest.raises(SelectionError, match="listed twice"):
        replace(selection, sites=(first, first))
    with pytest.raises(SelectionError, match="disagree about clusters"):
        replace(selection, sites=(first, replace(second, group=first.group, n_clusters=5)))
    with pytest.raises(SelectionError, match="not a finite number"):
        replace(selection, sites=(replace(first, scores=first.scores * float("nan")),))
    # jaxtyping's hook sees these first; it raises a TypeError
    with pytest.raises((SelectionError, TypeError), match=r"one of each|clusters"):
        replace(first, clusters=first.clusters[:2]).check()
    with pytest.raises((SelectionError, TypeError), match="profiles"):
        replace(first, profiles=torch.zeros(2, 3)).check()


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    choose(build()).save(tmp_path / "selection")
    return tmp_path / "selection"


def test_no_folder_or_file(folder: Path) -> None:
    with pytest.raises(MissingInputError, match="there is no folder"):
        NeuronSelection.load(folder / "none")
    (folder / "selection.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"selection\.safetensors is missing"):
        NeuronSelection.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(MissingInputError, match=r"has no manifest\.json"):
        NeuronSelection.load(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    file = folder / "selection.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SelectionError, match=r"selection\.safetensors is damaged or cut short"):
        NeuronSelection.load(folder)


def test_tensors_that_do_not_belong(folder: Path) -> None:
    file = folder / "selection.safetensors"
    good = load_file(file)
    for bad, said in (
        ({**good, "extra": torch.zeros(1)}, "unexpected tensor 'extra'"),
        ({k: v for k, v in good.items() if k != "1.scores"}, "lacks the tensor '1.scores'"),
        ({**good, "0.scores": torch.full((4,), float("nan"))}, "NaN or infinity"),
        ({**good, "0.clusters": torch.zeros(3).long()}, r"shape \(3,\); expected \(4,\)"),
        ({**good, "0.neurons": torch.tensor([0, 1, 2, F])}, f"names {F}"),
        ({**good, "0.neurons": torch.tensor([2, 1, 3, 4])}, "ascending"),
        ({**good, "0.clusters": torch.tensor([0, 1, 2, 0])}, "cluster ids 0 to 2"),
    ):
        save_file(bad, file)
        with pytest.raises(SelectionError, match=said):
            NeuronSelection.load(folder)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a manifest; of lists the first entry."""
    if path and path[0] in ("provenance", "counts", "nest_version"):
        return  # told, not used
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from _places(value[0], (*path, 0))


def fuzz(folder: Path) -> None:
    """Each garbled manifest is a known error, or a selection as good as the original."""
    file = folder / "manifest.json"
    original = file.read_text()
    accepted = set()
    for path in _places(json.loads(original)):
        for garbage in ("gone", None, "x", -3, 1e300, [], {}, [[1]], True, "\x00" * 9, 2**70):
            manifest = json.loads(original)
            parent = manifest
            for key in path[:-1]:
                parent = parent[key]
            if garbage == "gone":
                del parent[path[-1]]
            else:
                parent[path[-1]] = garbage
            if path != (SEAL,):  # whoever changes it knows how to seal it
                manifest[SEAL] = seal_of(manifest)
            file.write_text(json.dumps(manifest))
            try:
                found = NeuronSelection.load(folder)
            except NestError as fault:
                assert len(str(fault)) > 20
                continue
            accepted.add(path[-1])
            assert found.n_neurons == 16
    # names and numbers that are checked against the model when the selection is used
    free = {"projection", "module", "tensor", "layer", "group", "axis", "offset", "length", "dtype"}
    free |= {"config_hash", "width", "n_clusters", "tensors", "n_profiles"}
    assert accepted <= free | set(choose(build()).base.tensors), accepted
    for text in ("", "[]", "{", '{"kind": "selection"}', "nan", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(SelectionError):
            NeuronSelection.load(folder)


def test_no_garbled_manifest_gets_further_than_a_sentence(folder: Path) -> None:
    # in a process of its own: jaxtyping's hook would catch what users would see
    paths = [str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_versions_and_kinds(folder: Path) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for changed, said in (
        ({"format_version": "2.0"}, r"format version 2\.0; this nest reads 1\.x"),
        ({"kind": "patch"}, "is a patch; expected a selection"),
    ):
        file.write_text(json.dumps({**manifest, **changed}))
        with pytest.raises(SelectionError, match=said):
            NeuronSelection.load(folder)
    newer = {**manifest, "format_version": "1.9", "news": 1}
    file.write_text(json.dumps({**newer, "sha256": seal_of(newer)}))
    assert NeuronSelection.load(folder).n_neurons == 4 * len(find_sites(build()))


def test_fields_of_a_site_that_come_later_or_are_gone_are_no_fault(folder: Path) -> None:
    """An artifact of before a field was added stays readable, and one of after it as well."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    before = NeuronSelection.load(folder)
    for entry in manifest["sites"]:
        for name in ("tensor", "axis", "offset"):
            del entry[name]
        entry["expert"] = None
    file.write_text(json.dumps({**manifest, "sha256": seal_of(manifest)}))
    assert NeuronSelection.load(folder).sha256() == before.sha256()
    site = before.sites[0].site
    assert NeuronSite.from_dict({**site.to_dict(), "expert": 3}) == site
    with pytest.raises(KeyError, match="module"):
        NeuronSite.from_dict({"layer": 0, "projection": "fc1", "length": 4})


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]))
