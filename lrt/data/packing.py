"""Packing: documents into rows of one length, with nothing lost and nothing padded.

A piece is a separator followed by tokens of one document. A row starts with the piece that waited longest
and is then filled by the longest piece that still fits, sought among a buffer of documents. When none fits,
the longest is cut: the row ends full, and the rest waits behind a separator of its own. So every token of
every document stands in exactly one row, never at its first place, and is a target exactly once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """The part of a document that is not yet in a row."""

    group: int  # which group of documents (a parquet row group, ...)
    document: int  # its number within the group
    offset: int  # tokens of the document that came before
    tokens: np.ndarray  # (n,) the tokens from ``offset`` on, without separator

    def after(self, count: int) -> Piece:
        """What remains when the first ``count`` tokens are used."""
        return self._replace(offset=self.offset + count, tokens=self.tokens[count:])


class Row(NamedTuple):
    """One packed row."""

    tokens: np.ndarray  # (length,) int64
    filled: int  # tokens of it that are real; less than its length only in the last row of a finite stream
    origin: list[tuple[int, int, int]]  # (group, document, offset) of each piece
    spans: list[tuple[int, int]]  # (first, stop) of each piece's tokens in the row, without its separator


class Packer:
    """Best fit of pieces into rows.

    Args:
        next_piece: gives the next document, or None when there are no more.
        length: tokens of a row.
        bos_id: the separator.
        buffer: documents among which the best fit is sought.
        pieces: content of the buffer at the start, oldest first.
    """

    def __init__(
        self,
        next_piece: Callable[[], Piece | None],
        *,
        length: int,
        bos_id: int,
        buffer: int,
        pieces: list[Piece] | None = None,
    ) -> None:
        self._next_piece, self._length, self._bos, self._buffer = next_piece, length, bos_id, buffer
        self._pieces: dict[int, Piece] = {}  # by age: the first is the oldest
        self._sizes: list[tuple[int, int]] = []  # (size with separator, age), sorted
        self._age = 0
        self._finished = False
        for piece in pieces or ():
            self._add(piece)

    def waiting(self) -> list[list[int]]:
        """The buffer as [group, document, offset], oldest first: with the stream's place, all that resume needs."""
        return [[p.group, p.document, p.offset] for p in self._pieces.values()]

    def row(self) -> Row | None:
        """The next row, or None when every document is used up."""
        tokens = np.full(self._length, self._bos, dtype=np.int64)
        origin: list[tuple[int, int, int]] = []
        spans: list[tuple[int, int]] = []
        filled = 0
        while filled < self._length:
            self._fill()
            if not self._pieces:
                break
            room = self._length - filled
            age = next(iter(self._pieces)) if filled == 0 else self._choose(room)
            if room == 1 and len(self._pieces[age].tokens):
                filled += 1  # a separator alone: nothing is cut
                break
            piece = self._take(age)
            part = piece.tokens[: room - 1]
            spans.append((filled + 1, filled + 1 + len(part)))
            tokens[filled + 1 : filled + 1 + len(part)] = part
            filled += 1 + len(part)
            origin.append((piece.group, piece.document, piece.offset))
            if len(part) < len(piece.tokens):
                self._add(piece.after(len(part)))
        return Row(tokens, filled, origin, spans) if origin else None

    def _fill(self) -> None:
        while not self._finished and len(self._pieces) < self._buffer:
            piece = self._next_piece()
            if piece is None:
                self._finished = True
            else:
                self._add(piece)

    def _choose(self, room: int) -> int:
        """Age of the longest piece that fits, or of the longest of all."""
        place = bisect_right(self._sizes, (room, self._age)) - 1
        return self._sizes[place][1]  # place -1, nothing fits: the last, which is the longest

    def _add(self, piece: Piece) -> None:
        self._pieces[self._age] = piece
        insort(self._sizes, (1 + len(piece.tokens), self._age))
        self._age += 1

    def _take(self, age: int) -> Piece:
        piece = self._pieces.pop(age)
        del self._sizes[bisect_left(self._sizes, (1 + len(piece.tokens), age))]
        return piece
