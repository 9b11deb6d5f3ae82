"""What came out of a sweep: one JSONL line a run, the best rates of each twin, and a table."""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lrt.eval.runs import RunFolder, read_records, read_run
from lrt.tables import Table
from lrt.train.sweep.spec import PlannedRun, Point, Sweep, toml_value

Record = Table
MODES = ("zero", "parallel", "decode")


class Results:
    """The results of a folder, one line a run; where a run was tried twice its last line counts.

    Args:
        path: of the JSONL file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Record] = {}
        if path.is_file():
            self._found = {
                record["run"]: record for record in read_records(path) if isinstance(record, dict) and "run" in record
            }

    def add(self, record: Record) -> None:
        """Write a line so that a kill or a crash of the machine cannot take it."""
        self._found[record["run"]] = record
        with open(self._path, "a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # after a line that a kill cut short
            file.write((json.dumps(record, allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def of(self, run: PlannedRun) -> Record | None:
        """The last result of a run, done or failed; None = it has none."""
        return self._found.get(run.name)

    def adopt(self, run: PlannedRun) -> bool:
        """Take the result of a run that is done and had the very same settings under another name;
        False = there is none."""
        same = (r for r in self._found.values() if r["state"] == "done" and r["fingerprint"] == run.fingerprint)
        record = None if self.done(run) else next(same, None)
        if record is not None:
            self.add({**record, "run": run.name, "label": run.label, "stage": run.stage, "twin": run.twin})
        return record is not None

    def done(self, run: PlannedRun) -> bool:
        return (self.of(run) or {}).get("state") == "done"


def result(
    run: PlannedRun, folder: Path, *, seconds: float, error: str | None = None, device: str | None = None
) -> Record:
    """A run's line.

    Args:
        run: that ended.
        folder: of the run.
        seconds: by the wall, of this start of the run.
        error: why it failed; None = it is done.
        device: where it ran, if its folder does not say so.
    """
    try:
        found = read_run(folder)
    except ValueError:
        found = RunFolder(folder, [], [], {})
    scores = found.evaluations[-1]["bpb"] if found.evaluations and error is None else {}
    if error is None and not any(value is not None for value in scores.values()):
        error = "the run has no score: nothing was evaluated, or the scores are not finite"
    return {
        "run": run.name,
        "label": run.label,
        "stage": run.stage,
        "twin": run.twin,
        "seed": run.seed,
        "state": "done" if error is None else "failed",
        "error": error,
        "recipe": run.recipe.name,
        "overrides": list(run.overrides),
        "fingerprint": run.fingerprint,
        "steps": found.last.get("step", 0),
        "tokens": found.last.get("tokens", 0),
        "flops": found.last.get("flops", 0.0),
        "bpb": scores,
        "seconds": (found.seconds() or [0.0])[-1],
        "wall_seconds": seconds,
        "device": found.attempt.get("device", device),
        "commit": found.attempt.get("commit"),
        "data": found.about.get("data"),
        "folder": f"runs/{run.name}",
        "ended": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


# ------------------------------------------------------------------ rates


class Choice(NamedTuple):
    """What tuning has found for a twin."""

    point: Point | None  # None: not yet, or no point worked
    score: float
    decided: bool  # every point has ended
    at_edge: list[str]  # keys whose best value is the first or last of three or more


def score_of(run: PlannedRun, record: Record) -> float:
    """By which rates are chosen: bits per byte in mode decode, of a model without memory its only ones."""
    bpb = record["bpb"]
    value = next((bpb[mode] for mode in MODES if bpb.get(mode) is not None), None) if run.plain else bpb.get("decode")
    return math.inf if value is None else float(value)


def choose(sweep: Sweep, results: Results, *, failed: Collection[str] = ()) -> dict[str, Choice]:
    """The best point of the grid for each twin, by the mean over the seeds.

    Args:
        sweep: what was tuned.
        results: what is known.
        failed: names of runs that will not be tried again, so that the rest decides.
    """
    choices = {}
    for twin in sweep.twins:
        runs = [run for run in sweep.tuning if run.twin == twin]
        open_ = [run for run in runs if not results.done(run) and run.name not in failed]
        scores: dict[Point, list[float]] = defaultdict(list)
        for run in runs:
            record = results.of(run)
            scores[run.point].append(score_of(run, record) if record is not None and results.done(run) else math.inf)
        means = {point: statistics.fmean(values) for point, values in scores.items()}
        best = min(means, key=lambda point: means[point])
        if open_ or means[best] == math.inf:
            choices[twin] = Choice(None, math.inf, not open_, [])
        else:
            choices[twin] = Choice(best, means[best], True, _at_edge(sweep.axes, best))
    return choices


def _at_edge(axes: Mapping[str, Sequence[object]], point: Point) -> list[str]:
    """Keys whose numbers end where the best one lies."""
    at = []
    for (key, values), override in zip(axes.items(), point):
        numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
        ends = {f"{key}={toml_value(value)}" for value in (min(numbers), max(numbers))} if len(numbers) >= 3 else set()
        at += [key] if override in ends else []
    return at


# ------------------------------------------------------------------ the table


def table(sweep: Sweep, results: Results, *, folder: Path) -> str:
    """Everything that the sweep has found, one line a setting, seeds together.

    Args:
        sweep: as it was read.
        results: of its folder.
        folder: of the sweep: runs without a result tell how far they are.
    """
    choices = choose(
        sweep, results, failed=[run.name for run in sweep.tuning if (results.of(run) or {}).get("state") == "failed"]
    )
    parts = []
    if sweep.tuning:
        parts.append("tuning\n" + _rows(sweep.tuning, results, folder))
        for twin, choice in choices.items():
            if choice.point is None:
                parts.append(
                    f"rates of {twin}: "
                    + ("no point of the grid worked" if choice.decided else "not all points are done")
                )
                continue
            edge = f"; at the edge of the grid: {', '.join(choice.at_edge)}: widen it" if choice.at_edge else ""
            parts.append(f"rates of {twin}: {', '.join(choice.point)} ({choice.score:.4f}){edge}")
    rates = {twin: choice.point for twin, choice in choices.items() if choice.point is not None}
    compared = sweep.compared(rates)
    if compared:
        parts.append("runs\n" + _rows(compared, results, folder))
    waiting = [s.label for s in sweep.settings if s.label not in {run.label for run in compared}]
    if waiting:
        parts.append(f"waiting for the rates of their twin: {', '.join(waiting)}")
    return "\n\n".join(parts)


def _rows(runs: Iterable[PlannedRun], results: Results, folder: Path) -> str:
    groups: dict[str, list[PlannedRun]] = defaultdict(list)
    for run in runs:
        groups[run.label].append(run)
    lines = [["", "seeds", "steps", "tokens", "FLOPs", *MODES, "seconds", ""]]
    for label, members in groups.items():
        done = [record for run in members if results.done(run) and (record := results.of(run)) is not None]
        scores = [[r["bpb"][mode] for r in done if r["bpb"].get(mode) is not None] for mode in MODES]
        if members[0].plain:  # one score, whatever the mode
            scores = [[], [], next(filter(None, scores), [])]
        last = done[-1] if done else {}
        lines.append([
            label, f"{len(done)}/{len(members)}",
            _count(last.get("steps")), _count(last.get("tokens")), _power(last.get("flops")),
            *(mean_and_deviation(values) for values in scores),
            f"{statistics.fmean(r['seconds'] for r in done):.0f}" if done else "-", _remarks(members, results, folder),
        ])  # fmt: skip
    return columns(lines)


def _remarks(runs: Iterable[PlannedRun], results: Results, folder: Path) -> str:
    """What is to be said of runs that are not done."""
    said = []
    for run in runs:
        record, where = results.of(run), folder / "runs" / run.name
        if record is not None and record["state"] == "failed":
            said.append(f"seed {run.seed} failed: {record['error']}")
        elif record is None and (where / "metrics.jsonl").is_file():
            said.append(f"seed {run.seed} at step {read_run(where).last.get('step', 0):,}")
    return "; ".join(said)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and sample deviation of scores; no deviation of one."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):.4f}" + (f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else "")


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Rows of text under each other: the first and last column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, last) else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _power(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
