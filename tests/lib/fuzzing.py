"""What fuzzers share: a seed, a budget of seconds, a limit for one try, and values of every bad shape."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator

SECONDS, SEED = float(os.environ.get("LRT_FUZZ_SECONDS", 20)), int(os.environ.get("LRT_FUZZ_SEED", 0))

ODD = (
    "", " ", "0", "1", "-1", "2", "3.5", "true", "false", "none", '"none"', "nan", "inf", "-inf", "1e400", "5e-324",
    "1e308", "-0.0", "0x7fffffffffffffff",
    "9" * 19, "9" * 30, "9" * 401, "9" * 5000, "10**30", "[]", "[[]]", "{}",
    "[" * 3000, "[" * 3000 + "]" * 3000, "{a=" * 3000, "[1, 2]", '["x"]',
    "[0.1, 0.2, 0.7]", "[nan]", "1979-05-27", "07:32:00", '""', '"x"', "'" + "x" * 300 + "'", "x" * 5000,
    '"a\\u0000b"', '"a\\nb"', "ünï", "\udcff", "a\nb = 1",
    "5\nrun.name = 'other'", '"""\nlines"""', '[{kind = "refine"}]', '[{until = 1.0, kind = "baseline"}]',
    '[{until = 0.5}, {until = 0.5}]', "{kind = 1}",
    '[{path = "demo", weight = 1}]', "[{path = 1}]", '[{share = 1.0, kind = "refine"}]', "~nobody/x", "/dev/null",
    "/", "..", "../../x", "demo", "hf://", "hf://datasets/",
    "mixture", "sequential", "adamw", "block", "bytes", "wsd", "projected", "aligned", "layerwise", "memory",
)  # fmt: skip


class TooLong(Exception):
    """A try did not end in its time."""


def tries(limit_s: float) -> Iterator[tuple[str, random.Random]]:
    """Where a try stands, for a finding, and its random numbers, until the budget of seconds is used up.

    Args:
        limit_s: seconds that a try may take; it is interrupted by ``TooLong``.
    """
    until, number = time.monotonic() + SECONDS, 0

    def late(*_: object) -> None:
        raise TooLong(f"a try took more than {limit_s} s")

    before = signal.signal(signal.SIGALRM, late)
    try:
        while time.monotonic() < until:
            number += 1
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            yield f"LRT_FUZZ_SEED={SEED}, try {number}", random.Random(f"{SEED} {number}")
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print(f"seed {SEED}: {number} tries, no finding")


def shown(text: object, most: int = 300) -> str:
    """A value of which a finding shows the beginning."""
    return repr(text) if len(repr(text)) <= most else f"{repr(text)[:most]}... ({len(repr(text))} characters)"
