"""A part of the other tools, no command: types of their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lrt.decoding import prefill


def path(text: str) -> str:
    """Type of an option: a path, which an unset variable of a shell is not."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is empty, perhaps an unset variable: give a path (. is the present folder)")
    return text


def at_least(least: int) -> Callable[[str], int]:
    """Type of an option: a whole number of ``least`` or more."""

    def whole(text: str) -> int:
        if not text.strip().lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: use a whole number of {least} or more")
        return int(text)

    return whole


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
