"""The order of training documents, cut into streams that know their place.

A stream belongs to one worker process of one rank. A plan says, as a pure function of (seed, epoch, number of
streams), which documents each stream reads in which order; together the streams read every document once an
epoch. A stream's place is a few numbers and the list of documents that wait in its packing buffer. From the
places of all streams the unread documents of an epoch are known, so they can be dealt to another number of
streams (``deal_again``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lrt.data.documents import CorruptShard, Documents, Found, Reader
from lrt.data.packing import Packer, Piece, Row
from lrt.tables import Table

READ_AHEAD = 64  # documents tokenized at once
SPANS_PER_STREAM = 4  # groups are split until each stream has at least so many spans an epoch


class Span(NamedTuple):
    """Documents first..stop-1 of a group; the first ``offset`` tokens of document ``first`` are already used."""

    group: int
    first: int
    stop: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which documents each stream reads, epoch by epoch.

    Args:
        seed: of every permutation.
        streams: number of streams, over all ranks.
        sizes: (groups,) documents of each group.
        first_epoch: first epoch that is dealt by permutation.
        owed: what is read before that: the unread rest of epochs begun with another number of streams.
    """

    seed: int
    streams: int
    sizes: tuple[int, ...]
    first_epoch: int = 0
    owed: tuple[Span, ...] = ()
    _spans: tuple[Span, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = np.array(self.sizes, dtype=np.int64)
        parts = 1
        while np.minimum(sizes, parts).sum() < min(SPANS_PER_STREAM * self.streams, sizes.sum()):
            parts *= 2
        spans = []
        for group, size in enumerate(self.sizes):
            borders: list[int] = np.linspace(0, size, min(parts, size) + 1).astype(int).tolist() if size else []
            spans += [Span(group, a, b) for a, b in itertools.pairwise(borders)]
        object.__setattr__(self, "_spans", tuple(spans))

    @property
    def start(self) -> int:
        """Epoch at which a stream without history begins."""
        return self.first_epoch - bool(self.owed)

    def spans(self, *, epoch: int, stream: int) -> list[Span]:
        """What a stream reads in an epoch, in order."""
        if epoch < self.first_epoch:
            return list(self.owed[stream :: self.streams])
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._spans))
        return [self._spans[i] for i in order[stream :: self.streams]]

    def order(self, span: Span, *, epoch: int) -> list[int]:
        """Documents of a span in the order in which they are read."""
        rng = np.random.default_rng([self.seed, max(0, epoch), 1 + span.group, span.first])
        return (span.first + rng.permutation(span.stop - span.first)).tolist()


class Place(NamedTuple):
    """Where a stream stands: the next document is ``document`` of span ``turn`` of the epoch."""

    epoch: int
    turn: int
    document: int
    skipped: int  # documents left out until here, because their file cannot be read


class Stream:
    """Endless packed rows of one stream.

    Args:
        documents: the source.
        plan: the order.
        number: which stream of the plan.
        length: tokens of a row.
        bos_id: the separator.
        buffer: documents in the packing buffer.
        state: what ``state_dict`` gave, or None for the start.
        on_corrupt: "stop" or "skip", for files that cannot be read.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        plan: Plan,
        number: int,
        length: int,
        bos_id: int,
        buffer: int,
        state: Table | None = None,
        on_corrupt: str = "stop",
    ) -> None:
        state = state or fresh_state(plan)
        self._read, self._plan, self._number = Reader(documents.read, on_corrupt=on_corrupt), plan, number
        pieces = self._read_waiting(state["pieces"])
        lost = len(state["pieces"]) - len(pieces)
        self._place = Place(state["epoch"], state["turn"], state["document"], state["skipped"] + lost)
        self._walk_from_place = self._walk(self._place)
        self._packer = Packer(self._next_piece, length=length, bos_id=bos_id, buffer=buffer, pieces=pieces)

    def row(self) -> Row:
        """The next row; it is always full."""
        row = self._packer.row()
        assert row is not None and row.filled == len(row.tokens)
        return row

    def state_dict(self) -> Table:
        """The place, as plain numbers; valid between two rows."""
        return {**self._place._asdict(), "pieces": self._packer.waiting()}

    def _next_piece(self) -> Piece:
        self._place, piece = next(self._walk_from_place)
        return piece

    def _walk(self, place: Place) -> Iterator[tuple[Place, Piece]]:
        epoch, first_turn, start, skipped = place
        idle = 0
        while True:
            spans = self._plan.spans(epoch=epoch, stream=self._number)
            found = False
            for turn in range(first_turn, len(spans)):
                order = self._plan.order(spans[turn], epoch=epoch)
                for begin in range(start, len(order), READ_AHEAD):
                    chosen = order[begin : begin + READ_AHEAD]
                    for i, (document, tokens) in enumerate(zip(chosen, self._read(spans[turn].group, chosen))):
                        if tokens is None:
                            skipped += 1
                            continue
                        offset = spans[turn].offset if document == spans[turn].first else 0
                        if len(tokens) > offset:
                            found = True
                            piece = Piece(spans[turn].group, document, offset, tokens[offset:])
                            yield Place(epoch, turn, begin + i + 1, skipped), piece
                start = 0
            idle = 0 if found else idle + 1
            if idle > 2:
                raise ValueError(
                    f"data.train: the {len(spans)} parts of stream {self._number} hold no text: "
                    "use fewer data.workers, or more text"
                )
            first_turn, epoch = 0, epoch + 1

    def _read_waiting(self, waiting: Sequence[Sequence[int]]) -> list[Piece]:
        by_group: dict[int, list[int]] = {}
        for group, document, _ in waiting:
            by_group.setdefault(group, []).append(document)
        found: dict[tuple[int, int], np.ndarray | None] = {}
        for group, documents in by_group.items():
            found.update(zip(((group, d) for d in documents), self._read(group, documents)))
        return [Piece(g, d, offset, tokens[offset:]) for g, d, offset in waiting if (tokens := found[g, d]) is not None]


def in_order(documents: Documents, *, on_corrupt: str) -> Iterator[Piece]:
    """Every document once, in the order of the files."""
    for group, document, tokens in read_in_order(documents.read, documents.sizes, on_corrupt=on_corrupt):
        if len(tokens):
            yield Piece(group, document, 0, tokens)


def read_in_order(
    read: Callable[[int, Sequence[int]], Sequence[Found | CorruptShard]], sizes: np.ndarray, *, on_corrupt: str
) -> Iterator[tuple[int, int, Found]]:
    """Group, number and what ``read`` finds of every document, in the order of the files.

    Args:
        read: a method of ``Documents``, from a group and some of its documents.
        sizes: (groups,) documents of each group.
        on_corrupt: "stop" or "skip", for files and texts that cannot be read.
    """
    reader = Reader(read, on_corrupt=on_corrupt)
    for group, size in enumerate(sizes.tolist()):
        for begin in range(0, size, READ_AHEAD):
            chosen = range(begin, min(size, begin + READ_AHEAD))
            for document, found in zip(chosen, reader(group, chosen)):
                if found is not None:
                    yield group, document, found


def fresh_state(plan: Plan) -> Table:
    """State of a stream that has read nothing."""
    return {"epoch": plan.start, "turn": 0, "document": 0, "pieces": [], "skipped": 0}


def deal_again(plan: Plan, states: Sequence[Table], *, streams: int) -> tuple[Plan, list[Table]]:
    """A plan for another number of streams that goes on where some streams stopped.

    Args:
        plan: the plan of the stopped streams.
        states: the state of each of them, in order.
        streams: the new number of streams.

    Returns:
        The new plan, and the state at which each of its streams begins. What the stopped streams had not put into
        rows, up to the end of the furthest epoch begun, is read first, each document once.
    """
    last = max(state["epoch"] for state in states)
    owed: list[Span] = sorted(Span(g, d, d + 1, offset) for state in states for g, d, offset in state["pieces"])
    whole: list[Span] = []
    for number, state in enumerate(states):
        for epoch in range(state["epoch"], last + 1):
            spans = plan.spans(epoch=epoch, stream=number)
            if epoch == state["epoch"]:
                begun, spans = spans[state["turn"] : state["turn"] + 1], spans[state["turn"] + 1 :]
                for span in begun:
                    rest = plan.order(span, epoch=epoch)[state["document"] :]
                    owed += [Span(span.group, d, d + 1, span.offset if d == span.first else 0) for d in rest]
            whole += spans
    again = Plan(seed=plan.seed, streams=streams, sizes=plan.sizes, first_epoch=last + 1, owed=tuple(owed + whole))
    skipped = sum(state["skipped"] for state in states)
    return again, [fresh_state(again) | {"skipped": skipped if number == 0 else 0} for number in range(streams)]
