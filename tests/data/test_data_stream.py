"""Streams read every document once an epoch, resume exactly, and can be dealt to another number of streams."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt.data.documents import CorruptShard
from lrt.data.stream import Plan, Stream, deal_again, in_order

BOS = 0


class Numbers:
    """Documents whose tokens are all different."""

    skipped = 0
    fingerprint = "numbers"

    def __init__(self, groups: list[list[int]], broken: frozenset[int] = frozenset()) -> None:
        flat = [length for group in groups for length in group]
        starts = iter(np.cumsum([1, *flat]).tolist())
        self.groups = [[np.arange(s, s + length) for length, s in zip(group, starts)] for group in groups]
        self.sizes = np.array([len(group) for group in groups])
        self.total = sum(flat)
        self.broken = broken

    def name(self, group: int) -> str:
        return str(group)

    def read(self, group: int, documents) -> list[np.ndarray]:
        if group in self.broken:
            raise CorruptShard(f"group {group} is broken")
        return [self.groups[group][i] for i in documents]


groups = st.lists(st.lists(st.integers(1, 20), min_size=0, max_size=6), min_size=1, max_size=8).filter(
    lambda g: sum(map(len, g)) >= 6
)
stream_counts = st.integers(1, 6)


def open_streams(documents, plan, states=None, *, length=8, buffer=4, on_corrupt="stop"):
    return [
        Stream(
            documents,
            plan=plan,
            number=i,
            length=length,
            bos_id=BOS,
            buffer=buffer,
            state=states and states[i],
            on_corrupt=on_corrupt,
        )
        for i in range(plan.streams)
    ]


def plan_of(documents, streams, **more) -> Plan:
    return Plan(seed=3, streams=streams, sizes=tuple(documents.sizes.tolist()), **more)


def tokens_of(documents, spans) -> Counter:
    found: Counter = Counter()
    for span in spans:
        for d in range(span.first, span.stop):
            found.update(documents.groups[span.group][d][span.offset if d == span.first else 0 :].tolist())
    return found


def emitted(streams, counts) -> Counter:
    found: Counter = Counter()
    for stream, count in zip(streams, counts):
        for _ in range(count):
            found.update(stream.row().tokens.tolist())
    del found[BOS]
    return found


@given(groups, stream_counts, st.integers(0, 3))
def test_streams_are_disjoint_and_complete_in_every_epoch(groups, streams, epoch):
    documents = Numbers(groups)
    plan = plan_of(documents, streams)
    spans = [span for number in range(streams) for span in plan.spans(epoch=epoch, stream=number)]
    assert tokens_of(documents, spans) == Counter(range(1, 1 + documents.total))
    for span in spans:
        assert sorted(plan.order(span, epoch=epoch)) == list(range(span.first, span.stop))


@given(groups, st.data())
def test_every_stream_has_a_share_when_there_are_enough_documents(groups, data):
    streams = data.draw(st.integers(1, sum(map(len, groups))))
    plan = plan_of(Numbers(groups), streams)
    assert all(plan.spans(epoch=0, stream=number) for number in range(streams))


def test_the_order_depends_on_seed_and_epoch():
    documents = Numbers([[3] * 50] * 4)
    orders = [
        [plan.order(span, epoch=epoch) for span in plan.spans(epoch=epoch, stream=0)]
        for plan, epoch in (
            (plan_of(documents, 1), 0),
            (plan_of(documents, 1), 1),
            (Plan(seed=4, streams=1, sizes=(50,) * 4), 0),
        )
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == [
        plan_of(documents, 1).order(span, epoch=0) for span in plan_of(documents, 1).spans(epoch=0, stream=0)
    ]


@given(groups, stream_counts, st.integers(0, 40), st.integers(2, 30), st.integers(1, 8))
def test_a_stream_resumes_exactly_wherever_it_is_cut(groups, streams, cut, length, buffer):
    documents = Numbers(groups)
    plan = plan_of(documents, streams)
    for number in range(streams):

        def make(state=None, number=number):
            return Stream(documents, plan=plan, number=number, length=length, bos_id=BOS, buffer=buffer, state=state)

        whole = make()
        for _ in range(cut):
            whole.row()
        resumed = make(whole.state_dict())
        assert resumed.state_dict() == whole.state_dict()
        for _ in range(12):
            assert whole.row().tokens.tolist() == resumed.row().tokens.tolist()


@given(groups, stream_counts, stream_counts, st.lists(st.integers(0, 25), min_size=12, max_size=12))
def test_dealing_again_loses_and_repeats_nothing(groups, before, after, counts):
    documents = Numbers(groups)
    plan = plan_of(documents, before)
    streams = open_streams(documents, plan)
    used = emitted(streams, counts)
    once = Counter(range(1, 1 + documents.total))
    # twice: the second deal starts inside the first one's rest
    for streams_then, more in ((after, counts[6:]), (before, counts[3:])):
        states = [stream.state_dict() for stream in streams]
        last = max(state["epoch"] for state in states)
        plan, dealt = deal_again(plan, states, streams=streams_then)
        epochs = Counter(dict.fromkeys(once, last + 1))
        assert used + tokens_of(documents, plan.owed) == epochs
        shares = [span for number in range(streams_then) for span in plan.spans(epoch=plan.start, stream=number)]
        assert sorted(shares) == sorted(plan.owed) or not plan.owed
        streams = open_streams(documents, plan, dealt)
        used += emitted(streams, more)


@given(groups, stream_counts, st.integers(0, 15))
def test_what_is_owed_comes_before_the_next_epoch(groups, after, count):
    documents = Numbers(groups)
    stream = open_streams(documents, plan_of(documents, 1))[0]
    used = emitted([stream], [count])
    plan, dealt = deal_again(plan_of(documents, 1), [stream.state_dict()], streams=after)
    streams = open_streams(documents, plan, dealt, buffer=1)
    epochs = stream.state_dict()["epoch"] + 1
    for one in streams:  # a buffer of one document: rows follow the plan's order
        while one.state_dict()["epoch"] < plan.first_epoch:
            used += emitted([one], [1])
    assert all(used[token] >= epochs for token in range(1, 1 + documents.total))


def test_a_broken_group_stops_or_is_skipped_and_counted():
    documents = Numbers([[5] * 10, [5] * 10, [5] * 10], broken=frozenset({1}))
    (stopping,) = open_streams(documents, plan_of(documents, 1))
    with pytest.raises(CorruptShard, match=r"group 1 is broken"):
        for _ in range(100):
            stopping.row()
    (skipping,) = open_streams(documents, plan_of(documents, 1), on_corrupt="skip")
    found = emitted([skipping], [19])
    broken = set(np.concatenate(documents.groups[1]).tolist())
    assert not broken & set(found) and skipping.state_dict()["skipped"] == 10
    (resumed,) = open_streams(documents, plan_of(documents, 1), [skipping.state_dict()], on_corrupt="skip")
    assert resumed.state_dict() == skipping.state_dict()
    documents.broken = frozenset({0, 1})  # what waits in the buffer may be lost later
    waiting = sum(group == 0 for group, _, _ in skipping.state_dict()["pieces"])
    assert waiting
    (resumed,) = open_streams(documents, plan_of(documents, 1), [skipping.state_dict()], on_corrupt="skip")
    assert resumed.state_dict()["skipped"] == 10 + waiting
    assert sum(len(p.tokens) for p in in_order(documents, on_corrupt="skip")) == 50


def test_a_stream_without_any_text_says_so():
    documents = Numbers([[5] * 10], broken=frozenset({0}))
    (stream,) = open_streams(documents, plan_of(documents, 1), on_corrupt="skip")
    with pytest.raises(ValueError, match=r"data.train: the 4 parts of stream 0 hold no text: use fewer data.workers"):
        stream.row()


@given(groups)
def test_in_order_gives_every_document_once(groups):
    documents = Numbers(groups)
    tokens = itertools.chain.from_iterable(piece.tokens.tolist() for piece in in_order(documents, on_corrupt="stop"))
    assert list(tokens) == list(range(1, 1 + documents.total))
