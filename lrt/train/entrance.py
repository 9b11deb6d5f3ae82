"""The entrance into recurrence: the memory's values and learning rates grow from zero, so that nothing jumps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrt.train.optim.groups import is_memory
from lrt.train.optim.muon import local
from lrt.train.timetable import Timetable

# keeps its value: a map and gains that are both zero never get a gradient, and gains of zero add nothing
MAP = "injection.map.weight"


@dataclass(frozen=True)
class Entrance:
    """Memory parameters that start at zero and receive their initial values in equal parts, one per step,
    beside the optimizer's updates.

    Their learning rates rise over the same steps, because an optimizer without a past takes full steps in every
    direction. The model itself is what grows, so evaluations, checkpoints and exports on the way hold what is trained.
    """

    parameters: tuple[nn.Parameter, ...]
    wholes: tuple[Tensor, ...]  # the initial values, laid out as the parameters
    start: int  # first step of the ramp
    steps: int

    @classmethod
    def of(cls, named: Iterable[tuple[str, nn.Parameter]], *, start: int, steps: int) -> Entrance:
        """Take the memory's present values as what it is to receive, and set it to zero.

        Args:
            named: parameters of the model with their names; those of the recurrence are taken, but for ``MAP``.
            start: first step of the ramp.
            steps: length of the ramp.
        """
        chosen = tuple(parameter for name, parameter in named if is_memory(name) and name != MAP)
        entrance = cls(chosen, tuple(p.detach().clone() for p in chosen), start, steps)
        entrance.clear()
        return entrance

    @torch.no_grad()
    def clear(self) -> None:
        """Set the parameters to zero: the state before the ramp."""
        torch._foreach_zero_([local(p) for p in self.parameters])

    def share(self, step: int) -> float:
        """Share of the memory's learning rates at a step (0-based)."""
        return min(1.0, max(0, step - self.start + 1) / self.steps)

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """After the update of a step (0-based): the next part, as long as the ramp lasts."""
        if self.start <= step < self.start + self.steps:
            torch._foreach_add_(
                [local(p) for p in self.parameters], [local(w) for w in self.wholes], alpha=1 / self.steps
            )


def open_entrance(
    timetable: Timetable, named: Iterable[tuple[str, nn.Parameter]], *, began: int = 0
) -> Entrance | None:
    """The ramp into the first phase with memory, the parameters set to zero; None where the recipe asks for none.

    Args:
        timetable: of the run.
        named: parameters of the model with their names, those of the recurrence with their initial values.
        began: step at which the run began: a branch may begin inside the phase.

    Raises:
        ValueError: the phase ends before the ramp.
    """
    stretch = timetable.entrance
    if stretch is None or not stretch.ramp:
        return None
    start = max(stretch.start, began)
    if start + stretch.ramp > stretch.stop:
        raise ValueError(
            f"schedule ramp = {stretch.ramp}, but the phase with memory has {max(0, stretch.stop - start)} "
            f"steps from step {start} on, where this branch begins: use at most so many"
        )
    return Entrance.of(named, start=start, steps=stretch.ramp)
