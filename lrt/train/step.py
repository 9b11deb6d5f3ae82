"""One optimizer step: forwards and backwards, the norm, and an update that a bad number cannot reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrt.data import Batch
from lrt.loss import IGNORE
from lrt.train.distributed.graphs import Runner
from lrt.train.distributed.parallel import free_gathered
from lrt.train.distributed.world import World
from lrt.train.monitor.metrics import Late
from lrt.train.optim.groups import MuonAdamW, clip_factor, gradient_norm
from lrt.types import Schedule


class StepNumbers(NamedTuple):
    """What a step says of itself, once it is read."""

    step: int
    loss: float
    norm: float
    finite: bool
    stop: bool  # some rank was asked to stop
    groups: tuple[float, ...]

    @classmethod
    def of(cls, late: Late) -> StepNumbers:
        loss, norm, finite, stop, *groups = late.values
        return cls(late.step, loss, norm, finite > 0, stop > 0, tuple(groups))


def train_step(
    runner: Runner,
    optimizer: MuonAdamW,
    batches: Sequence[Batch],
    *,
    schedule: Schedule,
    seed: int,
    clip_norm: float | None,
    world: World,
    stop: bool = False,
    frozen: Sequence[nn.Parameter] = (),
) -> Tensor:
    """Forward and backward over all micro-batches, then one update.

    Args:
        runner: runs forward and backward of a model in training mode, plain or parallel.
        optimizer: with the rates of this step.
        batches: this rank's micro-batches, on the device.
        schedule: passes of every forward.
        seed: for schedules that draw: one order per step, the same on every rank and in every micro-batch.
        clip_norm: global gradient norm; None = no clipping.
        world: the processes.
        stop: this rank was asked to stop; every rank learns it from the result.
        frozen: parameters that this step leaves as they are, with their optimizer state; the norm does not count them.

    Returns:
        1-D tensor on the device for ``StepNumbers.of``; nothing here waits for the device.

    After an exception FSDP may hold gradients of the micro-batches before it: go on from a checkpoint with a new model.
    """
    # Normalised by the targets of all ranks and accumulation steps, and summed: equal to one large batch.
    valid = world.total(torch.stack([(batch.targets != IGNORE).sum() for batch in batches]).sum())
    scores: Tensor | None = None
    for index, batch in enumerate(batches):
        part = runner.forward_backward(
            batch.input_ids, batch.targets, schedule=schedule, seed=seed, valid_targets=valid, first=index == 0,
            last=index == len(batches) - 1,
        )  # fmt: skip
        scores = part if scores is None else scores + part
    free_gathered(runner.model)
    for parameter in frozen:
        parameter.grad = None
    assert scores is not None
    scores = world.total(torch.cat([scores, scores.new_full((1,), float(stop))]))
    norm = gradient_norm(runner.model.parameters())
    finite = torch.isfinite(norm) & torch.isfinite(scores[0])
    optimizer.step(finite=finite, scale=None if clip_norm is None else clip_factor(norm, clip_norm=clip_norm))
    optimizer.zero_grad(set_to_none=True)
    return torch.cat([scores[:1], norm[None], finite[None].to(norm.dtype), scores[-1:], scores[1:-1]])
