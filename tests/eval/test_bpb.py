"""Bits per byte against plain loops in all modes, and what is kept of documents, positions and passes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Oracle
from strategies import VOCABULARY, models, rows

import lrt
from lrt.config import DataConfig
from lrt.data import build_loader, load_tokenizer
from lrt.eval import MODES, evaluate_bpb

SMALL = ["model.width=8", "model.n_heads=2", "model.n_layers=2", "model.gate_channels=8"]


class Rows(list):
    """Batches that number their documents; every rank knows how many there are."""

    def __init__(self, batches, documents_reached):
        super().__init__(batches)
        self.documents_reached = documents_reached


def held_out(tokens, targets, seed):
    """Random documents and bytes for the targets; -1 is not scored, and a token may stand for no byte of its own."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.randint(-1, 4, targets.shape, generator=generator).masked_fill(targets == -100, -1)
    sizes = torch.randint(0, 5, targets.shape, generator=generator).masked_fill(documents < 0, 0)
    return SimpleNamespace(input_ids=tokens, targets=targets, documents=documents, sizes=sizes)


def oracle_nats(model, batch, mode, row):
    oracle = Oracle(model, batch.input_ids[row].tolist())
    groups = {"zero": oracle.initialize, "parallel": lambda: oracle.interleaved(2), "decode": oracle.sequential}[mode]()
    goals = batch.targets[row].clamp_min(0)
    return [torch.nn.functional.cross_entropy(group, goals, reduction="none").detach() for group in groups]


@settings(max_examples=10)
@given(model=models(), row=rows(batch=st.just(3), length=st.integers(3, 7)), seed=st.integers(0, 2**31))
def test_scores_of_documents_positions_and_passes_against_plain_loops(model, row, seed):
    torch.set_default_dtype(torch.float64)
    try:
        batch = held_out(*row, seed)
        parts = [SimpleNamespace(**{k: v[i : i + 1] for k, v in vars(batch).items()}) for i in range(3)]
        found = evaluate_bpb(model, Rows(parts, 4), schedule=lrt.interleaved(2), buckets=2)
        length = batch.targets.shape[1]
        for mode in MODES:
            nats = [oracle_nats(model, batch, mode, i) for i in range(3)]
            places = [(i, t) for i in range(3) for t in range(length) if batch.documents[i, t] >= 0]
            size = sum(int(batch.sizes[p]) for p in places)
            score = found[mode]
            assert (score.tokens, score.bytes) == (len(places), size)
            for group, value in enumerate(score.groups):
                total = sum(float(nats[i][group][t]) for i, t in places)
                assert math.isnan(value) if size == 0 else math.isclose(value, total / size / math.log(2), rel_tol=1e-9)
            assert score.documents.tolist() == sorted({int(batch.documents[p]) for p in places})
            for n, cost, bytes_ in zip(score.documents, score.document_nats, score.document_bytes):
                mine = [p for p in places if batch.documents[p] == n]
                assert math.isclose(cost, sum(float(nats[i][-1][t]) for i, t in mine), rel_tol=1e-9)
                assert bytes_ == sum(int(batch.sizes[p]) for p in mine)
            for bucket, value in enumerate(score.buckets):
                mine = [(i, t) for i, t in places if t * 2 // length == bucket]
                size = sum(int(batch.sizes[p]) for p in mine)
                total = sum(float(nats[i][-1][t]) for i, t in mine)
                assert math.isnan(value) if size == 0 else math.isclose(value, total / size / math.log(2), rel_tol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


@settings(max_examples=5)
@given(model=models(), row=rows(batch=st.just(4), length=st.just(5)), seed=st.integers(0, 2**31))
def test_ranks_together_score_what_one_process_scores(model, row, seed):
    batch = held_out(*row, seed)
    parts = [SimpleNamespace(**{k: v[i : i + 2] for k, v in vars(batch).items()}) for i in (0, 2)]
    alone = evaluate_bpb(model, Rows(parts, 4))
    tables = []
    evaluate_bpb(model, Rows(parts[:1], 4), reduce=lambda table: tables.append(table) or table)
    together = evaluate_bpb(model, Rows(parts[1:], 4), reduce=lambda table: table + tables.pop(0))
    for mode in MODES:
        assert (together[mode].tokens, together[mode].bytes) == (alone[mode].tokens, alone[mode].bytes)
        assert together[mode].documents.tolist() == alone[mode].documents.tolist()
        np.testing.assert_allclose(together[mode].document_nats, alone[mode].document_nats, rtol=1e-12)


def test_held_out_rows_are_scored_by_document_and_source(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(["one little text", "and another"] * 10))
    (tmp_path / "b.txt").write_text("\n\n".join(["Café, naïve", "x"] * 10), encoding="utf-8")
    model = lrt.build(lrt.load_recipe("lrt_tiny", overrides=[*SMALL, "recurrence.gate_channels=8"])).double()
    loader = build_loader(
        DataConfig(validation=str(tmp_path)),
        tokenizer=load_tokenizer("bytes"),
        sequence_length=32,
        rows=3,
        split="validation",
    )
    found = evaluate_bpb(model, loader)
    assert loader.files() == {f"{tmp_path}/a.txt": (0, 20), f"{tmp_path}/b.txt": (20, 40)}
    for score in found.values():
        assert score.bytes == score.tokens == 10 * (15 + 11) + 10 * (13 + 1) == score.document_bytes.sum()
        first, second = score.part(0, 20) * 260, score.part(20, 40) * 140
        assert score.value == pytest.approx((first + second) / 400) and score.documents.tolist() == list(range(40))
        ends = score.interval()
        assert ends.low < score.value < ends.high and ends.value == pytest.approx(score.value)
    by_table = evaluate_bpb(
        model, loader_without_documents(loader), token_bytes=torch.from_numpy(load_tokenizer("bytes").token_bytes())
    )
    assert by_table["decode"].value == pytest.approx(found["decode"].value)


def loader_without_documents(loader):
    return [SimpleNamespace(input_ids=batch.input_ids, targets=batch.targets) for batch in loader]


def test_a_model_without_memory_is_scored_once():
    model = lrt.build(lrt.load_recipe("baseline_tiny", overrides=SMALL))
    tokens = torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    calls = []
    found = evaluate_bpb(
        model,
        [SimpleNamespace(input_ids=tokens, targets=tokens)],
        token_bytes=torch.ones(257),
        progress=lambda: calls.append(1),
    )
    assert len(calls) == 1 and [score.mode for score in found.values()] == list(MODES) == list(found)
    assert len({score.value for score in found.values()}) == 1


def test_batches_that_do_not_say_their_bytes_are_refused():
    model = lrt.build(lrt.load_recipe("lrt_tiny", overrides=[*SMALL, "recurrence.gate_channels=8"]))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not say the bytes of their targets: give token_bytes"):
        evaluate_bpb(model, [SimpleNamespace(input_ids=tokens, targets=tokens)])
