"""Held-out rows: every document once, and for every target its document and the bytes that it stands for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lrt.config import DataConfig
from lrt.data.batch import make_batch
from lrt.data.documents import Documents
from lrt.data.packing import Packer, Piece, Row
from lrt.data.stream import read_in_order
from lrt.data.tokenizer import Measured
from lrt.tables import Table

NOT_SCORED = -1


class HeldOut(NamedTuple):
    """Packed rows, what they predict, and what a target counts for."""

    input_ids: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, already shifted; -100 where a row holds nothing
    source: Sequence[str]  # for each row the file, row group and documents it came from
    documents: torch.Tensor  # (B, T) int64, number of each target's document in the data; -1: a separator, or nothing
    sizes: torch.Tensor  # (B, T) int64, bytes of the text that each target stands for


class _Kept(NamedTuple):
    """A packed row with document and bytes of each token."""

    row: Row
    documents: np.ndarray
    sizes: np.ndarray


class ValidationLoader:
    """Every document once; the rows are the same for every number of ranks, and kept for the next time.

    Global row n goes to rank (n // rows) % world_size. Where rows run out, batches are filled with masked rows.

    Attributes:
        fingerprint: of the documents.
        skipped: files and documents left out because they could not be read.
        first_of_group: (groups + 1,) number of the first document of each group; the last is the number of documents.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        data: DataConfig,
        bos_id: int,
        length: int,
        rows: int,
        rank: int,
        world_size: int,
        limit: int | None,
    ) -> None:
        self._documents, self._rows, self._rank = documents, rows, rank
        self._world_size, self._limit = world_size, limit
        self.fingerprint = documents.fingerprint
        self.first_of_group = np.cumsum([0, *documents.sizes.tolist()])
        measured = read_in_order(documents.measure, documents.sizes, on_corrupt=data.on_corrupt)
        self._sizes: dict[tuple[int, int], np.ndarray] = {}  # of documents that are not yet whole in rows
        pieces = self._pieces(measured)
        self._packer = Packer(lambda: next(pieces, None), length=length, bos_id=bos_id, buffer=data.buffer_documents)
        self._packed: list[_Kept] = []
        nothing = Row(np.full(length, bos_id, dtype=np.int64), 0, [], [])
        self._padding = _Kept(nothing, np.full(length, NOT_SCORED, dtype=np.int32), np.zeros(length, dtype=np.int32))
        self._complete = False
        self._start = self._given = 0

    def __iter__(self) -> Iterator[HeldOut]:
        step = self._rows * self._world_size
        first, self._start = self._start, 0
        self._given = first
        while self._reach((first + 1) * step) > first * step:
            begin = first * step + self._rank * self._rows
            mine = self._packed[begin : begin + self._rows]
            first += 1
            self._given = first
            yield self._batch(mine + [self._padding] * (self._rows - len(mine)))
        self._given = 0

    def count_batches(self) -> int:
        """Batches of a round on each rank; packs every row to know it."""
        step = self._rows * self._world_size
        number = 0
        while self._reach((number + 1) * step) > number * step:
            number += 1
        return number

    def files(self) -> dict[str, tuple[int, int]]:
        """First document of each file, and one more than its last."""
        found: dict[str, tuple[int, int]] = {}
        for group, (first, stop) in enumerate(itertools.pairwise(self.first_of_group.tolist())):
            name = self._documents.name(group).rpartition("[")[0]
            found[name] = (found[name][0] if name in found else first, stop)
        return found

    @property
    def documents_reached(self) -> int:
        """One more than the largest number of a document in the rows packed so far; the same on every rank."""
        return max((int(kept.documents.max()) + 1 for kept in self._packed), default=0)

    def _pieces(self, measured: Iterator[tuple[int, int, Measured]]) -> Iterator[Piece]:
        for group, document, (ids, sizes) in measured:
            if len(ids):
                self._sizes[group, document] = sizes.astype(np.int32)
                yield Piece(group, document, 0, ids)

    def _keep(self, row: Row) -> _Kept:
        documents, sizes = self._padding.documents.copy(), self._padding.sizes.copy()
        for (group, document, offset), (first, stop) in zip(row.origin, row.spans):
            whole = self._sizes[group, document]
            documents[first:stop] = self.first_of_group[group] + document
            sizes[first:stop] = whole[offset : offset + stop - first]
            if offset + stop - first == len(whole):
                del self._sizes[group, document]
        return _Kept(row, documents, sizes)

    def _batch(self, kept: Sequence[_Kept]) -> HeldOut:
        batch = make_batch([k.row for k in kept], self._documents)
        return HeldOut(*batch, documents=_targets([k.documents for k in kept]), sizes=_targets([k.sizes for k in kept]))

    def _reach(self, count: int) -> int:
        """Pack until there are ``count`` rows or no more documents; returns the rows there are up to the limit."""
        if self._limit is not None:
            count = min(count, self._limit)
        while len(self._packed) < count and not self._complete:
            row = self._packer.row()
            if row is None:
                self._complete = True
            else:
                self._packed.append(self._keep(row))
        return min(count, len(self._packed))

    def state_dict(self) -> Table:
        """Batches given of the present round."""
        return {"batches": self._given}

    def load_state_dict(self, state: Table) -> None:
        """Begin the next round behind the batches of ``state``."""
        self._start = state["batches"]


def _targets(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """What the tokens of rows have, for their targets: (B, T) int64."""
    return torch.from_numpy(np.stack(rows)[:, 1:].astype(np.int64))
