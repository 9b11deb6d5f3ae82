"""Log-probabilities of continuations equal those of whole rows, in every memory mode, whatever shares a context or a
batch."""

from __future__ import annotations

import pytest
import torch
from strategies import randomized

import lrt
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.eval.choices import ChoiceScorer
from lrt.model import build_model

PAIRS = [
    ((0, 3, 4, 5), (6,)), ((0, 3, 4, 5), (7, 8, 9)), ((0, 1), (2, 3)), ((0, 3, 4, 5), (6, 6)), ((0,), (5,)),
    ((0, 9, 8, 7, 6, 5, 4, 3, 2), (1, 1)), ((0, 1), (2, 4, 6, 8)),
]  # fmt: skip


def model(recurrence=True):
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=12, sequence_length=16)
    found = randomized(
        build_model(config, RecurrenceConfig(separator=0) if recurrence else None, dtype=torch.float64), 4, 0.4
    ).eval()
    found.train_schedule = lrt.interleaved(2, weights=(0, 1)) if recurrence else lrt.baseline()
    return found


def by_rows(given, schedule, pairs, longest):
    for context, continuation in pairs:
        context = context[-(longest + 1 - len(continuation)) :]
        row = torch.tensor([[*context, *continuation[:-1]]])
        with torch.no_grad():
            logits = given(row, schedule=schedule).logits[0, len(context) - 1 :].float()
        goals = torch.tensor(continuation)
        yield logits.log_softmax(-1).gather(1, goals[:, None])[:, 0].tolist(), bool((logits.argmax(-1) == goals).all())


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("longest", [16, 5])
@pytest.mark.parametrize("memory", ["decode", "zero", "parallel"])
def test_continuations_are_scored_as_whole_rows(memory, longest, rows):
    given = model()
    schedule = {"decode": lrt.sequential(), "zero": lrt.baseline(), "parallel": lrt.interleaved(2)}[memory]
    found = ChoiceScorer(given, memory=memory, max_length=longest, rows=rows)(PAIRS)
    for one, (logprobs, greedy) in zip(found, by_rows(given, schedule, PAIRS, longest), strict=True):
        assert one.logprobs == pytest.approx(logprobs, abs=1e-5) and one.greedy == greedy
    best = int(given(torch.tensor([[0, 1]]), schedule=schedule).logits[0, -1].argmax())
    assert ChoiceScorer(given, memory=memory, max_length=16)([((0, 1), (best,))])[0].greedy


def test_a_common_context_is_decoded_once(monkeypatch):
    from lrt.eval import choices

    seen, run = [], choices.prefills.run
    monkeypatch.setattr(
        choices.prefills, "run", lambda m, tokens, **more: seen.append(tuple(tokens.shape)) or run(m, tokens, **more)
    )
    ChoiceScorer(model(), max_length=16)([((0, 3, 4, 5, 6), (n, 1)) for n in range(4)])
    assert seen == [(1, 5), (4, 1)]


def test_a_model_without_memory_and_what_is_refused():
    plain = model(recurrence=False)
    found = ChoiceScorer(plain, max_length=16)(PAIRS)
    for one, (logprobs, greedy) in zip(found, by_rows(plain, lrt.baseline(), PAIRS, 16), strict=True):
        assert one.logprobs == pytest.approx(logprobs, abs=1e-5) and one.greedy == greedy
    for memory, message in (("parallel", "the model has no memory"), ("exact", "use decode, zero or parallel")):
        with pytest.raises(ValueError, match=message):
            ChoiceScorer(plain, memory=memory, max_length=16)
    for pair, message in (
        (((), (1,)), "empty context"),
        (((0,), ()), "empty context or continuation"),
        (((0,), (1,) * 18), "longer than the model"),
    ):
        with pytest.raises(ValueError, match=message):
            ChoiceScorer(plain, max_length=16)([pair])
