"""Plans of passes: which ones ``lrt.passes`` can run, as a schedule of one's own may give any,
and where a pass ends."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from lrt.types import Pass


@functools.lru_cache(maxsize=256)
def check_plan(plan: tuple[Pass, ...], *, length: int, groups: int) -> None:
    """Refuse a plan that no loop here runs.

    Args:
        plan: of a row.
        length: tokens of the row.
        groups: loss groups of the schedule.

    Raises:
        ValueError: it is no full pass followed by full ones or by whole sweeps over residues,
            and no chunks from left to right, or a loss group has no pass.
    """
    wrong = _misshapen(plan, length)
    missing = [group for group in range(groups) if all(step.group != group for step in plan)]
    if wrong is None and missing:
        wrong = f"no pass belongs to loss group {missing[0]} of {groups}"
    if wrong is None and any(step.group >= groups for step in plan):
        wrong = f"a pass belongs to loss group {max(step.group for step in plan)}, but group_weights has {groups}"
    if wrong is not None:
        raise ValueError(
            f"the schedule's plan for {length} positions cannot be run: {wrong}. "
            "Possible are a pass over all positions alone, "
            "followed by others over all, or by sweeps over the residues 0..S-1 of one step S, "
            f"and contiguous chunks from left to right; the first receives no memory"
        )


def only_feeds(plan: Sequence[Pass], step: Pass, weights: Sequence[float], length: int) -> bool:
    """Whether a pass gives nothing but the memory of the next one, so that it ends at the source block.

    Args:
        plan: of full refinements; under any other, later passes read every block's keys and values.
        step: one of its passes.
        weights: of the loss groups.
        length: tokens per row.
    """
    unscored = step.group < 0 or weights[step.group] == 0
    return unscored and step is not plan[-1] and all(other.covers(length) for other in plan)


def _misshapen(plan: tuple[Pass, ...], length: int) -> str | None:
    """What is wrong with the shape of a plan."""
    if not plan:
        return "it has no passes"
    first, rest = plan[0], plan[1:]
    if first.memory != "zero":
        return f'its first pass receives memory ("{first.memory}"), but there is none yet'
    if any(step.stop > length for step in plan):
        return "a pass goes on behind the row's end"
    received = "all" if first.covers(length) else "first"
    if any(step.memory != received for step in rest):
        return (
            f'a pass after the first has memory "{next(s.memory for s in rest if s.memory != received)}", '
            f'not "{received}"'
        )
    if not first.covers(length):
        borders = [0, *(step.stop for step in plan)]
        right = all((step.start, step.step) == (begin, 1) for step, begin in zip(plan, borders))
        return (
            None
            if right and borders[-1] == length
            else "its first pass leaves positions out, and the passes are no chunks from 0 to the end"
        )
    if all(step.covers(length) for step in rest):
        return None
    stride = rest[0].step
    sweeps = [sorted(step.start for step in rest[i : i + stride]) for i in range(0, len(rest), stride)]
    whole = all(step.step == stride and step.stop >= length for step in rest)
    return (
        None
        if whole and all(sweep == list(range(stride)) for sweep in sweeps)
        else "after the first pass it has no whole sweeps"
    )
