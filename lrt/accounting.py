"""Parameters by part, FLOPs of every pass, key/value bytes and MFU: formulas with their source.

All counts are per token of data unless said otherwise, and matrix products only: 2 FLOPs a
multiply-add forward, twice that again backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
Attention counts 4 D_q operations a (query, key) pair that the mask allows (PaLM, arXiv 2204.02311,
appendix B, there without the causal half). Embedding look-ups count nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lrt.types import Pass, RecurrentDecoder, Schedule, parameter_count

# Dense bf16 peak of one device, FLOP/s, by words of the name that the driver reports (vendor datasheets; halved where they count sparsity).
PEAK_FLOPS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200 NVL", 835e12), ("H200", 989e12), ("GH200", 989e12),
    ("B200", 2250e12), ("GB200", 2500e12), ("B300", 2250e12), ("GB300", 2500e12), ("A100", 312e12), ("L40S", 362e12),
    ("MI300X", 1307e12), ("MI325X", 1307e12), ("MI250X", 191.5e12),
)  # fmt: skip
PART_OF_ONE = re.compile(r"\bMIG\b|\bGRID\b|-\d+[ABCQ]$")  # an instance or a virtual GPU, which has a share of the device


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


def count_parameters(model: Any) -> Parameters:
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


def query_width(model: RecurrentDecoder) -> int:
    """Width of all queries of a block together: query heads times their width."""
    geometry = getattr(model.blocks[0].block, "geometry", None)  # of an adapted block
    return (model.backbone.config.heads if geometry is None else geometry.heads) * model.backbone.head_dim


def matrices(module: Any, *, frozen: bool = False) -> int:
    """Numbers in the matrices of a module, or only in those that do not train; a mixture of experts counts every expert."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1 and not (frozen and p.requires_grad))


def forward_flops(model: RecurrentDecoder, length: int) -> ForwardFlops:
    """Forward FLOPs a position of a pass over rows of ``length`` tokens, by part."""
    backbone = model.backbone
    keys = [mean_keys(length, block.window) for block in model.blocks]
    parts = count_parameters(model)
    return ForwardFlops(
        blocks=2.0 * (sum(matrices(block.block) for block in model.blocks) + parts.memory_gates),
        attention=4.0 * query_width(model) * sum(keys),
        memory=2.0 * parts.memory_projections,
        head=2.0 * backbone.width * backbone.vocab_size,
    )


def training_flops(model: RecurrentDecoder, schedule: Schedule, length: int) -> float:
    """Forward and backward FLOPs of a training step, a token of data, every pass counted.

    Memory projections count only where memory arrives; a group of weight 0 needs no head, and one that
    only feeds a refinement stops at the source block. Frozen matrices hand gradients on but get none.

    Args:
        model: native or adapted, with ``requires_grad`` as it trains.
        schedule: of the step.
        length: tokens a row.
    """
    flops = forward_flops(model, length)
    weights = schedule.group_weights(length)
    plan = schedule.plan(length, generator=torch.Generator())  # an order costs the same; the default generator stays as it is
    share = model.source / len(model.blocks) if model.source else 1.0
    whole = len(plan) > 1 and all(step.covers(length) for step in plan)
    blocks = 3.0 * (flops.blocks + flops.attention) - 2.0 * sum(matrices(block.block, frozen=True) for block in model.blocks)
    head = (3.0 if model.backbone.head.weight.requires_grad else 2.0) * flops.head
    total = 0.0
    for step in plan:
        positions = len(range(step.start, step.stop, step.step)) / length
        scored = weights[step.group] > 0
        depth = share if whole and not scored and step is not plan[-1] else 1.0
        cost = depth * blocks
        if step.memory == "all" or (step.memory == "first" and positions * length <= 1):
            cost += 3.0 * flops.memory
        total += positions * (cost + (head if scored else 0.0))
    if schedule.kv_refresh:
        total += 3.0 * _refreshed_share(plan) * (flops.memory + _projection_flops(model))
    return total


def _refreshed_share(plan: Sequence[Pass]) -> float:
    """Positions that kv_refresh re-projects, in rows: before each pass those of the passes still to come."""
    subsets = len(plan) - 1
    return (subsets - 1) / 2


def _projection_flops(model: RecurrentDecoder) -> float:
    """Forward FLOPs a position of queries, keys, values and gates of all receiving blocks; of adapted blocks the gates alone."""
    blocks = [model.blocks[index] for index in model.receivers]
    linears = [getattr(block.block, name, None) for block in blocks for name in ("query", "key", "value")]
    return 2.0 * sum(linear.weight.numel() for linear in [*linears, *(block.gate for block in blocks)] if linear is not None)


def kv_bytes(model: RecurrentDecoder, length: int, *, bytes_per_number: int = 2) -> int:
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
