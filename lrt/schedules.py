"""Schedules as plain data: which positions a training step computes, in which order (paper section 4).

A schedule knows nothing of tensors. ``lrt.passes`` runs any object that follows ``lrt.types.Schedule``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch

from lrt.config import ScheduleConfig, Weights
from lrt.config.ranges import SHARES_SUM_WITHIN
from lrt.config.settings import PassesConfig, StretchConfig
from lrt.types import Pass, Schedule

Order = Literal["ascending", "rotated", "random"]
Cut = bool | Literal["initialization"]


@dataclass(frozen=True)
class Baseline:
    """The initialization forward alone; see ``baseline``."""

    cut_gradient: bool = False
    kv_refresh: bool = False
    token_compute: int = 1

    def group_weights(self, length: int) -> tuple[float, ...]:
        return (1.0,)

    def plan(self, length: int, *, generator: torch.Generator | None = None) -> tuple[Pass, ...]:
        return (Pass(0, length, 1, 0, "zero"),)


@dataclass(frozen=True)
class Interleaved:
    """Initialization, then sweeps of S disjoint subsets; see ``interleaved``."""

    subsets: int
    sweeps: int = 1
    order: Order = "ascending"
    kv_refresh: bool = False
    weights: Weights = "paper"
    cut_gradient: Cut = False

    @property
    def token_compute(self) -> int:
        return 1 + self.sweeps

    def group_weights(self, length: int) -> tuple[float, ...]:
        if isinstance(self.weights, str):
            return (1.0,) + (float(min(self.subsets, length)),) * self.sweeps
        return self.weights

    def plan(self, length: int, *, generator: torch.Generator | None = None) -> tuple[Pass, ...]:
        subsets = min(self.subsets, length)
        if self.kv_refresh and subsets == length:
            raise ValueError(
                f"schedule.kv_refresh has no effect with {self.subsets} subsets of a row of {length} tokens: "
                "use fewer subsets, or switch it off"
            )
        alone = bool(self.cut_gradient) and self.group_weights(length)[0] == 0
        passes = [Pass(0, length, 1, 0, "zero", graded=not alone)]
        for sweep in range(self.sweeps):
            residues = _residues(subsets, self.order, generator)
            passes += [Pass(r, length, subsets, sweep + 1, "all") for r in residues]
        return tuple(passes)


@dataclass(frozen=True)
class Refine:
    """Initialization, then K passes over all positions; see ``refine``."""

    passes: int
    weights: Weights = "paper"
    cut_gradient: Cut = False
    settle: int = 0
    kv_refresh: bool = False

    @property
    def token_compute(self) -> int:
        return 1 + self.settle + self.passes

    def group_weights(self, length: int) -> tuple[float, ...]:
        return (1.0,) * (1 + self.passes) if isinstance(self.weights, str) else self.weights

    def plan(self, length: int, *, generator: torch.Generator | None = None) -> tuple[Pass, ...]:
        scored = [weight > 0 for weight in self.group_weights(length)]
        first = Pass(0, length, 1, 0, "zero", graded=scored[0] or not (self.settle or self.cut_gradient))
        settling = [Pass(0, length, 1, -1, "all", graded=False)] * self.settle
        graded = [s or self.cut_gradient is not True for s in scored[1:-1]] + [True]
        return (first, *settling, *(Pass(0, length, 1, k, "all", graded=g) for k, g in enumerate(graded, start=1)))


@dataclass(frozen=True)
class Chunked:
    """Contiguous chunks left to right; see ``chunked``."""

    chunk: int
    cut_gradient: bool = False
    kv_refresh: bool = False
    token_compute: int = 1

    def group_weights(self, length: int) -> tuple[float, ...]:
        return (1.0,)

    def plan(self, length: int, *, generator: torch.Generator | None = None) -> tuple[Pass, ...]:
        starts = range(0, length, min(self.chunk, length))
        return tuple(Pass(s, min(s + self.chunk, length), 1, 0, "first" if s else "zero") for s in starts)


@dataclass(frozen=True)
class Mixture:
    """Several schedules; each step draws one. See ``mixture``."""

    members: tuple[tuple[float, Schedule], ...]  # (share of the steps, schedule)

    def draw(self, generator: torch.Generator | None = None) -> Schedule:
        """The schedule of one step.

        Args:
            generator: decides; None = torch's default one.
        """
        device = "cpu" if generator is None else generator.device
        place = float(torch.rand((), dtype=torch.float64, generator=generator, device=device))
        ends = list(accumulate(share for share, _ in self.members))
        return next((schedule for end, (_, schedule) in zip(ends, self.members) if place < end), self.members[-1][1])

    @property
    def most(self) -> Schedule:
        """The member with most passes, which stands for the mixture where one schedule is asked for."""
        return max((schedule for _, schedule in self.members), key=lambda s: (s.token_compute, isinstance(s, Chunked)))


class Phase(NamedTuple):
    """A part of a run with a schedule of its own."""

    until: float  # the share of the run's steps at which it ends
    schedule: Schedule | Mixture
    ramp: int  # steps over which gains and memory projections grow from zero


def _residues(subsets: int, order: Order, generator: torch.Generator | None) -> list[int]:
    if order == "ascending" or subsets == 1:
        return list(range(subsets))
    if order == "random":
        return torch.randperm(subsets, generator=generator).tolist()
    offset = int(torch.randint(subsets, (), generator=generator))
    return [(offset + r) % subsets for r in range(subsets)]


# ------------------------------------------------------------------ the public constructors


def baseline() -> Schedule:
    """The initialization forward alone: every position, zero memory.

    Returns:
        A schedule of 1x token compute.
    """
    return Baseline()


def interleaved(
    S: int,
    sweeps: int = 1,
    order: Order = "ascending",
    kv_refresh: bool = False,
    weights: str | Sequence[float] = "paper",
    cut_gradient: Cut = False,
) -> Schedule:
    """Initialization, then ``sweeps`` times S passes over the positions t = r (mod S) (paper section 4.2).

    Args:
        S: subsets; clamped to the row's length.
        sweeps: how often every position is recomputed.
        order: residues 0..S-1, rotated by a drawn offset, or in random order (drawn from the model call's generator).
        kv_refresh: re-project the memory part of keys and values not yet visited after each pass.
        weights: loss weight of the initialization and of each sweep; "paper" = (1, S, S, ...).
        cut_gradient: no gradient flows from a pass into the passes before it; "initialization" cuts there alone. A pass
            that is neither scored nor reached by a gradient has no backward.

    Returns:
        A schedule of (1 + sweeps)x token compute.

    Raises:
        ValueError: S or sweeps below 1, bad weights, or kv_refresh where it has no effect.
    """
    _at_least_one("subsets", S)
    _at_least_one("sweeps", sweeps)
    if order not in ("ascending", "rotated", "random"):
        raise ValueError(f"schedule.order = {order!r}: use ascending, rotated or random")
    if kv_refresh and (S == 1 or sweeps > 1):
        raise ValueError(
            f"schedule.kv_refresh has no effect with subsets = {S}, sweeps = {sweeps}: "
            "use subsets > 1 and one sweep, or switch it off"
        )
    if S == 1 and order != "ascending":
        raise ValueError(f"schedule.order = {order!r} has no effect with one subset: use subsets > 1, or ascending")
    return Interleaved(S, sweeps, order, kv_refresh, _check_weights(weights, 1 + sweeps), _check_cut(cut_gradient))


def refine(K: int, weights: str | Sequence[float] = "paper", cut_gradient: Cut = False, settle: int = 0) -> Schedule:
    """Initialization, then K passes over all positions, each fed by the pass before (multi-refinement).

    Args:
        K: full refinements.
        weights: loss weight of the initialization and of each pass; "paper" = all 1. With a weight of 0 the
            initialization stops at the source block and is not scored.
        cut_gradient: no gradient flows from a pass into the passes before it; "initialization" cuts there alone. A pass
            that is neither scored nor reached by a gradient has no backward.
        settle: passes without gradient between the initialization and the K, so that these meet the memory that
            decoding meets. They end at the source block and cost no backward.

    Returns:
        A schedule of (1 + settle + K)x token compute.

    Raises:
        ValueError: K below 1, settle below 0, or bad weights.
    """
    _at_least_one("passes", K)
    if isinstance(settle, bool) or not isinstance(settle, int) or settle < 0:
        raise ValueError(f"schedule.settle = {settle!r}: use a whole number of 0 or more")
    return Refine(K, _check_weights(weights, 1 + K), _check_cut(cut_gradient), settle)


def chunked(C: int) -> Schedule:
    """Contiguous chunks of C tokens from left to right; only the first position of a chunk receives memory.

    Args:
        C: tokens per chunk; clamped to the row's length. chunked(1) is true recurrence.

    Returns:
        A schedule of 1x token compute.

    Raises:
        ValueError: C below 1.
    """
    _at_least_one("chunks", C)
    return Chunked(C)


def sequential() -> Schedule:
    """True recurrence, one position after the other: the reference for every other schedule.

    Returns:
        A schedule of 1x token compute, whose steps depend on each other.
    """
    return Chunked(1)


def mixture(members: Sequence[tuple[float, Schedule]]) -> Mixture:
    """A share of the steps for each of several schedules.

    Args:
        members: (share, schedule) pairs; the shares sum to 1.

    Returns:
        What a model call resolves with its generator, by ``draw(generator)``.

    Raises:
        ValueError: no members, a share that is not above 0, a sum that is not 1, or a member that is no schedule.
    """
    pairs = tuple((float(share), schedule) for share, schedule in members)
    if not pairs:
        raise ValueError("schedule.mix = []: give at least one pair (share, schedule)")
    shares = [share for share, _ in pairs]
    if any(not 0 < share <= 1 for share in shares):
        raise ValueError(f"schedule.mix has the shares {shares}: use numbers above 0, at most 1")
    if abs(sum(shares) - 1) > SHARES_SUM_WITHIN:
        raise ValueError(f"schedule.mix has shares that sum to {sum(shares):.6g}: they must sum to 1")
    for _, schedule in pairs:
        if not hasattr(schedule, "plan"):
            raise ValueError(
                f"schedule.mix holds {schedule!r}: use lrt.baseline(), interleaved(S), refine(K), "
                "chunked(C) or sequential()"
            )
    return Mixture(pairs)


# ------------------------------------------------------------------ what stands for what


def resolve(schedule: Schedule | Mixture, generator: torch.Generator | None) -> Schedule:
    """The schedule of one call: a mixture draws a member."""
    return schedule.draw(generator) if isinstance(schedule, Mixture) else schedule


def single(schedule: Schedule | Mixture) -> Schedule:
    """The one schedule that stands for a mixture: its member with most passes."""
    return schedule.most if isinstance(schedule, Mixture) else schedule


def needs_memory(schedule: Schedule | Mixture) -> bool:
    """Whether some step of it uses memory."""
    if isinstance(schedule, Mixture):
        return any(needs_memory(member) for _, member in schedule.members)
    return not isinstance(schedule, Baseline)


def describe(schedule: Schedule) -> str:
    """A schedule in a word, such as refine(2), for a log."""
    if isinstance(schedule, Interleaved):
        sweeps = "" if schedule.sweeps == 1 else f", sweeps={schedule.sweeps}"
        return f"interleaved({schedule.subsets}{sweeps})"
    if isinstance(schedule, Refine):
        return f"refine({schedule.passes}{f', settle={schedule.settle}' if schedule.settle else ''})"
    if isinstance(schedule, Chunked):
        return "sequential" if schedule.chunk == 1 else f"chunked({schedule.chunk})"
    return "baseline"


# ------------------------------------------------------------------ from a recipe


def phases_of(config: ScheduleConfig) -> tuple[Phase, ...]:
    """The phases of a recipe's [schedule] section; one where it names none.

    Raises:
        ValueError: as the constructors above; the phase is named.
    """
    if config.phases is None:
        return (Phase(1.0, _from_keys(config, "schedule"), config.ramp),)
    return tuple(Phase(p.until, _from_keys(p, f"schedule.phases[{i}]"), p.ramp) for i, p in enumerate(config.phases))


def from_config(config: ScheduleConfig) -> Schedule:
    """The schedule for which a recipe's [schedule] section trains: that of its last phase,
    of a mixture the member with most passes.

    Raises:
        ValueError: as the constructors above.
    """
    return single(phases_of(config)[-1].schedule)


def _from_keys(config: StretchConfig, where: str) -> Schedule | Mixture:
    """A section or a phase; ``where`` it stands is named in errors."""
    if config.kind == "mixture":
        return mixture([(m.share, _single_from_keys(m, f"{where}.mix[{i}]")) for i, m in enumerate(config.mix)])
    return _single_from_keys(config, where)


def _single_from_keys(config: PassesConfig, where: str) -> Schedule:
    try:
        return _construct(config)
    except ValueError as error:
        if where == "schedule":
            raise
        raise ValueError(f"{where}: {error}") from None


def _construct(config: PassesConfig) -> Schedule:
    if config.kind == "baseline":
        return baseline()
    if config.kind == "refine":
        return refine(config.passes, config.weights, config.cut_gradient, config.settle)
    if config.kind == "chunked":
        return chunked(config.chunks)
    if config.kind == "sequential":
        return sequential()
    return interleaved(
        config.subsets, config.sweeps, config.order, config.kv_refresh, config.weights, config.cut_gradient
    )


def _at_least_one(key: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"schedule.{key} = {value!r}: use a whole number of 1 or more")


def _check_cut(cut: Cut) -> Cut:
    if not isinstance(cut, bool) and cut != "initialization":
        raise ValueError(f"schedule.cut_gradient = {cut!r}: use true, false or initialization")
    return cut


def _check_weights(weights: str | Sequence[float], length: int) -> Weights:
    if isinstance(weights, str):
        if weights != "paper":
            raise ValueError(f'schedule.weights = {weights!r}: use "paper" or a list of {length} numbers')
        return "paper"
    try:
        values = tuple(float(w) for w in weights)
    except (TypeError, ValueError):
        raise ValueError(f'schedule.weights = {weights!r}: use "paper" or a list of {length} numbers') from None
    if len(values) != length:
        raise ValueError(
            f"schedule.weights has {len(values)} values, but there are {length} groups: "
            f"the initialization and {length - 1} more"
        )
    if any(not 0 <= w < float("inf") for w in values):
        raise ValueError(f"schedule.weights = {list(values)}: use finite weights of 0 or more")
    if not any(values):
        raise ValueError(f"schedule.weights = {list(values)}: at least one must be above 0")
    return values
