"""What can go wrong in a long run, and what is done about it: signals, numbers that are not finite, hangs."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

ECHO = 5.0  # seconds after a signal in which torchrun's own copy of it may arrive


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class HangError(RuntimeError):
    """A collective did not end: another rank has died or hangs, so nothing more can be done together."""


class NotSavedError(RuntimeError):
    """What a run ends with could not be written."""


class StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint and a clean end; a second Ctrl-C ends at once.

    Losing torchrun counts as a stop request too: a signal that it does not handle ends it at once, and nothing would
    then supervise its ranks.
    Used as a context; outside it, and outside the main thread, no handler is changed.
    """

    SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")

    def __init__(self) -> None:
        self._received: str | None = None
        self._at = -math.inf
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> str | None:
        """What asks for the end; None = nothing."""
        if self._received is None and self._launcher not in (None, os.getppid()):
            self._received = "the end of torchrun"
        return self._received

    def ask(self, by: str) -> None:
        """Ask for the end without a signal."""
        self._received = self._received or by

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Processes that are started inside never hear these signals, which reach a whole process group:
        they end with this one.

        They inherit that the signals are blocked here; what comes meanwhile this process hears,
        at the end at the latest.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to torchrun too, which hands it on: the ranks hear one Ctrl-C twice.
        echo = self._launcher is not None and time.monotonic() - self._at < ECHO
        if self._received is not None and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        if self._received is None:
            self._received, self._at = signal.Signals(number).name, time.monotonic()


def start_compile_workers() -> None:
    """Start the processes in which the compiler makes kernels, where it uses any;
    otherwise the first compilation does."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.warm_pool()


class FiniteGuard:
    """Counts steps that the device skipped, names their data, and stops when they do not end.

    Args:
        limit: skipped steps in a row that stop the run.
        path: file to which the offending batches' identity goes, one JSON object per step.
        total: skipped steps so far, of a run that goes on.
    """

    def __init__(self, *, limit: int, path: Path, total: int = 0) -> None:
        self._limit, self._path = limit, path
        self.total, self._row = total, 0

    @property
    def skipping(self) -> int:
        """Steps in a row, up to the last, that were skipped."""
        return self._row

    def see(self, step: int, *, skipped: bool, loss: float, norm: float, sources: Sequence[str]) -> None:
        """Take note of a step.

        Raises:
            NonFiniteError: this one was the last that is tolerated.
        """
        if not skipped:
            self._row = 0
            return
        self.total, self._row = self.total + 1, self._row + 1
        line = json.dumps({"step": step, "loss": str(loss), "gradient_norm": str(norm), "rows": list(sources)})
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            print(f"{self._path} cannot be written ({error.strerror}): {line}", file=sys.stderr, flush=True)
        if self._row >= self._limit:
            raise NonFiniteError(
                f"step {step}: loss {loss}, gradient norm {norm}: {self._row} steps in a row were not finite and were "
                f"skipped (training.max_skipped = {self._limit}). Their rows are named in {self._path}. Lower the "
                "learning rates or look at the data; the checkpoints before are whole"
            )


class Heartbeat:
    """Names the step when nothing has moved for almost as long as the process group waits.

    The process group ends a hang by its own timeout, but cannot say which step it was in; this thread can.

    Args:
        timeout_s: of the process group.
        rank: of this process.
        stream: where the words go; None = standard error.
    """

    def __init__(self, *, timeout_s: float, rank: int = 0, stream: TextIO | None = None) -> None:
        self._timeout, self._rank, self._stream = timeout_s, rank, stream
        # reading and fetching data before the first beat may take long
        self._last, self._where, self._said = math.inf, "start", False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self, where: str) -> None:
        """Progress was made; ``where`` is what comes now, such as "step 12"."""
        self._last, self._where, self._said = time.monotonic(), where, False

    @property
    def where(self) -> str:
        return self._where

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat; infinite before the first, when nothing is known."""
        return math.inf if self._last == math.inf else time.monotonic() - self._last

    def _watch(self) -> None:
        while not self._stop.wait(min(5.0, self._timeout / 20)):
            silent = time.monotonic() - self._last
            if silent > 0.9 * self._timeout and not self._said:
                self._said = True
                stream = self._stream or sys.stderr
                print(
                    f"rank {self._rank}: {hang_message(self._where, self._timeout)}; stacks of this rank follow",
                    file=stream,
                    flush=True,
                )
                if self._stream is None:
                    faulthandler.dump_traceback(file=stream)


def hang_message(where: str, timeout_s: float, *, silent_s: float = math.inf) -> str:
    """What a user reads when a collective did not end.

    Args:
        where: such as "step 12".
        timeout_s: of the process group.
        silent_s: seconds without progress; a collective that ends long before its timeout has lost a rank.
    """
    if silent_s < 0.8 * timeout_s:
        return (
            f"{where}: another rank has ended or was killed, {silent_s:.3g} seconds after the last progress; "
            f"restart with the same command to go on from the newest checkpoint"
        )
    return (
        f"{where}: no progress for about {timeout_s / 60:.3g} minutes (parallel.timeout_minutes): "
        f"a rank has died or hangs; restart with the same command to go on from the newest checkpoint"
    )
