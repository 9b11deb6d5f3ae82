"""Bits per byte in the memory modes zero, parallel and decode, on the same tokens (docs/design.md, memory modes).

bpb = nats / (ln 2 * bytes). Separators stand for no bytes and their nats are not counted. Nats are summed in float64,
bytes in int64.

Legend: B batch, T row length, N documents, G loss groups (passes), K position buckets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrt.data.batch import Batch
from lrt.data.held_out import HeldOut
from lrt.eval.bootstrap import Interval, interval
from lrt.loss import IGNORE
from lrt.model import LatentRecurrentModel
from lrt.schedules import baseline, sequential, single
from lrt.types import Schedule

MODES = ("zero", "parallel", "decode")
Decode = Callable[[Tensor, Tensor], Tensor]  # tokens and targets (B, T) -> nats (B, T) by true recurrence


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
        documents: int64 (N,) number of each document that was scored; rows, where the batches name no documents.
        document_nats: float64 (N,) nats of the last group.
        document_bytes: int64 (N,).
    """

    mode: str
    value: float
    groups: tuple[float, ...]
    buckets: tuple[float, ...]
    tokens: int
    bytes: int
    documents: np.ndarray
    document_nats: np.ndarray
    document_bytes: np.ndarray

    def interval(self) -> Interval:
        """The value with its bootstrap interval over documents."""
        return interval(self.document_nats, self.document_bytes)

    def part(self, first: int, stop: int) -> float:
        """Bits per byte of the documents first..stop-1."""
        here = (self.documents >= first) & (self.documents < stop)
        return _bits(float(self.document_nats[here].sum()), int(self.document_bytes[here].sum()))


@torch.no_grad()
def evaluate_bpb(
    model: LatentRecurrentModel,
    batches: Iterable[Batch | HeldOut],
    *,
    token_bytes: Tensor | None = None,
    modes: Sequence[str] = MODES,
    schedule: Schedule | None = None,
    buckets: int = 4,
    device: torch.device | str | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[], None] | None = None,
    decode: Decode | None = None,
) -> dict[str, BitsPerByte]:
    """Score the same rows in every mode.

    Args:
        model: in any mode; it is put back as it was.
        batches: of ``input_ids`` and ``targets`` (B, T), gone through once. Held-out batches (``lrt.data``) also say
            the document and the bytes of every target; without them a row counts as a document.
        token_bytes: int64 (V,) bytes of each token, 0 for what is not scored; for batches that do not say their bytes.
        modes: which memory modes.
        schedule: of mode ``parallel``; None = ``model.train_schedule``.
        buckets: position buckets of the report.
        device: where the rows go; None = the model's.
        reduce: sums a tensor of the CPU over ranks; None = one process.
        progress: called after every batch and mode.
        decode: what scores mode ``decode``; None = the model itself, by the shortest exact way that needs no kernels.

    Returns:
        One result per mode. A model without recurrence is scored once and has the same score in every mode.

    Raises:
        ValueError: an unknown mode, or batches that do not say their bytes without ``token_bytes``.
    """
    wrong = [mode for mode in modes if mode not in MODES]
    if wrong:
        raise ValueError(f"evaluation.modes: {wrong} unknown; use {', '.join(MODES)}")
    device = device or next(model.parameters()).device
    one_mode = model.recurrence is None
    plans = {mode: _schedule(model, mode, schedule) for mode in (modes[:1] if one_mode else modes)}
    tables = {mode: _Table(buckets) for mode in plans}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            tokens, targets = batch.input_ids.to(device), batch.targets.to(device)
            counted = _counted(batch, token_bytes)
            for mode, plan in plans.items():
                if mode == "decode" and decode is not None and not one_mode:
                    groups = decode(tokens, targets)[None]
                else:
                    groups = model.score(tokens, targets, plan)
                tables[mode].add(groups, counted)
                if progress is not None:
                    progress()
    finally:
        model.train(was_training)
    reached = getattr(batches, "documents_reached", None)
    reports = {
        mode: table.report(mode, documents=reached, reduce=reduce) for mode, table in tables.items() if table.used
    }
    return (
        {mode: dataclasses.replace(reports[modes[0]], mode=mode) for mode in modes} if one_mode and reports else reports
    )


def _schedule(model: LatentRecurrentModel, mode: str, schedule: Schedule | None) -> Schedule:
    if model.recurrence is None or mode == "zero":
        return baseline()
    return sequential() if mode == "decode" else single(schedule or model.train_schedule)


# ------------------------------------------------------------------ adding up


@dataclass(frozen=True)
class _Counted:
    """What the targets of a batch count for, on the CPU."""

    scored: Tensor  # (B, T) bool
    sizes: Tensor  # (B, T) int64
    documents: Tensor | None  # (B, T) int64; None: a row is a document


def _counted(batch: Batch | HeldOut, token_bytes: Tensor | None) -> _Counted:
    documents, sizes = getattr(batch, "documents", None), getattr(batch, "sizes", None)
    if documents is not None and sizes is not None:
        return _Counted(documents >= 0, sizes, documents)
    if token_bytes is None:
        raise ValueError(
            "the batches do not say the bytes of their targets: give token_bytes, "
            "or rows of lrt.data.build_loader(split='validation')"
        )
    targets = batch.targets.cpu()
    sizes = torch.where(targets == IGNORE, 0, token_bytes.cpu()[targets.clamp_min(0)])
    return _Counted(sizes > 0, sizes, None)


class _Table:
    """Sums by loss group, document and position bucket, with bytes and targets behind the groups; exact below 2^53."""

    def __init__(self, buckets: int) -> None:
        self._buckets = buckets
        self._sums: Tensor | None = None  # (G + 2, N, K) float64
        self._rows = 0

    @property
    def used(self) -> bool:
        return self._sums is not None

    def add(self, groups: Tensor, counted: _Counted) -> None:
        """Add the nats (G, B, T) of a batch."""
        nats = groups.cpu().double()
        batch, length = nats.shape[1:]
        documents = counted.documents
        if documents is None:
            documents = self._rows + torch.arange(batch)[:, None].expand(batch, length)
            self._rows += batch
        bucket = (torch.arange(length) * self._buckets // length).expand(batch, length)
        place = (documents * self._buckets + bucket)[counted.scored]
        scored = counted.sizes[counted.scored].double()
        values = torch.cat([nats[:, counted.scored], scored[None], torch.ones_like(scored)[None]])
        self._grow(values.shape[0], int(documents.max()) + 1)
        assert self._sums is not None
        self._sums.flatten(1).index_add_(1, place, values)

    def report(self, mode: str, *, documents: int | None, reduce: Callable[[Tensor], Tensor] | None) -> BitsPerByte:
        assert self._sums is not None
        table = self._sums
        if reduce is not None:
            # Ranks agree on a size only where the batches number their documents.
            table = table.sum(1, keepdim=True) if documents is None else _resized(table, documents)
            table = reduce(table)
        nats, sizes, counts = table[:-2], table[-2], table[-1]
        total = int(sizes.sum())
        groups = tuple(_bits(float(group.sum()), total) for group in nats)
        by_position = tuple(_bits(float(n), int(b)) for n, b in zip(nats[-1].sum(0), sizes.sum(0)))
        seen = counts.sum(1).nonzero()[:, 0]
        by_document = (seen.numpy(), nats[-1].sum(1)[seen].numpy(), sizes.sum(1)[seen].long().numpy())
        return BitsPerByte(mode, groups[-1], groups, by_position, int(counts.sum()), total, *by_document)

    def _grow(self, rows: int, documents: int) -> None:
        if self._sums is None:
            self._sums = torch.zeros(rows, max(1, documents), self._buckets, dtype=torch.float64)
        elif documents > self._sums.shape[1]:
            self._sums = _resized(self._sums, max(documents, 2 * self._sums.shape[1]))


def _resized(table: Tensor, documents: int) -> Tensor:
    """With room for so many documents; what is cut off is zero."""
    kept = table[:, :documents]
    return torch.cat([kept, kept.new_zeros(kept.shape[0], documents - kept.shape[1], kept.shape[2])], dim=1)


def _bits(nats: float, size: int) -> float:
    return nats / (math.log(2) * size) if size else math.nan
