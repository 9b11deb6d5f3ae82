"""Going on from another run's checkpoint under a new name: what may differ, and which memory begins afresh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lrt.config import Recipe
from lrt.config.files import local_path
from lrt.config.ranges import HORIZON
from lrt.train.checkpoint.resuming import Resumed, state_of
from lrt.train.checkpoint.same_run import FREE, FREE_SECTIONS, changes, plain_key, stored_recipe
from lrt.train.checkpoint.verifying import find_checkpoint, read_rest
from lrt.train.distributed.world import World
from lrt.train.entrance import Entrance
from lrt.train.optim.groups import is_memory
from lrt.train.optim.muon import local

SCHEDULE_OF_RATES = ("lr_schedule", "warmup_steps", "warmdown_fraction", "final_lr_fraction")
RATES = (
    "matrix_lr", "embedding_lr", "head_lr", "scale_lr", "injection_lr", "adamw_lr", "adamw_memory_lr",
    "memory_map_scale", "memory_gate_scale", "memory_gain_scale",
)  # fmt: skip
MAY_DIFFER = {
    *(FREE - {"training.batch_tokens", "data.workers", "data.on_corrupt"}),
    *(f"training.{key}" for key in (*HORIZON, *SCHEDULE_OF_RATES, "init_from", "branch_from")),
    *(f"optimizer.{key}" for key in (*RATES, "reference_batch_tokens", "rate_scale")),
}


def find_branch(recipe: Recipe, world: World) -> Resumed | None:
    """The checkpoint of another run that ``training.branch_from`` names; None where it names none.

    Args:
        recipe: of the run that begins.
        world: the processes.

    Raises:
        ValueError: there is no such checkpoint, or its run differs in more than a branch may change;
            the keys are named.
    """
    path = recipe.training.branch_from
    if path is None:
        return None
    folder: Path = world.from_main(lambda: _checked(path, recipe))
    rest = read_rest(folder)
    state = state_of(folder, rest)
    return Resumed(folder, rest, dataclasses.replace(state, began=state.step))


def _checked(path: str, recipe: Recipe) -> Path:
    key = f'training.branch_from = "{path}"'
    try:
        folder = find_checkpoint(local_path(path, key="training.branch_from"))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    refused = refused_changes(stored_recipe(folder), recipe)
    if refused:
        raise ValueError(
            f"{key}: {folder} was trained with other settings: {'; '.join(refused)}. A branch may change its schedule, "
            f"rates and horizon, and switch recurrence on: give the other settings that the run had, or take only its "
            f"weights with training.init_from"
        )
    return folder


def refused_changes(there: Recipe, here: Recipe) -> list[str]:
    """What differs between a run and its branch, but may not."""
    switched_on = there.recurrence is None and here.recurrence is not None
    refused = []
    for change in changes(there, here):
        section = change.key.split(".")[0]
        if (
            plain_key(change.key) in MAY_DIFFER
            or section in ("schedule", *FREE_SECTIONS)
            or (section == "recurrence" and switched_on)
        ):
            continue
        refused.append(str(change))
    if here.recurrence is not None and switched_on and here.recurrence.init != "identity" and not has_ramp(here):
        refused.append(
            f'recurrence = off there, and recurrence.init = "{here.recurrence.init}" here would disturb the model: use '
            f'"identity", or a ramp in the first phase with memory'
        )
    return refused


def has_ramp(recipe: Recipe) -> bool:
    """Whether the first phase with memory lets it in gradually."""
    return any(phase.ramp for phase in recipe.schedule.phases or (recipe.schedule,))


def check_length(branch: Resumed, recipe: Recipe, *, steps: int) -> None:
    """Refuse a branch that has no step of its own."""
    if steps <= branch.state.step:
        raise ValueError(
            f'training.branch_from = "{recipe.training.branch_from}" has done {branch.state.step} steps, '
            f"and the horizon is {steps}: use a longer one, which counts them too"
        )


def begin_ramp(entrance: Entrance, tensors: Mapping[str, Tensor], world: World) -> None:
    """Set the memory of a branch to zero, from where its ramp begins.

    Args:
        entrance: the ramp.
        tensors: of the model and its optimizer, as the other run left them.
        world: the processes.

    Raises:
        ValueError: the other run has trained its memory.
    """
    states = [tensor for name, tensor in tensors.items() if name.startswith("optimizer.") and _of_memory(name)]
    moved = world.total(torch.stack([local(tensor).any() for tensor in states]).any().float())
    if moved.item():
        raise ValueError(
            "schedule ramp begins from a memory of zero, but the run that training.branch_from names has "
            "trained its memory: leave ramp out"
        )
    entrance.clear()


def without_fresh_memory(tensors: dict[str, Tensor], branch: Resumed, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of a branch that the other run's checkpoint holds: all, or all but the memory that it switches on.

    Args:
        tensors: of the model and its optimizer, by ``model.NAME`` and ``optimizer.NAME.KEY``.
        branch: the checkpoint.
        recipe: of the branch.
    """
    if recipe.recurrence is None or stored_recipe(branch.folder).recurrence is not None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if not _of_memory(name)}


def _of_memory(name: str) -> bool:
    """Whether ``model.NAME`` or ``optimizer.NAME.KEY`` belongs to a parameter of the recurrence."""
    return is_memory(name.partition(".")[2])
