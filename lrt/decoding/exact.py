"""True recurrence over a stretch of prompt: the blocks from the first receiver to the source alone run token by token.

What the blocks below compute does not depend on memory, and nothing waits for the blocks above, so both run once, in
parallel over the stretch.

Legend: B batch, P positions of the stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrt.decoding.prefill_passes import Span
from lrt.decoding.state import DecodeState
from lrt.decoding.step import Runner, stepper_of
from lrt.forward import Row
from lrt.types import Later


def recur(span: Span, state: DecodeState, *, runner: Runner) -> None:
    """Run the blocks below and the token-by-token loop; ``span.finish`` and ``span.commit`` do the rest.

    Args:
        span: of prompts that ``state`` consumes, at its beginning.
        state: takes the keys and values of the loop's blocks in place, and nothing else yet.
        runner: how the steps run.
    """
    assert state.memory is not None and span.memory is not None
    span.enter()
    hidden, memory, source, counts = span.hidden, span.memory, torch.empty_like(span.hidden), span.counts
    own: dict[str, Any] = {name: getattr(state, name).clone() for name in ("memory", "lengths", "document_starts")}
    loop = replace(state, **own, kept_at=(), kept=None)
    stepper = stepper_of(span.model)
    column = torch.zeros(1, dtype=torch.int64, device=counts.device)
    active = torch.ones(len(counts), dtype=torch.bool, device=counts.device)

    def step() -> None:
        row = Row(hidden.index_select(1, column), at_column(span.contexts, column), None, None, span.entry)
        tokens = span.tokens.index_select(1, column)[:, 0]
        out = stepper.step(loop, tokens, active & (column < counts), row=row, stop=span.model.source)
        source.index_copy_(1, column, out[:, None])
        assert loop.memory is not None
        memory.index_copy_(1, column + 1, loop.memory[:, None])
        column.add_(active.any())

    run_step = runner(step, active)
    for _ in range(span.length):
        run_step()
    span.source_hidden, span.in_state = source, range(span.entry, span.model.source)


def at_column(contexts: Sequence[Any], column: Tensor) -> tuple[Any, ...]:
    """Contexts of one position, which a tensor (1,) names, made where a block asks, and once for several blocks."""
    known: dict[int, Later[Tensor]] = {}

    def pick(x: Any) -> Any:
        if x is None or x.shape[1] == 1:
            return x
        if id(x) not in known:
            known[id(x)] = Later(partial(x.index_select, 1, column))
        return known[id(x)]

    return tuple(type(context)(*map(pick, context)) for context in contexts)
