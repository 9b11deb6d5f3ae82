"""config.json of a model's folder: what describes the model, in and out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from lrt.config import ModelConfig, RecurrenceConfig, ScheduleConfig, parse_section
from lrt.lora import put_adapter
from lrt.model import LatentRecurrentModel, build_model
from lrt.schedules import Baseline, Interleaved, Mixture, Refine, from_config, single
from lrt.serialization.adapted import decoder_of, describe_decoder, is_foreign, skeleton
from lrt.serialization.decoders import check_attention, read_json
from lrt.serialization.fingerprint import HALVES
from lrt.serialization.renewal import config_file
from lrt.tables import Table
from lrt.types import Device, Schedule

FORMAT = 1


def config_of(model: LatentRecurrentModel, decoder: nn.Module | None = None) -> Table:
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
        **(_native(model) if decoder is None else describe_decoder(decoder)),
    }


def _native(model: LatentRecurrentModel) -> Table:
    """The settings of a native decoder; its softcap also under the name that tools with a head of their own read."""
    return {
        "model": dataclasses.asdict(model.backbone.config),
        "final_logit_softcapping": model.backbone.config.softcap,
    }


def native_config(model: LatentRecurrentModel) -> Table:
    """config.json of a native model."""
    return config_of(model)


def model_from_config(config: Table, *, device: Device = None) -> LatentRecurrentModel:
    """The model that a config.json describes, parameters not initialized."""
    recurrence = config.get("recurrence")
    if "adapted" in config:
        return skeleton(config, schedule_of(config))
    try:
        model = build_model(
            ModelConfig(**config["model"]),
            None if recurrence is None else RecurrenceConfig(**recurrence),
            device=device,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json is not one that this version of lrt can read: {error}") from None
    model.train_schedule = schedule_of(config)
    if config.get("adapter"):
        put_adapter(model, config["adapter"])
    return model


def schedule_of(config: Table) -> Schedule:
    """The training schedule that a config.json names."""
    try:
        return from_config(ScheduleConfig(**config["schedule"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json is not one that this version of lrt can read: {error}") from None


def schedule_to_table(schedule: Schedule | Mixture) -> Table:
    """A schedule as the keys of a recipe's [schedule] section; of a mixture, its member with most passes."""
    schedule = single(schedule)
    if isinstance(schedule, Interleaved):
        return {"kind": "interleaved", **dataclasses.asdict(schedule)}
    if isinstance(schedule, Refine):
        settle = {"settle": schedule.settle} if schedule.settle else {}  # older versions read folders without it
        weights = {"weights": schedule.weights, "cut_gradient": schedule.cut_gradient}
        return {"kind": "refine", "passes": schedule.passes, **weights, **settle}
    return (
        {"kind": "baseline"}
        if isinstance(schedule, Baseline)
        else {"kind": "chunked", "chunks": getattr(schedule, "chunk", 1)}
    )


def _check_parts(config: Table, path: Path) -> None:
    """Refuse a config.json whose parts have other types than those that ``save`` writes."""
    wrong = [key for key in ("adapter", "base_fingerprint") if not isinstance(config.get(key), (dict, type(None)))]
    dtype = config.get("torch_dtype")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        wrong.append("torch_dtype")
    stored = config.get("base_fingerprint")
    if isinstance(stored, dict) and not all(isinstance(stored.get(key), str) for key in ("dtypes", "exact", *HALVES)):
        wrong.append("base_fingerprint")
    if not isinstance(config.get("adapted", {}), dict):
        wrong.append("adapted")
    if "recurrence" not in config or "adapted" not in config and not isinstance(config.get("model"), dict):
        wrong.append("recurrence" if "recurrence" not in config else "model")
    if config.get("adapter_only") and config.get("recurrence") is None:
        wrong.append("recurrence")
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is missing or of another kind than lrt.save writes: it was changed")
    try:
        if config["recurrence"] is not None:
            parse_section(RecurrenceConfig, "recurrence", config["recurrence"])
        if "adapted" not in config:
            parse_section(ModelConfig, "model", config["model"])
        parse_section(ScheduleConfig, "schedule", config.get("schedule"))
    except ValueError as error:
        raise ValueError(f"{path} is not one that this version of lrt can read: {error}") from None


def read_config(folder: str | Path) -> Table:
    """config.json of a saved folder.

    Raises:
        ValueError: there is none, or it is not JSON, of a newer format, or was changed.
    """
    path = config_file(folder)
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: give a folder that lrt.save wrote")
    config = read_json(path, where=str(folder))
    if "lrt_format" not in config:
        raise ValueError(f"{path}: not written by lrt.save (no lrt_format); to adapt a plain decoder use lrt.adapt")
    if type(config["lrt_format"]) is not int:
        raise ValueError(
            f"{path}: lrt_format = {config['lrt_format']!r}, but a model that lrt wrote has a whole number "
            "there: it was changed"
        )
    check_attention(config, where=str(path))
    if config["lrt_format"] > FORMAT:
        raise ValueError(
            f"{path}: format {config['lrt_format']}, but this version of lrt reads up to {FORMAT}: update lrt"
        )
    _check_parts(config, path)
    if config.get("model_type") != "lrt":
        raise ValueError(
            f'{path}: model_type = "{config.get("model_type")}", but a model that lrt wrote has model_type = "lrt": '
            "it was changed"
        )
    return config
