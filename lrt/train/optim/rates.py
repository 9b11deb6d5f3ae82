"""Learning rate, momentum and weight decay as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lrt.config import OptimizerConfig, TrainingConfig

Decay = Callable[[float], float]  # share of the decay done (0..1) -> share of the rate left (1..0)

DECAYS: dict[str, Decay] = {
    "warmdown": lambda done: 1.0 - done,  # constant, then linear (docs/method.md, section 5)
    "wsd": lambda done: 1.0 - math.sqrt(done),  # constant, then 1 - sqrt (Haegele et al. 2024, arXiv 2405.18392)
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),  # half a cosine over all steps after the warmup
}


class Rates(NamedTuple):
    """What one optimizer step multiplies its table of groups with."""

    lr_scale: float  # of every group's base rate
    momentum: float  # Muon
    decay_scale: float  # of the base weight decay, Muon
    memory_scale: float = 1.0  # of the memory's own rates, beside lr_scale


def lr_scale(step: int, *, total: int, training: TrainingConfig) -> float:
    """Share of the base learning rate at a step.

    Args:
        step: 0-based optimizer step.
        total: steps of the whole run.
        training: warmup_steps, lr_schedule, warmdown_fraction and final_lr_fraction.

    Returns:
        A number 0..1; the last step is not yet at ``final_lr_fraction``, the step after it would be.
    """
    warmup = min(training.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    decay_steps = total - warmup if training.lr_schedule == "cosine" else round(training.warmdown_fraction * total)
    decay_steps = min(decay_steps, total - warmup)
    start = total - decay_steps
    if step <= start or decay_steps == 0:
        return 1.0
    left = DECAYS[training.lr_schedule](min(1.0, (step - start) / decay_steps))
    return left + (1.0 - left) * training.final_lr_fraction


def rates_at(
    step: int, *, total: int, training: TrainingConfig, optimizer: OptimizerConfig, memory_scale: float = 1.0
) -> Rates:
    """Every number of the optimizer that changes with the step (docs/method.md, section 5).

    Args:
        step: 0-based optimizer step.
        total: steps of the whole run.
        training, optimizer: sections of the recipe.
        memory_scale: share of the memory's rates, below 1 while memory comes in.
    """
    warm = min(step / optimizer.momentum_warmup_steps, 1.0) if optimizer.momentum_warmup_steps else 1.0
    return Rates(
        lr_scale=lr_scale(step, total=total, training=training),
        momentum=(1.0 - warm) * optimizer.momentum_start + warm * optimizer.momentum,
        decay_scale=1.0 - step / max(1, total),
        memory_scale=memory_scale,
    )
