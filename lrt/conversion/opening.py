"""Any folder with a model, opened to be run: an export, a training run or checkpoint, a Hugging Face folder,
the memory alone.

``find_model`` is the one rule for which model a folder means; ``tools/generate.py``, ``tools/convert.py`` and
``tools/evaluate.py`` share it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lrt.adaptation import adapt, without_memory
from lrt.config import Recipe, RecurrenceConfig, load_recipe
from lrt.config.files import local_path
from lrt.conversion.kinds import KINDS, kind_of
from lrt.conversion.titan import description_of, is_titan
from lrt.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from lrt.model import LatentRecurrentModel, build
from lrt.serialization import load, model_from_config
from lrt.serialization.adapted import load_whole
from lrt.serialization.decoders import in_one_line, is_plain, open_decoder
from lrt.serialization.description import schedule_of
from lrt.train.checkpoint import find_checkpoint, latest, read_tensors, step_of
from lrt.train.checkpoint.starting_model import is_native, read_backbone
from lrt.types import Device


@dataclass(frozen=True)
class Opened:
    """A model that can be run, and what is known of it.

    Attributes:
        model: in evaluation mode.
        folder: what was read: the folder that was named, or the export or checkpoint found in it.
        kind: lrt, hf, dcp, titan, adapter, official, or plain (a Hugging Face decoder without memory).
        recipe: of the run that made it, where it lies beside the model.
    """

    model: LatentRecurrentModel
    folder: Path
    kind: str
    recipe: Recipe | None


def find_model(path: str | Path) -> Path:
    """The model that a path means: itself, or the newest export or checkpoint of a training run.

    The export of a run wins over a checkpoint of the same step.

    Raises:
        ValueError: there is no model at all.
    """
    if not str(path).strip():
        raise ValueError("the folder's name is empty: name a folder with a model")
    place = local_path(path, key="the folder of the model")
    if not place.exists():
        raise ValueError(f"{path}: there is nothing; name a folder with a model, or a training run")
    if (
        not place.is_dir()
        or (place / "config.json").is_file()
        or step_of(place) >= 0
        or (place / "complete.json").is_file()
    ):
        return place
    checkpoint = latest(place) or latest(place / "checkpoints")
    export = place / "export" if (place / "export" / "config.json").is_file() else None
    if export is not None:
        reached = _step(export)
        if checkpoint is None or reached is None or reached >= step_of(checkpoint):
            return export
    if checkpoint is not None:
        return checkpoint
    if is_titan(place) or any(place.glob("model_*.pt")) or any(place.glob("base_checkpoints/*/model_*.pt")):
        return place
    raise ValueError(
        f"{path} holds no model: name a folder with config.json (lrt.save, an export, Hugging Face), "
        "a training run that has written a checkpoint or an export, or one of its checkpoints"
    )


def open_model(
    path: str | Path, *, base: str | Path | None = None, dtype: torch.dtype | None = None, device: Device = None
) -> Opened:
    """Open whatever model a path means.

    Args:
        path: as ``find_model`` takes it.
        base: the decoder of a folder that holds the memory alone.
        dtype: of the parameters; None = as stored.
        device: None = CPU.

    Raises:
        ValueError: no model, a damaged one, or ``base`` is missing or has no use.
    """
    folder = find_model(path)
    kind = "plain" if is_plain(folder) else kind_of(folder)
    if (base is not None) != (kind == "adapter"):
        raise ValueError(
            f"{path} holds the memory alone: name the decoder that it was trained on with --base"
            if base is None
            else f"{path} holds a whole model: leave --base out"
        )
    if kind == "adapter":
        assert base is not None
        model = load(folder, base=_decoder(find_model(base)), dtype=dtype, device=device)
    elif kind in ("lrt", "hf"):
        model = load(folder, dtype=dtype, device=device)
    elif kind == "plain":
        model = in_one_line(
            str(folder),
            {},
            lambda: without_memory(adapt(_decoder(folder), RecurrenceConfig(init="identity", kv_projection=False))),
        )
    elif kind == "dcp":
        model = _from_checkpoint(folder)
    else:
        found = KINDS[kind].read(folder)
        if "adapted" in found.config:
            model = load_whole(
                folder, found.config, found.tensors, train_schedule=schedule_of(found.config), dtype=None, device=None
            )
        else:
            model = model_from_config(found.config, device="meta")
            model.load_state_dict({name: tensor.read() for name, tensor in found.tensors.items()}, assign=True)
    return Opened(model.to(device=device, dtype=dtype).eval(), folder, kind, find_recipe(folder))


def find_recipe(folder: Path) -> Recipe | None:
    """The recipe that lies in a checkpoint, or beside an export."""
    for place in (folder / "recipe.toml", folder.parent / "recipe.toml"):
        if place.is_file():
            return load_recipe(str(place))
    return None


def open_tokenizer(opened: Opened, *, name: str | None = None, base: str | Path | None = None) -> Tokenizer:
    """The tokenizer of an opened model.

    Args:
        opened: from ``open_model``.
        name: "bytes", a tokenizer.json or its folder; None = the one beside the model, its base, or of its recipe.
        base: of the memory alone.

    Raises:
        ValueError: none is found, or it has more ids than the model.
    """
    places = [
        opened.folder,
        opened.folder / "tokenizer",
        opened.folder.parent / "tokenizer",
        *([] if base is None else [Path(base)]),
    ]
    found = name or next((str(place) for place in places if (place / "tokenizer.json").is_file()), None)
    found = found or (None if opened.recipe is None else opened.recipe.data.tokenizer)
    found = found or (str(description_of(opened.folder)["tokenizer"]) if opened.kind == "titan" else None)
    if found is None:
        raise ValueError(
            f"{opened.folder} holds no tokenizer.json: name one with --tokenizer (the recipe's data.tokenizer; "
            '"bytes" for bytes)'
        )
    tokenizer = load_tokenizer(found)
    try:
        check_vocabulary(tokenizer, opened.model.vocab_size)
    except ValueError:
        raise ValueError(
            f"the tokenizer {found} has {tokenizer.vocab_size} ids, but the model in {opened.folder} knows "
            f"{opened.model.vocab_size}: name the tokenizer that the model was trained with, --tokenizer"
        ) from None
    return tokenizer


def check_finite(model: LatentRecurrentModel, *, where: str | Path) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ValueError: a parameter holds NaN or infinity; the message names the first and counts them.
    """
    damaged = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if damaged:
        raise ValueError(
            f"{where}: {damaged[0]} holds NaN or infinite weights ({len(damaged)} of "
            f"{sum(1 for _ in model.parameters())} tensors do), so no score would mean anything: "
            "use an earlier checkpoint"
        )


def _step(export: Path) -> int | None:
    """Step at which a run was exported; None where the export does not say it."""
    try:
        step = json.loads((export / "config.json").read_text(encoding="utf-8")).get("step")
    except (ValueError, AttributeError):
        return None
    return step if isinstance(step, int) else None


def _decoder(folder: Path) -> nn.Module:
    """The decoder in a folder: native, or of Hugging Face."""
    return open_decoder(folder, dtype="auto") if is_plain(folder) else open_model(folder).model


def _from_checkpoint(folder: Path) -> LatentRecurrentModel:
    """The weights of a training checkpoint, in the model of its recipe."""
    checkpoint = find_checkpoint(folder)
    recipe = load_recipe(str(checkpoint / "recipe.toml"))
    model = build(recipe) if is_native(recipe) else read_backbone(recipe)
    read_tensors(checkpoint, {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()})
    return model
