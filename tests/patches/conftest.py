from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_patches import build, make_patch
from torch import nn

from nest.patches.patch import NeuronPatch

torch.set_num_threads(1)


@pytest.fixture
def model() -> nn.Module:
    return build()


@pytest.fixture
def patch(model: nn.Module) -> NeuronPatch:
    return make_patch(model)


@pytest.fixture
def state() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    return lambda model: {k: v.detach().clone() for k, v in model.state_dict().items()}
