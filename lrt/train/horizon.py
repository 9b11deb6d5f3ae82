"""How long a run is, and how a batch is dealt over ranks and accumulation steps."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from lrt.accounting import Parameters, training_flops
from lrt.adaptation import without_memory
from lrt.config import ParallelConfig, Recipe, TrainingConfig
from lrt.config.ranges import HORIZON
from lrt.model import LatentRecurrentModel
from lrt.schedules import Mixture, baseline, phases_of
from lrt.train.checkpoint.starting_model import shapes_of


class Horizon(NamedTuple):
    """Sizes of a run in steps, rows and tokens."""

    steps: int  # optimizer steps of the whole run
    rows: int  # a forward on one rank
    accumulation: int  # forwards per step on one rank
    batch_tokens: int  # a step over all ranks
    tokens: int  # the whole run


def plan_horizon(recipe: Recipe, parameters: Parameters, *, world_size: int) -> Horizon:
    """Turn the recipe's horizon into steps, and its batch into rows per forward.

    Args:
        recipe: ``training`` and ``model.sequence_length`` are read.
        parameters: of the model, for ``tokens_per_parameter``.
        world_size: processes.

    Raises:
        ValueError: no horizon is given, the warmup is longer, the ranks make no mesh, or the batch cannot be dealt to
            them.
    """
    shards_of(recipe.parallel, world_size)
    training, length = recipe.training, recipe.model.sequence_length
    steps = steps_of(recipe, parameters)
    if steps and training.warmup_steps > steps:
        raise ValueError(
            f"training.warmup_steps = {training.warmup_steps}, but the run has {steps} steps, "
            f"so the rates would never be reached: use at most {steps}, or a longer horizon"
        )
    rows = training.batch_tokens // length
    if rows % world_size:
        raise ValueError(
            f"training.batch_tokens = {training.batch_tokens} is {rows} rows of {length} tokens, "
            f"which {world_size} processes cannot share evenly: "
            f"choose a multiple of {world_size * length}, or another number of processes"
        )
    here = rows // world_size
    forward = max(n for n in range(1, min(training.micro_batch, here) + 1) if here % n == 0)
    return Horizon(steps, forward, here // forward, training.batch_tokens, steps * training.batch_tokens)


def steps_of(recipe: Recipe, parameters: Parameters) -> int:
    """Optimizer steps of the whole run.

    Args:
        recipe: ``training``, for ``compute`` all that its FLOPs depend on.
        parameters: of the model, for ``tokens_per_parameter``.

    Raises:
        ValueError: no horizon is given.
    """
    training = recipe.training
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        tokens = float(training.tokens)
    elif training.tokens_per_parameter is not None:
        tokens = training.tokens_per_parameter * parameters.scaling
    elif training.compute is not None:
        tokens = training.compute / relative_compute(recipe)
    else:
        raise ValueError(
            f"training has no horizon: give exactly one of {', '.join(f'training.{key}' for key in HORIZON)}"
        )
    return max(1, round(tokens / training.batch_tokens))


def relative_compute(recipe: Recipe) -> float:
    """FLOPs of the recipe's mean step over those of its twin without memory, which trains plainly on as many tokens."""
    twin = without_memory(shapes_of(replace(recipe, training=replace(recipe.training, stage="all"))))
    return mean_flops(recipe, shapes_of(recipe)) / training_flops(twin, baseline(), recipe.model.sequence_length)


def mean_flops(recipe: Recipe, model: LatentRecurrentModel) -> float:
    """FLOPs of the mean step, a token of data: the mean over the phases of the recipe and the shares of their mixtures.

    Args:
        recipe: ``schedule`` and ``model.sequence_length`` are read.
        model: its shapes, with ``requires_grad`` as it trains.
    """
    mean, begin = 0.0, 0.0
    for phase in phases_of(recipe.schedule):
        members = phase.schedule.members if isinstance(phase.schedule, Mixture) else ((1.0, phase.schedule),)
        step = sum(share * training_flops(model, schedule, recipe.model.sequence_length) for share, schedule in members)
        mean += (phase.until - begin) * step
        begin = phase.until
    return mean


def rest_of(horizon: Horizon, *, training: TrainingConfig, step: int, tokens: int) -> Horizon:
    """The horizon of a run that goes on: one in tokens is not overrun, whatever the batches so far.

    Args:
        horizon: of a run that begins with this recipe.
        training: of the recipe.
        step: optimizer steps done.
        tokens: trained on in them.
    """
    if training.steps is not None or tokens == step * horizon.batch_tokens:
        return horizon
    left = max(0, (training.tokens or horizon.tokens) - tokens) // horizon.batch_tokens
    return horizon._replace(steps=step + left, tokens=tokens + left * horizon.batch_tokens)


def shards_of(config: ParallelConfig, world_size: int) -> int:
    """Ranks that share one copy of the parameters.

    Raises:
        ValueError: replicate x shard is not the number of processes.
    """
    shards = world_size // max(1, config.replicate) if config.shard == -1 else config.shard
    if min(config.replicate, shards) < 1 or config.replicate * shards != world_size:
        processes = f"{world_size} process{'es' * (world_size != 1)}"
        raise ValueError(
            f"parallel.replicate = {config.replicate} x parallel.shard = {config.shard} does not make {processes}: "
            f"choose replicate so that it divides {world_size}, and shard = -1 for the rest"
        )
    return shards
