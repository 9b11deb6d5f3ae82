"""A model as a folder: safetensors and config.json, readable by ``lrt.load`` alone.

Nothing is ever unpickled. A folder is written beside its place and renamed, so a broken save leaves
nothing half-written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lrt.adapted_folder import (
    decoder_of,
    describe_decoder,
    is_foreign,
    load_adapter,
    load_whole,
    model_card,
    refuse_whole,
    skeleton,
    without_ties,
)  # fmt: skip
from lrt.config import ModelConfig, RecurrenceConfig, ScheduleConfig
from lrt.model import LatentRecurrentModel, build_model
from lrt.schedules import Baseline, Interleaved, Mixture, Refine, from_config, single
from lrt.shards import check_shapes, in_memory, open_folder, write_folder
from lrt.types import Schedule

FORMAT = 1


def save(model: LatentRecurrentModel, folder: str | Path, *, adapter_only: bool = False, shard_size: int | None = None) -> Path:
    """Write a model to ``folder``: safetensors, config.json and a model card.

    Args:
        model: the model, on any device.
        folder: must not exist yet, or be empty.
        adapter_only: only the memory parameters of an adapted model, a few MB; ``load`` then needs its decoder.
        shard_size: bytes of the largest file; None = one file.

    Raises:
        ValueError: the folder is in use, or this model cannot be saved so.
    """
    with new_folder(folder) as place:
        write_model(model, place, adapter_only=adapter_only, shard_size=shard_size)
    return Path(folder)


def write_model(
    model: LatentRecurrentModel,
    place: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    adapter_only: bool = False,
    shard_size: int | None = None,
) -> None:
    """Write a model's files into a folder that exists; see ``save``.

    Args:
        tensors: gathered elsewhere, under the names of ``model.state_dict()``; None = the model's own.
    """
    if adapter_only and model.original is None:
        raise ValueError("adapter_only = True, but this model was not made by lrt.adapt: save it whole")
    if is_foreign(model) and not adapter_only:
        refuse_whole(model)
    config = config_of(model) | ({"adapter_only": True} if adapter_only else {})
    every = model.state_dict() if tensors is None else tensors
    chosen = {name: every[name] for name in model.memory_parameters()} if adapter_only else without_ties(model, every)
    write_folder(place, in_memory(chosen), shard_size=shard_size)
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (place / "README.md").write_text(model_card(config), encoding="utf-8")
    settings: Any = getattr(model, "generation_config", None)
    if settings is not None:
        settings.save_pretrained(place)


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: Any = None, base: Any = None, family: Any = None) -> LatentRecurrentModel:
    """Read a model that ``save`` wrote.

    Args:
        folder: with safetensors (whole or in shards) and config.json.
        dtype: of the parameters; None = as saved.
        device: None = CPU.
        base: the decoder that a folder of ``adapter_only=True`` was made for; it becomes part of the model.
        family: as in ``lrt.adapt``, for a decoder that needs it.

    Raises:
        ValueError: not such a folder, its tensors do not fit its config, or ``base`` is missing or another decoder.
    """
    config = read_config(folder)
    tensors = open_folder(folder)
    if config.get("adapter_only"):
        if base is not None and (device is not None or dtype is not None):
            base = base.to(device=device, dtype=dtype)
        return load_adapter(folder, config, tensors, base, family=family, train_schedule=_schedule(config))
    if base is not None:
        raise ValueError(f"{folder} holds a whole model: leave base out")
    if "adapted" in config:
        return load_whole(folder, config, tensors, train_schedule=_schedule(config), dtype=dtype, device=device)
    model = model_from_config(config, device="meta")
    check_shapes(str(folder), tensors, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    model.load_state_dict({n: t.read().to(device=device, dtype=dtype or t.dtype) for n, t in tensors.items()}, assign=True)
    return model.eval()


# ------------------------------------------------------------------ config.json


def config_of(model: LatentRecurrentModel, decoder: Any = None) -> dict[str, Any]:
    """config.json of a model; its keys also make it a Hugging Face config of type "lrt".

    Args:
        decoder: the foreign decoder inside; None = as the model remembers.
    """
    if decoder is None and is_foreign(model):
        decoder = decoder_of(model)
    return {
        "model_type": "lrt",
        "architectures": ["LRTForCausalLM"],
        "lrt_format": FORMAT,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "recurrence": None if model.recurrence is None else dataclasses.asdict(model.recurrence),
        "schedule": schedule_to_table(model.train_schedule),
        **({"model": dataclasses.asdict(model.backbone.config)} if decoder is None else describe_decoder(decoder)),
    }


def native_config(model: LatentRecurrentModel) -> dict[str, Any]:
    """config.json of a native model."""
    return config_of(model)


def model_from_config(config: dict[str, Any], *, device: Any = None) -> LatentRecurrentModel:
    """The model that a config.json describes, parameters not initialized."""
    recurrence = config.get("recurrence")
    if "adapted" in config:
        return skeleton(config, _schedule(config))
    try:
        model = build_model(ModelConfig(**config["model"]), None if recurrence is None else RecurrenceConfig(**recurrence), device=device)
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json is not one that this version of lrt can read: {error}") from None
    model.train_schedule = _schedule(config)
    return model


def _schedule(config: dict[str, Any]) -> Schedule:
    try:
        return from_config(ScheduleConfig(**config["schedule"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json is not one that this version of lrt can read: {error}") from None


def schedule_to_table(schedule: Schedule | Mixture) -> dict[str, Any]:
    """A schedule as the keys of a recipe's [schedule] section; of a mixture, its member with most passes."""
    schedule = single(schedule)
    if isinstance(schedule, Interleaved):
        return {"kind": "interleaved", **dataclasses.asdict(schedule)}
    if isinstance(schedule, Refine):
        return {"kind": "refine", "passes": schedule.passes, "weights": schedule.weights, "cut_gradient": schedule.cut_gradient}
    return {"kind": "baseline"} if isinstance(schedule, Baseline) else {"kind": "chunked", "chunks": getattr(schedule, "chunk", 1)}


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a saved folder.

    Raises:
        ValueError: there is none, or it is not JSON, or of a newer format.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: give a folder that lrt.save wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if "lrt_format" not in config:
        raise ValueError(f"{path}: not written by lrt.save (no lrt_format); to adapt a plain decoder use lrt.adapt")
    if config["lrt_format"] > FORMAT:
        raise ValueError(f"{path}: format {config['lrt_format']}, but this version of lrt reads up to {FORMAT}: update lrt")
    return config


# ------------------------------------------------------------------ folders that appear whole


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that appears at its place only when the block ends without an error.

    Raises:
        ValueError: something is already there.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{folder} already exists: choose a new folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield place
        os.chmod(place, 0o755)
        if target.exists():
            target.rmdir()
        place.rename(target)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
