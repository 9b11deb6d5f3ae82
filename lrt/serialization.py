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
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch

from lrt.config import ModelConfig, RecurrenceConfig, ScheduleConfig
from lrt.model import LatentRecurrentModel, build_model
from lrt.schedules import Baseline, Interleaved, Refine, from_config
from lrt.shards import check_shapes, in_memory, open_folder, write_folder
from lrt.types import Schedule

FORMAT = 1


def save(model: LatentRecurrentModel, folder: str | Path, *, shard_size: int | None = None) -> Path:
    """Write a native model to ``folder``: safetensors and config.json.

    Args:
        model: the model, on any device.
        folder: must not exist yet, or be empty.
        shard_size: bytes of the largest file; None = one file.

    Raises:
        ValueError: the folder is in use.
    """
    with new_folder(folder) as place:
        write_folder(place, in_memory(model.state_dict()), shard_size=shard_size)
        (place / "config.json").write_text(json.dumps(native_config(model), indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: Any = None) -> LatentRecurrentModel:
    """Read a model that ``save`` wrote.

    Args:
        folder: with safetensors (whole or in shards) and config.json.
        dtype: of the parameters; None = as saved.
        device: None = CPU.

    Raises:
        ValueError: not such a folder, or its tensors do not fit its config.
    """
    model = model_from_config(read_config(folder), device="meta")
    tensors = open_folder(folder)
    check_shapes(str(folder), tensors, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    model.load_state_dict({n: t.read().to(device=device, dtype=dtype or t.dtype) for n, t in tensors.items()}, assign=True)
    return model.eval()


# ------------------------------------------------------------------ config.json


def native_config(model: LatentRecurrentModel) -> dict[str, Any]:
    """config.json of a native model; its keys also make it a Hugging Face config of type "lrt"."""
    dtype = next(model.parameters()).dtype
    return {
        "model_type": "lrt",
        "architectures": ["LRTForCausalLM"],
        "lrt_format": FORMAT,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "model": dataclasses.asdict(model.backbone.config),
        "recurrence": None if model.recurrence is None else dataclasses.asdict(model.recurrence),
        "schedule": schedule_to_table(model.train_schedule),
    }


def model_from_config(config: dict[str, Any], *, device: Any = None) -> LatentRecurrentModel:
    """The native model that a config.json describes, parameters not initialized."""
    recurrence = config.get("recurrence")
    try:
        model = build_model(ModelConfig(**config["model"]), None if recurrence is None else RecurrenceConfig(**recurrence), device=device)
        model.train_schedule = from_config(ScheduleConfig(**config["schedule"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json is not one that this version of lrt can read: {error}") from None
    return model


def schedule_to_table(schedule: Schedule) -> dict[str, Any]:
    """A schedule as the keys of a recipe's [schedule] section."""
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
