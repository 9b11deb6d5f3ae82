"""Jobs of torchtitan and of our trainer, one after the other in one torchrun: ``titan_jobs.py JOBS.json RESULTS.pt``.

JOBS.json: {name: {"titan": [arguments]} or {"ours": recipe as TOML}}.
RESULTS.pt: {name: {"losses": [...], "weights": {...}} or {"error": text}}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lrt.config import parse_recipe
from lrt.train import trainer as own_trainer
from lrt.train.distributed.parallel import named_parameters
from lrt.train.monitor.metrics import read_records


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def in_torchtitan(arguments):
    """Losses of every step and the final weights, by torchtitan's own ConfigManager and Trainer."""
    import torchtitan.train
    from torchtitan.config import ConfigManager
    from torchtitan.train import Trainer

    torchtitan.train.time = types.SimpleNamespace(
        sleep=lambda _: None, perf_counter=time.perf_counter
    )  # it sleeps at the end of a job
    job = ConfigManager().parse_args(arguments)
    trainer, losses = Trainer(job), []
    trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.append(loss)
    try:
        trainer.train()
        model = trainer.model_parts[0]
        return {
            "losses": losses,
            "weights": {name: whole(p) for name, p in named_parameters(model)},
            "step": trainer.step,
        }
    finally:
        trainer.close()
        gc.enable()  # torchtitan collects by its own clock


def in_ours(text):
    recipe, kept = parse_recipe(text), {}
    finish = own_trainer.finish

    def keep(run, *args, **more):
        kept.update({name: whole(p) for name, p in named_parameters(run.model)})
        return finish(run, *args, **more)

    own_trainer.finish = keep
    try:
        own_trainer.train(recipe)
    finally:
        own_trainer.finish = finish
    records = read_records(Path(recipe.run.output) / recipe.run.name / "metrics.jsonl")
    return {"losses": [r["loss"] for r in records if r["kind"] == "train"], "weights": kept}


def main(jobs, results):
    os.environ.setdefault("LOCAL_RANK", "0")
    done = {}
    for number, (name, job) in enumerate(json.loads(Path(jobs).read_text()).items()):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(
            number
        )  # the processes find each other anew, not at the addresses of the job before
        try:
            done[name] = in_torchtitan(job["titan"]) if "titan" in job else in_ours(job["ours"])
        except (ValueError, AssertionError, ImportError) as error:
            done[name] = {"error": f"{type(error).__name__}: {error}"}
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(done, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
