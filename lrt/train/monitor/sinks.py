"""Where else the records of a run can go: CSV, TensorBoard, Weights & Biases, trackio.

A sink has two methods, ``write`` a record and ``close``. metrics.jsonl is written in any case and holds everything.
What goes wrong in another sink is said once, and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import csv
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from lrt.config import Recipe, recipe_to_table
from lrt.eval.runs import Record
from lrt.tables import Table
from lrt.train.monitor.metrics import JsonLines, Sink


def open_sinks(recipe: Recipe, folder: Path, *, resume_step: int, report: Callable[[str], None]) -> list[Sink]:
    """The sinks that a recipe asks for.

    Args:
        recipe: section ``metrics`` is read; the whole is handed on as the run's configuration.
        folder: of the run.
        resume_step: steps done; what was recorded behind them is dropped where a sink can.
        report: receives one line when a sink fails.

    Raises:
        ValueError: a package is missing, or a service cannot be reached.
    """
    asked = recipe.metrics
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", resume_step=resume_step, report=report)]
    if asked.csv:
        sinks.append(Csv(folder, resume_step=resume_step))
    if asked.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    if asked.wandb:
        sinks.append(Wandb(recipe, folder))
    if asked.trackio:
        sinks.append(Trackio(recipe, folder))
    return [sinks[0], *(Guarded(sink, report=report) for sink in sinks[1:])]


class Guarded:
    """A sink that cannot end a run: after its first error it is left out.

    Args:
        sink: that is written to.
        report: receives one line for the user.
    """

    def __init__(self, sink: Sink, *, report: Callable[[str], None]) -> None:
        self._sink: Sink | None = sink
        self._report = report

    def write(self, record: Record) -> None:
        if self._sink is not None:
            self._try(lambda sink: sink.write(record))

    def close(self) -> None:
        if self._sink is not None:
            self._try(lambda sink: sink.close())

    def _try(self, do: Callable[[Sink], None]) -> None:
        assert self._sink is not None
        try:
            do(self._sink)
        except Exception as error:  # noqa: BLE001 - whatever a service raises: metrics.jsonl has the records
            words = str(error).strip().splitlines() or [type(error).__name__]
            self._report(
                f"{type(self._sink).__name__} records nothing more ({words[0]}); metrics.jsonl holds everything"
            )
            self._sink = None


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Names and values of all numbers of a record; a list's are numbered, a table's have its name before theirs."""
    for name, value in record.items():
        if isinstance(value, (dict, list, tuple)):
            inside = value if isinstance(value, dict) else {str(i): v for i, v in enumerate(value)}
            yield from ((f"{name}/{key}", number) for key, number in scalars(inside))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            yield name, value


class Csv:
    """One table per kind of record (train.csv, evaluation.csv), one column per number.

    Args:
        folder: of the tables.
        resume_step: rows behind it are dropped; 0 starts new tables.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self._folder, self._resume_step = folder, resume_step
        self._columns: dict[str, list[str]] = {}
        self._files: dict[str, TextIO] = {}

    def write(self, record: Record) -> None:
        row = {"step": record["step"], **dict(scalars(record))}
        kind = record["kind"]
        if len(row) == 1:
            return
        if kind not in self._files or not set(row) <= set(self._columns[kind]):
            self._begin(kind, list(row))
        csv.DictWriter(self._files[kind], self._columns[kind]).writerow(row)
        self._files[kind].flush()

    def _begin(self, kind: str, columns: list[str]) -> None:
        """Open a table, or write it anew with more columns."""
        path, first = self._folder / f"{kind}.csv", kind not in self._files
        rows = []
        if not first or (self._resume_step and path.is_file()):
            if not first:
                self._files[kind].close()
            with open(path, newline="", encoding="utf-8") as file:
                rows = [r for r in csv.DictReader(file) if not first or _step(r) <= self._resume_step]
        self._columns[kind] = list(dict.fromkeys([*(rows[0] if rows else ()), *self._columns.get(kind, ()), *columns]))
        beside = path.with_name(path.name + ".new")
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns[kind])
            writer.writeheader()
            writer.writerows(rows)
        beside.replace(path)
        self._files[kind] = open(path, "a", newline="", encoding="utf-8")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _step(row: Table) -> float:
    try:
        return int(row["step"])
    except (KeyError, TypeError, ValueError):  # a last line that a kill cut short
        return float("inf")


class TensorBoard:
    """Scalars and samples for TensorBoard.

    Raises:
        ValueError: the package is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(_missing("tensorboard")) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        with contextlib.suppress(OSError):  # metrics.jsonl says that the disk is full, and keeps everything
            for name, value in scalars(record):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
            if "text" in record:
                self._writer.add_text(record["kind"], record["text"], record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; WANDB_MODE=offline records into the run's folder without a network or an account.

    A resumed run goes on in the same record: its id lies in the run's folder.

    Raises:
        ValueError: the package is missing, or it cannot start.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(_missing("wandb")) from None
        identity = folder / "wandb_id"
        if not identity.is_file():
            identity.write_text(secrets.token_hex(8), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=recipe.metrics.project, name=recipe.run.name, id=identity.read_text(encoding="utf-8").strip(),
                resume="allow", dir=str(folder), config=recipe_to_table(recipe),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - no account, no network, a project that may not be written
            raise ValueError(
                f"metrics.wandb = true, but it cannot start ({' '.join(str(error).split())}): run  wandb login , set "
                "WANDB_MODE=offline in the environment, or leave metrics.wandb out"
            ) from None
        self._text = wandb.Html

    def write(self, record: Record) -> None:
        kind = record["kind"]
        found: Table = {f"{kind}/{name}": value for name, value in scalars(record)}
        if "text" in record:
            found[kind] = self._text(_as_html(record["text"]))
        self._run.log(found, step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio: recorded on this machine, shown by ``trackio show``.

    Raises:
        ValueError: the package is missing, or it cannot start.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        try:
            import trackio
        except ImportError:
            raise ValueError(_missing("trackio")) from None
        try:
            self._run = trackio.init(
                project=recipe.metrics.project, name=recipe.run.name, resume="allow", embed=False,
                config=recipe_to_table(recipe), auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a folder or a space that may not be written
            words = " ".join(str(error).split())
            raise ValueError(
                f"metrics.trackio = true, but it cannot start ({words}): mend it, or leave metrics.trackio out"
            ) from None

    def write(self, record: Record) -> None:
        kind = record["kind"]
        found: Table = {f"{kind}/{name}": value for name, value in scalars(record)}
        if "text" in record:
            found[kind] = record["text"]
        self._run.log(found, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _missing(package: str) -> str:
    mend = f'pip install -e ".[{package}]" in a checkout of lrt'
    return f"metrics.{package} = true needs the package {package}: {mend}, or leave it out"


def _as_html(text: str) -> str:
    import html

    return f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"
