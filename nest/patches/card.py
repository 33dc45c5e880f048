"""The model card of a patch, written from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(manifest: Mapping[str, Any]) -> str:
    """README.md of a patch: what it changes, how it was made, what was measured, what it cannot do.

    Args:
        manifest: The patch's manifest. Of `provenance` are shown `model`, `revision`, `figures`
            (name to value), `tuning.config` and `versions`, as far as they are there.
    """
    provenance, counts = manifest["provenance"], manifest["counts"]
    model = provenance.get("model")
    base = f"`{_flat(model)}`" if model else "the model whose fingerprint is in `manifest.json`"
    revision = provenance.get("revision")
    sections = [
        "---",
        "library_name: nest-safety",
        "tags: [safety, neuron-selective-tuning]",
        "---",
        "# Neuron patch",
        "",
        f"A safety patch for {base}{f', revision `{_flat(revision)}`' if revision else ''}. It "
        "adds a "
        f"trained update to {counts['rows']} rows (neurons) of {counts['sites']} MLP projections, "
        f"in {counts['clusters']} clusters; {counts['trainable_parameters']} numbers were trained "
        f"(`{manifest['update']}` form). Every other weight stays as it is.",
        "",
        "## Use",
        "",
        "    nest verify --model MODEL --patch THIS_FOLDER",
        "    nest fold --model MODEL --patch THIS_FOLDER --out FOLDED",
        "    nest revert --model FOLDED --patch THIS_FOLDER --out ORIGINAL",
        "",
        f"It fits only the checkpoint it was made for, in {manifest['base']['dtype']}; any other "
        "is refused. Taking it out restores every weight bit by bit.",
        "",
        "## Measured",
        "",
        _table("figure", provenance.get("figures"))
        or "No figures were recorded with this patch; run `nest eval --patch` to measure it.",
        "",
        "## Made with",
        "",
        _table("setting", _mapping(provenance.get("tuning")).get("config"))
        or "No settings were recorded.",
        "",
        _table("package", provenance.get("versions")),
        "",
        "## Limits",
        "",
        "The patch defends against people who can only send prompts. Whoever holds the weights can "
        "subtract it, or train the behaviour back. What was not measured above is not known.",
        "",
    ]
    return "\n".join(sections)


def _table(heading: str, values: Any) -> str:
    rows = [f"| {_flat(name)} | {_flat(value)} |" for name, value in _mapping(values).items()]
    return "\n".join([f"| {heading} | value |", "|---|---|", *rows]) if rows else ""


def _mapping(values: Any) -> dict[str, Any]:
    return dict(values) if isinstance(values, Mapping) else {}


def _flat(value: Any) -> str:
    """A value on one line that cannot break a table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
