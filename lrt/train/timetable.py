"""Which schedule runs at which step: the phases of a recipe, laid over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lrt.config import Recipe
from lrt.schedules import Mixture, needs_memory, phases_of
from lrt.types import Schedule


class Stretch(NamedTuple):
    """A phase in steps of a run."""

    start: int  # its first step, 0-based
    stop: int  # the step after its last
    schedule: Schedule | Mixture
    ramp: int  # steps over which gains and memory projections grow from zero

    @property
    def plain(self) -> bool:
        """Whether no step of it uses memory, so that the memory's parameters rest."""
        return not needs_memory(self.schedule)


@dataclass(frozen=True)
class Timetable:
    """The schedule of every step, as a pure function of the step and the run's seed."""

    stretches: tuple[Stretch, ...]
    seed: int

    def at(self, step: int) -> Stretch:
        """The phase of a step (0-based); steps beyond the last border belong to the last phase."""
        return next((stretch for stretch in self.stretches if step < stretch.stop), self.stretches[-1])

    def seed_of(self, step: int) -> int:
        """What seeds everything that a step draws."""
        return self.seed * 1_000_003 + step

    def schedule(self, step: int) -> Schedule:
        """The schedule of a step; of a mixture, the member that this step draws, the same on every rank."""
        chosen = self.at(step).schedule
        if not isinstance(chosen, Mixture):
            return chosen
        # Orders of subsets are drawn with ``seed_of(step)`` itself and must not follow from the member that was drawn.
        return chosen.draw(torch.Generator().manual_seed(self.seed_of(step) ^ 0x9E3779B9))

    def borders(self, *, before: int) -> tuple[int, ...]:
        """Steps at which a phase ended, of those that have been crossed when ``before`` steps are done."""
        return tuple(stretch.stop for stretch in self.stretches[:-1] if stretch.stop < before)

    def past(self, step: int) -> tuple[Stretch, ...]:
        """What ran in the first ``step`` steps."""
        begun = (stretch for stretch in self.stretches if stretch.start < step)
        return tuple(stretch._replace(stop=min(stretch.stop, step)) for stretch in begun)

    @property
    def entrance(self) -> Stretch | None:
        """The first phase with memory; None where there is none."""
        return next((stretch for stretch in self.stretches if not stretch.plain), None)

    @property
    def kinds(self) -> tuple[Schedule, ...]:
        """Every schedule that may run, each once."""
        found: dict[Schedule, None] = {}
        for stretch in self.stretches:
            members = (
                [schedule for _, schedule in stretch.schedule.members]
                if isinstance(stretch.schedule, Mixture)
                else [stretch.schedule]
            )
            found.update(dict.fromkeys(members))
        return tuple(found)


def plan_timetable(recipe: Recipe, *, steps: int) -> Timetable:
    """Lay the phases of a recipe over the steps of a run: phase i ends at round(until_i x steps).

    Args:
        recipe: ``schedule`` and ``run.seed`` are read.
        steps: optimizer steps of the whole run.

    Raises:
        ValueError: a phase has no step, or is shorter than its ramp.
    """
    stretches: list[Stretch] = []
    start = 0
    for index, phase in enumerate(phases_of(recipe.schedule)):
        stop = round(phase.until * steps)
        key = f"schedule.phases[{index}]" if recipe.schedule.phases is not None else "schedule"
        if steps and stop <= start:
            raise ValueError(
                f"{key} ends at step round({phase.until} x {steps}) = {stop}, where it begins, so it has no step: "
                f"choose values of until farther apart, or a longer horizon"
            )
        if steps and phase.ramp > stop - start:
            raise ValueError(
                f"{key}.ramp = {phase.ramp}, but the phase has {stop - start} steps: "
                "use at most so many, or a longer phase"
            )
        stretches.append(Stretch(start, stop, phase.schedule, phase.ramp))
        start = stop
    return Timetable(tuple(stretches), recipe.run.seed)


def check_borders(timetable: Timetable, *, before: Timetable, step: int) -> None:
    """Refuse a horizon that would move a phase's border among steps that are done.

    Args:
        timetable: of the run as it goes on.
        before: of the same phases under the horizon so far.
        step: steps done.

    Raises:
        ValueError: a step that is done would belong to another phase.
    """
    there, here = before.borders(before=step), timetable.borders(before=step)
    if there == here:
        return
    ends = [[stretch.stop for stretch in table.stretches[:-1]] for table in (before, timetable)]
    raise ValueError(
        f"the new horizon moves the borders of schedule.phases from steps {ends[0]} to {ends[1]}, "
        f"but step {step} is reached: keep the horizon, give values of until that leave the borders behind step {step} "
        "where they are, or go on under a new run.name with training.branch_from"
    )
