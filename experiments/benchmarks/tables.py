"""README's speed tables and plot from the committed results: `python -m ... .tables [--check]`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
RESULTS, PLOT = HERE / "results", HERE / "ratios.png"
START, END = "<!-- bench: made by make tables -->", "<!-- /bench -->"
DEVICES = {"cpu": "CPU", "gpu": "GPU"}
COLOURS = {"met": "#1b7837", "missed": "#c2410c", "invalid": "#9ca3af"}
DIGEST = "Made from"

Content = dict[str, Any]


def load(folder: Path = RESULTS) -> dict[str, Content]:
    """The result files that are there, by device."""
    paths = {device: folder / f"{device}.json" for device in DEVICES}
    return {
        device: json.loads(path.read_text(encoding="utf-8"))
        for device, path in paths.items()
        if path.exists()
    }


def render(results: Mapping[str, Content]) -> str:
    """Everything between the markers."""
    if not results:
        return "No result file is committed: `make bench` writes one."
    parts = ["![Ratios and their targets](experiments/benchmarks/ratios.png)"]
    for device, content in results.items():
        parts += [described(device, content), ratio_table(content["ratios"])]
        if content.get("main_job"):
            parts.append(job_table(content["main_job"]))
    return "\n\n".join(parts)


def described(device: str, content: Content) -> str:
    """Machine, versions and commit in one line."""
    machine = dict(content["machine"])
    where = [str(machine[key]) for key in ("gpu", "processor") if key in machine]
    where.append(f"{machine['cores']} cores")
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    commits = sorted({line.get("commit", content["commit"]) for line in content["ratios"]})
    at = f"commit{'s' * (len(commits) > 1)} {', '.join(commits or [content['commit']])}"
    return f"**{DEVICES[device]}**: {', '.join(where)}; {versions}; {at}."


def ratio_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One ratio a row."""
    rows = ["| | ours / theirs | ratio | 95 % interval | target | |", "|---|---|---|---|---|---|"]
    for line in lines:
        low, high = line["ci95"]
        interval = "" if low == high else f"{figure(low)} to {figure(high)}"
        cells = [line["id"], line["name"], figure(line["ratio"]), interval, line["target"]]
        if verdict(line) == "invalid":
            cells[2], cells[3] = "invalid", ""
        rows.append("| " + " | ".join([*cells, verdict(line)]) + " |")
    return "\n".join(rows)


def job_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The commands that a newcomer runs."""
    lines = ["| command | measured | target | |", "|---|---|---|---|"]
    for row in rows:
        met = "met" if holds(row["value"], row["target"]) else "missed"
        value = f"{figure(row['value'])} {row['unit']}"
        lines.append(f"| {row['name']} | {value} | {row['target']} {row['unit']} | {met} |")
    return "\n".join(lines)


def verdict(line: Mapping[str, Any]) -> str:
    """`met`, `missed`, or `invalid` where the gate failed."""
    if line["gate"] != "pass":
        return "invalid"
    return "met" if holds(line["ratio"], line["target"]) else "missed"


def holds(value: float, target: str) -> bool:
    """Whether a value is what a target such as `<= 0.80` asks for."""
    sign, bound = target.split()
    return {
        "<": value < float(bound),
        "<=": value <= float(bound),
        ">=": value >= float(bound),
    }[sign]


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:#.3g}".rstrip(".")


def digest(results: Mapping[str, Content]) -> str:
    """Of what the plot shows."""
    keys = ("id", "name", "ratio", "ci95", "target", "gate")
    shown = {
        device: [[line[key] for key in keys] for line in content["ratios"]]
        for device, content in results.items()
    }
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def plot(results: Mapping[str, Content], path: Path) -> None:
    """All ratios with interval and target, coloured by verdict; the same bytes for the same results."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = [len(content["ratios"]) for content in results.values()]
    shape = Figure(figsize=(9.0, 1.1 + 0.27 * sum(counts) + 0.5 * (len(counts) - 1)), dpi=100)
    FigureCanvasAgg(shape)
    axes = shape.subplots(len(counts), squeeze=False, sharex=True, height_ratios=counts)[:, 0]
    for axis, (device, content) in zip(axes, results.items(), strict=True):
        _panel(axis, DEVICES[device], content["ratios"])
    axes[-1].set_xlabel("ours / theirs (logarithmic)", fontsize=8)
    _legend(shape)
    shape.tight_layout(rect=(0, 0, 1, 1 - 0.35 / shape.get_figheight()))
    shape.savefig(path, metadata={"Software": None, DIGEST: digest(results)})


def _panel(axis: Any, title: str, lines: Sequence[Mapping[str, Any]]) -> None:
    for place, line in enumerate(lines):
        state = verdict(line)
        colour, (low, high) = COLOURS[state], line["ci95"]
        sign, bound = line["target"].split()
        axis.plot([float(bound)], [place], "|", color="black", markersize=11, markeredgewidth=1.4)
        # the side of the target on which it is met
        marker = "<" if sign == "<=" else ">"
        axis.plot([float(bound)], [place], marker, color="black", markersize=3.5)
        if state == "invalid":  # no figure: what was timed was wrong
            axis.annotate("invalid", (float(bound), place), (8, -2.5), color=colour, fontsize=7.5,
                          textcoords="offset points")  # fmt: skip
            continue
        axis.plot([low, high], [place, place], "-", color=colour, linewidth=2.2)
        axis.plot([line["ratio"]], [place], "o", color=colour, markersize=5.5)
    axis.set_xscale("log")
    axis.axvline(1.0, color="#d1d5db", linewidth=1, zorder=0)
    axis.set_yticks(range(len(lines)), [_label(line) for line in lines], fontsize=7.5)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=7.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", color="#f3f4f6", zorder=0)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _legend(shape: Any) -> None:
    from matplotlib.lines import Line2D

    states = [
        Line2D([], [], color=COLOURS[state], marker="o", linestyle="-", label=state)
        for state in ("met", "missed")
    ]
    target = Line2D([], [], color="black", marker="|", linestyle="", markersize=9, label="target")
    shape.legend(handles=[*states, target], loc="upper right", ncols=3, fontsize=8, frameon=False)


def _label(line: Mapping[str, Any]) -> str:
    name = line["name"]
    return f"{name if len(name) <= 62 else name[:60] + '…'}  {line['id']}"


def updated(text: str, results: Mapping[str, Content]) -> str:
    """The README with what is between the markers made anew."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{render(results)}\n{END}{after}"


def is_plotted(results: Mapping[str, Content], path: Path) -> bool:
    """Whether the plot shows these results; its pixels may differ with matplotlib's version."""
    from PIL import Image

    if not results:
        return not path.exists()
    if not path.exists():
        return False
    with Image.open(path) as image:
        return bool(image.info.get(DIGEST) == digest(results))


def main() -> None:
    """Write table and plot, or check that they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if they are out of date")
    arguments = parser.parse_args()
    results, text = load(), README.read_text(encoding="utf-8")
    wanted = updated(text, results)
    if arguments.check:
        fresh = wanted == text and is_plotted(results, PLOT)
        sys.exit(0 if fresh else "README's speed tables are out of date: run `make tables`")
    README.write_text(wanted, encoding="utf-8")
    if results:
        plot(results, PLOT)
    else:
        PLOT.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
