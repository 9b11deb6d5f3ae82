"""A part of the other tools, no command: types of their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lrt.decoding import prefill


def path(text: str) -> str:
    """Type of an option: a path, which an unset variable of a shell is not."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is empty, perhaps an unset variable: give a path (. is the present folder)"
        )
    return text


LARGEST = 2**31 - 1
MOST_ROWS = 1 << 16  # of a batch: memory is taken for all of them


def at_least(least: int, *, most: int = LARGEST) -> Callable[[str], int]:
    """Type of an option: a whole number of ``least`` or more, up to ``most``."""

    def whole(text: str) -> int:
        digits = text.strip().lstrip("-")
        number = int(text) if digits.isdecimal() and len(digits) < 30 else None
        if number is None and digits.isdecimal() or number is not None and number > most:
            raise argparse.ArgumentTypeError(
                f"{text[:30]!r}{'...' * (len(text) > 30)}: use a whole number of {least} or more, at most {most}"
            )
        if number is None or number < least:
            raise argparse.ArgumentTypeError(f"{text[:100]!r}: use a whole number of {least} or more")
        return number

    return whole


whole_number = at_least(-LARGEST)  # where the library says which numbers it takes
seed = at_least(0, most=2**63 - 1)


def parse_prefill(text: str, *, option: str = "--prefill") -> prefill.Prefill:
    """A way to prefill from its name: exact, refine:K, fixed_point or fixed_point:GROUPS:TOL.

    Raises:
        ValueError: another name, or numbers that it does not take.
    """
    name, *rest = text.split(":")
    possible = "exact, refine:K, fixed_point, or fixed_point:GROUPS:TOL"
    try:
        if name == "exact" and not rest:
            return prefill.exact()
        if name == "refine" and len(rest) == 1:
            return prefill.refine(int(rest[0]))
        if name == "fixed_point" and len(rest) <= 2:
            return prefill.fixed_point(*(kind(value) for kind, value in zip((int, float), rest)))
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}; use {possible}") from None
    raise ValueError(f"{option} {text}: use {possible}")
