"""Packing loses nothing, repeats nothing, and starts every piece with a separator."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrt.data.batch import IGNORED, make_batch
from lrt.data.packing import Packer, Piece

BOS = 0
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def pieces_of(lengths: list[int]) -> list[Piece]:
    """Documents whose tokens are all different, so that each can be found again."""
    starts = np.cumsum([1, *lengths])
    return [Piece(0, i, 0, np.arange(starts[i], starts[i + 1])) for i in range(len(lengths))]


def pack(pieces: list[Piece], *, length: int, buffer: int) -> list:
    source = iter(pieces)
    packer = Packer(lambda: next(source, None), length=length, bos_id=BOS, buffer=buffer)
    return list(iter(packer.row, None))


class Named:
    sizes = np.array([1])

    def name(self, group: int) -> str:
        return f"file[{group}]"


@given(lengths, st.integers(2, 25), st.integers(1, 12))
def test_every_token_is_a_target_exactly_once(lengths, length, buffer):
    rows = pack(pieces_of(lengths), length=length, buffer=buffer)
    batch = make_batch(rows, Named())
    scored = batch.targets[(batch.targets != IGNORED) & (batch.targets != BOS)]
    assert sorted(scored.tolist()) == list(range(1, 1 + sum(lengths)))
    assert batch.input_ids.shape == batch.targets.shape == (len(rows), length - 1)


@given(lengths, st.integers(2, 25), st.integers(1, 12))
def test_rows_are_full_and_targets_are_the_next_inputs(lengths, length, buffer):
    rows = pack(pieces_of(lengths), length=length, buffer=buffer)
    assert all(row.filled == length for row in rows[:-1])
    batch = make_batch(rows, Named())
    assert (batch.input_ids[:, 0] == BOS).all()
    assert torch.equal(batch.targets[:-1, :-1], batch.input_ids[:-1, 1:])
    last = rows[-1].filled - 1
    assert (batch.targets[-1, last:] == IGNORED).all() and (batch.targets[-1, :last] != IGNORED).all()


@given(lengths, st.integers(2, 25), st.integers(1, 12))
def test_a_token_follows_its_predecessor_or_a_separator(lengths, length, buffer):
    for row in pack(pieces_of(lengths), length=length, buffer=buffer):
        tokens = row.tokens[: row.filled]
        inner = np.flatnonzero(tokens != BOS)
        assert all(tokens[i - 1] in (BOS, tokens[i] - 1) for i in inner)
        assert len(row.origin) <= (tokens == BOS).sum()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_documents_that_fit_are_not_cut_when_the_buffer_holds_all_and_lengths_are_equal(lengths):
    equal = [lengths[0]] * len(lengths)
    rows = pack(pieces_of(equal), length=3 * (lengths[0] + 1), buffer=100)
    assert all(offset == 0 for row in rows for _, _, offset in row.origin)


def test_the_longest_that_fits_is_taken_and_the_longest_of_all_is_cut():
    rows = pack(pieces_of([4, 9, 2, 3, 8]), length=10, buffer=10)
    # 4 is oldest (5 with its separator), 3 fits best (4), one place is left for a separator alone;
    # then 9 fills a row; then 2 (3), nothing fits 7: 8 is cut after 6 tokens.
    assert [row.origin for row in rows] == [[(0, 0, 0), (0, 3, 0)], [(0, 1, 0)], [(0, 2, 0), (0, 4, 0)], [(0, 4, 6)]]
    assert rows[0].tokens[-1] == BOS and rows[-1].filled == 3


@given(lengths, st.integers(2, 25), st.integers(1, 12), st.data())
def test_a_packer_goes_on_from_its_waiting_list(lengths, length, buffer, data):
    pieces = pieces_of(lengths)
    whole = pack(pieces, length=length, buffer=buffer)
    cut = data.draw(st.integers(0, len(whole)))
    source = iter(pieces)
    first = Packer(lambda: next(source, None), length=length, bos_id=BOS, buffer=buffer)
    for _ in range(cut):
        first.row()
    waiting = [pieces[d]._replace(offset=o, tokens=pieces[d].tokens[o:]) for _, d, o in first.waiting()]
    second = Packer(lambda: next(source, None), length=length, bos_id=BOS, buffer=buffer, pieces=waiting)
    rest = list(iter(second.row, None))
    assert [row.tokens.tolist() for row in rest] == [row.tokens.tolist() for row in whole[cut:]]


def test_the_source_names_file_group_documents_and_offsets():
    rows = pack(pieces_of([2, 12]), length=6, buffer=10)
    assert make_batch(rows, Named()).source == ("file[0]: 0, 1", "file[0]: 1+2", "file[0]: 1+7")
    many = pack(pieces_of([1] * 12), length=24, buffer=20)
    assert make_batch(many, Named()).source == ("file[0]: 0, 11, 10, 9, 8, 7, 6, 5 and 4 more",)
