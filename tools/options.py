"""A part of the other tools, no command: types of their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Type of an option: a whole number of ``least`` or more."""

    def whole(text: str) -> int:
        if not text.strip().lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: use a whole number of {least} or more")
        return int(text)

    return whole
