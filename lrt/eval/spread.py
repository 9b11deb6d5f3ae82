"""How well a mean over a few seeds is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

T95 = (  # Student's t at 97.5 % for 1, 2, ... degrees of freedom: few seeds make wide intervals
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Spread(NamedTuple):
    """How well a mean over seeds is known."""

    variance: float  # of the mean
    seeds: int


def half_interval(spreads: Sequence[Spread]) -> float:
    """Half of a 95 % interval of a sum of independent means, by Welch's degrees of freedom."""
    total = sum(spread.variance for spread in spreads)
    if not total:
        return 0.0
    freedom = total**2 / sum(spread.variance**2 / (spread.seeds - 1) for spread in spreads)
    return _t95(freedom) * math.sqrt(total)


def _t95(freedom: float) -> float:
    """Student's t, linear in 1 / degrees of freedom between the table's rows."""
    low = min(int(freedom + 1e-9), len(T95))
    high = min(low + 1, len(T95))
    share = 0.0 if high == low else max(0.0, (1 / low - 1 / freedom) / (1 / low - 1 / high))
    return (1 - share) * T95[low - 1] + share * T95[high - 1]
