"""Runs beside each other: over seeds, and at equal tokens, equal training compute and equal seconds.

Runs that differ only by their seed are one point: a mean and a deviation. Points that differ only by their horizon are
one curve. A curve is compared with the reference where both reach: the reference's scores are interpolated over the
logarithm of the amount, between the ends of its runs. A score in the middle of a run is no end, because its rates have
not fallen.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrt.config import Recipe, recipe_to_table
from lrt.config.ranges import HORIZON
from lrt.eval.bootstrap import DocumentScores, Interval, compare_scores
from lrt.eval.runs import RunFolder, read_records, read_run
from lrt.eval.spread import Spread, half_interval
from lrt.tables import ReadTable, Table

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - exercised on Python 3.10 only
    import tomli as tomllib

AXES = ("tokens", "flops", "seconds")
MODES = ("zero", "parallel", "decode")
SAME = 0.005  # amounts this close are the same: a batch more or less


@dataclass(frozen=True)
class Point:
    """Runs of one setting and one horizon, all seeds.

    Attributes:
        runs: their folders.
        seeds: of the runs.
        amounts: what they spent by axis, mean over seeds: tokens, training FLOPs of every pass, seconds of training;
            without seconds where a run goes on from another one, because it knows its own alone.
        scores: bits per byte by memory mode, one a seed.
        unfinished: steps reached and steps of the whole, of a run that is not at its end; None = all are.
    """

    runs: tuple[RunFolder, ...]
    seeds: tuple[int, ...]
    amounts: Mapping[str, float]
    scores: Mapping[str, tuple[float, ...]]
    unfinished: tuple[int, int] | None

    def mean(self, mode: str) -> float:
        return statistics.fmean(self.scores[mode])

    def deviation(self, mode: str) -> float | None:
        """Sample deviation over seeds; None of one seed."""
        return statistics.stdev(self.scores[mode]) if len(self.scores[mode]) > 1 else None

    def spread(self, mode: str) -> Spread | None:
        """How well the mean is known; None of one seed."""
        deviation = self.deviation(mode)
        return None if deviation is None else Spread(deviation**2 / len(self.runs), len(self.runs))

    def half(self, mode: str) -> float | None:
        """Half of the mean's 95 % interval over seeds; None of one seed."""
        spread = self.spread(mode)
        return None if spread is None else half_interval([spread])


@dataclass(frozen=True)
class Curve:
    """One setting over its horizons, by rising tokens.

    Attributes:
        label: for people.
        plain: a model without memory, whose scores are the same in every mode.
        points: one a horizon.
    """

    label: str
    plain: bool
    points: tuple[Point, ...]

    @property
    def mode(self) -> str:
        """The memory mode that counts: decode where it was scored."""
        modes = self.points[0].scores
        return "decode" if "decode" in modes else next(iter(modes))


@dataclass(frozen=True)
class Difference:
    """A point against the reference at the same amount.

    Attributes:
        absolute: bits per byte more than the reference's; below 0 is better.
        relative: the same as a share of the reference's score.
        half: half of the 95 % interval over seeds, as a share; None where one of them has a single seed.
    """

    absolute: float
    relative: float
    half: float | None


@dataclass(frozen=True)
class Comparison:
    """Curves, and the one that the others are held against.

    Attributes:
        curves: the reference first.
        data: fingerprints that all runs share; None = not known, or different and asked for.
    """

    curves: tuple[Curve, ...]
    data: ReadTable | None

    @property
    def reference(self) -> Curve:
        return self.curves[0]

    def difference(self, curve: Curve, point: Point, *, axis: str) -> Difference | None:
        """``point`` against the reference at the same amount of ``axis``; None where either's is not known,
        or the reference does not reach."""
        if axis not in point.amounts or curve is self.reference:
            return None
        there = interpolate(self.reference, point.amounts[axis], axis=axis)
        if there is None:
            return None
        score, spreads = there
        own = point.spread(curve.mode)
        half = None if own is None or spreads is None else half_interval([own, *spreads]) / score
        gap = point.mean(curve.mode) - score
        return Difference(gap, gap / score, half)

    def paired(self, curve: Curve, point: Point) -> Interval | None:
        """Bits per byte over the reference's on the same documents, seeds averaged; None without scores of documents.

        The reference's point is the one of the same tokens.
        """
        other = next((p for p in self.reference.points if _same(p.amounts["tokens"], point.amounts["tokens"])), None)
        if other is None or curve is self.reference:
            return None
        theirs, ours = documents(other, self.reference.mode), documents(point, curve.mode)
        if theirs is None or ours is None or theirs.data != ours.data:
            return None
        return compare_scores(theirs, ours, mode="score")


# ------------------------------------------------------------------ reading


def compare(paths: Iterable[str | Path], *, reference: str | None = None, different_data: bool = False) -> Comparison:
    """Read runs and put them beside each other.

    Args:
        paths: folders of runs or of sweeps, or folders that hold runs.
        reference: label of the curve that the others are held against; None = the first without memory, else the first.
        different_data: compare runs whose data differ.

    Raises:
        ValueError: a folder without runs, a run without scores or with scores that are no numbers, or different data.
    """
    found = [run for path in paths for run in _runs_below(Path(path))]
    found = [one for number, one in enumerate(found) if one.folder not in {other.folder for other in found[:number]}]
    data = _common_data(found, refuse=not different_data)
    curves = _curves(found)
    if reference is not None and reference not in [curve.label for curve in curves]:
        raise ValueError(
            f"reference {reference!r} is none of the settings: use one of {', '.join(c.label for c in curves)}"
        )
    first = next((c for c in curves if c.label == reference), None) or next((c for c in curves if c.plain), curves[0])
    return Comparison((first, *(curve for curve in curves if curve is not first)), data)


@dataclass(frozen=True)
class _Run:
    """A run with what it is called and what it was told."""

    folder: Path
    name: str
    recipe: Table
    files: RunFolder
    label: str | None  # in its sweep

    @property
    def scores(self) -> dict[str, float]:
        return self.files.evaluations[-1]["bpb"]


def _runs_below(path: Path) -> list[_Run]:
    """The runs that a path names: itself, those of its sweep, or those in its folders."""
    if (path / "metrics.jsonl").is_file():
        return [_read(path, None)]
    if (path / "results.jsonl").is_file():
        results = {r["run"]: r for r in read_records(path / "results.jsonl")}
        wanted = [r for r in results.values() if r["state"] == "done" and r["stage"] == "compare"]
        if not wanted:
            raise ValueError(f"{path} is a sweep without a finished run to compare: let it go on (tools/sweep.py)")
        return [_read(path / r["folder"], r["label"]) for r in wanted]
    inside = sorted(child for child in path.glob("*/") if (child / "metrics.jsonl").is_file())
    if not inside:
        raise ValueError(
            f"{path} holds no run: name the folder of a run (with metrics.jsonl), of a sweep (with results.jsonl), "
            "or of runs"
        )
    return [_read(child, None) for child in inside]


def _read(folder: Path, label: str | None) -> _Run:
    files = read_run(folder)
    if not files.evaluations:
        raise ValueError(
            f"{folder} has no evaluation yet: let the run reach its end, or set evaluation.every; leave it out to "
            "compare the others"
        )
    bad = [mode for mode, value in files.evaluations[-1]["bpb"].items() if value is None or not math.isfinite(value)]
    if bad or not files.evaluations[-1]["bpb"]:
        raise ValueError(
            f"{folder}: bits per byte in {', '.join(bad) or 'every mode'} are no number: the run has diverged, "
            "or scored no text; leave it out"
        )
    if not files.train:
        raise ValueError(f"{folder} has trained no step: leave it out")
    if not all("flops" in record for record in files.train):
        raise ValueError(
            f"{folder} has steps without training FLOPs: it was trained before they were recorded; leave it out, or "
            "train it again"
        )
    try:
        recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        raise ValueError(f"{folder} holds no recipe.toml that can be read: it is no folder of a training run") from None
    return _Run(folder.resolve(), folder.resolve().name, recipe, files, label)


def _common_data(runs: Sequence[_Run], *, refuse: bool) -> ReadTable | None:
    """What all runs read; checked as far as they tell it, and by what they scored."""
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = run.files.about.get("data") or {}, first.files.about.get("data") or {}
        different = [f"{key} data" for key in ours if key in theirs and ours[key] != theirs[key]]
        if run.files.evaluations[-1].get("scored") != first.files.evaluations[-1].get("scored"):
            different.append("scored tokens and bytes")
        if different and refuse:
            raise ValueError(
                f"{first.name} and {run.name} have different {' and '.join(different)}, so their scores do not "
                "compare: leave one out, evaluate both on the same text (tools/evaluate.py), or ask for it "
                "(--different-data)"
            )
        if different:
            return None
    return first.files.about.get("data")


# ------------------------------------------------------------------ grouping


def _curves(runs: Sequence[_Run]) -> list[Curve]:
    families: dict[str, dict[str, list[_Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        families[_identity(run.recipe, horizon=False)][_identity(run.recipe, horizon=True)].append(run)
    curves = []
    for groups in families.values():
        points = sorted((_point(group) for group in groups.values()), key=lambda p: p.amounts["tokens"])
        members = [run for group in groups.values() for run in group]
        curves.append(Curve(_label(members), members[0].recipe.get("recurrence") is False, tuple(points)))
    return _distinct(curves)


def _identity(recipe: ReadTable, *, horizon: bool) -> str:
    """What makes two runs the same setting: all that decides their weights but seed, data and, if asked, horizon.

    Data are compared by their fingerprints. A key with the default's value counts as one that is not there.
    """
    default = recipe_to_table(Recipe())
    left_out = {
        ("run", "name"),
        ("run", "seed"),
        ("run", "output"),
        ("data", "train"),
        ("data", "validation"),
        ("data", "workers"),
    }
    left_out |= set() if horizon else {("training", key) for key in HORIZON}
    table: Table = {}
    for section, values in recipe.items():
        if section in ("checkpoint", "metrics", "evaluation"):
            continue
        if not isinstance(values, dict):
            table[section] = values
            continue
        usual = default.get(section) or {}
        table |= {
            f"{section}.{k}": v for k, v in values.items() if (section, k) not in left_out and v != _plain(usual.get(k))
        }
    if "training.branch_from" in table:
        table["training.branch_from"] = True  # seeds branch from runs of their own
    return json.dumps(table, sort_keys=True, default=str)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _label(runs: Sequence[_Run]) -> str:
    """What the names of all runs begin with, without seed and horizon."""
    names = [run.label or re.sub(r"[-_. ]?s(eed)?[-_ ]?\d+$", "", run.name) for run in runs]
    words = [re.sub(rf" ?\b({'|'.join(HORIZON)})=\S+", "", name) for name in names]
    return os.path.commonprefix(words).rstrip(" -_.=") or words[0]


def _distinct(curves: Sequence[Curve]) -> list[Curve]:
    labels = [curve.label for curve in curves]
    return [
        curve
        if labels.count(curve.label) == 1
        else Curve(f"{curve.label} ({labels[:i].count(curve.label) + 1})", curve.plain, curve.points)
        for i, curve in enumerate(curves)
    ]


def _point(runs: Sequence[_Run]) -> Point:
    modes = [mode for mode in MODES if all(mode in run.scores for run in runs)]
    amounts = {axis: [r.files.last[axis] for r in runs] for axis in ("tokens", "flops")}
    if not any(r.files.goes_on for r in runs):
        amounts["seconds"] = [r.files.seconds()[-1] for r in runs]
    cut = [
        (r.files.last["step"], r.files.about["steps"])
        for r in runs
        if r.files.last["step"] < r.files.about.get("steps", 0)
    ]
    return Point(
        tuple(run.files for run in runs),
        tuple(run.recipe.get("run", {}).get("seed", 1) for run in runs),
        {axis: statistics.fmean(spent) for axis, spent in amounts.items()},
        {mode: tuple(run.scores[mode] for run in runs) for mode in modes},
        cut[0] if cut else None,
    )


# ------------------------------------------------------------------ at equal amounts


def interpolate(curve: Curve, amount: float, *, axis: str) -> tuple[float, list[Spread] | None] | None:
    """Score of a curve at an amount, between the ends of its runs, and how well it is known: None of a single seed.

    The whole is None where the amount lies outside of the curve: nothing is extrapolated.
    """
    ended = [p for p in curve.points if p.unfinished is None and axis in p.amounts]
    points = sorted(ended, key=lambda p: p.amounts[axis])
    for point in points:
        if _same(point.amounts[axis], amount):
            spread = point.spread(curve.mode)
            return point.mean(curve.mode), None if spread is None else [spread]
    for low, high in zip(points, points[1:]):
        if low.amounts[axis] < amount < high.amounts[axis]:
            a, b = math.log(low.amounts[axis]), math.log(high.amounts[axis])
            share = (math.log(amount) - a) / (b - a)
            ends = [(1 - share, low), (share, high)]
            spreads = [(weight, point.spread(curve.mode)) for weight, point in ends]
            known = [
                Spread(weight**2 * spread.variance, spread.seeds) for weight, spread in spreads if spread is not None
            ]
            score = sum(weight * point.mean(curve.mode) for weight, point in ends)
            return score, known if len(known) == len(ends) else None
    return None


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= SAME * max(a, b)


def documents(point: Point, mode: str) -> DocumentScores | None:
    """What every document cost, the mean over the point's seeds; None where a run kept no such scores."""
    files = [run.folder / "documents.npz" for run in point.runs]
    if not all(file.is_file() for file in files):
        return None
    scores = [DocumentScores.load(file) for file in files]
    first = scores[0]
    alike = all(
        s.data == first.data and np.array_equal(s.index, first.index) and np.array_equal(s.bytes, first.bytes)
        for s in scores
    )
    if not alike or not all(mode in s.nats for s in scores):
        return None
    return DocumentScores(
        first.data, first.index, first.bytes, {"score": np.mean([s.nats[mode] for s in scores], axis=0)}
    )
