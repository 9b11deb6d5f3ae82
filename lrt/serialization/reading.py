"""Reading a model's folder that ``lrt.save`` wrote. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lrt.families.description import Family
from lrt.model import LatentRecurrentModel
from lrt.rotary import kept_frequencies
from lrt.serialization.adapted import load_into, load_whole, needs_base
from lrt.serialization.description import model_from_config, read_config, schedule_of
from lrt.serialization.tensors import LazyTensor, check_shapes, open_folder
from lrt.tables import Table
from lrt.types import Device


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Device = None,
    base: nn.Module | None = None,
    family: Family | None = None,
) -> LatentRecurrentModel:
    """Read a model that ``save`` wrote.

    Args:
        folder: with safetensors (whole or in shards) and config.json.
        dtype: of the parameters; None = as saved.
        device: None = CPU.
        base: the decoder that a folder of ``adapter_only=True`` was made for, with the weights that the memory was
            trained on, or a decoder of one's own for a whole folder of it, whose weights are replaced;
            it becomes part of the model.
        family: as in ``lrt.adapt``, for a decoder that needs it.

    Raises:
        ValueError: not such a folder, its tensors do not fit its config, or ``base`` is missing, another decoder,
            or one of other weights.
    """
    config = read_config(folder)
    tensors = open_folder(folder)
    if config.get("adapter_only") or base is not None and needs_base(config):
        if base is not None and (device is not None or dtype is not None):
            with kept_frequencies(base):
                base = base.to(device=device, dtype=dtype)
        return load_into(base, folder, config, tensors, family=family, train_schedule=schedule_of(config))
    if base is not None:
        raise ValueError(f"{folder} holds a whole model: leave base out")
    return filled(config, tensors, where=str(folder), dtype=dtype, device=device)


def filled(
    config: Table,
    tensors: Mapping[str, LazyTensor],
    *,
    where: str,
    dtype: torch.dtype | None = None,
    device: Device = None,
) -> LatentRecurrentModel:
    """A whole model from its config.json and its tensors.

    Args:
        config: the table of config.json.
        tensors: under the names of ``model.state_dict()``.
        where: what they come from, for messages.
        dtype, device: as in ``load``.

    Raises:
        ValueError: the tensors do not fit the config.
    """
    if "adapted" in config:
        return load_whole(where, config, tensors, train_schedule=schedule_of(config), dtype=dtype, device=device)
    model = model_from_config(config, device="meta")
    check_shapes(where, tensors, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    model.load_state_dict({n: t.own(device=device, dtype=dtype) for n, t in tensors.items()}, assign=True)
    return model.eval()
