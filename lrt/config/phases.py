"""Rules of schedules over time: phases, mixtures, and where memory comes in; no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from lrt.config.ranges import SHARES_SUM_WITHIN, choice_errors, unused_errors

if TYPE_CHECKING:
    from lrt.config.settings import Recipe, ScheduleConfig, StretchConfig


def schedule_errors(c: ScheduleConfig) -> list[str]:
    """Phases and mixtures that do not fit together."""
    if c.phases is None:
        return _mixture_errors("schedule", c)
    beside = [f.name for f in fields(c) if f.name != "phases" and getattr(c, f.name) != f.default]
    errors = [
        f"schedule.{name} = {getattr(c, name)!r} has no effect beside schedule.phases: "
        "give it to a phase, or leave it out"
        for name in beside
    ]
    ends = [phase.until for phase in c.phases]
    if not ends:
        errors.append("schedule.phases = []: give at least one phase, or schedule.kind")
    elif all(isinstance(end, (int, float)) for end in ends) and (sorted(set(ends)) != ends or ends[-1] != 1):
        errors.append(f"schedule.phases end at until = {ends}: use rising shares of the steps, the last 1.0")
    for index, phase in enumerate(c.phases):
        where = f"schedule.phases[{index}]"
        errors += choice_errors(where, phase) + unused_errors(where, phase) + _mixture_errors(where, phase)
    return errors


def _mixture_errors(where: str, c: StretchConfig) -> list[str]:
    if c.kind != "mixture":
        return []
    if not c.mix:
        return [f'{where}.mix = []: a mixture needs members, such as mix = [{{share = 1.0, kind = "refine"}}]']
    errors = []
    shares = [member.share for member in c.mix]
    if all(isinstance(share, (int, float)) for share in shares) and abs(sum(shares) - 1) > SHARES_SUM_WITHIN:
        errors.append(f"{where}.mix has shares that sum to {sum(shares):.6g}: they must sum to 1")
    for index, member in enumerate(c.mix):
        errors += choice_errors(f"{where}.mix[{index}]", member) + unused_errors(f"{where}.mix[{index}]", member)
    return errors


def stretches(c: ScheduleConfig) -> list[tuple[str, StretchConfig]]:
    """The phases of a run and where each stands; one where there are no phases."""
    if c.phases is None:
        return [("schedule", c)]
    return [(f"schedule.phases[{i}]", phase) for i, phase in enumerate(c.phases)]


def _kinds(where: str, c: StretchConfig) -> list[tuple[str, str]]:
    """Every kind of passes in a phase, by the key that names it."""
    if c.kind != "mixture":
        return [(f"{where}.kind", c.kind)]
    return [(f"{where}.mix[{i}].kind", member.kind) for i, member in enumerate(c.mix)]


def entrance_errors(r: Recipe) -> list[str]:
    """Where memory is used, trained or let in, but cannot be."""
    parts = stretches(r.schedule)
    kinds = [_kinds(where, c) for where, c in parts]
    with_memory = [any(kind != "baseline" for _, kind in found) for found in kinds]
    errors = []
    if r.recurrence is None:
        for key, kind in (pair for found in kinds for pair in found if pair[1] != "baseline"):
            errors.append(
                f'{key} = {kind!r} needs memory, but recurrence is off: use kind = "baseline", or switch recurrence on'
            )
    elif r.training.stage == "memory":
        for (where, _), used in zip(parts, with_memory):
            if not used:
                errors.append(
                    f'training.stage = "memory" has nothing to train where {where} is plain: use stage = "all", '
                    "or passes with memory"
                )
    for index, (where, c) in enumerate(parts):
        if not c.ramp:
            continue
        if not with_memory[index]:
            if c.kind == "mixture":  # of another kind, unused_errors says so
                errors.append(
                    f"{where}.ramp = {c.ramp} has no effect: every member of {where}.mix is plain; leave it out"
                )
        elif any(with_memory[:index]):
            errors.append(
                f"{where}.ramp = {c.ramp} has no effect: memory came in before; give it to the first phase with memory"
            )
        elif r.training.init_from is not None:
            errors.append(
                f"{where}.ramp = {c.ramp} would add the values of recurrence.init to those of "
                "training.init_from: leave one out"
            )
    return errors
