"""A job of torchtitan as a recipe: the same tables and checks, and what the bridge refuses; no torchtitan here."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import tomli_w

from lrt.config import ModelConfig, Recipe, RunConfig, parse_recipe
from lrt.config.phases import stretches
from lrt.config.settings import OptimizerConfig
from lrt.tables import ReadTable, Table

NATIVE, LLAMA = "lrt", "lrt_llama3"  # model.name
PLAIN = "plain_"  # flavors without memory
MUON = "Muon"  # optimizer.name: our own, Muon for matrices and AdamW for the rest
TITAN_RATE = 8e-4  # torchtitan's default of optimizer.lr
SHARED = ("eps", "weight_decay")  # keys of [optimizer] that torchtitan has under the same name
OPTIMIZER_KEYS = tuple(
    f.name
    for f in dataclasses.fields(OptimizerConfig)
    if f.name not in (*SHARED, "betas", "kind") and not f.name.startswith("adamw")
)
PACKED = "lrt"  # training.dataset: rows packed by lrt, as its own trainer has them

_LARGE: Table = {"vocab_size": 32768, "gate_channels": 32}
_SIZES: dict[str, Table] = {
    "tiny": {"n_layers": 4, "width": 128, "n_heads": 2, "vocab_size": 257, "gate_channels": 32},
    "12l": {"n_layers": 12, **_LARGE},
    "20l": {"n_layers": 20, **_LARGE},
    "24l": {"n_layers": 24, **_LARGE},
}
# [model] of the recipes lrt_tiny, lrt_12l, lrt_20l and lrt_24l, and of their twins without memory.
FLAVORS: dict[str, Table] = {f"{prefix}{name}": keys for prefix in ("", PLAIN) for name, keys in _SIZES.items()}

MODEL_KEYS = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name != "sequence_length")  # beside a flavor's
SHARDING = "use data_parallel_shard_degree (FSDP2), with data_parallel_replicate_degree for HSDP"
# An object of torchtitan, read by attribute: a job, one of its tables, a module or a container of optimizers.
Theirs = Any
DEGREES = {
    "tensor_parallel_degree": "tensor parallelism (TP)",
    "context_parallel_degree": "context parallelism (CP)",
    "pipeline_parallel_degree": "pipeline parallelism (PP)",
    "expert_parallel_degree": "expert parallelism (EP)",
}


def recipe_of(job: Theirs, *, model: ReadTable, recurrent: bool, init: str = "paper") -> Recipe:
    """What a job says about the model and its schedule, as one of our recipes.

    Args:
        job: torchtitan's JobConfig, with the tables [recurrence] and [schedule].
        model: keys of our [model] that the flavor gives.
        recurrent: whether the flavor has memory.
        init: of the recurrence, where the job names none.

    Raises:
        ValueError: a setting that does not fit, or that the bridge cannot follow.
    """
    if not hasattr(job, "schedule"):
        raise ValueError(
            'job.custom_config_module is not given, so [recurrence] and [schedule] are unknown: set it to "lrt.titan"'
        )
    errors = refusals(job)
    recurrence, schedule = given(job.recurrence), given(job.schedule)
    if not recurrent and recurrence:
        errors.append(
            f"recurrence.{min(recurrence)} has no effect on model.flavor = {job.model.flavor!r}, which has no memory: "
            f"use {job.model.flavor.removeprefix(PLAIN)!r}, or leave [recurrence] out"
        )
    if errors:
        raise ValueError("; ".join(errors))
    if not recurrent:
        schedule = schedule or {"kind": "baseline"}
    seed = RunConfig().seed if job.debug.seed is None else job.debug.seed
    world = int(os.environ.get("WORLD_SIZE", 1))  # all of it is data parallel
    rows = (
        job.training.global_batch_size if job.training.global_batch_size > 0 else job.training.local_batch_size * world
    )
    table = {
        "run": {"name": job.model.flavor, "seed": seed},
        "model": {**model, "sequence_length": job.training.seq_len},
        "recurrence": {"init": init, **recurrence} if recurrent else False,
        "schedule": schedule,
        "training": {"steps": job.training.steps, "batch_tokens": rows * job.training.seq_len},
        "optimizer": optimizer_keys(job.optimizer),
        "parallel": {"compile": job.compile.enable},
        "data": {"train": job.training.dataset_path or "demo", "tokenizer": job.model.hf_assets_path},
    }
    bare_first = dict(sorted(table.items(), key=lambda item: isinstance(item[1], dict)))
    recipe = parse_recipe(tomli_w.dumps(bare_first))
    loads = job.checkpoint.enable and job.checkpoint.initial_load_path and not job.checkpoint.initial_load_in_hf
    ramps = [f"{where}.ramp = {c.ramp}" for where, c in stretches(recipe.schedule) if c.ramp]
    if ramps and loads:
        raise ValueError(
            f"{ramps[0]} would add the values of recurrence.init to those of checkpoint.initial_load_path: leave one "
            "out"
        )
    return recipe


def given(table: object) -> Table:
    """The keys of a table that differ from their defaults, as plain values."""
    if not dataclasses.is_dataclass(table):
        raise ValueError(
            f"recurrence = {table!r}: the twin without memory is a flavor of its own: set model.flavor = "
            f'"{PLAIN}12l", or another {PLAIN}*'
        )
    return {f.name: getattr(table, f.name) for f in dataclasses.fields(table) if getattr(table, f.name) != f.default}


def given_model(job: Theirs) -> Table:
    """The keys of our [model] that a job gives beside its flavor."""
    return {key: value for key in MODEL_KEYS if (value := getattr(job.model, key, None)) is not None}


def model_keys(job: Theirs) -> Table:
    """[model] of a native flavor, with the keys that the job gives.

    Raises:
        ValueError: there is no such flavor.
    """
    keys = FLAVORS.get(job.model.flavor)
    if keys is None:
        raise ValueError(f"model.flavor = {job.model.flavor!r}: use one of {', '.join(FLAVORS)}")
    return {**keys, **given_model(job)}


def optimizer_keys(table: Theirs) -> Table:
    """Our [optimizer] of a job that names Muon; empty for torchtitan's own optimizers.

    Raises:
        ValueError: a key that the optimizer of the job does not read.
    """
    keys = {key: value for key in OPTIMIZER_KEYS if (value := getattr(table, key, None)) is not None}
    if table.name != MUON:
        if keys:
            raise ValueError(
                f'optimizer.{min(keys)} has no effect on optimizer.name = "{table.name}": use "{MUON}", or leave it out'
            )
        return {}
    if table.lr != TITAN_RATE:
        raise ValueError(
            f'optimizer.lr = {table.lr} has no effect on optimizer.name = "{MUON}": use matrix_lr, head_lr ...'
        )
    return {**keys, **{key: getattr(table, key) for key in SHARED}, "betas": [table.beta1, table.beta2]}


def refusals(job: Theirs) -> list[str]:
    """Settings of torchtitan that the bridge does not follow, each in one line."""
    p, t, c, ac = job.parallelism, job.training, job.compile, job.activation_checkpoint
    errors = [
        f"parallelism.{key} = {getattr(p, key)}: lrt.titan has no {name}: set it to 1; {SHARDING}"
        for key, name in DEGREES.items()
        if getattr(p, key) > 1
    ]
    wrong = [
        (
            t.dtype != "float32",
            f"training.dtype = {t.dtype!r}: masters are float32: leave it out, and set mixed_precision_param",
        ),
        (
            t.enable_cpu_offload,
            "training.enable_cpu_offload = true is not supported: leave it out; shard over more GPUs",
        ),
        (
            bool(job.model.converters),
            f"model.converters = {job.model.converters} are not supported, because blocks read their weights directly: "
            "leave them out",
        ),
        (
            job.optimizer.early_step_in_backward,
            "optimizer.early_step_in_backward = true is not supported: every pass adds to a gradient; leave it out",
        ),
        (
            job.checkpoint.enable and job.checkpoint.last_save_in_hf,
            "checkpoint.last_save_in_hf = true is not supported: leave it out, and convert the checkpoint with "
            "tools/convert.py --to hf",
        ),
        (
            ac.mode == "memory_budget",
            f"activation_checkpoint.mode = {ac.mode!r} is not supported: use none, selective or full",
        ),
        (c.enable and c.backend != "inductor", f"compile.backend = {c.backend!r} is not supported: use inductor"),
        (
            c.enable and sorted(c.components) != ["loss", "model"],
            f'compile.components = {c.components}: blocks and loss are compiled together: use ["model", "loss"]',
        ),
    ]
    loader = t.dataloader
    unused = [key for key in ("persistent_workers", "pin_memory", "prefetch_factor") if getattr(loader, key)]
    if t.dataset == PACKED and unused:
        errors.append(f'training.dataloader.{unused[0]} has no effect on training.dataset = "{PACKED}": leave it out')
    return errors + [text for refused, text in wrong if refused]


def model_config(recipe: Recipe) -> Table:
    """[model] in plain values, as a checkpoint's description holds it."""
    return dataclasses.asdict(recipe.model)
