"""Where a process stands: environments that describe no group, addresses in use, and packages that are missing."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lrt.config import parse_recipe
from lrt.config.environment import Place, place_of_process
from lrt.eval.processes import joined
from lrt.train.distributed.world import open_world

ROOT = Path(__file__).parent.parent.parent
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


def told(monkeypatch, **values):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_is_alone_or_one_of_a_group(monkeypatch):
    told(monkeypatch)
    assert place_of_process() == Place(1, 0, 0)
    told(monkeypatch, WORLD_SIZE=4, RANK=3, LOCAL_RANK=1)
    assert place_of_process() == Place(4, 3, 1)


@pytest.mark.parametrize(
    "values",
    [
        {"WORLD_SIZE": "x"},
        {"WORLD_SIZE": 2, "RANK": 2},
        {"WORLD_SIZE": -1, "RANK": 0},
        {"WORLD_SIZE": 0, "RANK": 0},
        {"RANK": 1},
        {"LOCAL_RANK": ""},
    ],
)
def test_an_environment_that_describes_no_group_is_refused(monkeypatch, values):
    told(monkeypatch, **values)
    with pytest.raises(ValueError, match=r"the environment describes no process of a group \(WORLD_SIZE = .*torchrun"):
        with open_world(parse_recipe("")):
            pass


@pytest.mark.parametrize("opened", [lambda: open_world(parse_recipe("")), joined], ids=["train", "evaluate"])
def test_processes_that_do_not_find_each_other_are_told_where(monkeypatch, opened):
    """It was a traceback of twenty lines."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told(monkeypatch, WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(ValueError, match=rf"do not find each other at 127.0.0.1:{port} \(.*in use.*--master_port"):
            with opened():
                pass
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match=rf"do not find each other at 127.0.0.1:{port} \(.*RANK expected, but not set"):
        with opened():
            pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match=r"do not find each other at MASTER_ADDR is unset:"):
        with opened():
            pass


@pytest.mark.parametrize("file", ["recipes/run.py", "tools/evaluate.py", "tools/bench/training.py"])
def test_a_python_without_torch_is_told_what_to_install(file):
    done = subprocess.run([sys.executable, "-S", "-E", ROOT / file, "--help"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: lrt needs torch, ") and "pip install torch && pip install -e ." in done.stderr
