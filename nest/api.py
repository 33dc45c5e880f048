"""The public functions: what the command line and Python users call.

Each takes files, names or plain values, and hands tensors to the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nest.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nest.artifacts.unfinished import Unfinished
    from nest.conversations.encoders import Encoder
    from nest.evaluation.report import EvalReport
    from nest.judging.judge import Judge
    from nest.models.loading import LoadedModel
    from nest.models.sites import NeuronSite
    from nest.patches.checkpoint import FoldResult
    from nest.patches.patch import NeuronPatch
    from nest.patches.verify import Verification
    from nest.prompts.attacks import Attack
    from nest.prompts.prompt_set import PromptSet
    from nest.selection.selection import NeuronSelection
    from nest.tuning.tune import TuningResult

    Prompts = str | Path | Sequence[str] | PromptSet
    Dialogues = str | Path | Sequence[tuple[str, str]] | PromptSet
    EncodeLike = Callable[[str], Sequence[int]] | Encoder

ProgressCallback = Callable[[str, int, int], None]
BatchSize = int | Literal["auto"]

ORGANISM = "organism"
# What `auto` stands for until it is measured per machine: prompts a forward pass of capture, and
# prompts decoded together.
CAPTURE_BATCH_SIZE = 32
GENERATION_BATCH_SIZE = 256

_Config = TypeVar("_Config")


def load(
    name: str | Path = ORGANISM,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer, in eval mode.

    Args:
        name: A local folder, a name on the Hub, or `organism` for the embedded model.
        dtype: `auto` keeps the checkpoint's own.
        device: `auto` takes an accelerator where there is one.
        device_map: As transformers takes it; `device` then plays no part.
        revision: Of a model on the Hub.
        trust_remote_code: Run code that comes with the model.

    Returns:
        (model, tokenizer)

    Raises:
        InputError: no such model, or one that cannot be read.
    """
    from nest.models.loading import load_model

    return load_model(
        str(resolve_model(name)),
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def stored_dtype(name: str | Path, *, revision: str | None = None) -> torch.dtype | None:
    """The dtype that a checkpoint's weights are stored in; None where they are quantised.

    Raises:
        InputError: no checkpoint there.
    """
    from nest.models.loading import checkpoint_folder
    from nest.models.loading import stored_dtype as stored

    return stored(checkpoint_folder(resolve_model(name), revision=revision))


def resolve_model(name: str | Path) -> str | Path:
    """The embedded model's folder for `organism`, and any other name as it is."""
    from nest.organism import model_folder

    is_organism = str(name) == ORGANISM and not Path(name).exists()
    return model_folder() if is_organism else name


def select(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    unsafe: Prompts | None = None,
    safe: Prompts | None = None,
    pairs: str | Path | Sequence[tuple[str, str]] | None = None,
    layout: Sequence[NeuronSite] | None = None,
    encode: EncodeLike | None = None,
    system: str | None = None,
    batch_size: BatchSize = "auto",
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    work: str | Path | Unfinished | None = None,
    **settings: Any,
) -> NeuronSelection:
    """Find the neurons that tell unsafe prompts from safe ones, and group them.

        selection = nest.select(model, tokenizer, unsafe=[...], safe=[...], z_threshold=3.0)

    Args:
        model: Any `nn.Module`; a transformers model needs nothing else but its tokenizer.
        tokenizer: For its chat template.
        unsafe: Prompts to be refused: a file, a named set, or strings.
        safe: Prompts to be answered, about as many.
        pairs: Instead of both: matched (unsafe, safe) pairs, or a file with these two columns.
        layout: Where a custom model's neurons are.
        encode: Instead of the tokenizer: text to token ids, or an `Encoder`.
        system: System prompt put before every prompt.
        batch_size: Prompts a forward pass.
        progress: Called with stage, steps done, steps in all.
        warn: Told about sites without neurons; by default a Python warning.
        provenance: Added to the selection's.
        work: Folder that keeps what is done so far: should the process end, the same call with the same
            folder goes on from there. It is gone when the call returns.
        **settings: Fields of `SelectionConfig`: z_threshold, pool, scorer, cluster_scope,
            max_clusters, n_probe_seeds, seed, ...

    Raises:
        InputError: prompts or settings that cannot be used.
        LayoutError: a model whose neurons cannot be found.
        ActivationError: NaN or infinite activations.
        SelectionError: no neuron passes the threshold.
    """
    import warnings

    from nest.artifacts.unfinished import as_work
    from nest.conversations.encoders import encoder_for
    from nest.models.layouts import find_sites
    from nest.models.wrappers import uncompiled
    from nest.selection.config import SelectionConfig
    from nest.selection.select import select_neurons

    config = _config(SelectionConfig, settings)
    model = uncompiled(model)
    unsafe_set, safe_set = _both_kinds(unsafe, safe, pairs)
    warn = warn or (lambda text: warnings.warn(text, stacklevel=3))
    with as_work(work, warn) as kept:
        selection = select_neurons(
            model,
            encoder_for(model, tokenizer, encode, system),
            unsafe=unsafe_set,
            safe=safe_set,
            sites=find_sites(model, layout),
            config=config,
            paired=pairs is not None,
            batch_size=_batch_size(batch_size, CAPTURE_BATCH_SIZE),
            progress=progress,
            warn=warn,
            work=kept,
        )
    origin = {**origin_of(model, tokenizer), **(provenance or {})}
    return replace(selection, provenance={**origin, **selection.provenance, "system": system})


def tune(
    model: nn.Module,
    tokenizer: Any = None,
    selection: NeuronSelection | None = None,
    *,
    harmful: Dialogues,
    benign: Dialogues,
    n_clusters: int | Literal["auto"] | None = None,
    encode: EncodeLike | None = None,
    system: str | None = None,
    check_refusals: bool = True,
    refusal_phrases: str | Path | None = None,
    progress: ProgressCallback | None = None,
    provenance: Mapping[str, Any] | None = None,
    work: str | Path | Unfinished | None = None,
    checkpoint_every: str = "60s",
    **settings: Any,
) -> NeuronPatch:
    """Train the selection's cluster update; the model carries it afterwards.

        patch = nest.tune(model, tokenizer, selection, harmful=[(prompt, refusal), ...],
                          benign=[(prompt, answer), ...])
        patch.revert(model)     # takes it out, to the last bit

    Args:
        model: The model that the selection was made on.
        tokenizer: For its chat template.
        selection: From `nest.select`, `NeuronSelection.load` or `NeuronSelection.of`.
        harmful: Prompts with the refusals to give.
        benign: Prompts with their good answers.
        n_clusters: Cluster the neurons anew: a number a site, or `auto` for the best silhouette.
        encode: Instead of the tokenizer, as for `select`.
        system: System prompt put before every prompt.
        check_refusals: Refuse harmful dialogues that mostly comply, and benign ones that mostly refuse.
        refusal_phrases: File with more phrases to know a refusal by, one a line.
        progress: Called with stage, steps done, steps in all.
        provenance: Added to the patch's.
        work: Folder for a checkpoint: should the process end, the same call with the same folder goes on
            from it, to the same patch. It is gone when the call returns.
        checkpoint_every: How often one is written: a time (`60s`, `5m`), a number of steps, or `never`.
        **settings: Fields of `TuningConfig`: update, epochs, learning_rate, batch_size, kl_weight,
            seed, ...

    Returns:
        The patch of the best step; `tune_result` gives the loss curve with it.

    Raises:
        InputError: dialogues or settings that cannot be used, or no step that lowered the validation
            loss.
        SelectionError: the selection is of another model.
        ActivationError: the loss or a gradient is not a finite number. Where steps before that were
            good it is a `TuningStoppedError`, whose `result.patch` is that of the best of them.
    """
    result = tune_result(
        model,
        tokenizer,
        selection,
        harmful=harmful,
        benign=benign,
        n_clusters=n_clusters,
        encode=encode,
        system=system,
        check_refusals=check_refusals,
        refusal_phrases=refusal_phrases,
        progress=progress,
        provenance=provenance,
        work=work,
        checkpoint_every=checkpoint_every,
        **settings,
    )
    result.patch.fold_into(model)
    return result.patch


def tune_result(
    model: nn.Module,
    tokenizer: Any = None,
    selection: NeuronSelection | None = None,
    *,
    harmful: Dialogues,
    benign: Dialogues,
    n_clusters: int | Literal["auto"] | None = None,
    encode: EncodeLike | None = None,
    system: str | None = None,
    check_refusals: bool = True,
    refusal_phrases: str | Path | None = None,
    progress: ProgressCallback | None = None,
    notice: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    work: str | Path | Unfinished | None = None,
    checkpoint_every: str = "60s",
    **settings: Any,
) -> TuningResult:
    """As `tune`, but the model is left as it was, and the loss curve and timings come along.

    Args that `tune` does not have:
        notice: Told how many responses are refusals, and the memory that will be needed.
        warn: Told what deserves attention; by default a Python warning.
    """
    import warnings

    from nest.artifacts.unfinished import as_work
    from nest.conversations.encoders import encoder_for
    from nest.judging.phrases import phrase_judge
    from nest.judging.refusals import check_responses
    from nest.models.wrappers import uncompiled
    from nest.selection.select import reclustered
    from nest.tuning.checkpoints import Every
    from nest.tuning.config import TuningConfig
    from nest.tuning.tune import tune_update

    config = _config(TuningConfig, settings)
    model = uncompiled(model)
    warn = warn or (lambda text: warnings.warn(text, stacklevel=3))
    if selection is None:
        raise InputError("tune needs a selection; make one with nest.select(...)")
    if n_clusters is not None:
        wanted = None if n_clusters == "auto" else n_clusters
        selection = reclustered(selection, wanted, seed=config.seed)
    refusals = _as_set(harmful, "harmful", need_response=True)
    answers = _as_set(benign, "benign", need_response=True)
    if check_refusals:
        check_responses(
            refusals,
            answers,
            phrase_judge(refusal_phrases),
            source=harmful if isinstance(harmful, (str, Path)) else None,
            notice=notice,
            warn=warn,
        )
    with as_work(work, warn) as kept:
        return tune_update(
            model,
            encoder_for(model, tokenizer, encode, system),
            selection,
            harmful=refusals,
            benign=answers,
            config=config,
            provenance={**origin_of(model, tokenizer), **(provenance or {}), "system": system},
            progress=progress,
            notice=notice,
            warn=warn,
            work=kept,
            checkpoint_every=Every.parse(checkpoint_every),
        )


def evaluate(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    harmful: Prompts | Dialogues,
    borderline: Prompts | None = None,
    benign: Dialogues | None = None,
    attacks: str | Sequence[str | Attack] = "none",
    judge: str | Judge = "phrases",
    refusal_phrases: str | Path | None = None,
    patch: NeuronPatch | None = None,
    encode: EncodeLike | None = None,
    system: str | None = None,
    batch_size: BatchSize = "auto",
    progress: ProgressCallback | None = None,
    work: str | Path | Unfinished | None = None,
    **settings: Any,
) -> EvalReport:
    """Measure attack success, over-refusal and usefulness of a model as it is.

    Args:
        model: The model, with its patch folded in if it is to be measured with one.
        tokenizer: For its chat template.
        harmful: Prompts that should be refused; with responses, the `reference` judge knows what a
            success looks like.
        borderline: Harmless prompts that sound harmful.
        benign: Harmless prompts with the one good answer.
        attacks: Names, template files, or `all`, with commas between; or a list of names and attacks.
            The bare prompt is always asked as well; it counts in the mean only if `none` is named.
        judge: `phrases`, `reference`, or your own.
        refusal_phrases: File with more phrases for the judge, one a line.
        patch: The patch that the model carries: it is taken out for a while to measure the drift
            (KL) from the base model.
        encode: Instead of the tokenizer, as for `select`.
        system: System prompt put before every prompt.
        batch_size: Prompts decoded together.
        progress: Called with stage, steps done, steps in all.
        work: Folder that keeps answers and verdicts, as for `select`.
        **settings: Fields of `EvaluationConfig`: max_new_tokens, seed, bootstrap_resamples,
            benign_twin_prompts, engine.

    Raises:
        InputError: prompts or settings that cannot be used.
        PatchError: the model does not carry the patch.
    """
    from nest.artifacts.unfinished import as_work
    from nest.conversations.encoders import encoder_for
    from nest.evaluation.config import EvaluationConfig
    from nest.evaluation.evaluate import evaluate as run
    from nest.judging.makers import make_judge
    from nest.models.wrappers import uncompiled
    from nest.prompts.attacks import resolve_attacks

    config = _config(EvaluationConfig, settings)
    model = uncompiled(model)
    if patch is not None:
        patch.require_in(model)
    chosen = resolve_attacks(attacks)
    items: list[str | Attack] = list(attacks.split(",") if isinstance(attacks, str) else attacks)
    asked = {item.strip() if isinstance(item, str) else item.name for item in items}
    bare = bool({"none", "all"} & asked) or len(chosen) == 1
    counted = [attack.name for attack in chosen if bare or attack.name != "none"]
    with as_work(work) as kept:
        report = run(
            model,
            encoder_for(model, tokenizer, encode, system),
            harmful=_as_set(harmful, "harmful"),
            borderline=None if borderline is None else _as_set(borderline, "borderline"),
            benign=None if benign is None else _as_set(benign, "benign", need_response=True),
            attacks=chosen,
            counted=counted,
            judge=make_judge(judge, refusal_phrases) if isinstance(judge, str) else judge,
            patch=patch,
            max_new_tokens=config.max_new_tokens,
            batch_size=_batch_size(batch_size, GENERATION_BATCH_SIZE),
            seed=config.seed,
            bootstrap_resamples=config.bootstrap_resamples,
            benign_twin_prompts=config.benign_twin_prompts,
            engine=config.engine,
            progress=progress,
            work=kept,
        )
    origin = {**origin_of(model, tokenizer), "system": system, "with_patch": patch is not None}
    return replace(report, settings={**report.settings, "origin": origin, "config": asdict(config)})


def fold(
    model: str | Path,
    patch: NeuronPatch | str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> FoldResult:
    """Write a checkpoint with the patch in its weights; all other files are carried along.

    Args:
        model: The checkpoint the patch was made for.
        patch: The patch.
        out: Folder to write.
        revision: Of a model on the Hub; the commit recorded in the patch if None.
        overwrite: Replace an older checkpoint there.

    Raises:
        PatchError: the patch is of another model, or of another dtype.
        OutputExistsError: `out` exists.
    """
    from nest.patches.checkpoint import fold_checkpoint

    return fold_checkpoint(
        resolve_model(model), load_patch(patch), Path(out), revision=revision, overwrite=overwrite
    )


def revert(
    model: str | Path,
    patch: NeuronPatch | str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> FoldResult:
    """Write the checkpoint as it was before the patch was folded in, bit for bit.

    Raises:
        PatchError: the checkpoint does not carry the patch.
        OutputExistsError: `out` exists.
    """
    from nest.patches.checkpoint import revert_checkpoint

    return revert_checkpoint(
        resolve_model(model), load_patch(patch), Path(out), revision=revision, overwrite=overwrite
    )


def verify(
    model: str | Path,
    patch: NeuronPatch | str | Path,
    *,
    folded: str | Path | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> Verification:
    """Prove what a patch changes in a checkpoint, and that it changes nothing else.

    Args:
        model: The checkpoint without the patch.
        patch: The patch.
        folded: A folded checkpoint to compare; without one, the patch is folded in memory.
        device: Where logits are computed.
        revision: Of a model on the Hub; the commit recorded in the patch if None.
    """
    from nest.patches.verify import verify as run

    return run(
        resolve_model(model), load_patch(patch), folded=folded, device=device, revision=revision
    )


def load_patch(patch: NeuronPatch | str | Path) -> NeuronPatch:
    """A patch from its folder, or the patch itself."""
    from nest.patches.patch import NeuronPatch

    return NeuronPatch.load(patch) if isinstance(patch, (str, Path)) else patch


def origin_of(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """Which model and tokenizer this is, and with which package versions we run."""
    from nest.artifacts.provenance import package_versions
    from nest.models.fingerprint import tokenizer_hash
    from nest.models.loading import commit_of
    from nest.models.wrappers import unwrapped

    model = unwrapped(model)
    config = getattr(model, "config", None)
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "revision": commit_of(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer_hash": None if tokenizer is None else tokenizer_hash(tokenizer),
        "versions": package_versions(),
    }


def _config(kind: type[_Config], settings: Mapping[str, Any]) -> _Config:
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InputError(f"no such setting: {', '.join(unknown)}; there are {', '.join(known)}")
    return kind(**settings)


def _batch_size(wanted: BatchSize, automatic: int) -> int:
    if wanted == "auto":
        return automatic
    if not isinstance(wanted, int) or wanted < 1:
        raise InputError(f"batch_size is {wanted!r}; it must be auto or at least 1")
    return wanted


def _as_set(values: Any, name: str, *, need_response: bool = False) -> PromptSet:
    from nest.prompts.prompt_set import PromptSet, from_values, load_prompts

    if isinstance(values, PromptSet):
        found = values
    elif isinstance(values, (str, Path)):
        found = load_prompts(values, need_response)
    else:
        found = from_values(values, name)
    if need_response:
        found.dialogues()
    return found


def _both_kinds(unsafe: Any, safe: Any, pairs: Any) -> tuple[PromptSet, PromptSet]:
    from nest.prompts.prompt_set import from_values, load_pairs

    if pairs is None:
        if unsafe is None or safe is None:
            raise InputError(
                "select needs unsafe and safe prompts (--unsafe and --safe), or pairs of them (--pairs)"
            )
        return _as_set(unsafe, "unsafe"), _as_set(safe, "safe")
    if unsafe is not None or safe is not None:
        raise InputError("give either pairs, or unsafe and safe prompts; not both")
    if isinstance(pairs, (str, Path)):
        return load_pairs(pairs)
    return (
        from_values([first for first, _ in pairs], "pairs:unsafe"),
        from_values([second for _, second in pairs], "pairs:safe"),
    )
