"""A recipe's TOML, in and out, no torch. The settings themselves are in ``lrt.config.settings``.

A recipe file holds only what differs from the defaults. ``base = "other.toml"`` inherits from one other
recipe, and ``--set a.b=c`` overrides a single value. All mistakes of a recipe are collected and reported together.

Three layers, each over the one before: the base, the file, all overrides. A layer that gives a horizon
(``training.steps``, ``tokens``, ``tokens_per_parameter`` or ``compute``) replaces the horizon below it. A layer that
gives ``schedule.kind`` (``optimizer.kind``, ``training.lr_schedule``) drops inherited keys that the new kind does not
use: ``schedule.kind=refine`` over a file with ``subsets = 4`` is no mistake. Such a key beside its kind or above it is
a mistake, unless it has the default's value.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, Union

from lrt.config.files import read_text
from lrt.config.ranges import USED, item_class, range_errors, without_replaced
from lrt.config.settings import PassesConfig, Recipe, ScheduleConfig, ShareConfig, StretchConfig
from lrt.tables import ReadTable, Table

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - exercised on Python 3.10 only
    import tomli as tomllib

OPTIONAL = {"recurrence": "for the twin without memory", "tuning": "for training on text"}  # sections that may be off

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
Section = TypeVar("Section", bound="DataclassInstance")

LONGEST_MISTAKE, MOST_MISTAKES = 2000, 20  # characters; those that are listed


class RecipeError(ValueError):
    """A recipe that cannot be used; the message lists every mistake found."""


# ------------------------------------------------------------------ TOML in


def recipe_folders() -> list[Path]:
    """Folders in which a recipe's bare name is looked up, in order."""
    here = Path(__file__).resolve().parent.parent  # lrt/, which holds recipes/ in a wheel
    return [Path.cwd(), Path.cwd() / "recipes", here / "recipes", here.parent / "recipes"]


def shipped_recipes() -> list[Path]:
    """The recipes that come with this lrt: of the installed package, or of the checkout."""
    here = Path(__file__).resolve().parent.parent
    return sorted(path for folder in (here / "recipes", here.parent / "recipes") for path in folder.glob("*.toml"))


def find_recipe(name: str | Path) -> Path:
    """Path of the recipe called ``name``: a path, or a name in recipes/ (with or without .toml).

    Raises:
        ValueError: there is no such recipe; the message lists those that exist.
    """
    folders = recipe_folders()
    for candidate in (str(name), f"{name}.toml"):
        for folder in folders:
            path = folder / candidate
            if _is_file(path):
                return path
    known = sorted({p.name for folder in folders[1:] if folder.is_dir() for p in folder.glob("*.toml")})
    close = similar(str(name).removesuffix(".toml"), [one.removesuffix(".toml") for one in known])
    hint = f"; did you mean {close}.toml?" if close else "."
    raise RecipeError(f"recipe {str(name)!r} not found{hint} Recipes here: {', '.join(known) or 'none'}")


def load_recipe(name: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or by name.

    Args:
        name: a path, or the name of a recipe in ``recipes/``.
        overrides: strings ``section.key=value`` that win over the file (value in TOML syntax, or bare text).

    Raises:
        RecipeError: unknown keys, wrong types or values; every mistake is listed.
    """
    path = find_recipe(name)
    return _with_overrides(_read_with_base(path, chain=[]), overrides, where=path.name)


def parse_recipe(text: str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from TOML text (``base`` is not allowed here)."""
    return _with_overrides(_toml(text, where="recipe"), overrides, where="recipe")


def _toml(text: str, *, where: str) -> Table:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # also a number of more digits than Python reads
        raise RecipeError(f"{where}: not valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not valid TOML: brackets or braces are nested too deeply") from None


def _with_overrides(table: ReadTable, overrides: Sequence[str], where: str) -> Recipe:
    errors: list[str] = []
    above: Table = {}
    for override in overrides:
        _apply_override(above, override, errors)
    return _recipe_from_table(_merge(table, above), errors, where=where)


def _read_with_base(path: Path, chain: list[Path]) -> Table:
    table = _toml(read_text(path), where=path.name)
    base = table.pop("base", None)
    if base is None:
        return table
    if chain:
        raise RecipeError(
            f"{chain[0].name}: base = {path.name!r} has a base of its own ({base!r}): at most one level is allowed"
        )
    beside = path.parent / str(base)
    below = _read_with_base(beside if _is_file(beside) else find_recipe(base), chain=[path])
    return _merge(below, table)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _merge(below: ReadTable, above: ReadTable) -> Table:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**without_replaced(merged[key], value, section=key), **value} if both else value
    return merged


def _apply_override(table: Table, override: str, errors: list[str]) -> None:
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) not in (1, 2) or not all(keys):
        errors.append(f"--set {override!r}: write section.key=value, such as training.steps=100")
        return
    try:
        read = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        read = {"value": raw.strip()}
    if len(read) > 1:
        errors.append(f"--set {override!r}: holds more than one value: give each its own --set")
        return
    value = read["value"]
    if len(keys) == 1:
        table[keys[0]] = value
        return
    section = table.get(keys[0])
    if not isinstance(section, dict):
        section = table[keys[0]] = {}
    section[keys[1]] = value


def _shortened(error: str) -> str:
    """A mistake without the middle of a value that fills pages."""
    return (
        error
        if len(error) <= LONGEST_MISTAKE
        else f"{error[: LONGEST_MISTAKE // 2]} ... {error[-LONGEST_MISTAKE // 2 :]}"
    )


def _recipe_from_table(table: ReadTable, errors: list[str], where: str) -> Recipe:
    sections: Table = {}
    hints = typing.get_type_hints(Recipe)
    for key, value in table.items():
        if key not in hints:
            errors.append(_unknown("section", key, list(hints)))
        elif key in OPTIONAL and value in (False, "none"):
            sections[key] = None
        elif not isinstance(value, Mapping):
            off = f", or {key} = false {OPTIONAL[key]}" if key in OPTIONAL else ""
            errors.append(f"{key} = {value!r}: expected a table [{key}]{off}")
        else:
            cls = item_class(hints[key])
            assert cls is not None
            sections[key] = _section_from_table(cls, key, value, errors)
    recipe = None
    if errors:  # those that a whole recipe would have told
        errors += [
            error
            for key, section in sections.items()
            if section
            for error in range_errors(key, type(section), vars(section))
        ]
    else:
        try:
            recipe = Recipe(**sections)
        except ValueError as error:
            errors.append(str(error))
    if recipe is None:
        more = [f"and {len(errors) - MOST_MISTAKES} more mistakes"] if len(errors) > MOST_MISTAKES else []
        raise RecipeError(f"{where}: " + "\n  ".join([*map(_shortened, errors[:MOST_MISTAKES]), *more]))
    return recipe


def parse_section(cls: type[Section], name: str, table: object) -> Section:
    """One section from plain values, as a model's config.json holds it too.

    Args:
        cls: its dataclass.
        name: for the messages.
        table: values by key; None where TOML has "none".

    Raises:
        RecipeError: it is no table, or has unknown keys, wrong types or values; every mistake is listed.
    """
    if not isinstance(table, Mapping):
        raise RecipeError(_shortened(f"{name} = {table!r}: expected a table"))
    errors: list[str] = []
    section = _section_from_table(cls, name, {key: _without_none(value) for key, value in table.items()}, errors)
    if section is None or errors:
        raise RecipeError("; ".join(map(_shortened, errors)))
    return section


def _section_from_table(cls: type[Section], section: str, table: ReadTable, errors: list[str]) -> Section | None:
    hints = typing.get_type_hints(cls)
    values: Table = {}
    before = len(errors)
    for key, raw in table.items():
        if key not in hints:
            errors.append(_unknown("key", key, list(hints), inside=f"{section}."))
            continue
        items = item_class(hints[key])
        if items is not None and isinstance(raw, list):
            values[key] = tuple(
                _item_from_table(items, f"{section}.{key}[{index}]", item, errors) for index, item in enumerate(raw)
            )
            continue
        try:
            values[key] = _convert(raw, hints[key])
        except TypeError as error:
            errors.append(f"{section}.{key} = {raw!r}: expected {error}")
    if section == "schedule" and values.get("phases") is not None:
        errors += [
            f"schedule.{key} = {table[key]!r} has no effect beside schedule.phases: give it to a phase"
            for key in values
            if key != "phases"
        ]
    if len(errors) > before:
        errors += range_errors(section, cls, values)
        return None
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        errors += [f"{section} has no {name}" for name in missing]
        return None
    try:
        return cls(**values)
    except ValueError as error:
        errors.append(str(error))
        return None


def _item_from_table(cls: type[Section], where: str, raw: object, errors: list[str]) -> Section | None:
    """One table of a list of tables."""
    if isinstance(raw, Mapping):
        return _section_from_table(cls, where, raw, errors)
    example = ", ".join(f"{field.name} = ..." for field in dataclasses.fields(cls)[:2])
    errors.append(f"{where} = {raw!r}: expected a table, such as {{{example}}}")
    return None


def _convert(raw: object, hint: object) -> object:
    """``raw`` as the type ``hint``; TypeError names what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in args and raw == "none":
            return None
        expected = []
        for option in args:
            if option is type(None):
                expected.append('"none"')
                continue
            try:
                return _convert(raw, option)
            except TypeError as error:
                expected.append(str(error))
        raise TypeError(" or ".join(expected))
    if origin is Literal:
        if raw in args and isinstance(raw, str):
            return raw
        close = similar(str(raw), [str(a) for a in args])
        raise TypeError(f"one of {', '.join(map(str, args))}" + (f" (did you mean {close!r}?)" if close else ""))
    if origin is tuple:
        if not isinstance(raw, (list, tuple)):
            raise TypeError("a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(item, args[0]) for item in raw)
        if len(raw) != len(args):
            raise TypeError(f"a list of {len(args)} values")
        return tuple(_convert(item, arg) for item, arg in zip(raw, args))
    if hint is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        try:
            return float(raw)
        except OverflowError:
            raise TypeError("a number that fits a float") from None
    if hint is int and isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(hint, type) and hint in (bool, str) and isinstance(raw, hint):
        return raw
    raise TypeError(EXPECTED[hint] if isinstance(hint, type) and hint in EXPECTED else str(hint))


def _unknown(kind: str, name: str, known: Sequence[str], *, inside: str = "") -> str:
    close = similar(name, known)
    hint = f"did you mean {inside + close!r}?" if close else f"known: {', '.join(known)}"
    return f"unknown {kind} {inside + name!r}; {hint}"


def similar(name: str, known: Sequence[str]) -> str | None:
    """The one of some names that another is a slip of; None where none is near enough to be meant."""
    return next(iter(difflib.get_close_matches(name[:LONGEST_MISTAKE], known, n=1, cutoff=0.7)), None)


# ------------------------------------------------------------------ TOML out


def _schedule_to_table(c: ScheduleConfig) -> Table:
    """The section: its phases alone, or its keys; tables inside it hold what their kind uses."""
    if c.phases is not None:
        return {"phases": [{"until": phase.until, **_used_keys(phase)} for phase in c.phases]}
    table = dataclasses.asdict(c)
    del table["phases"], table["mix"]
    return {**table, "mix": _members(c.mix)} if c.kind == "mixture" else table


def _members(mix: Sequence[ShareConfig]) -> list[Table]:
    return [{"share": member.share, **_used_keys(member)} for member in mix]


def _used_keys(c: PassesConfig) -> Table:
    used = [key for key in USED["schedule", "kind"][c.kind] if hasattr(c, key)]
    return {
        "kind": c.kind,
        **{key: _members(c.mix) if isinstance(c, StretchConfig) and key == "mix" else getattr(c, key) for key in used},
    }


def _without_none(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_none(item) for item in value)
    return "none" if value is None else value


def recipe_to_table(recipe: Recipe) -> Table:
    """The recipe as nested plain values, None written as "none" (TOML has no null)."""
    table: Table = {}
    for section in dataclasses.fields(recipe):
        value = getattr(recipe, section.name)
        if value is None:
            table[section.name] = False
            continue
        values = _schedule_to_table(value) if isinstance(value, ScheduleConfig) else dataclasses.asdict(value)
        table[section.name] = _without_none(values)
    # A bare key must stand before the first table.
    return dict(sorted(table.items(), key=lambda item: isinstance(item[1], dict)))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML text; parse_recipe(dump_recipe(r)) == r."""
    import tomli_w

    return tomli_w.dumps(recipe_to_table(recipe))
