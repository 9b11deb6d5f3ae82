"""What a run says of itself: JSONL always, and rows on the console; other places are in ``lrt.train.monitor.sinks``.

Numbers of a step are read one step late, when the device has them anyway, so that reading never waits
for work that was only just queued.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lrt.eval.runs import Record, read_records, scores_of
from lrt.train.monitor.faults import NotSavedError


class Sink(Protocol):
    """Somewhere that records go: those of steps, evaluations and samples, told apart by ``kind``,
    each with its ``step``."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


# ------------------------------------------------------------------ late reading


class Late(NamedTuple):
    """Numbers of an earlier step."""

    step: int
    values: list[float]
    note: Any  # what ``push`` was given beside them


class LateReader:
    """Device tensors in, host numbers out one step later."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None, Any]] = deque()

    def push(self, step: int, values: Tensor, note: Any = None) -> None:
        """Start copying a 1-D tensor of numbers to the host.

        Args:
            step: that they belong to.
            values: on any device.
            note: handed back by ``pop``.
        """
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, values, event, note))

    @property
    def busy(self) -> bool:
        """Whether the device still works on what was pushed last."""
        return bool(self._waiting) and self._waiting[-1][2] is not None and not self._waiting[-1][2].query()

    def pop(self, *, keep: int = 1) -> Iterator[Late]:
        """Numbers of all steps but the newest ``keep``; on the CPU of all, since nothing is queued there."""
        while self._waiting and (len(self._waiting) > keep or self._waiting[0][2] is None):
            step, values, event, note = self._waiting.popleft()
            if event is not None:
                event.synchronize()  # of that step, not of what was queued since
            yield Late(step, values.tolist(), note)


class Clock:
    """Seconds of training between two steps, and how many of them were spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited, self._paused = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self, late: LateReader) -> Iterator[None]:
        """Time inside counts as waiting for data, unless the device has work until its end."""
        start = time.perf_counter()
        yield
        if not late.busy:
            self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (evaluation, a profile) is no training time."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def lap(self) -> tuple[float, float]:
        """(seconds since the last lap, share of them spent waiting for data)."""
        now = time.perf_counter()
        seconds = max(1e-9, now - self._start - self._paused)
        share = min(1.0, self._waited / seconds)
        self._start, self._waited, self._paused = now, 0.0, 0.0
        return seconds, share


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the device, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ------------------------------------------------------------------ sinks


class JsonLines:
    """One JSON object per line; ``kind`` tells train from evaluation.

    Where the disk is full, records wait in memory until there is room, and the run goes on.

    Args:
        path: of the file; lines behind step ``resume_step`` are dropped, so that a resumed run repeats none.
        resume_step: steps done; 0 starts a new file.
        report: receives one line for the user when records begin to wait.
    """

    def __init__(self, path: Path, *, resume_step: int = 0, report: Callable[[str], None] = print) -> None:
        kept = (
            [r for r in read_records(path) if r.get("step", 0) <= resume_step] if resume_step and path.is_file() else []
        )
        _replace(path, kept)
        self._file = open(path, "ab", buffering=0)
        self._path, self._report, self._unwritten = path, report, b""
        self._evaluated = {r["step"] for r in kept if r["kind"] == "evaluation"}
        self.lost: str | None = None

    def write(self, record: Record) -> None:
        if self.lost is None and not self._is_there():
            self.lost = f"{self._path} was deleted or replaced under the run: its records are lost"
            self._report(self.lost)
        if record["kind"] == "evaluation":
            self._forget(record["step"])
        waits = bool(self._unwritten)
        self._unwritten += (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        try:
            while self._unwritten:  # a disk that fills up takes a part of it
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waits:
                self._report(
                    f"{self._path} cannot be written ({error.strerror}): its records wait in memory until there is room"
                )

    def check(self) -> None:
        """Try once more to write what waits.

        Raises:
            NotSavedError: records are lost.
        """
        with contextlib.suppress(OSError):
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        if self._unwritten:
            self.lost = f"{self._path} lacks its last {self._unwritten.count(10)} records: they could not be written"
        if self.lost is not None:
            raise NotSavedError(f"{self.lost}. The same command goes on from the newest checkpoint")

    def close(self) -> None:
        if self._unwritten:
            self._report(f"{self._path} lacks its last {self._unwritten.count(10)} records: they could not be written")
        self._file.close()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except OSError:
            return False

    def _forget(self, step: int) -> None:
        """A step that is evaluated again has one record: the last."""
        if step in self._evaluated and self._is_there() and not self._unwritten:
            kept = [r for r in read_records(self._path) if r["kind"] != "evaluation" or r["step"] != step]
            with contextlib.suppress(OSError):
                _replace(self._path, kept)
                self._file.close()
                self._file = open(self._path, "ab", buffering=0)
        self._evaluated.add(step)


def _replace(path: Path, records: Sequence[Record]) -> None:
    """Write a JSONL file anew; it is there whole, before and after."""
    beside = path.with_name(path.name + ".new")
    beside.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    beside.replace(path)


def _plain(value: object) -> object:
    """JSON has no NaN: a number that is none becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """A progress bar and a row every few steps.

    Args:
        total: steps of the run.
        start: steps already done.
        every: steps between rows.
    """

    HEADER = (
        f"{'step':>8} {'loss':>8}  {'by group':<20} {'rate':>7} {'gradient':>9} {'tokens/s':>10} {'MFU':>6} "
        f"{'data':>6} {'GiB':>6}"
    )

    def __init__(self, *, total: int, start: int, every: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        class Unbreakable(RichConsole):
            def on_broken_pipe(self) -> None:  # rich would end the run, which only lost its reader
                self.quiet = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        self._total, self._every, self._rows = total, max(1, every), 0
        self.console = Unbreakable(highlight=False, soft_wrap=True)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._progress.add_task("training", total=total, completed=start)
        self._progress.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def write(self, record: Record) -> None:
        if record["kind"] == "evaluation":
            self.say(f"{record['step']:>8} bits per byte: {score_line(record)}  ({record['seconds']:.0f} s)")
            for line in source_lines(record):
                self.say(f"{'':>8} {line}")
            for line in core_lines(record):
                self.say(f"{'':>8} {line}")
            for line in memory_table(record) if record["step"] < self._total else ():  # at the end the summary says it
                self.say(f"{'':>8} {line}")
            return
        if record["kind"] == "sample" and record["step"] < self._total:
            for line in record["text"].splitlines():
                self.say(f"{'':>8} | {line}")
        if record["kind"] != "train":
            return
        step = record["step"]
        self._progress.update(self._task, completed=step)
        if step % self._every and step not in (1, self._total):
            return
        if self._rows % 40 == 0:
            self.say(self.HEADER)
        self._rows += 1
        groups = " ".join(f"{group:.3f}" for group in record["groups"])
        mfu = f"{100 * record['mfu']:.1f}%" if "mfu" in record else "-"
        skipped = f"  {record['skipped']} skipped" if record["skipped"] else ""
        self.say(
            f"{step:>8} {record['loss']:>8.4f}  {groups:<20} {record['lr_scale']:>7.4f} {record['grad_norm']:>9.3g} "
            f"{record['tokens_per_second']:>10,.0f} {mfu:>6} {100 * record['data_wait']:>5.1f}% "
            f"{record['peak_memory_gib']:>6.2f}{skipped}"
        )

    def close(self) -> None:
        self._progress.stop()


TABLE = (  # of an evaluation's record: what a line says, and the key of its numbers, one per block
    ("norm of the source's output", "source_norm", "mean"), ("norm of the memory", "memory_norm", "mean"),
    ("local gate, mean", "local_gate", "mean"), ("local gate, std", "local_gate", "std"),
    ("memory gate, mean", "memory_gate", "mean"), ("memory gate, std", "memory_gate", "std"),
    ("injected memory / residual", "injection_ratio", "mean"),
    ("memory / local keys", "key_ratio", "mean"), ("memory / local values", "value_ratio", "mean"),
)  # fmt: skip


def source_lines(record: Record) -> list[str]:
    """Bits per byte of an evaluation's further sources, one per line."""
    found = record.get("bpb_of_sources") or {}
    width = max(map(len, found), default=0)
    return [f"{name:<{width}}  {score_line({**record, 'bpb': scores})}" for name, scores in found.items()]


def core_lines(record: Record) -> list[str]:
    """What an evaluation's tasks of CORE gave, in one line; none where none are asked."""
    found = record.get("core")
    if not found:
        return []
    each = "  ".join(f"{name} {value:.3f}" for name, value in found["accuracy"].items())
    return [f"tasks of CORE ({found['memory']}): centred {found['value']:+.4f} +- {found['se']:.4f}; accuracy: {each}"]


def score_line(record: Record) -> str:
    """Bits per byte of an evaluation; a model without memory has one number and no mode."""
    scores = scores_of(record)
    return "  ".join(f"{mode} {value:.4f}" if len(scores) > 1 else f"{value:.4f}" for mode, value in scores.items())


def memory_table(record: Record) -> list[str]:
    """What the memory does, one line per statistic: least, median and most over the blocks; empty without memory.

    Args:
        record: of an evaluation, with ``activations`` and ``recurrence``.
    """
    activations, parameters = record.get("activations") or {}, record.get("recurrence") or {}
    rows = [(title, activations[key][of]) for title, key, of in TABLE if key in activations]
    rows += [
        (title, parameters[key])
        for title, key in (("gain g", "gains"), ("residual scale a", "residual_scales"))
        if key in parameters
    ]
    if not activations:
        return []
    lines = [f"{'memory, over the blocks':<28} {'least':>10} {'median':>10} {'most':>10}"]
    for title, x in rows:
        least, median, most = (f"{value:.4g}" for value in (min(x), statistics.median(x), max(x)))
        if len(x) == 1:
            least = most = ""  # one number is said once
        lines.append(f"{title:<28} {least:>10} {median:>10} {most:>10}".rstrip())
    return lines


class Recorder:
    """Hands every record to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    @property
    def lost(self) -> str | None:
        """What happened to records that a file no longer has; None = nothing."""
        return next((sink.lost for sink in self._sinks if isinstance(sink, JsonLines)), None)

    def check(self) -> None:
        """Raises NotSavedError where records are lost."""
        for sink in self._sinks:
            if isinstance(sink, JsonLines):
                sink.check()

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
