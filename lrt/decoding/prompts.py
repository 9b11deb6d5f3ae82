"""Prompts into states: everything of a prompt but its last token, which the first step of decoding consumes.

Legend: B batch, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lrt.decoding import prefill as prefills
from lrt.decoding import step as decoding
from lrt.decoding.lengths import lengthen, rotated_alike
from lrt.decoding.prefill_contract import Prefill, Report
from lrt.decoding.prefix_cache import PrefixCache
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes


def after(
    model: Decodes,
    before: DecodeState,
    tokens: Tensor,
    counts: Tensor,
    *,
    room: int,
    method: Prefill | None,
    runner: decoding.Runner,
) -> tuple[DecodeState, Report | None]:
    """A state that has consumed what ``before`` has and every prompt but its last token."""
    before.check_model(model)
    if before.batch != len(tokens):
        raise ValueError(
            f"the state has {before.batch} rows, but the prompt {len(tokens)}: "
            "give a row for each, or state.fork(n) and state.select(rows)"
        )
    capacity = int(before.lengths.max()) + tokens.shape[1] + room
    state = DecodeState.empty(
        model, batch=before.batch, capacity=max(capacity, *before.kept_at, 1), keep_at=before.kept_at
    )
    state.put(range(before.batch), before)
    lengthen(model, state, state.lengths + counts)
    if tokens.shape[1] == 1 or int(counts.max()) == 1:
        return state, None
    done = prefills.consume(
        model, state, tokens[:, :-1], counts - 1, method=prefills.exact() if method is None else method, runner=runner
    )
    return done.state, done.report


def before_last(
    model: Decodes, tokens: Tensor, counts: Tensor, capacity: int, keep_at: Sequence[int], prefill: Prefill | None,
    prefix_cache: PrefixCache | None, runner: decoding.Runner,
) -> tuple[DecodeState, Report | None]:  # fmt: skip
    """A state that has consumed every prompt but its last token."""
    method = prefills.exact() if prefill is None else prefill
    if prefix_cache is None or len(tokens) > 1:
        state = DecodeState.empty(model, batch=len(tokens), capacity=capacity, keep_at=keep_at)
        lengthen(model, state, counts)
        if tokens.shape[1] == 1 or int(counts.max()) == 1:
            return state, None
        done = prefills.consume(model, state, tokens[:, :-1], counts - 1, method=method, runner=runner)
        return done.state, done.report
    known, prompt = 0, tokens[0].tolist()
    state = DecodeState.empty(model, batch=1, capacity=capacity, keep_at=keep_at)
    lengthen(model, state, counts)
    found = prefix_cache.find(prompt[:-1], model=model, method=method, keep_at=state.kept_at)
    if found is not None and rotated_alike(model, found, state):
        state.put([0], found)
        known = int(found.lengths[0])
    if known == len(prompt) - 1:
        return state, None
    done = prefills.consume(model, state, tokens[:, known:-1], counts - 1 - known, method=method, runner=runner)
    prefix_cache.put(prompt[:-1], done.state, method=method)
    return done.state, done.report
