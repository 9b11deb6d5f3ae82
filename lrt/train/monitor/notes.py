"""What a run says before its first step: choices that cost time or change the model without being asked for."""

from __future__ import annotations

import os

import torch

from lrt.config import Recipe
from lrt.data import Tokenizer


def opening_notes(recipe: Recipe, tokenizer: Tokenizer, device: torch.device, *, steps: int) -> list[str]:
    """Lines for the user.

    Args:
        recipe: of the run.
        tokenizer: of its data.
        device: of the computation.
        steps: that are still to be done.
    """
    notes = [_threads(recipe, device)]
    parallel = recipe.parallel
    if device.type == "cpu" and parallel.compile and steps:
        notes.append(
            "parallel.compile = true on a CPU: the first step compiles for up to minutes, "
            "and small models gain nothing; set parallel.compile = false for a run of minutes"
        )
    if device.type == "cpu" and parallel.param_dtype != "float32" and steps:
        notes.append(
            f"parallel.param_dtype = {parallel.param_dtype!r} on a CPU: most CPUs compute it several times slower than "
            f'float32; set parallel.param_dtype = "float32", unless this one has instructions for it'
        )
    if recipe.recurrence is not None and recipe.recurrence.separator is None:
        notes.append(
            "recurrence.separator is not set, so memory goes on from one document into the next, "
            f"although the data have a separator between them: set recurrence.separator = {tokenizer.bos_id}, "
            "unless that is what you want"
        )
    if recipe.training.steps == 0:
        start = recipe.training.init_from or recipe.training.branch_from
        notes.append(
            f"training.steps = 0: nothing is trained; {start or 'the initial model'} is evaluated and exported. "
            f"tools/evaluate.py FOLDER scores a model without a run"
        )
    return notes


def _threads(recipe: Recipe, device: torch.device) -> str:
    given, environment = recipe.parallel.host_threads, os.environ.get("OMP_NUM_THREADS")
    count, why = torch.get_num_threads(), f"of {os.cpu_count()} cores, as torch chooses"
    if given is not None:
        count, why = given, "parallel.host_threads"
    elif environment is not None:
        why = f"OMP_NUM_THREADS = {environment}" + (", as torchrun sets it" if "LOCAL_RANK" in os.environ else "")
    elif device.type != "cpu":
        count, why = 1, "because a process with a GPU only copies batches on the host"
    more = "; parallel.host_threads sets another number" if given is None and device.type == "cpu" else ""
    return f"computes on {device} with {count} thread{'s' * (count != 1)} a process on the host ({why}){more}"
