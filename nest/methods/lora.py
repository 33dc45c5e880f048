"""PEFT's LoRA on the same modules, with the same loss, data order and schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nest.conversations.answers import target_logits
from nest.errors import InputError
from nest.methods.method import MethodResult, Subject, TrainingData, Treated
from nest.progress import ProgressCallback
from nest.tuning.config import TuningConfig
from nest.tuning.dialogues import prepare
from nest.tuning.loop import TrainingLoop

# Peak learning rate where the config leaves it open.
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Lora:
    """Train a LoRA on the modules of the subject's sites.

    Attributes:
        rank: Of the adapter.
        tuning: As for `tune_update`; its `update`, `mode`, `layers`, `checkpointing` and
            `cache_prefix` play no part, and a learning rate of None means `LEARNING_RATE`.
        name: For tables.
    """

    rank: int
    tuning: TuningConfig = field(default_factory=TuningConfig)
    name: str = "lora"

    @contextmanager
    def applied(
        self, subject: Subject, data: TrainingData, progress: ProgressCallback | None = None
    ) -> Iterator[Treated]:
        """See `Method.applied`; the treated model is PEFT's wrapper.

        Raises:
            InputError: PEFT is not installed.
        """
        model, config = subject.model, self.tuning
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise InputError(
                "the LoRA baseline needs PEFT: pip install 'nest-safety[baselines]'"
            ) from None
        train, validation, n_steps = prepare(subject.encoder, data.harmful, data.benign, config)
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        adapted = None
        try:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                targets = [site.module for site in subject.sites]
                # alpha 2r is the common choice; Adam makes the scale a matter of the learning rate.
                shape = LoraConfig(
                    r=self.rank, lora_alpha=2 * self.rank, target_modules=targets, lora_dropout=0.0
                )
                adapted = get_peft_model(model, shape)
            adapter = _Adapter(adapted)
            adapted.eval()
            device = next(model.parameters()).device
            optimizer = torch.optim.AdamW(
                adapter.parameters(),
                lr=config.learning_rate or LEARNING_RATE,
                weight_decay=config.weight_decay,
                fused=device.type in ("cpu", "cuda"),
            )
            loop = TrainingLoop(
                subject.encoder,
                adapter,
                optimizer,
                lambda micro_batch: target_logits(adapted, micro_batch.batch, device),
                config,
                n_steps,
                micro_batch_size=config.micro_batch_size or config.batch_size,
                progress=progress,
            )
            loop.run(train, validation)
            count = sum(parameter.numel() for parameter in adapter.parameters())
            result = MethodResult(
                count,
                tuple(loop.history),
                loop.best_step,
                n_steps,
                loop.seconds,
                {"rank": self.rank},
            )
            yield Treated(adapted, result)
        finally:
            if adapted is not None:
                adapted.unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class _Adapter:
    """PEFT's adapter as the training loop wants it."""

    def __init__(self, adapted: nn.Module) -> None:
        self._adapted = adapted
        self._named = {n: p for n, p in adapted.named_parameters() if p.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._named.values())

    @contextmanager
    def removed(self) -> Iterator[None]:
        with self._adapted.disable_adapter():  # type: ignore[operator]
            yield

    def gradients(self) -> Mapping[str, Tensor]:
        return {name: p.grad for name, p in self._named.items() if p.grad is not None}

    def snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def load_snapshot(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)
