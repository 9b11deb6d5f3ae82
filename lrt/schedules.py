"""Schedules as plain data: which positions a training step computes, in which order (paper section 4).

A schedule knows nothing of tensors. ``lrt.passes`` runs any object that follows ``lrt.types.Schedule``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lrt.config import ScheduleConfig, Weights
from lrt.types import Pass, Schedule

Order = Literal["ascending", "rotated", "random"]


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
    cut_gradient: bool = False

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
                f"schedule.kv_refresh has no effect with {self.subsets} subsets of a row of {length} tokens: use fewer subsets, or switch it off"
            )
        passes = [Pass(0, length, 1, 0, "zero")]
        for sweep in range(self.sweeps):
            residues = _residues(subsets, self.order, generator)
            passes += [Pass(r, length, subsets, sweep + 1, "all") for r in residues]
        return tuple(passes)


@dataclass(frozen=True)
class Refine:
    """Initialization, then K passes over all positions; see ``refine``."""

    passes: int
    weights: Weights = "paper"
    cut_gradient: bool = False
    kv_refresh: bool = False

    @property
    def token_compute(self) -> int:
        return 1 + self.passes

    def group_weights(self, length: int) -> tuple[float, ...]:
        return (1.0,) * (1 + self.passes) if isinstance(self.weights, str) else self.weights

    def plan(self, length: int, *, generator: torch.Generator | None = None) -> tuple[Pass, ...]:
        first = Pass(0, length, 1, 0, "zero")
        return (first, *(Pass(0, length, 1, k + 1, "all") for k in range(self.passes)))


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


def _residues(subsets: int, order: Order, generator: torch.Generator | None) -> list[int]:
    if order == "ascending" or subsets == 1:
        return list(range(subsets))
    if order == "random":
        return torch.randperm(subsets, generator=generator).tolist()
    offset = int(torch.randint(subsets, (), generator=generator))
    return [(offset + r) % subsets for r in range(subsets)]


def only_feeds(plan: Sequence[Pass], step: Pass, weights: Sequence[float], length: int) -> bool:
    """Whether a pass gives nothing but the memory of the next one, so that it ends at the source block.

    Args:
        plan: of full refinements; under any other, later passes read every block's keys and values.
        step: one of its passes.
        weights: of the loss groups.
        length: tokens a row.
    """
    return weights[step.group] == 0 and step is not plan[-1] and all(other.covers(length) for other in plan)


# ------------------------------------------------------------------ the public constructors


def baseline() -> Schedule:
    """The initialization forward alone: every position, zero memory, 1x token compute."""
    return Baseline()


def interleaved(
    S: int,
    sweeps: int = 1,
    order: Order = "ascending",
    kv_refresh: bool = False,
    weights: str | Sequence[float] = "paper",
    cut_gradient: bool = False,
) -> Schedule:
    """Initialization, then ``sweeps`` times S passes over the positions t = r (mod S) (paper section 4.2).

    Args:
        S: subsets; clamped to the row's length.
        sweeps: how often every position is recomputed.
        order: residues 0..S-1, rotated by a drawn offset, or in random order (drawn from the model call's generator).
        kv_refresh: re-project the memory part of keys and values not yet visited after each pass.
        weights: loss weight of the initialization and of each sweep; "paper" = (1, S, S, ...).
        cut_gradient: no gradient flows from a pass into the passes before it.

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
        raise ValueError(f"schedule.kv_refresh has no effect with subsets = {S}, sweeps = {sweeps}: use subsets > 1 and one sweep, or switch it off")
    if S == 1 and order != "ascending":
        raise ValueError(f"schedule.order = {order!r} has no effect with one subset: use subsets > 1, or ascending")
    return Interleaved(S, sweeps, order, kv_refresh, _check_weights(weights, 1 + sweeps), cut_gradient)


def refine(K: int, weights: str | Sequence[float] = "paper", cut_gradient: bool = False) -> Schedule:
    """Initialization, then K passes over all positions, each fed by the pass before (multi-refinement).

    Args:
        K: full refinements.
        weights: loss weight of the initialization and of each pass; "paper" = all 1. With a weight of 0 the
            initialization stops at the source block and is not scored.
        cut_gradient: no gradient flows from a pass into the passes before it.

    Returns:
        A schedule of (1 + K)x token compute.

    Raises:
        ValueError: K below 1, or bad weights.
    """
    _at_least_one("passes", K)
    return Refine(K, _check_weights(weights, 1 + K), cut_gradient)


def chunked(C: int) -> Schedule:
    """Contiguous chunks of C tokens, left to right, each in parallel, memory only at its first token.

    Args:
        C: tokens a chunk; clamped to the row's length. chunked(1) is true recurrence.

    Raises:
        ValueError: C below 1.
    """
    _at_least_one("chunks", C)
    return Chunked(C)


def sequential() -> Schedule:
    """True recurrence, one position after the other: the reference for every other schedule."""
    return Chunked(1)


def from_config(config: ScheduleConfig) -> Schedule:
    """The schedule that a recipe's [schedule] section describes.

    Raises:
        ValueError: as the constructors above.
    """
    if config.kind == "baseline":
        return baseline()
    if config.kind == "refine":
        return refine(config.passes, config.weights, config.cut_gradient)
    if config.kind == "chunked":
        return chunked(config.chunks)
    if config.kind == "sequential":
        return sequential()
    return interleaved(config.subsets, config.sweeps, config.order, config.kv_refresh, config.weights, config.cut_gradient)


def _at_least_one(key: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"schedule.{key} = {value!r}: use a whole number of 1 or more")


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
        raise ValueError(f"schedule.weights has {len(values)} values, but there are {length} groups: the initialization and {length - 1} more")
    if any(not 0 <= w < float("inf") for w in values):
        raise ValueError(f"schedule.weights = {list(values)}: use finite weights of 0 or more")
    if not any(values):
        raise ValueError(f"schedule.weights = {list(values)}: at least one must be above 0")
    return values
