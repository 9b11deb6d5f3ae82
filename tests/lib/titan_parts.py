"""The parts of ``lrt.titan`` that need no torchtitan, where the package itself cannot be imported without it."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import ROOT

from lrt.config import RecurrenceConfig, ScheduleConfig

if importlib.util.find_spec("torchtitan") is None or importlib.util.find_spec("triton") is None:
    spec = importlib.machinery.ModuleSpec("lrt.titan", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT / "lrt" / "titan")]
    sys.modules.setdefault("lrt.titan", importlib.util.module_from_spec(spec))


def table(settings):
    """A section as torchtitan reads it: the same keys and defaults, values as TOML has them."""
    fields = [(f.name, Any, dataclasses.field(default=f.default)) for f in dataclasses.fields(settings)]
    return dataclasses.make_dataclass(settings.__name__, fields)


recurrence, schedule = table(RecurrenceConfig), table(ScheduleConfig)


def job(**sections):
    """A JobConfig of torchtitan as far as it is read here, with the defaults of torchtitan 0.2.2."""
    from lrt.titan.settings import MODEL_KEYS

    of = types.SimpleNamespace
    names = ("tensor_parallel_degree", "context_parallel_degree", "pipeline_parallel_degree", "expert_parallel_degree")
    loader = of(num_workers=0, persistent_workers=False, pin_memory=False, prefetch_factor=None)
    made = {
        "job": {"dump_folder": "outputs"},
        "model": {
            "name": "lrt", "flavor": "tiny", "hf_assets_path": "bytes", "converters": [], **dict.fromkeys(MODEL_KEYS),
        },
        "recurrence": recurrence(),
        "schedule": schedule(),
        "training": {
            "dataset": "lrt", "dataset_path": None, "seq_len": 32, "local_batch_size": 4,
            "global_batch_size": -1, "steps": 10,
            "dtype": "float32", "enable_cpu_offload": False, "mixed_precision_param": "float32",
            "mixed_precision_reduce": "float32", "dataloader": loader,
        },
        "parallelism": {**dict.fromkeys(names, 1), "fsdp_reshard_after_forward": "default"},
        "optimizer": {
            "name": "AdamW", "lr": 8e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1,
            "early_step_in_backward": False,
        },
        "checkpoint": {
            "enable": False, "last_save_in_hf": False, "create_seed_checkpoint": False, "initial_load_path": None,
            "initial_load_in_hf": False,
        },
        "activation_checkpoint": {"mode": "none", "selective_ac_option": "2"},
        "compile": {"enable": False, "components": ["model", "loss"], "backend": "inductor"},
        "debug": {"seed": 3},
    }  # fmt: skip
    for name, given in sections.items():
        made[name] = {**made[name], **given} if isinstance(given, dict) else given
    return of(**{name: of(**value) if isinstance(value, dict) else value for name, value in made.items()})


RECURRENCE = recurrence(gate_channels=8, separator=256)
SMALL = {"n_layers": 2, "width": 32, "n_heads": 2, "gate_channels": 8}


def small(passes=schedule(), **sections):
    from lrt.titan.settings import model_keys, recipe_of

    made = job(recurrence=RECURRENCE, schedule=passes, model=SMALL, **sections)
    return made, recipe_of(made, model=model_keys(made), recurrent=True)


def trainee(passes=schedule(), **sections):
    from lrt.titan.model import native

    made, recipe = small(passes, **sections)
    model = native(recipe)
    model.init_weights()
    return model, recipe, made


def leave_checkpoint(folder):
    """What a job leaves: a distributed checkpoint as torchtitan writes it, and the description; returns the model."""
    from lrt.titan.model import describe

    model, _, made = trainee(schedule(kind="refine"), job={"dump_folder": str(folder)})
    describe(model, made)
    state = {
        **model.state_dict(),
        "optimizer.state.backbone.head.weight.exp_avg": torch.zeros(3),
        "train_state": {"step": 7},
    }
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=folder / "checkpoint" / "step-7", no_dist=True)
    return model
