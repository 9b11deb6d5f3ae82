"""Runs of a sweep as processes, several on each device; the same sweep again goes on after an interruption."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from lrt.eval.runs import read_run
from lrt.train.monitor.faults import StopSignal
from lrt.train.sweep.results import Results, choose, result, score_of
from lrt.train.sweep.spec import PlannedRun, Sweep

POLL = 0.2  # seconds between two looks at the processes

HERE = Path(__file__).resolve().parents[3]  # the folder that holds the package


class Slot(NamedTuple):
    """A place for one run."""

    device: str | None  # what CUDA_VISIBLE_DEVICES says; None = the processor
    number: int  # among those of the device

    def __str__(self) -> str:
        return "CPU" if self.device is None else f"GPU {self.device}"


@dataclass(frozen=True)
class Child:
    """A run that is under way."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    log_start: int  # bytes that earlier starts wrote
    began: float


class Summary(NamedTuple):
    """How a sweep ended."""

    done: int  # runs, those of earlier calls too
    failed: int
    left: int  # runs that can still start; those whose rates are not found yet are not counted
    stopped: str | None  # why it ended before everything was tried


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Hold a sweep's folder, so that no second sweep works in it; runs that outlive a killed sweep hold it too.

    Raises:
        ValueError: another sweep holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by another sweep ({file.read().strip() or 'unknown process'}), or by runs that it "
                "left and that still save: wait for it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield file


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    launch: Sequence[str],
    devices: Sequence[str | None],
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> Summary:
    """Run everything that a sweep still lacks.

    A run that failed is tried once more in every call. Ctrl-C and SIGTERM end the runs, which save first; a second
    Ctrl-C kills them.

    Args:
        sweep: what to run.
        folder: results.jsonl, logs/ and runs/ lie in it.
        launch: command that trains a recipe, such as ``python recipes/run.py``.
        devices: values of CUDA_VISIBLE_DEVICES; ``[None]`` = the processor.
        minutes: after which nothing new starts; None = no limit.
        say: receives lines for the user.

    Raises:
        ValueError: another sweep works in the folder.
    """
    with locked(folder) as lock, StopSignal() as signals:
        pool = _Pool(sweep, folder, launch=launch, devices=devices, lock=lock.fileno(), say=say)
        pool.collect_finished()
        end = time.monotonic() + 60 * minutes if minutes is not None else None
        try:
            while True:
                pool.reap()
                over = end is not None and time.monotonic() >= end
                if signals.received is not None:
                    pool.stop(signals.received)
                    return pool.summary(f"stopped by {signals.received}")
                waiting = pool.waiting()
                if waiting and not over:
                    pool.start(waiting)
                if not pool.children and (over or not waiting):
                    return pool.summary("the time is over" if waiting else None)
                time.sleep(POLL)
        finally:
            pool.kill()


class _Pool:
    """Processes of a sweep and what came of them."""

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        *,
        launch: Sequence[str],
        devices: Sequence[str | None],
        lock: int,
        say: Callable[[str], None],
    ) -> None:
        self._sweep, self._folder, self._launch, self._lock, self._say = sweep, folder, list(launch), lock, say
        self._slots = [
            Slot(device, number) for number in range(sweep.side_by_side) for device in devices
        ]  # one on each device first
        self._results = Results(folder / "results.jsonl")
        self._failed: set[str] = set()  # in this call
        self._chosen: set[str] = set()
        self.children: dict[Slot, Child] = {}
        (folder / "logs").mkdir(exist_ok=True)

    # -------------------------------------------------------------- what there is to do

    def planned(self) -> list[PlannedRun]:
        """All runs that are known by now: those of a twin once its rates are found."""
        choices = choose(self._sweep, self._results, failed=self._failed)
        rates = {}
        for twin, choice in choices.items():
            if choice.point is not None:
                rates[twin] = choice.point
            if choice.decided and twin not in self._chosen:
                self._chosen.add(twin)
                edge = f"; at the edge of the grid: {', '.join(choice.at_edge)}: widen it" if choice.at_edge else ""
                found = (
                    "no point of the grid worked"
                    if choice.point is None
                    else f"{', '.join(choice.point)} ({choice.score:.4f}){edge}"
                )
                self._say(f"rates of {twin}: {found}")
        compared = self._sweep.compared(rates)
        for run in compared:
            if self._results.adopt(run):
                self._say(f"{_now()} done   {run.name}  by a run with the same settings")
        return [*self._sweep.tuning, *compared]

    def waiting(self) -> list[PlannedRun]:
        """Runs that can start now, in order."""
        under_way = {child.run.name for child in self.children.values()}
        return [
            run for run in self.planned() if not self._results.done(run) and run.name not in self._failed | under_way
        ]

    def collect_finished(self) -> None:
        """Write down runs that ended when no sweep was there to see it."""
        for run in self.planned():
            if not self._results.done(run) and self._ended(run):
                self._results.add(result(run, self._where(run), seconds=0.0))

    def summary(self, stopped: str | None) -> Summary:
        planned = self.planned()
        done = sum(map(self._results.done, planned))
        return Summary(done, len(self._failed), len(planned) - done - len(self._failed), stopped)

    # -------------------------------------------------------------- processes

    def start(self, waiting: Sequence[PlannedRun]) -> None:
        """Give every free slot a run."""
        for slot, run in zip([slot for slot in self._slots if slot not in self.children], waiting):
            sets = [*run.overrides, f"run.output={self._folder.resolve() / 'runs'}", f"run.name={run.name}"]
            line = [
                *self._launch,
                "--recipe",
                str(run.recipe),
                *(word for override in sets for word in ("--set", override)),
            ]
            log = open(self._folder / "logs" / f"{run.name}.log", "ab")
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(slot),
                pass_fds=(self._lock,),  # a sweep that is killed leaves its folder locked until its runs have saved
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which tells its runs
                preexec_fn=_end_with_parent,
            )  # fmt: skip
            self.children[slot] = Child(run, process, log, log.tell(), time.monotonic())
            self._say(f"{_now()} start  {run.name}  on {slot}")

    def _environment(self, slot: Slot) -> dict[str, str]:
        cores = max(1, (os.cpu_count() or 1) // len(self._slots))
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))  # the runs are of this lrt
        mine = {"OMP_NUM_THREADS": str(self._sweep.threads), "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        if slot.device is not None:
            mine["CUDA_VISIBLE_DEVICES"] = slot.device
        return {"TORCHINDUCTOR_COMPILE_THREADS": str(cores), **os.environ, **mine}

    def reap(self) -> None:
        """Write down every run that has ended by itself."""
        for slot, child in list(self.children.items()):
            code = child.process.poll()
            if code is None:
                continue
            self._close(slot)
            error = (
                None
                if code == 0 and self._ended(child.run)
                else _error(code, Path(child.log.name).read_bytes()[child.log_start :])
            )
            record = result(
                child.run, self._where(child.run), seconds=time.monotonic() - child.began, error=error, device=str(slot)
            )
            self._results.add(record)
            if record["state"] == "failed":
                self._failed.add(child.run.name)
                self._say(f"{_now()} FAILED {child.run.name}: {record['error']} ({child.log.name})")
            else:
                score = score_of(child.run, record)
                self._say(
                    f"{_now()} done   {child.run.name}  {score:.4f} bits per byte, {record['wall_seconds']:.0f} s"
                )

    def stop(self, reason: str) -> None:
        """End all runs, which save first; the same sweep goes on with them."""
        if self.children:
            self._say(f"stopping by {reason}: {len(self.children)} runs save first; Ctrl-C again kills them")
        for child in self.children.values():
            child.process.send_signal(signal.SIGTERM)
        for slot, child in list(self.children.items()):
            child.process.wait()
            if self._ended(child.run):
                self._results.add(
                    result(child.run, self._where(child.run), seconds=time.monotonic() - child.began, device=str(slot))
                )
            self._close(slot)

    def kill(self) -> None:
        """Leave no run behind."""
        for slot, child in list(self.children.items()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()
            self._close(slot)

    def _close(self, slot: Slot) -> None:
        self.children.pop(slot).log.close()

    def _where(self, run: PlannedRun) -> Path:
        return self._folder / "runs" / run.name

    def _ended(self, run: PlannedRun) -> bool:
        """Whether a run has reached its end, whatever became of its process."""
        return (self._where(run) / "metrics.jsonl").is_file() and read_run(self._where(run)).done


def visible_devices(environment: Mapping[str, str] = os.environ) -> list[str | None]:
    """The GPUs that this process may use, or ``[None]`` where there is none."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [*filter(None, (name.strip() for name in given.split(",")))] or [None]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())] or [None]


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In a new process: a sweep that is killed takes its runs along, which save first."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _error(code: int, log: bytes) -> str:
    """Why a run failed, in one line: what it said last."""
    lines = [line.strip() for line in log.decode("utf-8", errors="replace").splitlines() if line.strip()]
    said = next(
        (line for line in reversed(lines) if line.startswith(("error:", "stopped:"))),
        lines[-1] if lines else "it said nothing",
    )
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}; last line: {said}"
    return said if code else f"ended without being told to, last line: {said}"


def _now() -> str:
    return time.strftime("%H:%M:%S")
