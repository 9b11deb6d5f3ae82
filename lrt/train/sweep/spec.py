"""What a sweep runs: a TOML file in, a list of runs out, every one checked before the first starts.

    recipe = "frontier_d4.toml"             # of every run: beside this file, or a name in recipes/
    set = ["training.tokens=168_000_000"]   # over the recipe, as run.py's --set
    seeds = [1, 2, 3]
    side_by_side = 3                        # runs at once on one device
    threads = 1                             # of the processor, each run
    budget_minutes = 25                     # nothing new starts later

    [twins.plain]                           # what shares its rates
    set = ["recurrence=false", "schedule.kind=baseline"]
    [twins.lrt]

    [tune]                                  # the best point of the grid, for each twin
    set = ["training.tokens=40_000_000"]
    seeds = [1]
    grid = {"optimizer.reference_batch_tokens" = [32768, 65536, 131072]}

    [[runs]]
    name = "plain"
    twin = "plain"                          # its recipe and overrides, with the rates that were found
    [[runs]]
    name = "refine"
    twin = "lrt"
    set = ["schedule.kind=refine"]
    grid = {"schedule.passes" = [1, 2]}     # every combination is a run

Overrides are one layer over the recipe. In it a later one wins: the sweep's, the twin's, the stage's or the run's, a
point of the grid, the rates that were found, and those of the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lrt.config import Recipe, RecipeError, find_recipe, load_recipe
from lrt.config.files import read_text
from lrt.config.recipes import similar
from lrt.tables import ReadTable, Table
from lrt.train.sweep.keys import KINDS

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - exercised on Python 3.10 only
    import tomli as tomllib

Point = tuple[str, ...]  # overrides that belong together
OWN = {
    "run.seed": "seeds",
    "run.name": "name",
    "run.output": "--out",
}  # keys of a recipe that a sweep sets, and what says so


class SpecError(ValueError):
    """A sweep that cannot run; the message lists every mistake found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        label: of all seeds of this setting.
        stage: ``tune`` or ``compare``.
        twin: whose rates it tunes or uses; None = nobody's.
        point: what differs within the label's grid, or the rates that were found.
        seed: of the run.
        recipe: path of its recipe.
        overrides: all of them, in the order in which they win.
        fingerprint: of the resolved recipe, without the run's name and folder.
        plain: whether it has no memory, so that every memory mode gives one score.
    """

    label: str
    stage: str
    twin: str | None
    point: Point
    seed: int
    recipe: Path
    overrides: Point
    fingerprint: str
    plain: bool

    @property
    def name(self) -> str:
        """Name of the run's folder: the same for the same settings, another one for others."""
        return f"{re.sub(r'[^A-Za-z0-9.=]+', '_', self.label)[:80].strip('_')}-s{self.seed}-{self.fingerprint[:8]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A label before its seeds and the rates that its twin gets."""

    label: str
    stage: str
    twin: str | None
    point: Point
    seeds: tuple[int, ...]
    recipe: Path
    overrides: Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything that a spec asks for.

    Attributes:
        tuning: runs that find the rates, those of all twins.
        axes: the grid of the tuning stage: key and values.
        settings: what is compared, before the rates of its twin.
        last: overrides of the command line.
        side_by_side: runs at once on one device.
        threads: of the processor, each run.
        budget_minutes: after which nothing new starts; None = no limit.
    """

    tuning: tuple[PlannedRun, ...]
    axes: Mapping[str, tuple[object, ...]]
    settings: tuple[Setting, ...]
    last: Point
    side_by_side: int
    threads: int
    budget_minutes: float | None

    @property
    def twins(self) -> tuple[str, ...]:
        """Twins whose rates are tuned."""
        return tuple(dict.fromkeys(run.twin for run in self.tuning if run.twin is not None))

    def compared(self, rates: Mapping[str, Point]) -> list[PlannedRun]:
        """The runs to compare, first seeds first; those of a tuned twin that has no rates yet are left out.

        Args:
            rates: overrides that were found, by twin.
        """
        tuned = set(self.twins)
        ready = [s for s in self.settings if s.twin not in tuned or s.twin in rates]
        return _in_order([_runs(s, rates.get(s.twin or "", ()), self.last) for s in ready])


# ------------------------------------------------------------------ reading


def read_spec(path: str | Path, *, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's TOML file and check every run of it.

    Args:
        path: of the file.
        overrides: strings ``section.key=value`` over those of every run.

    Raises:
        SpecError: unknown keys, no runs, settings that no recipe allows; every mistake is listed.
    """
    path = Path(path)
    try:
        table = tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise SpecError(f"sweep {str(path)!r} not found: name a TOML file with [[runs]]") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path.name}: not valid TOML: {error}") from None
    errors: list[str] = []
    try:
        sweep = _Reader(path.parent, errors).sweep(table, tuple(overrides))
    except RecipeError as error:
        errors, sweep = [*errors, str(error)], None
    if errors or sweep is None:
        raise SpecError(f"{path.name}: " + "\n  ".join(dict.fromkeys(errors)))
    return sweep


class _Reader:
    """Turns a spec's table into settings; mistakes go to ``errors``."""

    def __init__(self, folder: Path, errors: list[str]) -> None:
        self._folder, self._errors = folder, errors

    def sweep(self, table: ReadTable, last: Point) -> Sweep | None:
        top = self._section(
            "", table, ("recipe", "set", "seeds", "side_by_side", "threads", "budget_minutes", "twins", "tune", "runs")
        )
        below = {"recipe": top.get("recipe", "lrt_tiny"), "set": top.get("set", []), "seeds": top.get("seeds", [1])}
        twins = {
            name: self._under(below, self._section(f"twins.{name}.", twin, ("recipe", "set")))
            for name, twin in top.get("twins", {}).items()
        }
        stage = self._section("tune.", top.get("tune", {}), ("set", "seeds", "grid"))
        if "tune" in top and not stage.get("grid"):
            self._errors.append('[tune] has no grid: give one, such as grid = {"optimizer.matrix_lr" = [0.01, 0.02]}')
        if "tune" in top and not twins:
            self._errors.append("[tune] has no twin to tune: add a table [twins.NAME]")
        runs = top.get("runs", [])
        if not runs and "tune" not in top:
            self._errors.append("no runs: add at least one table [[runs]] with a name")
        settings = [
            s for number, run in enumerate(runs) for s in self._settings_of(f"runs[{number}].", run, below, twins)
        ]
        twins = {name: self._under(twin, stage) for name, twin in twins.items()}
        tuning = [
            s
            for name, twin in twins.items()
            if stage.get("grid")
            for s in self._grid("tune", f"tune {name}", name, twin, stage["grid"])
        ]
        if self._errors:
            return None
        again = [label for label, count in Counter(s.label for s in settings).items() if count > 1]
        self._errors += [f"runs: {label!r} stands for two settings: give one another name" for label in again]
        return self._checked(settings, tuning, top, stage.get("grid", {}), last)

    def _section(self, where: str, table: ReadTable, keys: tuple[str, ...]) -> Table:
        found = {}
        for key, value in table.items():
            if key not in keys:
                close = similar(key, keys)
                self._errors.append(
                    f"unknown key {where}{key}"
                    + (f"; did you mean {close}?" if close else f"; known: {', '.join(keys)}")
                )
            elif not KINDS[key][0](value):
                self._errors.append(f"{where}{key} = {value!r}: use {KINDS[key][1]}")
            else:
                found[key] = value
        return found

    def _under(self, below: ReadTable, above: ReadTable) -> Table:
        return {**below, **above, "set": [*below["set"], *above.get("set", [])]}

    def _settings_of(self, where: str, run: ReadTable, below: ReadTable, twins: ReadTable) -> list[Setting]:
        given = self._section(where, run, ("name", "twin", "recipe", "set", "seeds", "grid"))
        if "name" not in run:
            self._errors.append(f"{where}name is missing: give the run a name")
        twin = given.get("twin")
        if twin is not None and twin not in twins:
            self._errors.append(
                f"{where}twin = {twin!r}: there is no [twins.{twin}]; there are: {', '.join(twins) or 'none'}"
            )
        own = {key: value for key, value in given.items() if key not in ("name", "twin")}
        merged = self._under(below if twin is None else twins.get(twin, below), own)
        return self._grid("compare", given.get("name", ""), twin, merged, given.get("grid", {}))

    def _grid(
        self, stage: str, label: str, twin: str | None, merged: ReadTable, grid: Mapping[str, list[object]]
    ) -> list[Setting]:
        path = self._folder / str(merged["recipe"])
        recipe = path if path.is_file() else find_recipe(merged["recipe"])
        return [
            Setting(
                label=" ".join([label, *(f"{key.rpartition('.')[2]}={_shown(value)}" for key, value in point)]),
                stage=stage,
                twin=twin,
                point=_point(point),
                seeds=tuple(merged["seeds"]),
                recipe=recipe,
                overrides=(*merged["set"], *_point(point)),
            )
            for point in _product(grid)
        ]

    def _checked(
        self,
        settings: Sequence[Setting],
        tuning: Sequence[Setting],
        top: ReadTable,
        axes: Mapping[str, list[object]],
        last: Point,
    ) -> Sweep | None:
        """The sweep, when a recipe can be made of every run with every point that its twin may get."""
        points = tuple(_point(point) for point in _product(axes)) if axes else ()
        seen: dict[tuple[str, Point, str], str] = {}
        found = []
        for setting in (*tuning, *settings):
            rated = setting.stage == "compare" and setting.twin is not None and bool(points)
            self._errors += [
                f"{setting.label}: {key} is tuned for its twin: leave it out of the run, or out of tune.grid"
                for key in dict.fromkeys(_keys((*setting.overrides, *last)) if rated else _keys(last))
                if key in axes
            ]
            self._errors += [
                f"{setting.label}: {key} is the sweep's to set: use {instead}"
                for key, instead in OWN.items()
                if key in _keys((*setting.overrides, *last))
            ]
            for rates in points if rated else ((),):
                try:
                    runs = _runs(setting, rates, last)
                except RecipeError as error:
                    self._errors.append(f"{setting.label}: {error}")
                    break
                for run in runs:
                    other = seen.setdefault((run.stage, rates, run.fingerprint), run.label)
                    if other != run.label:
                        self._errors.append(f"{run.label} is the same run as {other}: leave one out")
                if run.stage == "tune":
                    found.append(runs)
        if self._errors:
            return None
        return Sweep(
            tuning=tuple(_in_order(found)),
            axes={key: tuple(values) for key, values in axes.items()},
            side_by_side=top.get("side_by_side", 1),
            threads=top.get("threads", 1),
            budget_minutes=top.get("budget_minutes"),
            settings=tuple(settings),
            last=last,
        )


# ------------------------------------------------------------------ settings to runs


def _runs(setting: Setting, rates: Point, last: Point) -> list[PlannedRun]:
    """A setting's runs, one a seed.

    Raises:
        RecipeError: an override is wrong, or a model with memory is tuned without its score in mode decode.
    """
    runs = []
    for seed in setting.seeds:
        overrides = (*setting.overrides, *rates, *last, f"run.seed={seed}")
        recipe = load_recipe(setting.recipe, overrides=overrides)
        plain = recipe.recurrence is None
        if setting.stage == "tune" and not plain and "decode" not in recipe.evaluation.modes:
            raise RecipeError(
                f'evaluation.modes = {list(recipe.evaluation.modes)} lacks "decode", by which rates are chosen: add it'
            )
        runs.append(
            PlannedRun(
                label=setting.label, stage=setting.stage, twin=setting.twin, point=(*setting.point, *rates), seed=seed,
                recipe=setting.recipe, overrides=overrides, fingerprint=fingerprint(recipe), plain=plain,
            )
        )  # fmt: skip
    return runs


def fingerprint(recipe: Recipe) -> str:
    """sha256 of what differs from the defaults, without the run's name and folder.

    A key that the library gains changes nothing.
    """
    different: Table = {}
    for section in dataclasses.fields(recipe):
        values = getattr(recipe, section.name)
        if values is None:
            different |= {} if section.default is None else {section.name: None}
            continue
        default = type(values)()
        keys = [
            f.name
            for f in dataclasses.fields(values)
            if (section.name, f.name) not in (("run", "name"), ("run", "output"))
        ]
        different |= {
            f"{section.name}.{k}": getattr(values, k) for k in keys if getattr(values, k) != getattr(default, k)
        }
    return hashlib.sha256(json.dumps(different, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()


def _in_order(settings: Sequence[Sequence[PlannedRun]]) -> list[PlannedRun]:
    """First seeds first, so that a sweep whose time is over has compared everything at least once."""
    return [run for layer in itertools.zip_longest(*settings) for run in layer if run is not None]


def _product(grid: Mapping[str, list[object]]) -> list[list[tuple[str, object]]]:
    return [list(zip(grid, values)) for values in itertools.product(*grid.values())]


def _point(point: Iterable[tuple[str, object]]) -> Point:
    return tuple(f"{key}={toml_value(value)}" for key, value in point)


def _keys(overrides: Iterable[str]) -> list[str]:
    return [override.partition("=")[0].strip() for override in overrides]


def toml_value(value: object) -> str:
    """A value of a TOML file on one line, as ``--set`` takes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(
        value, ensure_ascii=False, default=str
    )  # numbers, true, false and texts are written alike in JSON and TOML


def _shown(value: object) -> str:
    return re.sub(r"[\s\"]", "", toml_value(value))
