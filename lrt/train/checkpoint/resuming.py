"""The checkpoint from which a run goes on, and how far it is."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.accounting import Parameters
from lrt.config import Recipe
from lrt.data.conversations import TuningLoader
from lrt.data.loader import TrainLoader
from lrt.train.checkpoint.checkpoint import read_tensors
from lrt.train.checkpoint.same_run import check_same_model, check_same_run, stored_recipe
from lrt.train.checkpoint.verifying import Loaded, newest, read_rest, step_of
from lrt.train.distributed.world import World
from lrt.train.horizon import steps_of
from lrt.train.run import TrainState
from lrt.train.timetable import Timetable, check_borders, plan_timetable


class Resumed(NamedTuple):
    """A checkpoint to go on from."""

    folder: Path
    rest: Loaded
    state: TrainState


def find_resumed(recipe: Recipe, folder: Path, world: World) -> Resumed | None:
    """The checkpoint to go on from, the same on every rank; other ranks wait for rank 0 to look.

    Args:
        recipe: to go on with.
        folder: of the run.
        world: the processes.

    Raises:
        ValueError: it must not be used, belongs to another model, or none of those that are there can be used.
    """
    found: Path | None = world.from_main(lambda: newest(folder / "checkpoints", report=warnings.warn))
    if found is None:
        return None
    if not recipe.checkpoint.resume:
        raise ValueError(
            f"checkpoint.resume = false, but {folder} holds a run that reached step {step_of(found)}: choose another "
            f"run.name, delete the folder, or set checkpoint.resume = true"
        )
    check_same_model(found, recipe)
    rest = read_rest(found)
    return Resumed(found, rest, state_of(found, rest))


def state_of(folder: Path, rest: Loaded) -> TrainState:
    """How far a run is; what TrainState has that an older checkpoint lacks begins at its default."""
    known = {field.name: rest.meta[field.name] for field in dataclasses.fields(TrainState) if field.name in rest.meta}
    wrong = [name for name in ("step", "tokens", "skipped") if not isinstance(known.get(name), int)]
    if wrong:
        raise ValueError(f"{folder / 'meta.json'} has no number {wrong[0]}: it was not written by this trainer")
    return TrainState(**known)


def check_past(resumed: Resumed, recipe: Recipe, timetable: Timetable, parameters: Parameters, *, steps: int) -> None:
    """Refuse what would make one run of two: other settings, or a horizon that moves borders of phases among the steps
    that are done."""
    step, planned = resumed.state.step, resumed.rest.meta.get("planned_steps")
    stored = stored_recipe(resumed.folder)
    before = plan_timetable(stored, steps=planned or steps_of(stored, parameters))
    same_past = timetable.past(step) == before.past(step)
    check_same_run(
        resumed.folder, recipe, step=step, steps=steps, planned=planned, finished=step >= steps, same_past=same_past
    )
    if stored.schedule.phases is not None and stored.schedule == recipe.schedule:
        check_borders(timetable, before=before, step=step)


def restore(resumed: Resumed, tensors: dict[str, Tensor], loader: TrainLoader | TuningLoader, world: World) -> None:
    """Fill ``tensors``, and put the loader and random numbers where the checkpoint has them."""
    read_tensors(resumed.folder, tensors, process_group=world.checkpoint_group)
    rest = resumed.rest
    loader.load_state_dict([state["loader"] for state in rest.rank_states])
    if rest.meta["world_size"] == world.size:  # otherwise there is no same stream of random numbers to go on with
        set_random_state(rest.rank_states[world.rank]["random"], world.device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The random number generators of this process."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on with random numbers where ``random_state`` was taken."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
