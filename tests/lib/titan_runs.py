"""torchtitan's trainer on the CPU: its environment, its jobs, and the same jobs for our own trainer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT

LIB = ROOT / "tests" / "lib"
needs_torchtitan = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None,
    reason='torchtitan is not installed: pip install -e ".[titan]", then python -m pytest tests/titan -m slow',
)

ROWS, LENGTH, RATE = 8, 32, 3e-3  # of every job here


def environment():
    """A process that finds a CPU where torchtitan looks for a GPU."""
    path = os.pathsep.join([str(LIB / "titan_cpu"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(module_or_file, *arguments, ranks=1):
    """torchrun with a module of torchtitan, or a file."""
    what = ["-m", module_or_file] if not module_or_file.endswith(".py") else [module_or_file]
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        *what,
        *map(str, arguments),
    ]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=540)


def run_jobs(folder, jobs, *, ranks=1):
    """What ``titan_jobs.py`` found out about each job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ran = launch(str(LIB / "titan_jobs.py"), folder / "jobs.json", folder / "results.pt", ranks=ranks)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    return torch.load(folder / "results.pt", weights_only=True)


# Of both trainers; the other keys by our defaults. Under an eps of 1e-10 the sign of what is all rounding decides.
OUR_MUON = "reference_batch_tokens = 4096\neps = 1e-6"
OUR_ADAMW = f"""
kind = "adamw"
adamw_lr = {RATE}
betas = [0.9, 0.95]
eps = 1e-8
reference_batch_tokens = {ROWS * LENGTH}
"""
ADAMW = f"lr = {RATE}\nbeta1 = 0.9\nbeta2 = 0.95\neps = 1e-8\nweight_decay = 0.0"
MUON = f'name = "Muon"\nbeta1 = 0.8\nbeta2 = 0.95\nweight_decay = 0.2\n{OUR_MUON}'


def titan_arguments(
    folder,
    schedule,
    *more,
    steps=10,
    ranks=1,
    flavor="tiny",
    recurrence="gate_channels = 32\nseparator = 256\n",
    name="lrt",
    optimizer=ADAMW,
):
    """A job of torchtitan's trainer; ``schedule`` and ``recurrence`` are TOML."""
    text = f"""
[job]
dump_folder = "{folder}"
custom_config_module = "lrt.titan"
[experimental]
custom_import = "lrt.titan"
[model]
name = "{name}"
flavor = "{flavor}"
hf_assets_path = "bytes"
[recurrence]
{recurrence}
[schedule]
{schedule}
[training]
dataset = "lrt"
seq_len = {LENGTH}
local_batch_size = {ROWS // ranks}
steps = {steps}
max_norm = 1.0
mixed_precision_param = "float32"
[optimizer]
{optimizer}
[lr_scheduler]
warmup_steps = 2
decay_ratio = 0.5
[activation_checkpoint]
mode = "none"
[metrics]
log_freq = 1
[debug]
seed = 3
"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.toml").write_text(text)
    return ["--job.config_file", str(folder / "job.toml"), *map(str, more)]


def our_recipe(folder, schedule, *, steps=10, ranks=1, plain=False, muon=False):
    """The same job as a recipe of our own trainer."""
    recurrence = "" if plain else "[recurrence]\ngate_channels = 32\nseparator = 256\n"
    return f"""
{"recurrence = false" if plain else ""}
[run]
name = "ours"
output = "{folder}"
seed = 3
[model]
n_layers = 4
width = 128
n_heads = 2
vocab_size = 257
sequence_length = {LENGTH}
gate_channels = 32
{recurrence}
[schedule]
{schedule}
[data]
workers = 0
[training]
steps = {steps}
batch_tokens = {ROWS * LENGTH}
micro_batch = {ROWS // ranks}
warmup_steps = 2
clip_norm = 1.0
[optimizer]
{OUR_MUON if muon else OUR_ADAMW}
[parallel]
compile = false
param_dtype = "float32"
[checkpoint]
every = 0
export_at_end = false
[metrics]
every = 1000
plot = false
[evaluation]
tokens = 256
modes = ["zero"]
sample_tokens = 0
"""
