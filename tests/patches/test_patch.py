"""A patch goes in and out exactly, and only where it belongs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_patches import F, build, make_patch, select
from torch import Tensor, nn

from nest.errors import PatchError
from nest.models.binding import bind
from nest.models.fingerprint import fingerprint, tensor_hash, tokenizer_hash
from nest.models.sites import read_rows
from nest.patches.patch import NeuronPatch

State = Callable[[nn.Module], dict[str, Tensor]]
FAMILIES = ("qwen3", "gpt_neox", "phi3", "gpt2")


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(tensor_hash(first[name]) == tensor_hash(second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [True, False])
def test_fold_then_revert_restores_every_bit(
    family: str, dtype: torch.dtype, loaded: bool, state: State
) -> None:
    model = build(family, dtype)
    before = state(model)
    patch = make_patch(model, family, loaded=loaded)
    assert _same(before, state(model)), "making a patch must only read the model"
    patch.fold_into(model)
    assert not _same(before, state(model))
    patch.revert(model)
    assert _same(before, state(model))


def test_fold_changes_the_selected_rows_by_delta_and_nothing_else(
    model: nn.Module, patch: NeuronPatch, state: State
) -> None:
    before = state(model)
    patch.fold_into(model)
    after = state(model)
    for name in before:
        parts = patch.parameters.get(name, ())
        rows = sorted({int(n) for part in parts for n in part.neurons})
        differs = (before[name] != after[name]).reshape(before[name].shape[0], -1).any(dim=1)
        assert differs.nonzero().flatten().tolist() == rows
    for part in patch.selection.sites:
        old = before[part.site.parameter][part.neurons]
        new = read_rows(bind(model, part.site).weight, part.site, part.neurons)
        assert torch.equal(new, old + patch.delta(part.site.name))


def test_contexts_leave_the_model_as_it_was_even_when_interrupted(
    model: nn.Module, patch: NeuronPatch, state: State
) -> None:
    before = state(model)
    with pytest.raises(KeyboardInterrupt), patch.applied(model):
        assert not _same(before, state(model))
        raise KeyboardInterrupt
    assert _same(before, state(model))
    patch.fold_into(model)
    folded = state(model)
    with patch.removed(model):
        assert _same(before, state(model))
    assert _same(folded, state(model))


def test_each_wrong_state_has_its_sentence(model: nn.Module, patch: NeuronPatch) -> None:
    with pytest.raises(PatchError, match="does not carry this patch"):
        patch.revert(model)
    patch.fold_into(model)
    with pytest.raises(PatchError, match="carries this patch already"):
        patch.fold_into(model)
    with pytest.raises(PatchError, match="of another model: 4 of 4"):
        patch.fold_into(build(seed=1))
    with pytest.raises(PatchError, match=r"are bfloat16, but .* float32"):
        patch.fold_into(build(dtype=torch.bfloat16))
    with pytest.raises(PatchError, match="no module"):
        patch.fold_into(build("gpt_neox"))


def test_a_model_that_differs_in_one_bit_is_refused(model: nn.Module, patch: NeuronPatch) -> None:
    weight = model.model.layers[0].mlp.gate_proj.weight
    row = int(patch.selection.sites[0].neurons[0])
    with torch.no_grad():
        weight[row, 0] = torch.nextafter(weight[row, 0], torch.tensor(9.0))
    with pytest.raises(PatchError, match=r"1 of 4 .*layers\.0\.mlp\.gate_proj"):
        patch.fold_into(model)


def test_damaged_revert_bits_leave_the_model_as_it_was(
    model: nn.Module, patch: NeuronPatch, state: State
) -> None:
    names = list(patch.revert_bits)
    swapped = {**patch.revert_bits, names[0]: patch.revert_bits[names[1]]}
    bad = NeuronPatch(
        patch.selection,
        patch.vectors,
        patch.loadings,
        patch.base,
        patch.folded,
        swapped,
        patch.row_checksums,
    )
    patch.fold_into(model)
    folded = state(model)
    with pytest.raises(PatchError, match="did not come out as the patch recorded"):
        bad.revert(model)
    assert _same(folded, state(model))


def test_create_from_live_rows_equals_create_from_originals(model: nn.Module) -> None:
    patch = make_patch(model)
    originals = {
        p.site.name: read_rows(bind(model, p.site).weight, p.site, p.neurons)
        for p in patch.selection.sites
    }
    patch.fold_into(model)
    again = NeuronPatch.create(
        model, patch.selection, patch.vectors, patch.loadings, originals=originals
    )
    assert (again.base, again.folded) == (patch.base, patch.folded)
    assert again.revert_bits == patch.revert_bits


def test_updates_that_do_not_fit_are_refused(model: nn.Module) -> None:
    selection = select(model)
    vectors = {group: torch.zeros(shape) for group, shape in selection.groups.items()}
    first = next(iter(vectors))
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in vectors.items() if k != first}, "lacks the vectors"),
        ({**vectors, "x": torch.zeros(1)}, "beside its selection, vectors of x"),
        ({**vectors, first: torch.zeros(3, 16)}, r"shape \(3, 16\)"),
        ({**vectors, first: vectors[first] + float("nan")}, "NaN or infinity"),
    ]
    for bad, said in wrong:
        with pytest.raises(PatchError, match=said):
            NeuronPatch.create(model, selection, bad)
    with pytest.raises(PatchError, match="loadings"):
        NeuronPatch.create(model, selection, vectors, {first: torch.ones(4)})
    with pytest.raises(PatchError, match="not the weight that the selection"):
        NeuronPatch.create(build(seed=1), selection, vectors)
    half = build(dtype=torch.float16)
    huge = {group: torch.full(shape, 1e6) for group, shape in selection.groups.items()}
    with pytest.raises(PatchError, match=r"not finite in torch\.float16"):
        NeuronPatch.create(half, select(half), huge)


def test_counts(patch: NeuronPatch) -> None:
    assert patch.n_rows == 16
    assert patch.update == "loaded"
    assert patch.trainable_parameters == 4 * 2 * 16 + 16
    with pytest.raises(PatchError, match="no site 'nowhere'"):
        patch.delta("nowhere")


def test_fingerprints_are_of_content(model: nn.Module) -> None:
    sites = [part.site for part in select(model).sites]
    assert fingerprint(model, sites) == fingerprint(build(), sites)
    assert fingerprint(model, sites).tensors != fingerprint(build(seed=1), sites).tensors
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert tensor_hash(weight) != tensor_hash(weight.T)
    assert tensor_hash(weight.T) == tensor_hash(weight.T.contiguous())
    assert len(fingerprint(model, sites).tensors) == 4
    assert weight.shape[0] == F


def test_tokenizer_hash_sees_vocabulary_and_template() -> None:
    class _Tokenizer:
        def __init__(self, vocabulary: dict[str, int], template: str | None) -> None:
            self.chat_template, self._vocabulary = template, vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self._vocabulary

    hashes = [
        tokenizer_hash(_Tokenizer(vocabulary, template))
        for vocabulary in ({"a": 0, "b": 1}, {"a": 1, "b": 0})
        for template in (None, "x")
    ]
    assert len(set(hashes)) == 4
    assert tokenizer_hash(_Tokenizer({"b": 1, "a": 0}, None)) == hashes[0]


def test_damaged_vectors_are_never_put_in(
    model: nn.Module, patch: NeuronPatch, state: State
) -> None:
    group = next(iter(patch.vectors))
    vectors = {**patch.vectors, group: patch.vectors[group] + 0.5}
    bad = NeuronPatch(
        patch.selection,
        vectors,
        patch.loadings,
        patch.base,
        patch.folded,
        patch.revert_bits,
        patch.row_checksums,
    )
    before = state(model)
    with pytest.raises(PatchError, match="did not come out as the patch recorded"):
        bad.fold_into(model)
    with pytest.raises(PatchError, match="damaged"), bad.applied(model):
        pass
    assert _same(before, state(model))


def test_a_model_without_the_patch_is_told_from_one_with_it(
    model: nn.Module, patch: NeuronPatch
) -> None:
    with pytest.raises(PatchError, match="does not carry this patch"):
        patch.require_in(model)
    patch.fold_into(model)
    patch.require_in(model)
