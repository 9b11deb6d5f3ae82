"""What a run would need and how long it would take, from the recipe alone: no data, no weights, no GPU, in seconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lrt.accounting import Work, count_parameters, work_of
from lrt.config import Recipe, dump_recipe
from lrt.families.blocks import FamilyBlock
from lrt.families.description import part
from lrt.kernels.attention import takes_mask
from lrt.model import LatentRecurrentModel
from lrt.schedules import single
from lrt.train.checkpoint.starting_model import is_native, shapes_of
from lrt.train.distributed.gradient_sums import TWINS
from lrt.train.horizon import Horizon, mean_flops, plan_horizon, shards_of
from lrt.train.timetable import plan_timetable
from lrt.types import Schedule

GPU, PEAK, ASSUMED_MFU, GPU_GIB = "H100", 989e12, 0.40, 80.0


# Fitted to measured peaks (docs/train.md): what a pass with memory keeps, in passes without,
# and bytes of a chunk's logits.
RECURRENT_PASS, LOGIT_BYTES = 1.05, 4.0


class Memory(NamedTuple):
    """Expected GPU memory of one GPU in GiB, by what it holds."""

    masters: float  # float32 parameters, this rank's rows
    copies: float  # parameters in the dtype of the computation: gathered ones, or the working copy of one GPU
    optimizer: float
    kept_gradients: float  # float32, from micro-batch to micro-batch: all of them, or this rank's rows
    activations: float
    logits: float  # of a chunk, and the head's gradient
    # all gradients, and what adds those of the passes or what the optimizer's step takes, when the activations are gone
    update: float

    @property
    def total(self) -> float:
        """The peak: at the end of the last forward, or after its backward."""
        return (
            self.masters
            + self.copies
            + self.optimizer
            + max(self.kept_gradients + self.activations + self.logits, self.update)
        )


def activation_numbers(model: LatentRecurrentModel) -> float:
    """Numbers a token that a block keeps for the backward: 12 of width D for input, norms, queries, keys and values
    before and after RoPE and attention, and what its MLP's matrices read or make; less what compilation fuses away."""
    block = model.blocks[0].block
    mlp = (
        [part(block.layer, path) for path in block.family.mlp_parts]
        if isinstance(block, FamilyBlock)
        else [block.mlp_in, block.mlp_out]
    )
    return 12.0 * model.backbone.width + sum(max(p.shape) for module in mlp for p in module.parameters() if p.ndim > 1)


def graded_work(model: LatentRecurrentModel, schedule: Schedule, length: int) -> list[Work]:
    """What a schedule runs and keeps something of: passes without gradient keep nothing."""
    return [part for part in work_of(model, schedule, length) if part.graded]


def recurrent_numbers(model: LatentRecurrentModel, schedule: Schedule, length: int) -> float:
    """Numbers a token that all blocks together keep of the passes with memory, beside what any pass keeps.

    Layerwise projections keep theirs of the memory, aligned ones the input that it is added to, and projected residuals
    what they add (by count, not by measurement). FlexAttention reads keys and values of all S groups in natural order,
    and keeps that copy for each subset (``lrt.kernels.attention.takes_mask`` says where it is used).
    """
    subsets, work = min(getattr(schedule, "subsets", 1), length), graded_work(model, schedule, length)
    cut = getattr(model.backbone, "attention_reset", None) is not None
    pairs, inputs, recurrence = 0.0, 0.0, model.recurrence
    added = 0 if recurrence is None else (recurrence.projection == "aligned") + (recurrence.residual == "projected")
    for index, block in enumerate(model.blocks):
        window = None if block.window is None or block.window >= length - 1 else block.window
        reordered = cut or takes_mask(length=length, groups=subsets, window=window)
        runs = sum(part.positions for part in work if part.received and part.start <= index < part.stop)
        pairs += runs * ((block.projection is not None) + reordered * (subsets - 1))
        inputs += runs * added * (index in model.receivers)
    return 2.0 * model.backbone.kv_heads * model.backbone.head_dim * pairs + model.backbone.width * inputs


def expected_memory(
    recipe: Recipe, model: LatentRecurrentModel, horizon: Horizon, *, world_size: int, schedule: Schedule | None = None
) -> Memory:
    """Estimate the peak memory of one GPU; within 3 % of 17 measured peaks of the native decoder (docs/train.md says
    what they count).

    With activation checkpointing a block keeps its input and its keys and values. A decoder from a folder whose loss
    is not chunked keeps the logits of every loss group until the backward.

    Args:
        recipe: of the run.
        model: its shapes, with ``requires_grad`` as it trains.
        horizon: rows per forward, and forwards per step.
        world_size: GPUs.
        schedule: of the step; None = the model's.
    """
    parallel, parameters, native = recipe.parallel, count_parameters(model), is_native(recipe)
    schedule = schedule or single(model.train_schedule)
    size = 2 if parallel.param_dtype == "bfloat16" else 4
    shards = shards_of(parallel, world_size)
    n_layers, width = len(model.blocks), model.backbone.width
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_muon, stack = _muon_numbers(model) if recipe.optimizer.kind == "muon" else (0, 0)
    if world_size > 1:
        copied = parameters.total if parallel.reshard == "after_step" else 2 * parameters.total / n_layers
    else:  # token tables are not copied (lrt.train.distributed.graphs)
        tables = parameters.embedding + parameters.value_embeddings if native else 0
        copied = parameters.total - tables if size < 4 else 0
    every = activation_numbers(model)
    kept = {
        "none": every,
        "selective": 0.7 * every,
        "block": width + 2.0 * model.backbone.kv_heads * model.backbone.head_dim,
    }
    tokens = horizon.rows * recipe.model.sequence_length
    work = graded_work(model, schedule, recipe.model.sequence_length)
    forwards = sum(
        part.positions * (part.stop - part.start) * (RECURRENT_PASS if part.received else 1.0) for part in work
    )
    more = (
        recurrent_numbers(model, schedule, recipe.model.sequence_length)
        if parallel.activation_checkpointing != "block"
        else 0.0
    )
    one_block = every * tokens if parallel.activation_checkpointing != "none" else 0.0
    chunk = min(parallel.loss_chunk or tokens, tokens)
    groups = len(schedule.group_weights(recipe.model.sequence_length))
    if native:
        logits = (LOGIT_BYTES if parallel.compile else 20.0) * chunk * model.vocab_size + (
            4.0 + size * groups
        ) * model.vocab_size * width
    else:
        logits = (2 + (groups if chunk == tokens else 1)) * 4.0 * chunk * model.vocab_size
    gradients = 4.0 * trained / shards
    if world_size == 1:  # sums that are always there (lrt.train.distributed.gradient_sums)
        kept_gradients = gradients
        of_passes: float = size * _numbers_by_pass(model, work if schedule.token_compute > 1 else work[:1])
    else:
        of_passes = 0.0
        kept_gradients = (4.0 * trained if parallel.reduces_once else gradients) if horizon.accumulation > 1 else 0.0
    parts = Memory(
        masters=4.0 * parameters.total / shards,
        copies=size * copied,
        optimizer=4.0 * (2.0 * trained - by_muon) / shards,
        kept_gradients=kept_gradients,
        activations=size * (tokens * (kept[parallel.activation_checkpointing] * forwards + more) + one_block),
        logits=logits,
        # Muon stacks averages, updates and what orthogonalizes them, in half precision
        update=gradients + max(of_passes, 12.0 * stack / shards),
    )
    return Memory(*(part / 2**30 for part in parts))


def _numbers_by_pass(model: LatentRecurrentModel, work: Sequence[Work]) -> int:
    """Numbers in the gradients of what the passes share, where each pass, up to the last twin's, keeps its own."""

    def trained(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad)

    runs = [sum(part.start <= index < part.stop for part in work) for index in range(len(model.blocks))]
    own = sum(trained(block) * max(1, min(count, 1 + TWINS)) for block, count in zip(model.blocks, runs))
    shared = trained(model.memory_projection) + trained(model.injection)
    return own + shared * max(1, min(sum(part.received for part in work), 1 + TWINS))


def _muon_numbers(model: LatentRecurrentModel) -> tuple[int, int]:
    """Numbers in all trained matrices, which keep one moment where AdamW keeps two, and in the largest stack of one
    shape."""
    parts = (*model.blocks, model.memory_projection, model.injection)
    modules = [module for module in parts if module is not None]
    shapes = Counter(
        tuple(p.shape) for module in modules for p in module.parameters() if p.ndim > 1 and p.requires_grad
    )
    stacks = [count * math.prod(shape) for shape, count in shapes.items()]
    return sum(stacks), max(stacks, default=0)


def dry_run(recipe: Recipe, *, world_size: int | None = None) -> str:
    """The resolved recipe and what it means, as text.

    Args:
        recipe: of the run.
        world_size: GPUs to plan for; None = 8, or fewer where the batch cannot be shared by 8.

    Raises:
        ValueError: the recipe has no horizon, the GPUs make no mesh, or the batch cannot be dealt to them.
    """
    model = shapes_of(recipe)
    parameters = count_parameters(model)
    if world_size is None:
        world_size = math.gcd(8, recipe.training.batch_tokens // recipe.model.sequence_length)
    horizon = plan_horizon(recipe, parameters, world_size=world_size)
    a_token = mean_flops(recipe, model)
    kinds = plan_timetable(recipe, steps=horizon.steps).kinds
    memory = max(
        (expected_memory(recipe, model, horizon, world_size=world_size, schedule=kind) for kind in kinds),
        key=lambda memory: memory.total,
    )
    whole = a_token * horizon.tokens
    seconds = whole / (world_size * PEAK * ASSUMED_MFU)
    verdict = "fits" if memory.total < 0.92 * GPU_GIB else (
        "does not fit: lower training.micro_batch, or set parallel.activation_checkpointing = \"block\""
    )  # fmt: skip
    twin = parameters.total - parameters.memory
    lines = [
        dump_recipe(recipe),
        *([] if is_native(recipe) else [_decoder(recipe, model), ""]),
        "parameters",
        *(f"  {name.replace('_', ' '):<20} {number:>16,}" for name, number in parameters._asdict().items()),
        f"  {'total':<20} {parameters.total:>16,}  (memory adds {100 * parameters.memory / twin:.2f} % to the "
        "twin without it)",
        "work",
        f"  {'tokens':<20} {horizon.tokens:>16,}  in {horizon.steps:,} steps of {horizon.batch_tokens:,}",
        f"  {'a step':<20} {world_size} GPUs x {horizon.accumulation} forwards x {horizon.rows} rows x "
        f"{recipe.model.sequence_length} tokens",
        f"  {'FLOPs a token':<20} {a_token:>16.4g}  (every pass, forward and "
        f"backward{' of the mean step' if len(kinds) > 1 else ''})",
        f"  {'FLOPs a step':<20} {a_token * horizon.batch_tokens:>16.4g}",
        f"  {'FLOPs of the run':<20} {whole:>16.4g}",
        f"expected memory of one GPU, GiB: {memory.total:.1f} of {GPU_GIB:.0f}: {verdict}",
        *(f"  {name.replace('_', ' '):<20} {gib:>16.2f}" for name, gib in memory._asdict().items()),
        f"expected time on {world_size} x {GPU} at an assumed MFU of {100 * ASSUMED_MFU:.0f} %: {_duration(seconds)}",
    ]
    return "\n".join(lines)


def _decoder(recipe: Recipe, model: LatentRecurrentModel) -> str:
    size = f"{len(model.blocks)} blocks of width {model.backbone.width}, {model.vocab_size:,} token ids"
    return f"the decoder in {recipe.run.backbone} takes the place of [model], but for sequence_length: {size}"


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
