"""The schedules at work (paper section 4): which pass runs next, and which memory feeds it.

How one pass is computed is the engine's business (``lrt.engine``); between passes nothing is written in place.

Legend: B batch, T row length, P positions of the pass, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.engine import Engine, engine_of
from lrt.forward import Row
from lrt.plans import check_plan, only_feeds
from lrt.recurrence import reset_memory, shift_right
from lrt.types import KV, Pass, PassOutput, RecurrentDecoder, Schedule


class PassResult(NamedTuple):
    """A pass that ran: its plan, the last block's output and the memory (B, P, D), and block inputs when asked for."""

    plan: Pass
    hidden: Tensor
    memory: Tensor | None
    inputs: tuple[Tensor, ...] = ()


def run_schedule(
    model: RecurrentDecoder, row: Row, schedule: Schedule, *, generator: torch.Generator | None = None,
    keep_inputs: bool = False,
) -> list[PassResult]:  # fmt: skip
    """Run every pass of a schedule and return what each computed.

    Args:
        model: the decoder's parts.
        row: embedded tokens.
        schedule: which positions, in which order.
        generator: draws the order of subsets, where the schedule asks for it.
        keep_inputs: also return the input of every block.

    Returns:
        One result per pass, in order. A pass that only feeds the next one stops at the source block; its ``hidden``
        must not be scored.

    Raises:
        ValueError: a schedule of one's own has a plan of another shape than those of ``lrt.plans.check_plan``.
    """
    plan, engine = schedule.plan(row.length, generator=generator), engine_of(model, keep_inputs=keep_inputs)
    check_plan(tuple(plan), length=row.length, groups=len(schedule.group_weights(row.length)))
    if len(plan) == 1:
        return refine(engine, row, plan, schedule)
    row, inputs = below_memory(engine, row)
    if not plan[0].covers(row.length):
        results = chunks(engine, row, plan)
    else:
        results = (refine if plan[1].covers(row.length) else interleave)(engine, row, plan, schedule)
    if not inputs:
        return results
    return [r._replace(inputs=(*(x[:, r.plan.positions] for x in inputs), *r.inputs)) for r in results]


def below_memory(engine: Engine, row: Row) -> tuple[Row, tuple[Tensor, ...]]:
    """The row where memory first enters: what the blocks below compute is the same in every pass, so they run once."""
    first = engine.model.receivers[0]
    if not first:
        return row, ()
    out = engine.run(row, stop=first, keep_kv=False)
    return row._replace(hidden=out.hidden, start=first), out.inputs


def interleave(engine: Engine, row: Row, plan: Sequence[Pass], schedule: Schedule) -> list[PassResult]:
    """Initialization, then passes over residues, each fed by the newest memory of the position before."""
    whole, parts = engine.split(row, plan[1].step)
    first = engine.run(whole, graded=plan[0].graded, keep_inputs=schedule.kv_refresh)
    known = first if schedule.kv_refresh else first._replace(inputs=())
    buffer = engine.buffer(whole, parts, handed_on(known, cut=bool(schedule.cut_gradient)))
    results = [PassResult(plan[0], first.hidden, first.memory, first.inputs)]
    for index, step in enumerate(plan[1:], start=1):
        residue, later = step.start, plan[index + 1 :]
        if schedule.kv_refresh:
            buffer.refresh(other.start for other in later)
        stores = buffer.stores(residue)
        out = engine.run(parts[residue], buffer.received(residue), stores=stores, index=index, keep_kv=bool(later))
        results.append(PassResult(step, out.hidden, out.memory, out.inputs))
        if later:
            buffer.write_back(residue, handed_on(out, cut=schedule.cut_gradient is True))
    return results


def refine(engine: Engine, row: Row, plan: Sequence[Pass], schedule: Schedule) -> list[PassResult]:
    """Passes over all positions, each fed by the memory of the pass before; one alone is the baseline."""
    weights, received, graded = schedule.group_weights(row.length), None, 0
    results: list[PassResult] = []
    for step in plan:
        stop = engine.model.source if only_feeds(plan, step, weights, row.length) else None
        out = engine.run(row, received, index=graded, graded=step.graded, keep_kv=False, stop=stop)
        graded += step.graded
        if step.group >= 0:
            results.append(PassResult(step, out.hidden, out.memory, out.inputs))
        if step is not plan[-1]:
            cut = schedule.cut_gradient is True or bool(schedule.cut_gradient) and step is plan[0]
            received = received_everywhere(row, handed_on(out, cut=cut))
    return results


def chunks(engine: Engine, row: Row, plan: Sequence[Pass]) -> list[PassResult]:
    """Contiguous passes, left to right, up to the source block; the blocks above it wait for nothing and run once."""
    row, parts = engine.pieces(row, [step.stop - step.start for step in plan])
    prefix, source = engine.prefix(row), engine.model.source
    outs: list[PassOutput] = []
    received: list[Tensor] = []
    with engine.chunkwise(len(plan)):
        for step, part in zip(plan, parts):
            if outs:
                received.append(received_first(part, outs[-1]))
            outs.append(engine.run(part, received[-1] if received else None, stores=prefix.stores(step), stop=source))
            prefix.keep(outs[-1].kv)
    loop = side_by_side(outs)
    fed = F.pad(torch.cat(received, 1), (0, 0, parts[0].length, 0))  # the first chunk receives nothing
    out = engine.run(row._replace(hidden=loop.hidden, start=source), fed, keep_kv=False)
    whole = Pass(0, row.length, 1, plan[0].group, "first")
    return [PassResult(whole, out.hidden, loop.memory, (*loop.inputs, *out.inputs))]


def received_first(part: Row, before: PassOutput) -> Tensor:
    """m[t-1] (B, P, D) of a chunk: the last memory of the chunk before at its first position, zero elsewhere."""
    assert before.memory is not None
    last = before.memory[:, -1:]
    return reset_memory(last if part.length == 1 else F.pad(last, (0, 0, 0, part.length - 1)), part.starts)


def side_by_side(outs: Sequence[PassOutput]) -> PassOutput:
    """What passes over contiguous chunks computed, as of one pass over all of them; without keys and values."""
    memory = torch.cat([out.memory for out in outs if out.memory is not None], 1)
    inputs = tuple(torch.cat(of_block, 1) for of_block in zip(*(out.inputs for out in outs)))
    return PassOutput(torch.cat([out.hidden for out in outs], 1), memory, (), inputs)


def received_everywhere(row: Row, before: PassOutput) -> Tensor:
    """m[t-1] (B, T, D) for every position of a row, from a pass over all of them."""
    assert before.memory is not None
    return reset_memory(shift_right(before.memory), row.starts)


def handed_on(out: PassOutput, *, cut: bool) -> PassOutput:
    """What later passes read of a pass; with ``cut`` no gradient comes back through it."""
    if not cut or out.memory is None:
        return out
    kv = tuple(KV(key.detach(), value.detach()) for key, value in out.kv)
    return PassOutput(out.hidden, out.memory.detach(), kv, tuple(x.detach() for x in out.inputs))
