"""Runs on several processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT, TINY


def gpus(count):
    """Marks of what needs so many GPUs; on one there is no FSDP."""
    return [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")]


def launch(folder, *sets, ranks=2, options=(), gpu=False, own_group=False):
    (folder / "r.toml").write_text(TINY)
    pairs = [f"run.output={folder}", "run.name=tiny", "evaluation.sample_tokens=0", *sets]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    line += [
        str(ROOT / "recipes" / "run.py"),
        "--recipe",
        str(folder / "r.toml"),
        *(x for pair in pairs for x in ("--set", pair)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, **pipes, env=environment, start_new_session=own_group)
