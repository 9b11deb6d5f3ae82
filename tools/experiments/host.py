"""A part of the scripts beside it, no command: commands within a time limit, and what runs have recorded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Host:
    """Commands within a time limit, each with its own log; what they leave is written down as soon as it is there."""

    def __init__(self, out: Path, *, seconds: float, processors: bool) -> None:
        self.out, self.work, self.processors = out, out / "work", processors
        self.until = time.monotonic() + seconds
        self.results: dict[str, Any] = {"left_out": [], "seconds": {}, "exit_codes": {}}
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def keep(self, **found: Any) -> None:
        self.results.update(found)
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def start(
        self, name: str, *line: str, processes: int = 0, gpus: range | None = None, limit: float = 1e9, **more: str
    ) -> Job | None:
        """Start a command of the checkout, under torchrun with ``processes``; None where no time is left for it.

        Args:
            name: of the command, and of its log.
            line: what Python runs.
            processes: 0 = none of torchrun.
            gpus: that it sees; None = all.
            limit: seconds after which it is killed.
            more: environment variables.
        """
        if self.left < 15:
            self.results["left_out"].append(name)
            return None
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}
        if self.processors or gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = "" if self.processors or gpus is None else ",".join(map(str, gpus))
        log = self.work / f"{name}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, *(launcher if processes else []), *line],
                stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
            )  # fmt: skip
        return Job(name, process, log, limit=min(limit, self.left))

    def wait(self, job: Job | None) -> bool:
        """Wait for a command, at most until the time limit; whether it ended well."""
        if job is None:
            return False
        try:
            code = job.process.wait(max(1.0, min(self.left, job.began + job.limit - time.monotonic())))
        except subprocess.TimeoutExpired:
            job.kill()
            code = job.process.wait()
        self.results["seconds"][job.name] = round(time.monotonic() - job.began, 1)
        self.results["exit_codes"][job.name] = code
        print(f"{job.name}: exit code {code}, {time.monotonic() - job.began:.0f} s, {self.left:.0f} s left", flush=True)
        if code:
            print("\n".join(job.log.read_text(errors="replace").splitlines()[-25:]), flush=True)
        self.keep()
        return code == 0

    def run(self, name: str, *line: str, **options: Any) -> bool:
        """``start`` and ``wait``."""
        return self.wait(self.start(name, *line, **options))


class Job:
    """A command that was started."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, *, limit: float) -> None:
        self.name, self.process, self.log, self.limit = name, process, log, limit
        self.began = time.monotonic()

    def stop_at(self, folder: Path, step: int) -> None:
        """Send one rank SIGUSR1 when the run has recorded a step: all ranks save and end."""
        while self.process.poll() is None:
            if steps := [r["step"] for r in records(folder)]:
                if steps[-1] >= step:
                    break
            time.sleep(0.1)
        with contextlib.suppress(IndexError, ProcessLookupError):
            os.kill(self._ranks()[0], signal.SIGUSR1)

    def kill(self) -> None:
        """End the command at once, and the ranks of torchrun, which have sessions of their own."""
        for pid in (*self._ranks(), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _ranks(self) -> list[int]:
        pid = self.process.pid
        with contextlib.suppress(FileNotFoundError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []


def records(folder: Path) -> list[dict[str, Any]]:
    """The training steps that a run has recorded so far."""
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return []
