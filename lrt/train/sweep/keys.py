"""What each key of a sweep's TOML file may be, in code and in words."""

from __future__ import annotations

import re
from collections.abc import Callable


def _are_seeds(value: object) -> bool:
    return _are(value, int) and isinstance(value, list) and min(value, default=-1) >= 0 and _are_different(value)


def _is_grid(value: object) -> bool:
    return isinstance(value, dict) and all(map(_are_different, value.values()))


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _are(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _are_different(values: object) -> bool:
    return (
        isinstance(values, list) and len(values) > 0 and all(value not in values[:i] for i, value in enumerate(values))
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


KINDS: dict[str, tuple[Callable[[object], bool], str]] = {  # of a key: what it may be, in code and in words
    "recipe": (lambda v: isinstance(v, str), "the name or path of a recipe"),
    "set": (lambda v: _are(v, str), 'a list of overrides, such as ["training.steps=100"]'),
    "seeds": (_are_seeds, "a list of different whole numbers of 0 or more"),
    "grid": (_is_grid, "a table of lists of different values, one a key of the recipe"),
    "side_by_side": (_is_whole, "a whole number of 1 or more"),
    "threads": (_is_whole, "a whole number of 1 or more"),
    "budget_minutes": (_is_time, "a number of minutes above 0"),
    "name": (lambda v: isinstance(v, str) and bool(re.search("[A-Za-z0-9]", v)), "a text with a letter or a digit"),
    "twin": (lambda v: isinstance(v, str), "the name of a table [twins.NAME]"),
    "twins": (lambda v: isinstance(v, dict) and _are([*v.values()], dict), "tables [twins.NAME]"),
    "tune": (lambda v: isinstance(v, dict), "a table [tune]"),
    "runs": (lambda v: _are(v, dict), "tables [[runs]]"),
}
