"""transformers' Trainer, as it comes, trains an update as a plain loop does on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    BATCH,
    RATE,
    Recorded,
    Trained,
    assert_carries,
    assert_close,
    collate,
    examples,
    grouped,
    plain,
    watched,
)
from safetensors.torch import load_file
from tiny_models import build, choose, filled, loss_of, same_bits, state_of, tokens
from torch import nn

from nest.errors import SelectionError
from nest.tuning.config import UpdateMode
from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import PARAMETER, ClusterUpdate, trainable

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

# Both names of checkpointing are in use; transformers announces the end of the older.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*:FutureWarning")

Optimizer = Callable[[ClusterUpdate], Any]


class RecordedTrainer(Recorded, Trainer):
    pass


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 3,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "epoch",
        "save_only_model": False,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **more})


def trainer_of(model: nn.Module, settings: TrainingArguments, **more: Any) -> RecordedTrainer:
    data = examples(of_one_length=settings.torch_compile)  # each length is compiled anew
    return RecordedTrainer(
        model=model, args=settings, train_dataset=data, data_collator=collate, **more
    )


def ours(update: ClusterUpdate) -> NeuronAdamW:
    return NeuronAdamW(update, lr=RATE)


def torchs(update: ClusterUpdate) -> torch.optim.Optimizer:
    return torch.optim.AdamW(update.parameters(), lr=RATE, weight_decay=0.0)


def trained(
    folder: Path,
    make: Callable[[], nn.Module] = build,
    optimizer: Optimizer | None = None,
    mode: UpdateMode = "live",
    resume: Path | None = None,
    **more: Any,
) -> tuple[Trained, RecordedTrainer]:
    model = make()
    with watched(model, mode=mode) as (update, finish):
        optimizers = (None if optimizer is None else optimizer(update), None)
        trainer = trainer_of(model, arguments(folder, **more), optimizers=optimizers)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        done = finish(latest(folder) if mode == "live" else None)
    assert done.after < done.before
    return done, trainer


def latest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize(
    ("optimizer", "same", "more"),
    [
        (None, ours, {}),
        (ours, torchs, {}),
        (None, ours, {"optim": "adamw_torch"}),
        (None, ours, {"gradient_accumulation_steps": 2}),
        (ours, torchs, {"gradient_accumulation_steps": 2}),
        (None, ours, {"gradient_checkpointing": True}),
        (
            None,
            ours,
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
        ),
        (None, ours, {"bf16": True}),
        (ours, torchs, {"bf16": True}),
        (None, ours, {"bf16": True, "gradient_checkpointing": True}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value) if value else "default",
)
def test_it_trains_as_a_plain_loop(
    optimizer: Optimizer | None, same: Optimizer, more: dict[str, Any], tmp_path: Path
) -> None:
    done, trainer = trained(tmp_path, optimizer=optimizer, **more)
    # That is what a user gets who names no optimizer.
    assert optimizer or more.get("optim") or trainer.args.optim == "adamw_torch_fused"
    steps = grouped(trainer.seen, more.get("gradient_accumulation_steps", 1))
    expected = plain(steps, optimizer=same, autocast=more.get("bf16", False))
    assert_close(done.packed, expected)


def test_dropout_is_as_in_a_plain_loop(tmp_path: Path) -> None:
    def dropping() -> nn.Module:
        model = build()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        return model

    done, trainer = trained(tmp_path, make=dropping)
    assert trainer.model.training
    steps = grouped(trainer.seen, 1)
    assert_close(done.packed, plain(steps, model=dropping, train=True))
    undisturbed = plain(steps, model=dropping, train=False)
    assert float((done.packed - undisturbed).abs().max()) > RATE


def test_the_branch_trains_as_the_rows(tmp_path: Path) -> None:
    model = build()
    with trainable(model, choose(model), mode="branch") as update:
        trainer = trainer_of(model, arguments(tmp_path, gradient_checkpointing=True))
        trainer.train()
        packed = update.packed.detach().clone()
    assert_close(packed, plain(grouped(trainer.seen, 1)))


# tracing raises warnings of its own inside torch, which as errors would end it
@pytest.mark.filterwarnings("ignore")
def test_compiled_it_trains_the_same(tmp_path: Path) -> None:
    torch._dynamo.reset()
    done, trainer = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert trainer.model_wrapped is not trainer.model
    assert_close(done.packed, plain(grouped(trainer.seen, 1)))


def test_autocast_is_the_trainers_to_take_off(tmp_path: Path) -> None:
    """The weights are as they were; what the trainer put around them runs in bfloat16 until unwrapped."""
    model = build()
    expected = loss_of(model, tokens())
    with watched(model) as (_, finish):
        trainer = trainer_of(model, arguments(tmp_path, bf16=True, save_strategy="no"))
        trainer.train()
        finish(None)
    assert not torch.equal(loss_of(model.eval(), tokens()), expected)
    bare = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert bare is model
    assert torch.equal(loss_of(model, tokens()), expected)


def test_a_trainer_made_before_the_block_trains_the_update(tmp_path: Path) -> None:
    model = build()
    trainer = trainer_of(model, arguments(tmp_path, save_strategy="no"))
    with watched(model) as (_, finish):
        trainer.train()
        assert_close(finish(None).packed, plain(grouped(trainer.seen, 1)))


# --- checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, ours], ids=["default", "ours"])
def test_training_goes_on_where_it_stopped(optimizer: Optimizer | None, tmp_path: Path) -> None:
    whole, trainer = trained(tmp_path / "whole", optimizer=optimizer, lr_scheduler_type="linear")
    middle = tmp_path / "whole" / f"checkpoint-{trainer.state.max_steps // 3}"
    for kept in (tmp_path / "whole").glob("checkpoint-*"):
        if kept != middle:
            kept.rename(tmp_path / kept.name)
    again, resumed = trained(
        tmp_path / "whole", optimizer=optimizer, lr_scheduler_type="linear", resume=middle
    )
    assert len(resumed.seen) == len(trainer.seen) * 2 // 3
    assert torch.equal(again.packed, whole.packed)


def test_the_best_step_comes_back_with_its_rows(tmp_path: Path) -> None:
    model = build()
    base = state_of(model)
    settings = arguments(
        tmp_path,
        num_train_epochs=6,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        # so high that the best step is not the last
        learning_rate=0.5,
    )
    with watched(model) as (update, finish):
        trainer = trainer_of(model, settings, eval_dataset=examples())
        trainer.train()
        best, last = Path(trainer.state.best_model_checkpoint or ""), latest(tmp_path)
        assert best != last
        held = load_file(best / "model.safetensors")
        assert torch.equal(update.packed.detach(), held.pop(f"{PARAMETER}.packed"))
        assert same_bits(held, {name: state_of(model)[name] for name in held})
        assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
        finish(best)
        assert_carries(held, {name: base[name] for name in held}, update.patch())


def test_a_checkpoint_is_an_ordinary_model_with_the_live_rows(tmp_path: Path) -> None:
    done, _ = trained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(latest(tmp_path)).eval()
    folded = build()
    done.patch.fold_into(folded)
    assert same_bits(state_of(model), state_of(folded))
    assert torch.equal(loss_of(model, tokens()), loss_of(folded, tokens()))


def test_weights_without_the_update_do_not_hide_it() -> None:
    model = build()
    base = state_of(model)
    with trainable(model, choose(model)) as update:
        filled(update)
        live = state_of(model)
        model.load_state_dict(base, strict=False)
        assert same_bits(live, state_of(model))
        assert_carries(live, base, update.patch())
    assert same_bits(base, state_of(model))


@pytest.mark.parametrize("mode", ["live", "branch"])
@pytest.mark.parametrize("other", ["another selection's", "another model's"])
def test_a_checkpoint_that_is_not_ours_is_refused(
    mode: UpdateMode, other: str, tmp_path: Path
) -> None:
    seed = 1 if other == "another model's" else 0
    source = build(seed=seed)
    neurons = (1, 4, 7, 23) if seed else (2, 3, 8, 9)
    with trainable(source, choose(source, neurons=neurons)) as update:
        filled(update)
        trainer = trainer_of(source, arguments(tmp_path, max_steps=2))
        trainer.train()
    model = build()
    with trainable(model, choose(model), mode=mode):
        trainer = trainer_of(model, arguments(tmp_path))
        with pytest.raises(SelectionError, match="loaded are not those of this model"):
            trainer.train(resume_from_checkpoint=str(latest(tmp_path)))
