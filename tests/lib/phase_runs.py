"""Tiny runs whose schedule changes."""

from __future__ import annotations

from runs import TINY, train_records
from safetensors.torch import load_file

from lrt.config import parse_recipe

# what these runs have beside ``runs.TINY``: clipping, another batch of reference, and quick ends
BESIDE = [
    "training.clip_norm=0.5",
    "optimizer.reference_batch_tokens=256",
    "parallel.param_dtype=float32",
    "checkpoint.export_at_end=false",
    "metrics.every=1000",
    "evaluation.tokens=64",
    "evaluation.batch=2",
    'evaluation.modes=["parallel"]',
    "evaluation.sample_tokens=0",
]
MIX = (
    '[{share=0.5, kind="baseline"}, {share=0.2, kind="interleaved", order="random"}, '
    '{share=0.3, kind="refine", weights=[0.0, 1.0], cut_gradient="initialization"}]'
)  # the last as in the recipes


def tiny(folder, *sets, name="tiny"):
    return parse_recipe(TINY, overrides=[*BESIDE, f"run.output={folder}", f"run.name={name}", *sets])


def steps_of(result):
    return train_records(result.folder)


def tensors_at(folder, step):
    (file,) = (folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return load_file(file)


def is_of_memory(name):
    return any(part in name for part in ("memory_projection", "injection", ".gate.", ".projection."))
