"""Several sources of documents: as one, and rows drawn from each by its weight."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrt.data.documents import CorruptShard, Documents
from lrt.data.packing import Row
from lrt.data.stream import Plan, Span, Stream, deal_again, fresh_state
from lrt.data.tokenizer import Measured
from lrt.tables import Table

GOLDEN = (math.sqrt(5) - 1) / 2


class SeveralDocuments:
    """The documents of several sources, one after the other."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self.parts = tuple(parts)
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.skipped = sum(part.skipped for part in parts)
        self.fingerprint = hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest()
        self._first = [0, *itertools.accumulate(len(part.sizes) for part in parts)]

    def name(self, group: int) -> str:
        part, own = self._find(group)
        return part.name(own)

    def read(self, group: int, documents: Sequence[int]) -> Sequence[np.ndarray | CorruptShard]:
        part, own = self._find(group)
        return part.read(own, documents)

    def measure(self, group: int, documents: Sequence[int]) -> Sequence[Measured | CorruptShard]:
        part, own = self._find(group)
        return part.measure(own, documents)

    def sizes_of_parts(self) -> list[np.ndarray]:
        """For every source (groups,) documents of each group, 0 for those of other sources."""
        groups = np.arange(len(self.sizes))
        return [
            np.where((first <= groups) & (groups < stop), self.sizes, 0)
            for first, stop in itertools.pairwise(self._first)
        ]

    def _find(self, group: int) -> tuple[Documents, int]:
        number = next(i for i in range(len(self.parts)) if group < self._first[i + 1])
        return self.parts[number], group - self._first[number]


def choose(row: int, *, shares: Sequence[float], phase: float) -> int:
    """Which source gives a row of a stream: after n rows every source has had n times its share, within a few rows.

    Args:
        row: number of the row in its stream, from 0.
        shares: of the sources; they sum to 1.
        phase: 0..1, of the stream, so that streams do not draw from the same source at the same time.

    Returns:
        The source that a sequence without gaps or heaps (multiples of the golden ratio) meets at this row.
    """
    place = (phase + row * GOLDEN) % 1.0
    borders = list(itertools.accumulate(shares))
    return next((i for i, border in enumerate(borders) if place < border), len(shares) - 1)


class MixedStream:
    """Endless packed rows, each of one source.

    Args:
        streams: one for each source.
        shares: of the sources; they sum to 1.
        phase: see ``choose``.
        rows: rows given so far of each source.
    """

    def __init__(
        self, streams: Sequence[Stream], *, shares: Sequence[float], phase: float, rows: Sequence[int]
    ) -> None:
        self._streams, self._shares, self._phase, self._rows = streams, shares, phase, list(rows)

    def row(self) -> Row:
        """The next row; it is always full."""
        source = choose(sum(self._rows), shares=self._shares, phase=self._phase)
        row = self._streams[source].row()
        self._rows[source] += 1
        return row

    def state_dict(self) -> Table:
        """The place, as plain numbers; valid between two rows."""
        return {"rows": list(self._rows), "sources": [stream.state_dict() for stream in self._streams]}


@dataclass(frozen=True)
class Deal:
    """How the documents of every source are dealt to the streams; of one source, its plan alone.

    Args:
        plans: one for each source; groups of other sources have no documents in it.
        shares: of the rows, for each source; they sum to 1.
    """

    plans: tuple[Plan, ...]
    shares: tuple[float, ...]

    @property
    def streams(self) -> int:
        """Number of streams, over all ranks."""
        return self.plans[0].streams

    def fresh(self) -> Table:
        """State of a stream that has read nothing."""
        states = [fresh_state(plan) for plan in self.plans]
        return states[0] if len(states) == 1 else {"rows": [0] * len(states), "sources": states}

    def open(
        self, documents: Documents, *, number: int, state: Table, length: int, bos_id: int, buffer: int, on_corrupt: str
    ) -> Stream | MixedStream:
        """A stream at a state; the other arguments as of ``Stream``."""
        settings: Table = {"length": length, "bos_id": bos_id, "buffer": buffer, "on_corrupt": on_corrupt}
        opened = [
            Stream(documents, plan=plan, number=number, state=place, **settings)
            for plan, place in zip(self.plans, places(state))
        ]
        if len(opened) == 1:
            return opened[0]
        return MixedStream(opened, shares=self.shares, phase=self.phase_of(number), rows=state["rows"])

    def phase_of(self, number: int) -> float:
        """Where a stream begins in the sequence of ``choose``."""
        return float(np.random.default_rng([self.plans[0].seed, number]).random())

    def count(self, rows: Sequence[int], *, number: int, more: int) -> list[int]:
        """Rows of each source when a stream has given ``more`` rows.

        Args:
            rows: that it has given before, of each source.
            number: which stream.
            more: rows.
        """
        counted, first, phase = list(rows), sum(rows), self.phase_of(number)
        for row in range(first, first + more):
            counted[choose(row, shares=self.shares, phase=phase)] += 1
        return counted

    def again(self, states: Sequence[Table], *, streams: int) -> tuple[Deal, list[Table]]:
        """A deal for other streams that go on where all of these stopped, and the states at which they begin."""
        every = [
            deal_again(plan, [places(state)[i] for state in states], streams=streams)
            for i, plan in enumerate(self.plans)
        ]
        deal = Deal(tuple(plan for plan, _ in every), self.shares)
        if len(every) == 1:
            return deal, every[0][1]
        given = [sum(state["rows"][i] for state in states) for i in range(len(every))]
        nothing = [0] * len(every)
        return deal, [
            {"rows": nothing if number else given, "sources": [dealt[number] for _, dealt in every]}
            for number in range(streams)
        ]

    def to_json(self) -> Table | list[Table]:
        """What a state says of the plans: plain numbers."""
        said = [
            {"seed": plan.seed, "first_epoch": plan.first_epoch, "owed": [list(span) for span in plan.owed]}
            for plan in self.plans
        ]
        return said[0] if len(said) == 1 else said

    def saved(self, said: Table | list[Table], *, streams: int) -> Deal:
        """The same sources as ``to_json`` said."""
        every = [said] if isinstance(said, dict) else said
        return Deal(
            tuple(
                Plan(
                    seed=one["seed"], streams=streams, sizes=plan.sizes, first_epoch=one["first_epoch"],
                    owed=tuple(Span(*span) for span in one["owed"]),
                )
                for plan, one in zip(self.plans, every)
            ),
            self.shares,
        )  # fmt: skip


def places(state: Table) -> list[Table]:
    """The states of the single sources in a stream's state."""
    found: list[Table] = state.get("sources", [state])
    return found
