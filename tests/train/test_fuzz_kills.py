"""A fuzzer of ends: runs that are stopped or killed at any instant, with any settings, end as if nothing had been.

The folder of the run is compared with that of an uninterrupted one: its newest checkpoint, export and records,
bit for bit.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fuzzing import tries
from runs import ROOT, TINY, files_equal, tiny, train_records

from lrt.train.checkpoint import latest
from lrt.train.trainer import train

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def drawn_settings(folder, drawn: random.Random) -> dict[str, object]:
    """Settings of a run of two to four seconds."""
    for name, letters in (("a", "ab cd"), ("b", "xy z")):
        text = "\n\n".join("".join(drawn.choices(letters, k=drawn.randint(5, 60))) for _ in range(60))
        (folder / f"{name}.txt").write_text(text)
    mixed = f'[{{path = "{folder / "a.txt"}", weight = 3}}, {{path = "{folder / "b.txt"}", weight = 1}}]'
    return {
        "training.steps": drawn.randint(10, 60),
        "training.warmup_steps": drawn.choice([0, 5]),
        "checkpoint.every": drawn.choice([0, 1, 2, 3, 7]),
        "checkpoint.keep_last": drawn.choice([1, 2]),
        "evaluation.every": drawn.choice([0, 4, 10]),
        "evaluation.sample_tokens": drawn.choice([0, 3]),
        "data.workers": drawn.choice([0, 0, 2]),
        "data.validation": "demo",
        **({"data.sources": mixed} if drawn.random() < 0.5 else {"data.train": "demo"}),
        **drawn.choice([{}, {"optimizer.kind": "adamw"}, {"schedule.kind": "refine"}]),
        "run.seed": drawn.randint(1, 99),
    }


def interrupted(line, drawn: random.Random) -> int | None:
    """Start a run and end it some seconds later; its exit code, None where a signal ended it."""
    with subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        time.sleep(drawn.uniform(1.0, 9.0))
        how = drawn.choice(SIGNALS)
        if run.poll() is None:
            (os.killpg if how == signal.SIGKILL else os.kill)(run.pid, how)
        assert run.stderr is not None
        told = run.stderr.read()
        code = run.wait()
    assert "Traceback" not in told or code < 0, told[-3000:]
    assert code in (0, 130, 143) or code < 0, (code, told[-3000:])
    return code


@pytest.mark.slow
@pytest.mark.timeout(0)  # the budget ends it
def test_ends(tmp_path):
    for at, drawn in tries(limit_s=300):
        shutil.rmtree(tmp_path / "try", ignore_errors=True)
        folder = tmp_path / "try"
        (folder / "whole").mkdir(parents=True)
        sets = drawn_settings(folder, drawn)
        recipe = folder / "recipe_in.toml"
        recipe.write_text(TINY)
        pairs = (f"--set={key}={value}" for key, value in {**sets, "run.output": folder, "run.name": "tiny"}.items())
        line = [sys.executable, str(ROOT / "recipes" / "run.py"), "--recipe", str(recipe), *pairs]
        codes = [interrupted(line, drawn) for _ in range(drawn.randint(1, 4))]
        finished = subprocess.run(line, capture_output=True, text=True)
        assert finished.returncode == 0, (at, sets, codes, finished.stderr[-3000:])
        reference = train(tiny(folder / "whole", **sets))
        files_equal(latest(folder / "tiny" / "checkpoints"), latest(reference.folder / "checkpoints"))
        assert train_records(folder / "tiny") == train_records(reference.folder), (at, sets, codes)
        left = {path.name for path in (folder / "tiny").iterdir()} ^ {path.name for path in reference.folder.iterdir()}
        assert left <= {"settings.jsonl"}, (at, sets, codes, left)
