"""Tiny training runs and what they leave behind."""

from __future__ import annotations

from pathlib import Path

import torch

from lrt.config import parse_recipe
from lrt.train import plan
from lrt.train.checkpoint import read_rest
from lrt.train.distributed.world import World
from lrt.train.monitor.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent.parent


ONE = World(0, 1, torch.device("cpu"), sharded=False)


TINY = """
[model]
n_layers = 2
width = 16
n_heads = 2
vocab_size = 257
sequence_length = 32
gate_channels = 8
[recurrence]
gate_channels = 8
separator = 256
[training]
steps = 8
batch_tokens = 256
micro_batch = 4
[parallel]
compile = false
param_dtype = "float32"
[checkpoint]
every = 4
[metrics]
every = 1
plot = false
[evaluation]
tokens = 256
batch = 4
sample_tokens = 6
"""


def tiny(folder, **overrides):
    sets = {"run.output": str(folder), "run.name": "tiny", **overrides}
    return parse_recipe(TINY, overrides=[f"{k}={v}" for k, v in sets.items()])


def train_records(folder):
    timings = ("tokens_per_second", "flops_per_second", "data_wait", "peak_memory_gib")
    return [
        {k: v for k, v in r.items() if k not in timings}
        for r in read_records(folder / "metrics.jsonl")
        if r["kind"] == "train"
    ]


def files_equal(a, b, *, except_for=()):
    """Every tensor and every rank's state of two checkpoints, bit for bit;
    of what the run says of itself all but these keys."""
    from safetensors.torch import load_file

    names = sorted(p.name for p in a.glob("*.safetensors"))
    assert names and names == sorted(p.name for p in b.glob("*.safetensors"))
    for name in names:
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]), key
    left, right = read_rest(a), read_rest(b)
    kept = [{key: value for key, value in one.meta.items() if key not in except_for} for one in (left, right)]
    assert kept[0] == kept[1]
    assert left.rank_states[0]["loader"] == right.rank_states[0]["loader"]
    assert torch.equal(left.rank_states[0]["random"]["cpu"], right.rank_states[0]["random"]["cpu"])


def poison(monkeypatch, *, bad):
    """Gradients of the given steps become NaN, as a bad batch would make them."""
    made = plan.build_parallel

    def build(recipe, world, **more):
        model, calls = made(recipe, world, **more), iter(range(1, 1000))

        def count(module, args, output):
            if (
                module.training and torch.is_grad_enabled() and (next(calls) - 1) // 2 + 1 in bad
            ):  # two micro-batches a step
                output.register_hook(lambda gradient: gradient * float("nan"))

        model.backbone.embedding.register_forward_hook(count)
        return model

    monkeypatch.setattr(plan, "build_parallel", build)
