"""Checkpoints to convert, and how conversions are compared."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from strategies import randomized

import lrt
from lrt.config import CheckpointConfig, parse_recipe
from lrt.train.checkpoint import CheckpointManager

NANOCHAT = Path(__file__).parent.parent / "golden" / "nanochat"


def quiet(*_):
    pass


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def logits(model):
    tokens = torch.randint(0, model.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, schedule=lrt.baseline()).logits, model(tokens, schedule=lrt.sequential()).logits


SMALL = (
    "[model]\nn_layers = 2\nwidth = 32\nn_heads = 2\nn_kv_heads = 1\nvocab_size = 300\nsequence_length = 16\n"
    "[training]\nbatch_tokens = 64\n"
)


def small_model(text=SMALL, seed=0):
    return randomized(lrt.build(parse_recipe(text)), seed).eval()


def save_step(folder, step, model, *, recipe, rank=0, world_size=1, group=None, shard=lambda t: t):
    manager = CheckpointManager(
        folder,
        config=CheckpointConfig(asynchronous=False, keep_last=5),
        recipe=recipe,
        rank=rank,
        world_size=world_size,
        process_group=group,
    )
    tensors = {f"model.{n}": shard(t.detach()) for n, t in model.state_dict().items()}
    tensors |= {f"optimizer.{n}.momentum": shard(torch.zeros_like(t)) for n, t in model.state_dict().items()}
    manager.save(step, tensors=tensors, rank_state={"row": rank}, meta={"tokens": step})
    assert manager.wait()


def leave_nanochat(place, **more):
    """A tiny NanoChatForCausalLM of transformers in a folder; returns it."""
    sizes = {
        "vocab_size": 301,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    given = {
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    torch.manual_seed(0)
    model = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**sizes | given | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that every part of a block counts
    model.save_pretrained(place)
    return model
