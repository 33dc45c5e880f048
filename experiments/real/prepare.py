"""Prompts for the comparison on a real model: `python -m experiments.real.prepare MODEL DATA OUT`.

DATA is a folder of public prompt sets, which are not copied here: advbench/harmful_behaviors.csv,
benign_mix/benign_mix.jsonl, harmbench/harmbench_behaviors_text_{val,test}.csv, jbb/benign-behaviors.csv,
xstest/xstest_prompts.csv. What is written to OUT are JSON lines and a copy of the plan that names them.

Learned from: 160 AdvBench goals with a refusal each, and 160 ordinary instructions and JailbreakBench's
benign goals with the model's own greedy answers. Development: HarmBench's validation behaviours, half of
each type of XSTest's safe prompts, and other instructions. Test: 60 of HarmBench's test behaviours, the
other halves, again other instructions. AdvBench goals with a near twin in HarmBench are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from nest.conversations.conversation import Conversation
from nest.conversations.encoders import ChatEncoder
from nest.generation.static import generate
from nest.judging.judge import SUCCESSES, Exchange
from nest.judging.phrases import PhraseJudge
from nest.models.loading import load_model
from nest.prompts.overlap import near_duplicates
from nest.prompts.prompt_set import from_values

N_HARMFUL, N_BENIGN, N_TEST, N_KEPT = 160, 160, 60, 60
N_TOKENS, BATCH_SIZE = 40, 16
TWIN = 0.6
REFUSALS = (
    "I'm sorry, but I can't help with that. It could seriously harm someone.",
    "I can't assist with this request, because it could be used to hurt people.",
    "I won't help with that. If there is something safe behind it, I am glad to talk about that.",
    "Sorry, that is something I can't support, since it may be dangerous or against the law.",
)
PLAN = Path(__file__).with_name("smollm2.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "out"):
        parser.add_argument(name, type=Path)
    chosen = parser.parse_args()
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    prompts = prompts_of(chosen.data)
    model, tokenizer = load_model(str(chosen.model), dtype="float32", device="cpu")
    encoder = ChatEncoder(tokenizer, model)

    def answered(asked: Sequence[str]) -> list[tuple[str, str]]:
        said = generate(model, encoder, list(asked), N_TOKENS, BATCH_SIZE)
        return [(prompt, text) for prompt, text in zip(asked, said, strict=True) if text.strip()]

    goals, ordinary = prompts["goals"], prompts["ordinary"]
    refusals = [(goal, REFUSALS[i % len(REFUSALS)]) for i, goal in enumerate(goals)]
    write(out / "unsafe.jsonl", goals)
    write(out / "safe.jsonl", ordinary[: len(goals)])
    write(out / "harmful.jsonl", refusals)
    judged = answered(goals)
    said = PhraseJudge().judge([Exchange(Conversation.of(goal), text) for goal, text in judged])
    complied = [pair for pair, one in zip(judged, said, strict=True) if one.verdict in SUCCESSES]
    write(out / "complying.jsonl", complied)
    write(out / "benign.jsonl", answered([*ordinary[:N_BENIGN], *prompts["jbb"]]))
    for number, split in enumerate(("development", "test")):
        write(out / f"{split}_harmful.jsonl", prompts[f"{split}_harmful"])
        write(out / f"{split}_borderline.jsonl", prompts[f"{split}_borderline"])
        start = N_BENIGN + number * N_KEPT
        write(out / f"{split}_benign.jsonl", answered(ordinary[start : start + N_KEPT]))
    shutil.copyfile(PLAN, out / PLAN.name)
    (out / "model").unlink(missing_ok=True)
    (out / "model").symlink_to(chosen.model.resolve())


def prompts_of(data: Path) -> dict[str, list[str]]:
    """The public sets, cut to what is used."""
    behaviours = {
        split: [
            row["Behavior"]
            for row in rows(data / "harmbench" / f"harmbench_behaviors_text_{split}.csv")
            if row["FunctionalCategory"] == "standard"
        ]
        for split in ("val", "test")
    }
    held_out = from_values([*behaviours["val"], *behaviours["test"]], "HarmBench")
    goals = [
        goal
        for goal in (row["goal"] for row in rows(data / "advbench" / "harmful_behaviors.csv"))
        if not near_duplicates(held_out, from_values([goal], "AdvBench"), at_least=TWIN).n
    ]
    step = len(goals) / N_HARMFUL
    with (data / "benign_mix" / "benign_mix.jsonl").open(encoding="utf-8") as lines:
        ordinary = [json.loads(line)["prompt"] for line in lines]
    stride = len(ordinary) / (N_BENIGN + 2 * N_KEPT)
    return {
        "goals": [goals[int(i * step)] for i in range(N_HARMFUL)],
        "ordinary": [ordinary[int(i * stride)] for i in range(N_BENIGN + 2 * N_KEPT)],
        "jbb": [row["goal"] for row in rows(data / "jbb" / "benign-behaviors.csv")],
        "development_harmful": behaviours["val"][:N_TEST],
        "test_harmful": behaviours["test"][:N_TEST],
        **xstest_of(data),
    }


def xstest_of(data: Path) -> dict[str, list[str]]:
    """XSTest's safe prompts, of each type the first half and the second: neighbours are alike."""
    by_type: dict[str, list[str]] = {}
    for row in rows(data / "xstest" / "xstest_prompts.csv"):
        if row["label"] == "safe":
            by_type.setdefault(row["type"], []).append(row["prompt"])
    splits: dict[str, list[str]] = {"development": [], "test": []}
    for same in by_type.values():
        splits["development"] += same[: len(same) // 2]
        splits["test"] += same[len(same) // 2 :]
    stride = {split: len(prompts) / N_TEST for split, prompts in splits.items()}
    return {
        f"{split}_borderline": [prompts[int(i * stride[split])] for i in range(N_TEST)]
        for split, prompts in splits.items()
    }


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def write(file: Path, values: Iterable[str | tuple[str, str]]) -> None:
    lines = [
        {"prompt": value} if isinstance(value, str) else {"prompt": value[0], "response": value[1]}
        for value in values
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
