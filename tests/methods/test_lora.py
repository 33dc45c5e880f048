"""The LoRA baseline trains, counts its parameters and leaves the model as it was."""

import pytest
import torch

from nest.conversations.encoders import ChatEncoder
from nest.methods.lora import tuned_lora
from nest.models.layouts import find_sites
from nest.prompts.prompt_set import load_prompts
from nest.tuning.config import TuningConfig

pytest.importorskip("peft")


def test_lora_learns_and_leaves_no_trace():
    import nest

    torch.set_num_threads(1)
    model, tokenizer = nest.load()
    encoder, sites = ChatEncoder(tokenizer, model), find_sites(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with tuned_lora(
        model,
        encoder,
        sites,
        rank=1,
        harmful=load_prompts("organism:harmful", need_response=True),
        benign=load_prompts("organism:benign", need_response=True),
        config=TuningConfig(max_steps=20, batch_size=16),
    ) as (adapted, result):
        assert result.trainable_parameters == sum(
            site.length + model.config.hidden_size for site in sites
        )
        assert result.history[-1].validation_loss < result.history[0].validation_loss
        assert any("lora" in name for name, _ in adapted.named_parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
