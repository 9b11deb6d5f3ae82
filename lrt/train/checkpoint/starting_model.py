"""The model that a recipe trains: native, or a Hugging Face decoder from a folder with memory around it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from lrt.adaptation import adapt, with_lora_inside, without_memory
from lrt.config import ModelConfig, Recipe, RecurrenceConfig
from lrt.config.files import local_path
from lrt.data import Tokenizer, check_vocabulary, load_tokenizer
from lrt.lora import with_lora
from lrt.model import LatentRecurrentModel, build
from lrt.schedules import baseline, from_config
from lrt.serialization import load, model_from_config
from lrt.serialization.decoders import decoder_of_shapes, open_decoder, read_json
from lrt.serialization.description import read_config
from lrt.serialization.renewal import config_file
from lrt.tables import Table
from lrt.train.optim.groups import is_memory

OF_ANY_BACKBONE = ("sequence_length", "attention_reset")  # keys of [model] that a decoder from a folder leaves open


def is_native(recipe: Recipe) -> bool:
    return recipe.run.backbone == "native"


def shapes_of(recipe: Recipe) -> LatentRecurrentModel:
    """The recipe's model on the meta device, what does not train frozen: to count and to plan with;
    no weights are read.

    Raises:
        ValueError: as ``read_backbone``.
    """
    if is_native(recipe):
        return freeze(build(recipe, device="meta"), recipe)
    folder, config = _open(recipe)
    with torch.device("meta"):
        if "lrt_format" in config:
            model = _tuned(model_from_config(config), recipe)
        else:
            model = _adapted(decoder_of_shapes(folder, dtype=torch.float32, where=_where(folder)), recipe)
    return _prepared(model, recipe)


def read_backbone(recipe: Recipe) -> LatentRecurrentModel:
    """The model around the decoder in ``run.backbone``: on the CPU, in float32, in training mode.

    Args:
        recipe: the folder is one of Hugging Face, or one that ``lrt.save`` wrote for an adapted model.

    Raises:
        ValueError: the folder cannot be used, or a setting of the recipe does not fit it.
    """
    folder, config = _open(recipe)
    if "lrt_format" in config:
        return _prepared(_tuned(load(folder, dtype=torch.float32), recipe), recipe)
    return _prepared(_adapted(open_decoder(folder, dtype=torch.float32, where=_where(folder)), recipe), recipe)


def freeze(model: LatentRecurrentModel, recipe: Recipe) -> LatentRecurrentModel:
    """Let only the parameters of ``training.stage`` train.

    Raises:
        ValueError: there is no memory to train.
    """
    if recipe.training.stage == "memory":
        if recipe.recurrence is None:
            raise ValueError(
                'training.stage = "memory", but recurrence is off: use stage = "all", or switch recurrence on'
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_memory(name))
    return model


def check_tokenizer(recipe: Recipe, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that is not the model's.

    Args:
        recipe: of the run.
        tokenizer: of the data.
        vocab_size: rows of the model's vocabulary.

    Raises:
        ValueError: it has more ids than the model, or the decoder's folder holds another one.
    """
    if is_native(recipe):
        return check_vocabulary(tokenizer, vocab_size)
    folder = local_path(recipe.run.backbone, key="run.backbone")
    given, mend = f'data.tokenizer = "{recipe.data.tokenizer}"', f'set data.tokenizer = "{recipe.run.backbone}"'
    if (folder / "tokenizer.json").is_file() and load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f'{given} is not the tokenizer of run.backbone = "{folder}", whose token ids mean other words: {mend}'
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f'{given} has {tokenizer.vocab_size} ids, but the decoder in run.backbone = "{folder}" a vocabulary of '
            f"{vocab_size}: use the tokenizer that it was trained with"
        )


def check_separator(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Refuse a separator that the data never hold: it would silently carry memory from one document into the next.

    Raises:
        ValueError: a separator of the recipe is not the tokenizer's.
    """
    settings = {"model.attention_reset": recipe.model.attention_reset}
    if recipe.recurrence is not None:
        settings["recurrence.separator"] = recipe.recurrence.separator
    for key, value in settings.items():
        if value is not None and value != tokenizer.bos_id:
            raise ValueError(
                f"{key} = {value}, but the tokenizer's separator is {tokenizer.bos_id}: set {key} = {tokenizer.bos_id}"
            )


# ------------------------------------------------------------------ folders


def _open(recipe: Recipe) -> tuple[Path, Table]:
    """The folder of ``run.backbone`` and its config.json, after every check that needs no model."""
    _check_settings(recipe)
    folder = local_path(recipe.run.backbone, key="run.backbone")
    key = f'run.backbone = "{recipe.run.backbone}"'
    if not config_file(folder).is_file():
        what = "holds no config.json" if folder.is_dir() else "is no folder"
        raise ValueError(
            f'{key} {what}: use "native", a local Hugging Face folder, or one that lrt.save wrote for an adapted model'
        )
    config = read_json(folder / "config.json", where=key)
    if "lrt_format" in config:
        _check_saved(recipe, read_config(folder), key)
    elif recipe.recurrence is not None and recipe.recurrence.init != "identity":
        raise ValueError(
            f'recurrence.init = "{recipe.recurrence.init}" would disturb the decoder of {key}: '
            'set recurrence.init = "identity"'
        )
    if "quantization_config" in config:
        raise ValueError(f"{key} is quantized, and its matrices cannot train: save it dequantized first")
    return folder, config


def _check_settings(recipe: Recipe) -> None:
    """Refuse what the decoder in the folder decides itself."""
    default = ModelConfig()
    given = {
        f.name: getattr(recipe.model, f.name) for f in dataclasses.fields(default) if f.name not in OF_ANY_BACKBONE
    }
    idle = [f"model.{name} = {value}" for name, value in given.items() if value != getattr(default, name)]
    if idle:
        raise ValueError(
            f"{', '.join(idle)} would have no effect: the decoder in run.backbone decides this; "
            "leave it out of the recipe"
        )
    if recipe.optimizer.kind != "adamw":
        raise ValueError(
            f'optimizer.kind = "{recipe.optimizer.kind}" knows the matrices of the native decoder alone: '
            'set optimizer.kind = "adamw" for a decoder from run.backbone'
        )


def _check_saved(recipe: Recipe, config: Table, key: str) -> None:
    """Refuse a folder of ``lrt.save`` that holds another model than the recipe describes."""
    if "adapted" not in config:
        raise ValueError(
            f'{key} holds a native model: set run.backbone = "native" and training.init_from to this folder'
        )
    if config.get("adapter_only"):
        raise ValueError(
            f"{key} holds the memory alone: lrt.load it with base=, lrt.save the whole model, and give that folder"
        )
    if recipe.recurrence is None:
        raise ValueError(
            f"{key} was trained with memory, but recurrence is off: "
            "give the decoder's own folder, or switch recurrence on"
        )
    stored = dataclasses.asdict(RecurrenceConfig(**config["recurrence"]))
    here = dataclasses.asdict(recipe.recurrence)
    different = [
        f"recurrence.{k} = {stored[k]!r} there, {v!r} here" for k, v in here.items() if k != "init" and v != stored[k]
    ]
    if different:
        raise ValueError(
            f"{key} holds another recurrence than the recipe: {'; '.join(different)}: use the folder's settings"
        )


def _where(folder: Path) -> str:
    return f'run.backbone = "{folder}"'


def _adapted(decoder: nn.Module, recipe: Recipe) -> LatentRecurrentModel:
    """Adapt a decoder, with LoRA in it where the recipe asks for that; memory starts at zero,
    so only LoRA draws from the seed."""
    if recipe.tuning is not None and recipe.tuning.lora_rank:
        decoder = with_lora(decoder, recipe.tuning, seed=recipe.run.seed)
    model = adapt(decoder, recipe.recurrence or RecurrenceConfig(init="identity", kv_projection=False))
    return without_memory(model) if recipe.recurrence is None else model


def _tuned(model: LatentRecurrentModel, recipe: Recipe) -> LatentRecurrentModel:
    """An adapted model from a folder, with LoRA in its decoder where the recipe asks for it."""
    if recipe.tuning is None or not recipe.tuning.lora_rank:
        return model
    assert model.original is not None
    if getattr(model.original[0], "peft_config", None):
        raise ValueError(
            f'run.backbone = "{recipe.run.backbone}" holds a LoRA adapter already: merge it first, '
            "or leave tuning.lora_rank out"
        )
    return with_lora_inside(model, recipe.tuning, seed=recipe.run.seed)


def _prepared(model: LatentRecurrentModel, recipe: Recipe) -> LatentRecurrentModel:
    model.backbone.pack(loss_chunk=recipe.parallel.loss_chunk, attention_reset=recipe.model.attention_reset)
    model.train_schedule = baseline() if recipe.recurrence is None else from_config(recipe.schedule)
    return freeze(model.train(), recipe)
