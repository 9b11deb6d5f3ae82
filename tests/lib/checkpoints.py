"""Checkpoints of a few tensors."""

from __future__ import annotations

import torch

from lrt.config import CheckpointConfig, parse_recipe
from lrt.train.checkpoint import CheckpointManager

RECIPE = parse_recipe("")


def tensors(value: float):
    return {
        "model.w": torch.full((64, 32), value),
        "model.g": torch.full((3,), value),
        "optimizer.w.step": torch.tensor(value),
    }


def manager(folder, report=print, **config):
    return CheckpointManager(folder, config=CheckpointConfig(**config), recipe=RECIPE, report=report)


def saved(folder, steps, **config):
    m = manager(folder, **config)
    for step in steps:
        m.save(
            step,
            tensors=tensors(step),
            rank_state={"loader": {"row": step}, "rng": torch.tensor([step])},
            meta={"tokens": step * 10},
        )
    assert m.wait()
    return m
