"""TRL's trainers train an update, and DPO's reference is the base model, whichever way it is made."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import IGNORED, RATE, Recorded, Step, assert_close, grouped, plain, watched
from tiny_models import (
    BENIGN,
    HARMFUL,
    build,
    choose,
    same_bits,
    save_checkpoint,
    state_of,
    word_tokenizer,
)
from torch import Tensor, nn

import nest
from nest.errors import InputError
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import PARAMETER, trainable

pytest.importorskip("trl", reason="trl is not installed")

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

# TRL calls transformers' checkpointing by the older of its two names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

BETA = 0.1


class RecordedSFT(Recorded, trl.SFTTrainer):
    pass


class RecordedDPO(Recorded, trl.DPOTrainer):
    pass


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def dialogues() -> Dataset:
    rows = [*HARMFUL[:6], *BENIGN[:6]]
    return Dataset.from_list(
        [{"prompt": said("user", p), "completion": said("assistant", r)} for p, r in rows]
    )


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": said("user", prompt),
                "chosen": said("assistant", refusal),
                "rejected": said("assistant", answer),
            }
            for (prompt, refusal), (_, answer) in zip(HARMFUL[:12], BENIGN, strict=False)
        ]
    )


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 3,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 2,
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return {**common, **more}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """In memory as from a checkpoint, which is where TRL looks for the reference."""
    return AutoModelForCausalLM.from_pretrained(save_checkpoint(tmp_path / "base")).eval()


def last(folder: Path) -> Path:
    (found,) = (folder / "out").glob("checkpoint-8")
    return found


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("own", [False, True], ids=["torch", "ours"])
def test_sft_trains_as_a_plain_loop(bf16: bool, own: bool, model: Any, tmp_path: Path) -> None:
    with watched(model) as (update, finish):
        trainer = RecordedSFT(
            model=model,
            args=trl.SFTConfig(**settings(tmp_path, bf16=bf16)),
            train_dataset=dialogues(),
            processing_class=word_tokenizer(),
            optimizers=(NeuronAdamW(update, lr=RATE) if own else None, None),
        )
        trainer.train()
        packed = finish(last(tmp_path)).packed
    # Prompts are not learned: the labels are those of the answers.
    assert all(bool((step.batch["labels"] == IGNORED).any()) for step in trainer.seen)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[4:]) < sum(losses[:4])  # the second epoch against the first
    expected = plain(grouped(trainer.seen, 1), autocast=bf16)
    # Under autocast TRL's own head rounds logits to bfloat16 (8 bits) elsewhere than the model's does:
    # seen, 0.09 of one step after eight.
    assert_close(packed, expected, step=0.2 if bf16 else 1e-3)


# --- preferences ---------------------------------------------------------------------------------------


def log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of each row's completion."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    labels = batch["input_ids"][:, 1:]
    found = -F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return (found * batch["completion_mask"][:, 1:]).sum(dim=1)


def preference_losses(model: nn.Module, passes: Sequence[Step]) -> Iterator[Tensor]:
    """DPO against an independent copy of the base model."""
    base = build()
    for step in passes:
        with torch.no_grad():
            reference = log_probs(base, step.batch)
        chosen, rejected = (log_probs(model, step.batch) - reference).chunk(2)
        yield -F.logsigmoid(BETA * (chosen - rejected)).mean()


@pytest.mark.parametrize(
    ("reference", "more"),
    [
        ("left out", {}),
        ("left out", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("left out", {"gradient_accumulation_steps": 1, "gradient_checkpointing": False}),
        ("computed before", {"precompute_ref_log_probs": True}),
        ("a deep copy", {}),
    ],
)
def test_dpo_compares_with_the_base(
    reference: str, more: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    base = state_of(model)
    with watched(model) as (_, finish):
        trainer = RecordedDPO(
            model=model,
            ref_model=copy.deepcopy(model) if reference == "a deep copy" else None,
            args=trl.DPOConfig(**settings(tmp_path, beta=BETA, bf16=False, **more)),
            train_dataset=preferences(),
            processing_class=word_tokenizer(),
        )
        trainer.train()
        packed = finish(last(tmp_path)).packed
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Policy and reference are one before the first step, which exactly this loss tells.
    assert losses[0] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-6)
    assert losses[-1] < losses[0]
    assert_close(packed, plain(grouped(trainer.seen, 1), loss=preference_losses))

    assert (trainer.ref_model is None) == (reference == "computed before")
    if trainer.ref_model is not None:
        assert trainer.ref_model is not model
        assert same_bits(base, state_of(trainer.ref_model))
    if trainer.ref_model is not None and reference == "left out":
        modules = list(trainer.ref_model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        assert not any(PARAMETER in name for name, _ in trainer.ref_model.named_parameters())


def test_dpo_in_bfloat16_lowers_its_loss(model: Any, tmp_path: Path) -> None:
    with watched(model) as (_, finish):
        trainer = RecordedDPO(
            model=model,
            args=trl.DPOConfig(**settings(tmp_path)),  # autocast is TRL's own default
            train_dataset=preferences(),
            processing_class=word_tokenizer(),
        )
        assert trainer.args.bf16
        trainer.train()
        finish(last(tmp_path))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05


def test_a_copy_beside_a_branch_is_refused_in_one_sentence(model: Any, tmp_path: Path) -> None:
    with trainable(model, choose(model), mode="branch"):
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=trl.DPOConfig(**settings(tmp_path)),
            train_dataset=preferences(),
            processing_class=word_tokenizer(),
        )
        with pytest.raises(InputError, match="copy of a model whose update is being trained"):
            trainer.train()


def test_a_reference_that_follows_needs_the_same_parameters(model: Any, tmp_path: Path) -> None:
    """With `sync_ref_model` a fresh reference lacks the update's parameter; a copy has it."""
    how = settings(tmp_path, sync_ref_model=True, ref_model_sync_steps=2, save_strategy="no")
    with watched(model) as (_, finish):
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=trl.DPOConfig(**how),
            train_dataset=preferences(),
            processing_class=word_tokenizer(),
        )
        trainer.train()
        finish(None)


def test_readmes_lines(model: Any, tmp_path: Path) -> None:
    selection, tokenizer = choose(model), word_tokenizer()
    base = state_of(model)
    sft = trl.SFTConfig(**settings(tmp_path, max_steps=2))
    dpo = trl.DPOConfig(**settings(tmp_path, max_steps=2, precompute_ref_log_probs=True))
    for trainer_class, args, data in (
        (trl.SFTTrainer, sft, dialogues()),
        (trl.DPOTrainer, dpo, preferences()),
    ):
        with nest.trainable(model, selection) as update:
            trainer = trainer_class(
                model=model,
                args=args,
                train_dataset=data,
                processing_class=tokenizer,
                optimizers=(nest.NeuronAdamW(update, lr=1e-2), None),
            )
            trainer.train()
            patch = update.patch()
        assert same_bits(base, state_of(model))
        assert patch.has_effect
