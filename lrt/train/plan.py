"""The model of a run and what runs it: the only place that decides which copy of a model is parallelized."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lrt.config import Recipe
from lrt.model import LatentRecurrentModel
from lrt.model import build as build_native
from lrt.train.checkpoint.starting_model import freeze, is_native, read_backbone, shapes_of
from lrt.train.checkpoint.weights import fill, named_tensors
from lrt.train.distributed.graphs import Runner, graphed, single_device
from lrt.train.distributed.parallel import parallelize
from lrt.train.distributed.world import World

if TYPE_CHECKING:
    from lrt.train.distributed.graphs import Pool


class Built(NamedTuple):
    """What an optimizer updates and a checkpoint holds, and what computes its gradients."""

    model: LatentRecurrentModel
    runner: Runner


def build(
    recipe: Recipe,
    world: World,
    *,
    shapes: LatentRecurrentModel | None = None,
    pool: Pool = None,
    report: Callable[[str], None] = warnings.warn,
) -> Built:
    """The recipe's model on this rank under the plan of its parallel settings, and its runner.

    Several processes shard it; on one GPU it holds the masters of a working copy; on a CPU it is plain.

    Args:
        recipe: of the run.
        world: the processes.
        shapes: what ``shapes_of`` gives for the recipe, which may become the model; None = made here.
        pool, report: as ``Runner`` says.
    """
    model = build_parallel(recipe, world, shapes=shapes)
    if world.working_copy:
        return Built(model, single_device(model, recipe.parallel, world, pool=pool, report=report))
    once, graphs = world.sharded and recipe.parallel.reduces_once, graphed(recipe.parallel, world)
    return Built(model, Runner(model, model, graphs=graphs, reduces_once=once, pool=pool, report=report))


def build_parallel(recipe: Recipe, world: World, *, shapes: LatentRecurrentModel | None = None) -> LatentRecurrentModel:
    """The recipe's model on this rank, planned, with the values that training starts from.

    They are the same whatever the number of ranks. A native model that is sharded is planned on the meta device; each
    rank then makes the whole model for a moment and keeps its rows. A decoder from a folder may tie weights and hold
    tables that an empty model loses, so it is read before it is planned.

    Args:
        recipe: of the run.
        world: the processes.
        shapes: as in ``build``.
    """
    if not is_native(recipe):
        model = read_backbone(recipe).to(world.device)
    elif world.sharded:
        model = shapes_of(recipe) if shapes is None else shapes
    else:
        model = freeze(build_native(recipe, device=world.device), recipe)
    if not world.working_copy:  # otherwise the plan is the copy's (lrt.train.distributed.graphs)
        parallelize(model, recipe.parallel, world)
    if is_native(recipe) and world.sharded:
        model.to_empty(device=world.device)
        fill(model, named_tensors(build_native(recipe, device=world.device)))
    return model
