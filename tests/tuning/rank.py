"""One of two processes of test_ranks.py: the update's gradient on a model sharded by FSDP, or under DDP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from tiny_models import build, choose, loss_of, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nest.tuning.optimizer import NeuronAdamW
from nest.tuning.update import trainable

N_RANKS = 2


def main(kind: str, rank: int, meeting: str) -> None:
    """Save the gradient of one pass and the parameters after one step."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(N_RANKS))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=N_RANKS)
    model = build()
    selection = choose(model)
    if kind == "fsdp":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        mesh = init_device_mesh("cpu", (N_RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    with trainable(model, selection, mode="branch" if kind == "fsdp" else "live") as update:
        network = model if kind == "fsdp" else nn.parallel.DistributedDataParallel(model)
        optimizer = NeuronAdamW(update, lr=0.01)
        loss_of(network, tokens(seed=rank)).backward()
        gradient = update.packed.grad.clone()
        optimizer.step()
        torch.save([gradient, update.packed.detach()], f"{meeting}-{kind}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
