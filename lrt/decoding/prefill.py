"""Prefill with a contract: how a prompt enters a state, and a report of how exact the result is.

``exact()`` runs the prompt token by token. ``refine(k)`` and ``fixed_point(...)`` run it in parallel
passes; every pass stops at the source block, because only the memory feeds the next one, and the blocks
above it run once, over the settled memory (docs/method.md, section 3).

Legend: B batch, T prompt tokens, P positions of a chunk, S groups, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrt.accounting import Work, work_flops
from lrt.decoding import step as decoding
from lrt.decoding.exact import recur
from lrt.decoding.prefill_contract import Prefill as Prefill
from lrt.decoding.prefill_contract import Prefilled, Report, Settled
from lrt.decoding.prefill_passes import Span
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes, itself
from lrt.padding import check_prompt

# Residual at which a fixed point counts as reached, by dtype (docs/prefill.md): 0.1 leaves at most 1.5e-4 bits per byte
# to exact prefill with one group and 3.5e-4 with any number; 0.3 leaves more than 0.001. bfloat16 itself ends near
# 2e-2. float16 is not measured; float64 is for checks.
DEFAULT_TOL = {torch.float64: 1e-6, torch.float32: 0.1, torch.bfloat16: 0.1, torch.float16: 0.1}
DEFAULT_GROUPS = 1  # more groups need fewer sweeps, but a GPU runs a sweep of one group in a third of the time of four


# ------------------------------------------------------------------ the three contracts


@dataclass(frozen=True)
class Exact:
    """Token by token; see ``exact``."""

    chunk: int | None = 2048  # bounds what the blocks that run in parallel hold

    def __str__(self) -> str:
        return "exact"

    def settle(
        self,
        model: Decodes,
        state: DecodeState,
        tokens: Tensor,
        counts: Tensor,
        *,
        everywhere: bool,
        runner: decoding.Runner,
    ) -> Settled:
        if state.memory is None:
            return _plain(model, state, tokens, counts, everywhere)
        span, real = Span(model, state, tokens, counts), counts.tolist()
        recur(span, state, runner=runner)
        done = _finish(
            span, state, tokens, real, [0] * len(real), [0.0] * len(real), real, [True] * len(real), everywhere
        )
        return done._replace(work=[Work(float(sum(real)), 0, len(model.blocks), received=True, scored=False)])


@dataclass(frozen=True)
class Refine:
    """k full refinements; see ``refine``."""

    passes: int
    chunk: int | None = None

    def __str__(self) -> str:
        return f"refine({self.passes})"

    def settle(
        self,
        model: Decodes,
        state: DecodeState,
        tokens: Tensor,
        counts: Tensor,
        *,
        everywhere: bool,
        runner: decoding.Runner,
    ) -> Settled:
        if state.memory is None:
            return _plain(model, state, tokens, counts, everywhere)
        span, real = _span(model, state, tokens, counts, kind="refine"), counts.tolist()
        span.first()
        residual = counts.new_zeros(len(real), dtype=torch.float32)
        for _ in range(self.passes):
            residual = span.again()
        exact = [min(n, self.passes + 1) for n in real]
        done = [e >= n for e, n in zip(exact, real)]
        return _finish(span, state, tokens, real, [self.passes] * len(real), residual.tolist(), exact, done, everywhere)


@dataclass(frozen=True)
class FixedPoint:
    """Sweeps over interleaved groups until the memory settles; see ``fixed_point``."""

    groups: int = DEFAULT_GROUPS
    tol: float | None = None
    max_sweeps: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        return f"fixed_point(groups={self.groups}, tol={'default' if self.tol is None else self.tol})"

    def settle(
        self,
        model: Decodes,
        state: DecodeState,
        tokens: Tensor,
        counts: Tensor,
        *,
        everywhere: bool,
        runner: decoding.Runner,
    ) -> Settled:
        if state.memory is None:
            return _plain(model, state, tokens, counts, everywhere)
        tol = DEFAULT_TOL[state.memory.dtype] if self.tol is None else self.tol
        span, real = _span(model, state, tokens, counts, kind=self.groups), counts.tolist()
        span.first()
        sweeps, residual, exact = [0] * len(real), [0.0] * len(real), [min(n, 1) for n in real]
        alive, number = [row for row, n in enumerate(real) if n > exact[row]], 0
        while alive and (self.max_sweeps is None or number < self.max_sweeps):
            changes = span.round(alive, groups=self.groups, number=number, longest=max(real[row] for row in alive))
            number += 1
            for row, change in zip(alive, changes):
                sweeps[row], residual[row], exact[row] = number, change, min(real[row], number * self.groups + 1)
            alive = [row for row in alive if exact[row] < real[row] and not residual[row] <= tol]
        converged = [e >= n or r <= tol for e, n, r in zip(exact, real, residual)]
        residual = [0.0 if e >= n else r for e, n, r in zip(exact, real, residual)]
        return _finish(span, state, tokens, real, sweeps, residual, exact, converged, everywhere)


def exact() -> Prefill:
    """Run a prompt token by token: true recurrence, the library's default.

    Returns:
        A method for ``run`` and ``lrt.generate``; every position is exact.
    """
    return Exact()


def refine(k: int, *, chunk: int | None = None) -> Prefill:
    """One parallel forward and k full refinements, each fed by the pass before; k + 1 positions are exact.

    Args:
        k: refinements.
        chunk: tokens in flight at once, which bounds GPU memory; None = the whole prompt.

    Returns:
        A method for ``run`` and ``lrt.generate``.

    Raises:
        ValueError: k below 1.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"prefill.refine({k!r}): use a whole number of 1 or more")
    return Refine(k, _check_chunk(chunk))


def fixed_point(
    groups: int = DEFAULT_GROUPS, tol: float | None = None, max_sweeps: int | None = None, *, chunk: int | None = None
) -> Prefill:
    """A parallel forward, then sweeps over ``groups`` interleaved subsets until the memory settles.

    After n sweeps groups * n + 1 positions are exact. They are not swept again, and neither are rows that have settled;
    recorded passes of an accelerated model compute them along and drop the result.

    Args:
        groups: subsets of a sweep; the default is the fastest on a GPU (docs/prefill.md).
        tol: a row stops when the largest relative change of its memory in a sweep is at most this; None = the
            measured default of the dtype (docs/prefill.md). A small residual does not bound the error.
        max_sweeps: stop there, converged or not; None = go on until everything is exact.
        chunk: tokens in flight at once, which bounds GPU memory; None = the whole prompt.

    Returns:
        A method for ``run`` and ``lrt.generate``.

    Raises:
        ValueError: groups or max_sweeps below 1, or tol not above 0.
    """
    for name, value in (("groups", groups), ("max_sweeps", max_sweeps)):
        if (name == "groups" or value is not None) and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"prefill.fixed_point({name}={value!r}): use a whole number of 1 or more")
    if tol is not None and not 0 < tol < float("inf"):
        raise ValueError(
            f"prefill.fixed_point(tol={tol}): use a number above 0, leave it out for the measured default, "
            "or use prefill.exact()"
        )
    return FixedPoint(groups, tol, max_sweeps, _check_chunk(chunk))


# ------------------------------------------------------------------ running one


@torch.no_grad()
def run(
    model: Decodes,
    tokens: Tensor,
    *,
    lengths: Tensor | None = None,
    state: DecodeState | None = None,
    capacity: int | None = None,
    keep_at: Sequence[int] = (),
    method: Prefill | None = None,
    everywhere: bool = False,
    runner: decoding.Runner = decoding.eager,
) -> Prefilled:
    """Let rows consume their prompts.

    Args:
        model: a RecurrentDecoder.
        tokens: (B, T) ids, rows beginning at column 0.
        lengths: (B,) real tokens of each row, 1..T; None = T.
        state: to continue; it is left as it is, and a copy returned. None = a new one.
        capacity: of a new state; None = T.
        keep_at: of a new state, see DecodeState.
        method: ``exact()``, ``refine(k)`` or ``fixed_point(...)``; None = exact.
        everywhere: return the last block's output at every position.
        runner: how the single steps of ``exact`` run: ``decoding.eager``, ``decoding.graphed``.

    Raises:
        ValueError: empty prompts, tokens out of range, no room, or a state of another model.
    """
    counts = check_prompt(model, tokens, lengths)
    if state is None:
        state = DecodeState.empty(
            model, batch=len(tokens), capacity=tokens.shape[1] if capacity is None else capacity, keep_at=keep_at
        )
    else:
        state.check_model(model)
        state = state.fork()
    if state.batch != len(tokens):
        raise ValueError(f"{len(tokens)} prompts for a state of {state.batch} rows: give one prompt a row")
    return consume(
        model, state, tokens, counts, method=exact() if method is None else method, everywhere=everywhere, runner=runner
    )


@torch.no_grad()
def consume(
    model: Decodes, state: DecodeState, tokens: Tensor, counts: Tensor, *, method: Prefill, everywhere: bool = False,
    runner: decoding.Runner = decoding.eager,
) -> Prefilled:  # fmt: skip
    """``run`` on a state that is written in place; rows may have nothing to consume."""
    began = time.perf_counter()
    if not hasattr(method, "settle"):
        raise ValueError(f"prefill = {method!r}: use lrt.prefill.exact(), .refine(k) or .fixed_point(...)")
    _check_fit(state, counts)
    size = method.chunk or tokens.shape[1]
    parts: list[Settled] = []
    hidden = None
    for first in range(0, tokens.shape[1], size):
        now = (counts - first).clamp(0, size)
        part = method.settle(model, state, tokens[:, first : first + size], now, everywhere=everywhere, runner=runner)
        parts.append(part)
        hidden = part.hidden if everywhere or hidden is None else torch.where((now > 0)[:, None], part.hidden, hidden)
    if everywhere:
        hidden = torch.cat([part.hidden for part in parts], dim=1)
    assert hidden is not None
    report = _report(model, method, state, parts)  # its numbers wait for the device
    return Prefilled(state, hidden, replace(report, seconds=time.perf_counter() - began))


def _check_fit(state: DecodeState, counts: Tensor) -> None:
    most = int((state.lengths + counts).max())
    if most > state.capacity:
        raise ValueError(
            f"the prompt needs room for {most} tokens, but the state's capacity is {state.capacity}: "
            f"make it with capacity = {most} or more"
        )


def _check_chunk(chunk: int | None) -> int | None:
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"prefill chunk = {chunk!r}: use a whole number of 1 or more tokens, or leave it out")
    return chunk


def _span(model: Decodes, state: DecodeState, tokens: Tensor, counts: Tensor, *, kind: Any) -> Span:
    """The stretch that a parallel prefill works on."""
    return decoding.stepper_of(model).stretch(state, tokens, counts, kind=kind)


def _plain(model: Decodes, state: DecodeState, tokens: Tensor, counts: Tensor, everywhere: bool) -> Settled:
    """A model without recurrence: one causal forward is exact."""
    span, real = _span(model, state, tokens, counts, kind="plain"), counts.tolist()
    hidden = _taken(span.whole(), tokens, counts, everywhere)
    span.commit(state, real, real)
    return Settled(hidden, [0] * len(real), [0.0] * len(real), real, [True] * len(real), span.ran)


def _finish(
    span: Span, state: DecodeState, tokens: Tensor, real: list[int], sweeps: list[int], residual: list[float],
    exact: list[int], converged: list[bool], everywhere: bool,
) -> Settled:  # fmt: skip
    """The blocks above the source, and everything into the state."""
    hidden = _taken(span.finish(), tokens, span.counts, everywhere)
    span.commit(state, real, exact)
    return Settled(hidden, sweeps, residual, exact, converged, span.ran)


def _taken(hidden: Tensor, tokens: Tensor, counts: Tensor, everywhere: bool) -> Tensor:
    """A copy of what is asked for: the next recorded pass will overwrite ``hidden``."""
    if everywhere:
        return hidden[:, : tokens.shape[1]].clone()
    return hidden[torch.arange(len(hidden), device=hidden.device), (counts - 1).clamp_min(0)]


def _report(model: Decodes, method: Prefill, state: DecodeState, parts: Sequence[Settled]) -> Report:
    rows = range(state.batch)
    return Report(
        method=str(method),
        sweeps=tuple(max(part.sweeps[row] for part in parts) for row in rows),
        residual=tuple(max(part.residual[row] for part in parts) for row in rows),
        exact_positions=tuple(torch.minimum(state.approximate_from, state.lengths).tolist()),
        converged=tuple(all(part.converged[row] for part in parts) for row in rows),
        flops=_flops(model, state, parts),
        seconds=0.0,
    )


def _flops(model: Decodes, state: DecodeState, parts: Sequence[Settled]) -> float | None:
    """Forward FLOPs of every block of every pass, and of the head at the last position of every row."""
    if not hasattr(getattr(model.backbone, "config", None), "windows"):
        return None
    head = Work(state.batch, 0, 0, received=False, scored=True)
    work = [head, *(one for part in parts for one in part.work)]
    return work_flops(itself(model), work, length=max(1, int(state.lengths.max())))
