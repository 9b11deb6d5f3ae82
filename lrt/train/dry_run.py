"""What a run would need and how long it would take, from the recipe alone: no data, no GPU, in seconds."""

from __future__ import annotations

import math
from typing import NamedTuple

from lrt.accounting import Parameters, count_parameters, training_flops
from lrt.config import Recipe, dump_recipe
from lrt.model import build
from lrt.schedules import from_config
from lrt.train.horizon import Horizon, plan_horizon

GPU, PEAK, ASSUMED_MFU, GPU_GIB = "H100", 989e12, 0.40, 80.0


class Memory(NamedTuple):
    """Expected peak of one GPU in GiB, by what it holds."""

    masters: float  # float32 parameters, this rank's rows
    gradients: float  # float32, this rank's rows
    optimizer: float
    gathered: float  # whole parameters in the dtype of the computation
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(self)


def expected_memory(recipe: Recipe, parameters: Parameters, horizon: Horizon, *, world_size: int) -> Memory:
    """Estimate the peak memory of one GPU; good to about a fifth.

    Activations without checkpointing are counted as 20 numbers of width D a token, block and pass: input,
    norm, queries, keys, values before and after RoPE, attention, and the MLP's two times 4 D, less what
    compilation fuses away. With checkpointing a block keeps its input and its keys and values.
    """
    model, parallel = recipe.model, recipe.parallel
    size = 2 if parallel.param_dtype == "bfloat16" else 4
    shards = world_size // parallel.replicate if parallel.shard == -1 else parallel.shard
    gib = 2**30
    matrices = parameters.blocks + parameters.memory_projections + parameters.memory_gates
    moments = 2.0 if recipe.optimizer.kind == "adamw" else (matrices + 2.0 * (parameters.total - matrices)) / parameters.total
    whole = parameters.total if parallel.reshard == "after_step" else 2 * parameters.total / model.n_layers
    sharded = world_size > 1 or parallel.param_dtype != "float32"
    numbers = {"none": 20.0, "selective": 14.0, "block": 1.0 + 2.0 * model.kv_heads / model.heads}[parallel.activation_checkpointing]
    passes = from_config(recipe.schedule).token_compute if recipe.recurrence is not None else 1
    tokens = horizon.rows * model.sequence_length
    one_block = 20.0 * model.d_model * tokens * size if parallel.activation_checkpointing != "none" else 0.0
    chunk = min(parallel.loss_chunk or tokens, tokens)
    return Memory(
        masters=4.0 * parameters.total / shards / gib,
        gradients=4.0 * parameters.total / shards / gib,
        optimizer=4.0 * parameters.total * moments / shards / gib,
        gathered=size * whole / gib if sharded else 0.0,
        activations=(numbers * model.n_layers * model.d_model * tokens * passes * size + one_block) / gib,
        logits=3 * 4.0 * chunk * model.vocab_size / gib,
    )


def dry_run(recipe: Recipe, *, world_size: int | None = None) -> str:
    """The resolved recipe and what it means, as text.

    Args:
        recipe: of the run.
        world_size: GPUs to plan for; None = 8, or fewer where the batch cannot be shared by 8.

    Raises:
        ValueError: the recipe has no horizon, or its batch cannot be dealt to the GPUs.
    """
    model = build(recipe, device="meta")
    parameters = count_parameters(model)
    if world_size is None:
        world_size = math.gcd(8, recipe.training.batch_tokens // recipe.model.sequence_length)
    horizon = plan_horizon(recipe, parameters, world_size=world_size)
    a_token = training_flops(model, model.train_schedule, recipe.model.sequence_length)
    memory = expected_memory(recipe, parameters, horizon, world_size=world_size)
    whole = a_token * horizon.tokens
    seconds = whole / (world_size * PEAK * ASSUMED_MFU)
    verdict = "fits" if memory.total < 0.92 * GPU_GIB else (
        "does not fit: lower training.micro_batch, or set parallel.activation_checkpointing = \"block\""
    )  # fmt: skip
    twin = parameters.total - parameters.memory
    lines = [
        dump_recipe(recipe),
        "parameters",
        *(f"  {name.replace('_', ' '):<20} {number:>16,}" for name, number in parameters._asdict().items()),
        f"  {'total':<20} {parameters.total:>16,}  (memory adds {100 * parameters.memory / twin:.2f} % to the twin without it)",
        "work",
        f"  {'tokens':<20} {horizon.tokens:>16,}  in {horizon.steps:,} steps of {horizon.batch_tokens:,}",
        f"  {'a step':<20} {world_size} GPUs x {horizon.accumulation} forwards x {horizon.rows} rows x {recipe.model.sequence_length} tokens",
        f"  {'FLOPs a token':<20} {a_token:>16.4g}  (every pass, forward and backward)",
        f"  {'FLOPs a step':<20} {a_token * horizon.batch_tokens:>16.4g}",
        f"  {'FLOPs of the run':<20} {whole:>16.4g}",
        f"expected memory of one GPU, GiB: {memory.total:.1f} of {GPU_GIB:.0f}: {verdict}",
        *(f"  {name:<20} {gib:>16.2f}" for name, gib in memory._asdict().items()),
        f"expected time on {world_size} x {GPU} at an assumed MFU of {100 * ASSUMED_MFU:.0f} %: {_duration(seconds)}",
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
