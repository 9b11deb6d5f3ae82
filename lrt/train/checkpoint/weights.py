"""Parameters in and out of a (sharded) model: filling, gathering, exporting."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrt.config import Recipe
from lrt.data import Tokenizer
from lrt.data.chat import open_chat, save_chat
from lrt.model import LatentRecurrentModel, build
from lrt.serialization import load, write_model
from lrt.serialization.adapted import is_foreign, pretrained
from lrt.serialization.renewal import config_file, renewed_folder
from lrt.train.checkpoint.checkpoint import read_tensors
from lrt.train.checkpoint.starting_model import is_native, read_backbone
from lrt.train.checkpoint.verifying import find_checkpoint
from lrt.train.distributed.parallel import WRAPPED, named_parameters
from lrt.train.distributed.world import World
from lrt.train.optim.muon import layout_of, local

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names that the plain model gives them."""
    return {
        **dict(named_parameters(model)),
        **{name.replace(WRAPPED, ""): buffer for name, buffer in model.named_buffers()},
    }


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a model, each rank its rows.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    for name, parameter in named_tensors(model).items():
        whole = tensors.get(name)
        if whole is None or whole.shape != parameter.shape:
            got = "nothing" if whole is None else f"shape {tuple(whole.shape)}"
            raise ValueError(
                f"{name} of shape {tuple(parameter.shape)} cannot be filled from {got}: "
                "the weights belong to another model"
            )
        layout = layout_of(parameter)
        if layout is not None:
            counts = layout.rows(whole.shape[0])
            whole = whole.narrow(0, min(sum(counts[: layout.rank]), whole.shape[0]), counts[layout.rank])
        local(parameter).copy_(whole)


def warm_start(model: nn.Module, path: str | Path, world: World) -> None:
    """Take the weights of a training checkpoint, of an exported folder or of a safetensors file with the model's own
    names, and nothing else.

    Raises:
        ValueError: it is none of these, or holds another model.
    """
    try:
        if Path(path).is_file():
            fill(model, _read_file(Path(path)))
            return
        if config_file(path).is_file():  # written by lrt.save, whole or in shards
            fill(model, named_tensors(load(path, device="cpu")))
            return
        tensors: dict[str, Tensor] = {
            f"model.{name}": parameter.detach() for name, parameter in named_parameters(model)
        }
        read_tensors(find_checkpoint(path), tensors, process_group=world.checkpoint_group)
    except ValueError as error:
        raise ValueError(f"training.init_from = {path}: {error}") from None


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"not a whole safetensors file ({error})") from None


def gather(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, under plain names; empty on other ranks."""
    whole = {}
    for name, tensor in named_tensors(model).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            whole[name] = full.detach().cpu()
    return whole


def copy_on_every_rank(model: nn.Module, recipe: Recipe, world: World) -> LatentRecurrentModel:
    """The plain model with the weights of the computation, on every rank's device, to evaluate with.

    Args:
        model: parallel; every rank must call this.
        recipe: of the model.
        world: the processes.
    """
    dtype, weights = getattr(torch, recipe.parallel.param_dtype), dict(named_parameters(model))
    whole = {}
    for name, tensor in named_tensors(model).items():
        full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        whole[name] = full.to(dtype) if name in weights else full  # buffers, such as frequencies, keep theirs
    return _plain(recipe, whole).to(world.device).eval()


def not_finite(tensors: Mapping[str, Tensor], world: World) -> str | None:
    """Which tensors hold numbers that are not finite, in words ("a and 2 more are"), the same on every rank;
    None = none does."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    rows = [local(tensors[name]) for name in names]
    flags = [~torch.linalg.vector_norm(row, math.inf).isfinite() if row.numel() else row.new_zeros(()) for row in rows]
    bad = world.total(torch.stack([flag.int().to(world.device) for flag in flags])).tolist()
    found = [name for name, count in zip(names, bad) if count]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{', '.join(found[:3])}{more} {'is' if len(found) == 1 else 'are'}" if found else None


def refuse_non_finite(model: nn.Module, recipe: Recipe, world: World) -> None:
    """Refuse weights to start from with which a run could only skip every step."""
    bad = not_finite(dict(named_parameters(model)), world)
    if bad:
        start = (
            f"training.init_from = {recipe.training.init_from}"
            if recipe.training.init_from
            else f"run.backbone = {recipe.run.backbone}"
        )
        raise ValueError(f"{start}: {bad} not finite: start from weights that are")


def export(
    model: nn.Module,
    recipe: Recipe,
    folder: Path | None,
    world: World,
    *,
    tokenizer: Tokenizer | None = None,
    step: int | None = None,
) -> LatentRecurrentModel | None:
    """Make the plain model, and write it in place of an earlier export: with ``lrt.save``,
    or as a Hugging Face folder where the recipe continues a decoder without memory.

    Args:
        model: plain or parallel; every rank must call this.
        recipe: of the model.
        folder: None = write nothing.
        world: the processes.
        tokenizer: written beside the model.
        step: of the run; config.json says it, so that an export that is older than a checkpoint is known.

    Returns:
        The plain model on the CPU in evaluation mode on rank 0, None on other ranks.
    """
    tensors = gather(model, world)
    if not world.main:
        return None
    plain = _plain(recipe, tensors)
    if folder is not None:
        with renewed_folder(folder) as place:
            if plain.recurrence is None and is_foreign(plain):
                _without_lora(plain).save_pretrained(place)
            else:
                write_model(plain, place)
            if tokenizer is not None:
                tokenizer.save(place)
                if recipe.tuning is not None:
                    save_chat(open_chat(tokenizer, recipe.data.tokenizer), place)
            if step is not None:
                _add_step(place / "config.json", step)
    return plain.eval()


def _without_lora(model: LatentRecurrentModel) -> PreTrainedModel:
    """The decoder of a model without memory; LoRA becomes a part of its weights."""
    assert model.original is not None
    merge: Callable[[], PreTrainedModel] | None = getattr(model.original[0], "merge_and_unload", None)
    return pretrained(model) if merge is None else merge()


def _add_step(config: Path, step: int) -> None:
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"step": step}, indent=2) + "\n", encoding="utf-8"
    )


def _plain(recipe: Recipe, tensors: Mapping[str, Tensor]) -> LatentRecurrentModel:
    """The recipe's model with these values."""
    if not is_native(recipe):
        plain = read_backbone(recipe)
        fill(plain, tensors)
        return plain
    plain = build(recipe, device="meta")
    plain.load_state_dict(tensors, assign=True)
    return plain
