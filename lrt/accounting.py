"""Parameters by part, FLOPs of every pass, key/value bytes and MFU: formulas with their source.

All counts are per token of data unless said otherwise, and matrix products only: 2 FLOPs a
multiply-add forward, twice that again backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
Attention counts 4 D_q operations a (query, key) pair that the mask allows (PaLM, arXiv 2204.02311,
appendix B, there without the causal half). Embedding look-ups count nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from operator import or_
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from lrt.plans import only_feeds
from lrt.recurrence import aligned_mix
from lrt.types import Pass, Schedule, parameter_count

if TYPE_CHECKING:
    from lrt.model import LatentRecurrentModel
    from lrt.recurrence import RecurrentBlock

# Dense bf16 peak of one device, FLOP/s, by words of the name that the driver reports (vendor datasheets;
# halved where they count sparsity).
PEAK_FLOPS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200 NVL", 835e12), ("H200", 989e12),
    ("GH200", 989e12), ("B200", 2250e12), ("GB200", 2500e12), ("B300", 2250e12), ("GB300", 2500e12), ("A100", 312e12),
    ("L40S", 362e12), ("MI300X", 1307e12), ("MI325X", 1307e12), ("MI250X", 191.5e12),
)  # fmt: skip
# an instance or a virtual GPU, which has a share of the device
PART_OF_ONE = re.compile(r"\bMIG\b|\bGRID\b|-\d+[ABCQ]$")


class Parameters(NamedTuple):
    """Numbers of parameters by part; their sum is the whole model."""

    embedding: int
    value_embeddings: int
    blocks: int
    head: int
    scales: int
    memory_projections: int
    memory_gates: int
    injection: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def memory(self) -> int:
        """What the recurrence added to the matched twin."""
        return self.memory_projections + self.memory_gates + self.injection

    @property
    def scaling(self) -> int:
        """Matrices and head of the twin without memory: what ``tokens_per_parameter`` multiplies."""
        return self.blocks + self.head


def count_parameters(model: LatentRecurrentModel) -> Parameters:
    """Parameters of a model by part, native or adapted; works on the meta device.

    A head that is tied to the embedding counts once, as the head. Whatever else a backbone has is a scale:
    those of the native one, the final norm and learned positions of an adapted one.
    """
    backbone = model.backbone
    own = [model.memory_projection, *(block.projection for block in model.blocks)]
    gates = [block.gate for block in model.blocks]
    head, value_embeddings = parameter_count(backbone.head), parameter_count(backbone.value_embeddings)
    embedding = 0 if backbone.head.weight is backbone.embedding.weight else parameter_count(backbone.embedding)
    return Parameters(
        embedding=embedding,
        value_embeddings=value_embeddings,
        blocks=sum(parameter_count(block.block) for block in model.blocks),
        head=head,
        scales=parameter_count(backbone) - embedding - value_embeddings - head,
        memory_projections=sum(parameter_count(p) for p in own if p is not None),
        memory_gates=sum(parameter_count(g) for g in gates if g is not None),
        injection=0 if model.injection is None else parameter_count(model.injection),
    )


class ForwardFlops(NamedTuple):
    """Forward FLOPs of one pass over one position."""

    blocks: float  # matrices of the blocks
    attention: float  # mean over the positions of a row
    memory: float  # memory projections and gates that only memory needs
    head: float


def mean_keys(length: int, window: int | None) -> float:
    """Keys that a query sees under a causal mask, mean over ``length`` positions."""
    reach = length if window is None else min(window + 1, length)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def query_width(model: LatentRecurrentModel) -> int:
    """Width of all queries of a block together: query heads times their width."""
    geometry = getattr(model.blocks[0].block, "geometry", None)  # of an adapted block
    return (model.backbone.config.heads if geometry is None else geometry.heads) * model.backbone.head_dim


def matrices(module: nn.Module, *, frozen: bool = False) -> int:
    """Numbers in the matrices of a module, or only in those that do not train;
    a mixture of experts counts every expert."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1 and not (frozen and p.requires_grad))


class BlockFlops(NamedTuple):
    """Forward FLOPs of one block over one position."""

    matrices: float  # its own, and its gates
    attention: float  # mean over the positions of a row
    memory: float  # its own memory projection, or what an aligned one reads twice; it runs only where memory arrives


def block_flops(model: LatentRecurrentModel, length: int) -> tuple[BlockFlops, ...]:
    """Forward FLOPs a position of each block in a pass over rows of ``length`` tokens."""

    def gates(block: RecurrentBlock) -> int:
        return 0 if block.gate is None else matrices(block.gate)

    def own(block: RecurrentBlock) -> int:
        # a joint projection then reads both inputs
        aligned = getattr(block, "mixer", None) is aligned_mix
        more = getattr(block.block, "fused", None) if aligned else block.projection
        return 0 if more is None else matrices(more)

    seen, width = (mean_keys(length, block.window) for block in model.blocks), query_width(model)
    numbers = [(matrices(block.block) + gates(block), own(block)) for block in model.blocks]
    return tuple(
        BlockFlops(2.0 * mine, 4.0 * width * keys, 2.0 * memory) for (mine, memory), keys in zip(numbers, seen)
    )


def shared_flops(model: LatentRecurrentModel) -> float:
    """Forward FLOPs a position of what all blocks share of the memory: a projection, the residual's map;
    once per pass with memory."""
    return sum(2.0 * matrices(module) for module in (model.memory_projection, model.injection) if module is not None)


def forward_flops(model: LatentRecurrentModel, length: int) -> ForwardFlops:
    """Forward FLOPs a position of a pass over rows of ``length`` tokens, by part."""
    blocks = block_flops(model, length)
    return ForwardFlops(
        blocks=sum(block.matrices for block in blocks),
        attention=sum(block.attention for block in blocks),
        memory=shared_flops(model) + sum(block.memory for block in blocks),
        head=2.0 * model.backbone.width * model.backbone.vocab_size,
    )


class Work(NamedTuple):
    """Blocks that run over positions of a row."""

    positions: float  # share of a row, or their number
    start: int  # blocks, zero-based and half open
    stop: int
    received: bool  # memory arrives
    scored: bool  # the head runs too
    graded: bool = True  # a backward pass follows


def work_of(model: LatentRecurrentModel, schedule: Schedule, length: int) -> list[Work]:
    """What a schedule runs: the blocks below the first receiver once per row, then those of every pass.

    Args:
        model: its receivers and its source say which blocks a pass needs.
        schedule: of the step.
        length: tokens per row.
    """
    weights, first = schedule.group_weights(length), min(model.receivers, default=0)
    # an order costs the same; the default generator stays as it is
    plan = schedule.plan(length, generator=torch.Generator())
    parts = [Work(1.0, 0, first, received=False, scored=False)] if first else []
    for step in plan:
        count = len(range(step.start, step.stop, step.step))
        stop = model.source if only_feeds(plan, step, weights, length) else len(model.blocks)
        received = step.memory == "all" or (step.memory == "first" and count == 1)
        scored = step.group >= 0 and weights[step.group] > 0
        parts.append(Work(count / length, first, stop, received, scored, step.graded))
    return parts


def work_flops(model: LatentRecurrentModel, work: Sequence[Work], *, length: int) -> float:
    """Forward FLOPs of what runs over rows of ``length`` tokens; memory projections count only where memory arrives."""
    blocks, shared, head = block_flops(model, length), shared_flops(model), forward_flops(model, length).head
    total = 0.0
    for part in work:
        mine = blocks[part.start : part.stop]
        cost = sum(block.matrices + block.attention for block in mine)
        if part.received:
            fed = any(part.start <= index < part.stop for index in model.receivers)
            cost += sum(block.memory for block in mine) + (shared if fed else 0.0)
        total += part.positions * (cost + (head if part.scored else 0.0))
    return total


def block_forwards(model: LatentRecurrentModel, schedule: Schedule, length: int) -> tuple[float, ...]:
    """How often a position runs through each block in a training step; their sum is the cost in block forwards.

    Args:
        model, schedule, length: as in ``work_of``.
    """
    work = work_of(model, schedule, length)
    return tuple(
        sum(part.positions for part in work if part.start <= index < part.stop) for index in range(len(model.blocks))
    )


def training_flops(model: LatentRecurrentModel, schedule: Schedule, length: int) -> float:
    """Forward and backward FLOPs of a training step, a token of data, every block of every pass counted as it runs.

    Memory projections count only where memory arrives, the head only for scored groups. Frozen matrices hand gradients
    on but get none; what lies below everything that trains has no backward.

    Args:
        model: native or adapted, with ``requires_grad`` as it trains.
        schedule: of the step.
        length: tokens per row.
    """
    blocks, shared, head = block_flops(model, length), shared_flops(model), forward_flops(model, length).head
    frozen = [2.0 * matrices(block.block, frozen=True) for block in model.blocks]
    differentiated = _differentiated(model)
    total = 0.0
    work = work_of(model, schedule, length)
    settling = [part for part in work if not part.graded]
    total += work_flops(model, settling, length=length)
    for part in (part for part in work if part.graded):
        cost = 3.0 * shared if part.received else 0.0
        for index in range(part.start, part.stop):
            forward = blocks[index].matrices + blocks[index].attention
            backward = 2.0 * forward - frozen[index] if part.received or differentiated[index] else 0.0
            cost += forward + backward + (3.0 * blocks[index].memory if part.received else 0.0)
        if part.scored:
            cost += (3.0 if model.backbone.head.weight.requires_grad else 2.0) * head
        total += part.positions * cost
    if schedule.kv_refresh:
        projection = 0.0 if model.memory_projection is None else 2.0 * matrices(model.memory_projection)
        again = projection + sum(block.memory for block in blocks) + _projection_flops(model)
        total += 3.0 * _refreshed_share(schedule.plan(length, generator=torch.Generator())) * again
    return total


def _differentiated(model: LatentRecurrentModel) -> list[bool]:
    """For each block: whether it, or anything below it, trains, so that a backward pass reaches it even without
    memory."""
    above = ("head", "norm")  # a tied head goes by the embedding's name
    reached = any(p.requires_grad for name, p in model.backbone.named_parameters() if name.split(".")[0] not in above)
    return list(
        accumulate((any(p.requires_grad for p in block.parameters()) for block in model.blocks), or_, initial=reached)
    )[1:]


def _refreshed_share(plan: Sequence[Pass]) -> float:
    """Positions that kv_refresh re-projects, in rows: before each pass those of the passes still to come."""
    subsets = len(plan) - 1
    return (subsets - 1) / 2


def _projection_flops(model: LatentRecurrentModel) -> float:
    """Forward FLOPs a position of queries, keys, values and gates of all receiving blocks;
    of adapted blocks the gates alone."""
    blocks = [model.blocks[index] for index in model.receivers]
    linears = [getattr(block.block, name, None) for block in blocks for name in ("query", "key", "value")]
    return 2.0 * sum(
        linear.weight.numel() for linear in [*linears, *(block.gate for block in blocks)] if linear is not None
    )


def kv_bytes(model: LatentRecurrentModel, length: int, *, bytes_per_number: int = 2) -> int:
    """Bytes of the decoding state of one sequence: keys and values (short windows as rings) and one memory vector."""
    backbone = model.backbone
    kept = sum(length if block.window is None else min(length, block.window + 1) for block in model.blocks)
    memory = backbone.width if model.source else 0
    return bytes_per_number * (2 * kept * backbone.kv_heads * backbone.head_dim + memory)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a whole device by its name; None where it is not known, and for a part of one."""
    if PART_OF_ONE.search(device_name):
        return None
    return next((peak for name, peak in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)), None)


def mfu(flops_per_second: float, device_name: str) -> float | None:
    """Share of one device's peak; None where the device is not known."""
    peak = peak_flops(device_name)
    return None if peak is None else flops_per_second / peak
