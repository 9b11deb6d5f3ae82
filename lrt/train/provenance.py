"""Where a run's numbers come from: run.json holds its data and, for every start, code, command and machine."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from lrt.tables import Table

Record = Table
PACKAGE = Path(__file__).resolve().parents[1]


class RunFile:
    """A run's run.json: what stays the same, and one attempt for every start.

    Args:
        path: of the file; attempts that it holds are kept.
        steps: of the whole run.
        start: steps done when this attempt begins.
        data: fingerprints of what the run reads.
        about: of this attempt, from ``provenance``.
    """

    def __init__(self, path: Path, *, steps: int, start: int, data: Record, about: Record) -> None:
        self._path, self._began = path, time.monotonic()
        earlier: list[Record] = []
        if path.is_file():
            with contextlib.suppress(
                ValueError, KeyError, TypeError
            ):  # cut short, or not ours: this attempt is told all the same
                earlier = list(json.loads(path.read_text(encoding="utf-8"))["attempts"])
        self._attempt = {"started": _now(), **about, "from_step": start, "state": "running"}
        self._content = {"steps": steps, "data": data, "attempts": [*earlier, self._attempt]}
        self._write()

    def end(self, state: str, *, step: int) -> None:
        """Say how the attempt ended.

        Args:
            state: ``done``, ``stopped: SIGNAL`` or ``failed: REASON``; an attempt that was killed stays ``running``.
            step: steps done.
        """
        self._attempt |= {
            "ended": _now(),
            "seconds": round(time.monotonic() - self._began, 3),
            "step": step,
            "state": state,
        }
        self._write()

    def _write(self) -> None:
        beside = self._path.with_name(self._path.name + ".new")
        with contextlib.suppress(OSError):  # a full disk: the run goes on, and its checkpoints say what matters
            beside.write_text(json.dumps(self._content, indent=1), encoding="utf-8")
            beside.replace(self._path)


def provenance(device: torch.device, *, world_size: int) -> Record:
    """Code, versions, command and machine of this process.

    Args:
        device: on which it computes.
        world_size: processes of the run.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__, "lrt": sys.modules["lrt"].__version__}
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda or "none"
    if "transformers" in sys.modules:
        versions["transformers"] = sys.modules["transformers"].__version__
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        **commit(),
        "versions": versions,
        "command": list(sys.orig_argv),
        "host": platform.node(),
        "device": name,
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "process": os.getpid(),
    }


def commit(package: Path = PACKAGE) -> Record:
    """Git commit of the code, and whether tracked files differ from it; both None without a checkout."""
    try:
        _git(
            package, "ls-files", "--error-unmatch", "__init__.py"
        )  # installed inside somebody else's repository, it is not its code
        return {
            "commit": _git(package, "rev-parse", "HEAD"),
            "changed": bool(_git(package, "status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
