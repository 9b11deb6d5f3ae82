"""Bits per byte in the memory modes zero, parallel and decode, on the same tokens (spec section 4).

bpb = nats / (ln 2 * bytes). Special tokens hold no bytes and their nats are not counted. Nats are
summed in float64, bytes in int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrt.loss import IGNORE
from lrt.model import LatentRecurrentModel
from lrt.schedules import baseline, sequential, single
from lrt.types import Schedule

MODES = ("zero", "parallel", "decode")


@dataclass(frozen=True)
class BitsPerByte:
    """A score and what it was made of.

    Attributes:
        mode: memory mode: zero, parallel or decode.
        value: bits per byte of the last group; NaN when nothing was scored.
        groups: bits per byte of every loss group (in parallel: initialization first).
        buckets: bits per byte by position in the row, equal parts from first to last.
        tokens: targets scored.
        bytes: bytes that they stand for.
    """

    mode: str
    value: float
    groups: tuple[float, ...]
    buckets: tuple[float, ...]
    tokens: int
    bytes: int


@torch.no_grad()
def evaluate_bpb(
    model: LatentRecurrentModel,
    batches: Iterable[Any],
    *,
    token_bytes: Tensor,
    modes: Sequence[str] = MODES,
    schedule: Schedule | None = None,
    buckets: int = 4,
    device: Any = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[], None] | None = None,
    decode: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, BitsPerByte]:
    """Score the same rows in every mode.

    Args:
        model: in any mode; it is put back as it was.
        batches: of ``input_ids`` and ``targets`` (B, T); gone through once.
        token_bytes: int64 (V,) bytes of each token, 0 for special tokens.
        modes: which memory modes.
        schedule: of mode ``parallel``; None = ``model.train_schedule``.
        buckets: position buckets of the report.
        device: where the rows go; None = the model's.
        reduce: sums a tensor over ranks; None = one process.
        progress: called after every batch and mode.
        decode: what scores mode ``decode``, tokens and targets (B, T) -> nats (B, T), such as
            ``lambda *rows: lrt.decoding.scoring.score(lrt.accelerate(model), *rows)[0]``; None = the model itself, block by block.

    Returns:
        One result a mode. A model without recurrence scores the same in every mode.

    Raises:
        ValueError: an unknown mode.
    """
    wrong = [mode for mode in modes if mode not in MODES]
    if wrong:
        raise ValueError(f"evaluation.modes: {wrong} unknown; use {', '.join(MODES)}")
    plans = {mode: _schedule(model, mode, schedule) for mode in modes}
    device = device or next(model.parameters()).device
    token_bytes = token_bytes.to(device)
    sums: dict[str, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            tokens, targets = batch.input_ids.to(device), batch.targets.to(device)
            sizes = torch.where(targets == IGNORE, 0, token_bytes[targets.clamp_min(0)])
            for mode, plan in plans.items():
                given = decode if mode == "decode" and model.recurrence is not None else None
                groups = model.score(tokens, targets, plan) if given is None else given(tokens, targets)[None]
                nats = torch.where(sizes > 0, groups.double(), 0.0)
                table = _table(nats, sizes, buckets)
                sums[mode] = table + sums[mode] if mode in sums else table
                if progress is not None:
                    progress()
    finally:
        model.train(was_training)
    return {mode: _report(mode, table if reduce is None else reduce(table)) for mode, table in sums.items()}


def _schedule(model: LatentRecurrentModel, mode: str, schedule: Schedule | None) -> Schedule:
    if model.recurrence is None or mode == "zero":
        return baseline()
    return sequential() if mode == "decode" else single(schedule or model.train_schedule)


def _table(nats: Tensor, sizes: Tensor, buckets: int) -> Tensor:
    """float64 (groups + 2, buckets): nats of every group, then bytes and targets (both exact below 2^53)."""
    length = nats.shape[-1]
    bucket = torch.arange(length, device=nats.device) * buckets // length
    rows = torch.cat([nats.sum(1), sizes.sum(0, keepdim=True).double(), (sizes > 0).sum(0, keepdim=True).double()])
    return rows.new_zeros(rows.shape[0], buckets).index_add_(1, bucket, rows)


def _report(mode: str, table: Tensor) -> BitsPerByte:
    table = table.cpu()
    nats, sizes, counts = table[:-2], table[-2], table[-1]
    total = int(sizes.sum())
    groups = tuple(_bits(float(row.sum()), total) for row in nats)
    by_position = tuple(_bits(float(n), int(b)) for n, b in zip(nats[-1], sizes))
    return BitsPerByte(mode, groups[-1], groups, by_position, int(counts.sum()), total)


def _bits(nats: float, size: int) -> float:
    return nats / (math.log(2) * size) if size else math.nan
