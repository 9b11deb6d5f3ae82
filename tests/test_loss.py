"""Chunked cross entropy, masking, weights and normalization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import VOCABULARY, models, rows

import lrt
from lrt.loss import chunked_cross_entropy


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    chunk=st.integers(0, 12),
    softcap=st.sampled_from([None, 2.0, 15.0]),
    seed=st.integers(0, 999),
)
def test_chunked_is_whole(batch, length, chunk, softcap, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(batch, length, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (batch, length))
    targets[torch.rand(batch, length) < 0.3] = -100
    logits = hidden @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    total, each = chunked_cross_entropy(hidden, weight, targets, softcap=softcap, chunk=chunk)
    torch.testing.assert_close(each.flatten(), expected.detach())
    torch.testing.assert_close(total, expected.sum())
    for got, want in zip(
        torch.autograd.grad(3 * total, (hidden, weight)), torch.autograd.grad(3 * expected.sum(), (hidden, weight))
    ):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_cross_entropy(hidden, weight, targets, softcap=softcap, chunk=chunk), (total.detach(), each)
        )


def test_half_precision_stays_near_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 16, 32), torch.randn(64, 32) * 0.2
    targets = torch.randint(0, 64, (2, 16))
    exact, half = (
        chunked_cross_entropy(hidden.to(d), weight.to(d), targets, softcap=15.0)[0]
        for d in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    assert abs(half - exact) / exact < 0.01


@settings(max_examples=10)
@given(model=models(), row=rows(length=st.integers(3, 8)))
def test_fully_masked_gives_zero_loss_zero_gradient_and_no_nan(model, row):
    tokens, targets = row
    subset = targets.clone()
    subset[:, 0::2] = -100  # one subset of two has nothing to score
    for goals, empty in ((torch.full_like(targets, -100), True), (subset, bool((subset == -100).all()))):
        out = model(tokens, targets=goals, schedule=lrt.interleaved(2))
        assert torch.isfinite(out.loss) and (out.loss == 0) == empty
        grads = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
        assert all(g is None or torch.isfinite(g).all() for g in grads)
        assert not empty or all(g is None or not g.any() for g in grads)


@settings(max_examples=10)
@given(model=models(), row=rows(length=st.integers(2, 8)), weights=st.lists(st.floats(0.1, 3), min_size=3, max_size=3))
def test_loss_is_linear_in_the_weights(model, row, weights):
    tokens, targets = row
    out = model(tokens, targets=targets, schedule=lrt.refine(2, weights=weights))
    expected = sum(w * g for w, g in zip(weights, out.groups)) / sum(weights)
    torch.testing.assert_close(out.loss, expected)
    twice = model(tokens, targets=targets, schedule=lrt.refine(2, weights=[2 * w for w in weights]))
    torch.testing.assert_close(twice.loss, out.loss)


@settings(max_examples=10)
@given(
    model=models(),
    row=rows(batch=st.just(4), length=st.integers(2, 8)),
    schedule=st.sampled_from([lrt.interleaved(2), lrt.refine(1), lrt.chunked(3)]),
)
def test_accumulation_is_the_large_batch(model, row, schedule):
    tokens, targets = row
    whole = model(tokens, targets=targets, schedule=schedule)
    valid = (targets != -100).sum()
    parts = [
        model(t, targets=g, schedule=schedule, valid_targets=valid).loss
        for t, g in zip(tokens.split(1), targets.split(1))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
    if not valid:
        return
    parameters = list(model.parameters())
    for got, want in zip(
        torch.autograd.grad(sum(parts), parameters, allow_unused=True),
        torch.autograd.grad(whole.loss, parameters, allow_unused=True),
    ):
        torch.testing.assert_close(got, want)


def test_labels_are_shifted_inside_and_targets_are_not():
    model = lrt.build(lrt.load_recipe("lrt_tiny.toml"))
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    shifted = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    model.train()
    one, two = model(tokens, labels=tokens), model(tokens, targets=shifted)
    assert torch.equal(one.loss, two.loss) and one.logits is None
    with pytest.raises(ValueError, match="both targets and labels were given"):
        model(tokens, targets=shifted, labels=tokens)
    with pytest.raises(ValueError, match=r"targets have shape \(2, 8\), but input_ids \(2, 9\)"):
        model(tokens, targets=shifted[:, 1:])
