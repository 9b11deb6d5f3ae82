"""Packed rows: documents that position_ids, document_ids, seq_idx or cu_seq_lens mark are as if each had been run
apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_decoders import make, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import models
from torch import Tensor

import lrt

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
ROUGH = {"rtol": 1e-5, "atol": 1e-5}  # norms of Hugging Face decoders compute in float32
FAMILIES = ("llama", "mistral", "gemma2", "gpt2", "gpt_oss")
_made: dict[str, Any] = {}


def adapted(family: str) -> Any:
    if family not in _made:
        _made[family] = stir(lrt.adapt(make(family)))
    return _made[family]


def restarting(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


SCHEDULES = (
    lambda size: lrt.baseline(),
    lambda size: lrt.refine(2, weights=(1, 1, 1)),
    lambda size: lrt.sequential(),
    lambda size: lrt.interleaved(size, sweeps=2),
    lambda size: lrt.chunked(size),
)


def packed_equals_apart(
    model: Any, lengths: list[int], size: int, seed: int, *, kind: int, training: bool, close: dict[str, float]
) -> None:
    # groups and chunks are counted from the row's beginning, so documents begin at multiples of their size
    if kind >= 3:
        lengths = [-(-n // size) * size for n in lengths]
    ids = torch.randint(1, 13, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    model.train(training)
    found, expected = [], []
    for into, parts, more in (
        (found, [ids], {"position_ids": restarting(lengths)}),
        (expected, ids.split(lengths, dim=1), {}),
    ):
        model.zero_grad()
        outs = [model(part, schedule=SCHEDULES[kind](size), **more) for part in parts]
        logits, memory = torch.cat([o.logits for o in outs], 1), torch.cat([o.memory for o in outs], 1)
        (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sin().sum().backward()
        into += [
            logits.detach(),
            memory.detach(),
            *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()),
        ]
    model.eval()
    for mine, apart in zip(found, expected):
        scale = apart.abs().max().clamp_min(1)  # sums over all logits are large
        torch.testing.assert_close(mine / scale, apart / scale, **close)


KINDS = st.integers(0, len(SCHEDULES) - 1)


@given(
    model=models(layers=st.just(2)),
    lengths=LENGTHS,
    size=st.integers(1, 3),
    seed=st.integers(0, 99),
    kind=KINDS,
    training=st.booleans(),
)
def test_native_documents_are_as_if_run_apart(
    model: Any, lengths: list[int], size: int, seed: int, kind: int, training: bool
) -> None:
    packed_equals_apart(model, lengths, size, seed, kind=kind, training=training, close=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12)
@given(lengths=LENGTHS, size=st.integers(1, 3), seed=st.integers(0, 99), kind=KINDS, training=st.booleans())
def test_adapted_documents_are_as_if_run_apart(
    family: str, lengths: list[int], size: int, seed: int, kind: int, training: bool
) -> None:
    training = training and family != "gpt2"  # which has dropout
    packed_equals_apart(adapted(family), lengths, size, seed, kind=kind, training=training, close=ROUGH)


# transformers itself lets the documents of gpt-oss leak
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_oss"])
@settings(max_examples=8)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_baseline_isolates_documents_as_transformers_does(family: str, lengths: list[int], seed: int) -> None:
    ids = torch.randint(1, 61, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    decoder = make(family)
    with torch.no_grad():
        theirs = decoder(ids, position_ids=restarting(lengths), use_cache=False).logits
        ours = lrt.adapt(decoder)(ids, position_ids=restarting(lengths), schedule=lrt.baseline()).logits
    torch.testing.assert_close(ours, theirs, **ROUGH)


@given(
    lengths=LENGTHS, seed=st.integers(0, 99), name=st.sampled_from(["document_ids", "seq_idx", "cu_seq_lens_q", "all"])
)
def test_every_mark_of_a_border_means_the_same(lengths: list[int], seed: int, name: str) -> None:
    model = adapted("llama")
    ids = torch.randint(1, 61, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    marks: dict[str, dict[str, Any]] = {
        "document_ids": {"document_ids": number},
        "seq_idx": {"seq_idx": number.to(torch.int32)},
        "cu_seq_lens_q": {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        },
    }
    marks["all"] = {k: v for each in marks.values() for k, v in each.items()} | {"position_ids": restarting(lengths)}
    with torch.no_grad():
        expected = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], 1)
        torch.testing.assert_close(model(ids, use_cache=False, **marks[name]).logits, expected, **ROUGH)


def test_rows_of_the_flattening_collator_train_as_their_documents() -> None:
    from transformers import DataCollatorWithFlattening

    model = adapted("llama")
    documents = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]
    for more in ({}, {"return_seq_idx": True, "return_flash_attn_kwargs": True}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **more)([{"input_ids": d} for d in documents])
        model.train()
        packed = model(**batch, schedule=lrt.refine(2)).loss
        apart = [
            model(torch.tensor([d]), labels=torch.tensor([d]), schedule=lrt.refine(2)).loss * (len(d) - 1)
            for d in documents
        ]
        model.eval()
        torch.testing.assert_close(packed, torch.stack(apart).sum() / sum(len(d) - 1 for d in documents), **ROUGH)


def test_marks_that_do_not_fit_are_refused() -> None:
    model, ids = adapted("llama"), torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seq_lens_q is .0, 3., but the rows hold 5 tokens"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k differ"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 5]), cu_seq_lens_k=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="document_ids or seq_idx do not fit input_ids"):
        model(ids, seq_idx=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="position_ids do not count on from what the cache holds"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=True)
    with pytest.raises(ValueError, match="nor do seq_idx and cu_seq_lens_q; pass use_cache=False"):
        model(ids, seq_idx=torch.zeros(1, 5, dtype=torch.int32), use_cache=True)
