"""Tiny runs whose schedule changes."""

from __future__ import annotations

from safetensors.torch import load_file

from lrt.config import parse_recipe
from lrt.train.monitor.metrics import read_records

TINY = """
[model]
n_layers = 2
width = 16
n_heads = 2
vocab_size = 257
sequence_length = 32
gate_channels = 8
[recurrence]
gate_channels = 8
separator = 256
[training]
steps = 8
batch_tokens = 256
micro_batch = 4
clip_norm = 0.5
[optimizer]
reference_batch_tokens = 256
[parallel]
compile = false
param_dtype = "float32"
[checkpoint]
every = 4
export_at_end = false
[metrics]
every = 1000
plot = false
[evaluation]
tokens = 64
batch = 2
modes = ["parallel"]
sample_tokens = 0
"""


MIX = (
    '[{share=0.5, kind="baseline"}, {share=0.2, kind="interleaved", order="random"}, '
    '{share=0.3, kind="refine", weights=[0.0, 1.0], cut_gradient="initialization"}]'
)  # the last as in the recipes


def tiny(folder, *sets, name="tiny"):
    return parse_recipe(TINY, overrides=[f"run.output={folder}", f"run.name={name}", *sets])


def steps_of(result):
    timings = ("tokens_per_second", "flops_per_second", "data_wait", "peak_memory_gib")
    records = read_records(result.folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in timings} for r in records if r["kind"] == "train"]


def tensors_at(folder, step):
    (file,) = (folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return load_file(file)


def is_of_memory(name):
    return any(part in name for part in ("memory_projection", "injection", ".gate.", ".projection."))
