"""What a training run left in its folder, read without building its model."""

from __future__ import annotations

import contextlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from lrt.tables import Table

Record = Table
PAUSE = 10.0  # a step that took this many medians compiled or captured something, or began a process


def read_records(path: Path) -> list[Record]:
    """Records of a JSONL file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def scores_of(record: Record) -> dict[str, float]:
    """Bits per byte of an evaluation by memory mode; of a model without memory its only score, under the first mode.

    Args:
        record: of an evaluation; an empty ``recurrence`` says that there is no memory.
    """
    scores = record["bpb"]
    return dict(list(scores.items())[:1]) if record.get("recurrence") == {} else scores


@dataclass(frozen=True)
class RunFolder:
    """A run as its files tell it.

    Attributes:
        folder: of the run.
        train: records of its steps.
        evaluations: records of its evaluations.
        about: content of run.json: data, and one attempt for every start of the run; empty for a run without one.
    """

    folder: Path
    train: list[Record]
    evaluations: list[Record]
    about: Record

    @property
    def attempt(self) -> Record:
        """The run's last start; empty when it is not known."""
        return (self.about.get("attempts") or [{}])[-1]

    @property
    def done(self) -> bool:
        """Whether the run has reached its end, evaluation and export included."""
        return self.attempt.get("state") == "done"

    @property
    def last(self) -> Record:
        """Record of the last step; empty before the first."""
        return self.train[-1] if self.train else {}

    @property
    def goes_on(self) -> bool:
        """Whether it begins from another run's step, whose tokens and FLOPs it counts and whose seconds it does not
        know."""
        return bool(self.train) and self.train[0]["step"] > 1

    def seconds(self) -> list[float]:
        """Seconds of its own training up to every step, without evaluations, compilation and the start of processes.

        A step that took far longer than the run's median counts as the median.
        """
        before = [0, *(r["tokens"] for r in self.train[:-1])]
        if self.goes_on:
            before[0] = self.train[0]["tokens"] * (1 - 1 / self.train[0]["step"])
        laps = [(r["tokens"] - old) / r["tokens_per_second"] for r, old in zip(self.train, before)]
        median = statistics.median(laps) if laps else 0.0
        total, sums = 0.0, []
        for lap in laps:
            total += lap if lap <= PAUSE * median else median
            sums.append(total)
        return sums


def read_run(folder: str | Path) -> RunFolder:
    """Read a run's folder.

    Raises:
        ValueError: it holds no metrics.jsonl.
    """
    folder = Path(folder)
    metrics, about = folder / "metrics.jsonl", folder / "run.json"
    if not metrics.is_file():
        raise ValueError(
            f"{folder} holds no metrics.jsonl: name the folder of a training run, run.output/run.name of its recipe"
        )
    records = read_records(metrics)
    kinds = {kind: [r for r in records if r.get("kind") == kind] for kind in ("train", "evaluation")}
    found: Record = {}
    if about.is_file():
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(about.read_text(encoding="utf-8"))
            found = told if isinstance(told, dict) else {}
    return RunFolder(folder, kinds["train"], kinds["evaluation"], found)
