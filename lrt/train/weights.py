"""Parameters in and out of a (sharded) model: building, filling, gathering."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrt.config import Recipe
from lrt.model import LatentRecurrentModel, build
from lrt.serialization import load, save
from lrt.train.checkpoint import find_checkpoint, read_tensors
from lrt.train.distributed import World
from lrt.train.muon import layout_of, local
from lrt.train.optimizers import is_memory
from lrt.train.parallel import named_parameters, parallelize


def build_parallel(recipe: Recipe, world: World) -> LatentRecurrentModel:
    """The recipe's model on this rank, planned on the meta device and initialized with the recipe's seed.

    The values are those of ``lrt.build`` whatever the number of ranks: each rank makes the whole model
    for a moment and keeps its rows.
    """
    model = build(recipe, device="meta")
    if recipe.training.stage == "memory":
        if recipe.recurrence is None:
            raise ValueError('training.stage = "memory", but recurrence is off: use stage = "all", or switch recurrence on')
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_memory(name))
    if not world.working_copy:  # otherwise the plan is the copy's (lrt.train.replay)
        parallelize(model, recipe.parallel, world)
    model.to_empty(device=world.device)
    source = build(recipe, device=world.device)
    fill(model, {**dict(source.named_parameters()), **dict(source.named_buffers())})
    return model


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a model, each rank its rows.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    for name, parameter in [*named_parameters(model), *model.named_buffers()]:
        whole = tensors.get(name)
        if whole is None or whole.shape != parameter.shape:
            got = "nothing" if whole is None else f"shape {tuple(whole.shape)}"
            raise ValueError(f"{name} of shape {tuple(parameter.shape)} cannot be filled from {got}: the weights belong to another model")
        layout = layout_of(parameter)
        if layout is not None:
            counts = layout.rows(whole.shape[0])
            whole = whole.narrow(0, min(sum(counts[: layout.rank]), whole.shape[0]), counts[layout.rank])
        local(parameter).copy_(whole)


def warm_start(model: nn.Module, path: str | Path, world: World) -> None:
    """Take the weights of a training checkpoint or of an exported folder, and nothing else.

    Raises:
        ValueError: the folder is neither, or holds another model.
    """
    if (Path(path) / "config.json").is_file():  # written by lrt.save, whole or in shards
        source = load(path, device="cpu")
        fill(model, {**dict(source.named_parameters()), **dict(source.named_buffers())})
        return
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in named_parameters(model)}
    read_tensors(find_checkpoint(path), tensors, process_group=world.checkpoint_group)


def gather(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, under plain names; empty on other ranks."""
    whole = {}
    for name, tensor in [*named_parameters(model), *model.named_buffers()]:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            whole[name] = full.detach().cpu()
    return whole


def export(model: nn.Module, recipe: Recipe, folder: Path | None, world: World) -> LatentRecurrentModel | None:
    """Make the plain model, and write it with ``lrt.save`` in place of an earlier export.

    Args:
        model: plain or parallel; every rank must call this.
        recipe: of the model.
        folder: None = write nothing.
        world: the processes.

    Returns:
        The plain model on the CPU in evaluation mode on rank 0, None on other ranks.
    """
    tensors = gather(model, world)
    if not world.main:
        return None
    plain = build(recipe, device="meta")
    plain.load_state_dict(tensors, assign=True)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        save(plain, folder)
    return plain.eval()
