"""The selection stage: prompts in, neurons out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nest.activations.capture import Activations, capture
from nest.artifacts.unfinished import Unfinished
from nest.conversations.encoders import Encoder, rendered_hash
from nest.errors import InputError, NestError, SelectionError
from nest.models.binding import bind
from nest.models.fingerprint import fingerprint, weights_hash
from nest.models.sites import NeuronSite
from nest.progress import ProgressCallback
from nest.prompts.prompt_set import PromptSet
from nest.selection.choosing import Ranker, Ranking, Scored, kept, report_skipped
from nest.selection.clusters import MAX_CLUSTERS, MAX_CLUSTERS_OF, cluster_neurons, standardised
from nest.selection.config import LEARNING, Control, SelectionConfig
from nest.selection.controls import (
    End,
    as_many,
    random_clusters,
    random_neurons,
    shuffled_labels,
)
from nest.selection.probe import check_labels, contrast, fit_probe, z_scores
from nest.selection.selection import NeuronSelection, SiteSelection
from nest.settings import in_range, range_text


def select_neurons(
    model: nn.Module,
    encoder: Encoder,
    *,
    unsafe: PromptSet,
    safe: PromptSet,
    sites: Sequence[NeuronSite],
    config: SelectionConfig,
    paired: bool = False,
    batch_size: int = 32,
    control: Control | None = None,
    ranker: Ranker | None = None,
    progress: ProgressCallback | None = None,
    warn: Callable[[str], None] | None = None,
    work: Unfinished | None = None,
) -> NeuronSelection:
    """Find the neurons that tell unsafe prompts from safe ones, and group them.

    Args:
        model: The model; left as it was.
        encoder: Turns prompts into tokens.
        unsafe: Prompts that should be refused.
        safe: Prompts that should be answered.
        sites: Where to look.
        config: How.
        paired: Prompt i of `unsafe` and prompt i of `safe` are a matched pair.
        batch_size: Prompts a forward pass.
        control: A selection of the same size that says nothing, instead; see `Control`.
        ranker: Scores neurons, instead of what the config's scorer finds in their activations.
        progress: Called with stage, steps done, steps in all.
        warn: Told about each site that has no neurons over the threshold.
        work: Keeps activations and scores, so that a later run goes on from there.

    Returns:
        The selection, with its provenance.

    Raises:
        InputError: too few prompts of a kind, pairs that do not match, or a control that a ranker cannot
            have.
        ActivationError: NaN or infinite activations.
        SelectionError: no neuron anywhere passes the threshold.

    Source: arXiv 2602.16835, section 3.
    """
    config = config.resolved(dialogues=ranker is not None)
    assert config.scorer not in LEARNING or ranker is not None, "such scorers come by find_neurons"
    check_labels(len(unsafe), len(safe))
    if paired and len(unsafe) != len(safe):
        raise InputError(
            f"pairs need as many unsafe as safe prompts, but there are {len(unsafe)} "
            f"and {len(safe)}"
        )
    if ranker is not None and control == "shuffled_labels":
        raise InputError(
            f"the scorer {config.scorer} learns from dialogues and not from labels, so that there are none "
            "to shuffle; take another control"
        )
    _check_sides(unsafe, safe, warn)
    sites = _in_layers(sites, config.layers)
    prompts = [*unsafe.conversations, *safe.conversations]
    sequences = [encoder.prompt(prompt) for prompt in prompts]
    rendered = rendered_hash(sequences)
    if work is not None:
        work.begin(
            "selection",
            {
                "config": asdict(config),
                "prompts": {"unsafe": unsafe.sha256, "safe": safe.sha256},
                "rendered prompts": rendered,
                "paired": paired,
                "sites": [site.to_dict() for site in sites],
                "batch_size": batch_size,
                "model": weights_hash(model),
                "ranker": None if ranker is None else dict(ranker.identity),
            },
        )
    activations = capture(
        model,
        encoder,
        prompts,
        sites,
        pool=config.pool,
        batch_size=batch_size,
        memory_bound_bytes=config.memory_bound_bytes,
        progress=progress,
        sequences=sequences,
        work=work,
    )
    n_unsafe = len(unsafe)
    labels = np.arange(n_unsafe + len(safe)) < n_unsafe
    groups = np.concatenate([np.arange(n_unsafe), np.arange(len(safe))]) if paired else None
    ranking = (
        Ranking(tuple(_score(activations, labels, groups, config, progress, work)))
        if ranker is None
        else ranker.rank(activations, labels)
    )
    assert [one.site for one in ranking.scored] == list(activations.sites)
    scored = kept(ranking.scored, config)
    try:
        _check_chance(scored, n_unsafe, len(safe), warn)
        report_skipped(scored, config, warn)
    except NestError:
        if work is not None:  # other prompts or another threshold are another run
            work.forget()
        raise
    parts, silhouettes = _cluster(model, activations, scored, config, features=ranking.features)
    if control in ("lowest", "shuffled_labels"):
        against = scored
        if control == "shuffled_labels":
            mixed = shuffled_labels(labels, groups, seed=config.seed)
            against = _score(activations, mixed, groups, config, progress, None)
        end: End = "lowest" if control == "lowest" else "highest"
        scored = [
            replace(other, neurons=as_many(other.z, entry.neurons.size, end, config.side))
            for other, entry in zip(against, scored, strict=True)
        ]
        n_clusters = {part.group: part.n_clusters for part in parts}
        parts, silhouettes = _cluster(
            model, activations, scored, config, n_clusters, features=ranking.features
        )
    accuracies = [entry.accuracy for entry in scored if entry.accuracy is not None]
    selection = NeuronSelection(
        sites=parts,
        base=fingerprint(model, [part.site for part in parts]),
        provenance={
            "how": "nest select",
            "config": asdict(config),
            "paired": paired,
            "prompts": {"unsafe": unsafe.to_manifest(), "safe": safe.to_manifest()},
            "rendered_sha256": rendered,
            "probe_accuracy": _mean_and_min(accuracies),
            "probe_accuracy_by_site": {e.site.name: e.accuracy for e in scored},
            "silhouette": {"mean": float(np.mean(silhouettes)) if silhouettes else None},
            "neurons_looked_at": sum(entry.site.length for entry in scored),
            "skipped_sites": [entry.site.name for entry in scored if entry.neurons.size == 0],
            **ranking.provenance,
        },
    )
    if control is None:
        return selection
    if control == "random_neurons":
        return random_neurons(selection, seed=config.seed)
    if control == "random_clusters":
        return random_clusters(selection, seed=config.seed)
    provenance = {
        **selection.provenance,
        "control": control.replace("_", " "),
        "control_seed": config.seed,
    }
    return replace(selection, provenance=provenance)


def reclustered(
    selection: NeuronSelection, n_clusters: int | None, *, seed: int = 0
) -> NeuronSelection:
    """The same neurons grouped anew, each site on its own, from the stored profiles.

    Args:
        selection: With profiles.
        n_clusters: Clusters a site (fewer where it has fewer neurons); None takes the best silhouette.
        seed: Of k-means.

    Raises:
        SelectionError: the selection has no profiles.
        InputError: fewer than one cluster.
    """
    if n_clusters is not None and n_clusters < 1:
        raise InputError(f"n_clusters is {n_clusters}; it must be at least 1, or auto")
    parts = []
    for part in selection.sites:
        if part.profiles is None:
            raise SelectionError(
                f"{part.site.name} has no activation profiles to cluster; they are kept by `nest select`"
            )
        found = cluster_neurons(
            standardised(part.profiles.numpy()),
            max_clusters=MAX_CLUSTERS["projection"],
            n_clusters=n_clusters,
            seed=seed,
        )
        parts.append(
            replace(
                part,
                clusters=torch.from_numpy(found.labels),
                n_clusters=found.n_clusters,
                group=part.site.name,
            )
        )
    provenance = {**selection.provenance, "reclustered": n_clusters or "auto"}
    return replace(selection, sites=tuple(parts), provenance=provenance)


def _check_sides(unsafe: PromptSet, safe: PromptSet, warn: Callable[[str], None] | None) -> None:
    """Prompts that are on both sides say nothing of what tells the sides apart.

    Raises:
        InputError: most of one side's are.
    """
    both = len(set(unsafe.conversations) & set(safe.conversations))
    if both > min(len(unsafe), len(safe)) / 2:
        raise InputError(
            f"{both} prompts are both in {unsafe.name} (unsafe) and in {safe.name} (safe): what tells the "
            "two apart cannot be learned from them; give different prompts"
        )
    if both and warn:
        warn(f"{both} prompts are both in {unsafe.name} (unsafe) and in {safe.name} (safe)")


def _check_chance(
    scored: Sequence[Scored], n_unsafe: int, n_safe: int, warn: Callable[[str], None] | None
) -> None:
    """Neurons of a probe that tells nothing apart are noise.

    Raises:
        InputError: at no site is a probe better than always saying the larger kind.
    """
    accuracies = [entry.accuracy for entry in scored if entry.accuracy is not None]
    if not accuracies:
        return
    chance = max(n_unsafe, n_safe) / (n_unsafe + n_safe)
    best, mean = max(accuracies), float(np.mean(accuracies))
    if best <= chance:
        raise InputError(
            f"no probe tells unsafe from safe prompts: the best is right on {100 * best:.0f} % of prompts "
            f"it did not see, and always saying the larger kind on {100 * chance:.0f} %; give more "
            "prompts, or prompts that differ"
        )
    if warn and mean <= chance:
        warn(
            f"the probes are right on {100 * mean:.0f} % of prompts they did not see, no more than by "
            f"always saying the larger kind ({100 * chance:.0f} %): the neurons are hardly better than "
            "noise"
        )


def _in_layers(
    sites: Sequence[NeuronSite], layers: tuple[int, int | None] | None
) -> Sequence[NeuronSite]:
    if layers is None:
        return sites
    kept = [site for site in sites if in_range(site.layer, layers)]
    if not kept:
        raise InputError(
            f"the model has no sites in layers {range_text(layers)}; its layers are "
            f"{min(site.layer for site in sites)} to {max(site.layer for site in sites)}"
        )
    return kept


def _score(
    activations: Activations,
    unsafe: NDArray[np.bool_],
    groups: NDArray[np.int64] | None,
    config: SelectionConfig,
    progress: ProgressCallback | None,
    work: Unfinished | None,
) -> list[Scored]:
    scored = []
    entries = () if work is None else work.journal.entries
    known = {entry["scored"]: entry for entry in entries if "scored" in entry}
    seeds = [config.seed + i for i in range(config.n_probe_seeds)]
    for done, (site, pooled) in enumerate(zip(activations.sites, activations.pooled, strict=True)):
        accuracy = None
        if site.name in known:
            weights = np.array(known[site.name]["weights"], dtype=np.float64)
            accuracy = known[site.name]["accuracy"]
        elif config.scorer != "contrast":
            probe = fit_probe(
                pooled,
                unsafe,
                seeds=seeds,
                held_out=config.held_out,
                strength=config.probe_strength,
                groups=groups,
            )
            weights, accuracy = probe.weights, probe.held_out_accuracy
        else:
            weights = contrast(pooled, unsafe, groups)
        if work is not None and site.name not in known:
            work.journal.add(
                {"scored": site.name, "accuracy": accuracy, "weights": weights.tolist()}
            )
        z = z_scores(weights)
        rank = np.abs(z) if config.side == "both" else z
        scored.append(Scored(site, weights, z, rank, accuracy=accuracy))
        if progress:
            progress("score neurons", done + 1, len(activations.sites))
    return scored


def _cluster(
    model: nn.Module,
    activations: Activations,
    scored: Sequence[Scored],
    config: SelectionConfig,
    n_clusters: Mapping[str, int] | None = None,
    *,
    features: Mapping[str, NDArray[np.float64]] | None = None,
) -> tuple[tuple[SiteSelection, ...], list[float]]:
    """Group the kept neurons, per site or per layer; into so many clusters a group where it is given.

    By their activations, or by features of the sites' neurons (F, d).
    """
    profiles = {
        entry.site.name: np.ascontiguousarray(pooled[:, entry.neurons].T)  # (N, B)
        for entry, pooled in zip(scored, activations.pooled, strict=True)
    }
    rooms: dict[str, list[Scored]] = {}
    for entry in scored:
        if entry.neurons.size:
            room = (
                entry.site.name
                if config.cluster_scope == "projection"
                else (f"layer {entry.site.layer}, width {bind(model, entry.site).width}")
            )
            rooms.setdefault(room, []).append(entry)
    parts, silhouettes = [], []
    for room, entries in rooms.items():
        limit = config.max_clusters or MAX_CLUSTERS_OF.get(
            config.scorer, MAX_CLUSTERS[config.cluster_scope]
        )
        shaped: NDArray[np.float32] | NDArray[np.float64]
        if features is not None:
            shaped = np.concatenate([features[e.site.name][e.neurons] for e in entries])
        else:
            stacked = np.concatenate([profiles[entry.site.name] for entry in entries])
            shaped = standardised(stacked) if config.cluster_scope == "projection" else stacked
        found = cluster_neurons(
            shaped,
            max_clusters=limit,
            n_clusters=None if n_clusters is None else n_clusters[room],
            seed=config.seed,
        )
        if found.silhouette is not None:
            silhouettes.append(found.silhouette)
        first = 0
        for entry in entries:
            n = entry.neurons.size
            parts.append(
                SiteSelection(
                    site=entry.site,
                    neurons=torch.from_numpy(entry.neurons),
                    scores=torch.from_numpy(entry.z[entry.neurons]).float(),
                    clusters=torch.from_numpy(found.labels[first : first + n]),
                    width=bind(model, entry.site).width,
                    group=room,
                    n_clusters=found.n_clusters,
                    profiles=_sampled(profiles[entry.site.name], config.max_profile_prompts),
                )
            )
            first += n
    parts.sort(key=lambda part: part.site)
    return tuple(parts), silhouettes


def _sampled(profiles: NDArray[np.float32], n_prompts: int) -> torch.Tensor:
    """Evenly spaced prompts, so that both kinds are there in their proportion."""
    n = profiles.shape[1]
    columns = np.unique(np.linspace(0, n - 1, min(n, n_prompts)).astype(np.int64))
    return torch.from_numpy(np.ascontiguousarray(profiles[:, columns]))


def _mean_and_min(accuracies: Sequence[float]) -> dict[str, Any]:
    if not accuracies:
        return {"mean": None, "min": None}
    return {"mean": float(np.mean(accuracies)), "min": float(np.min(accuracies))}
