"""What a checkpoint is, said without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from lrt.conversion.adapters import is_memory, read_memory
from lrt.conversion.checkpoints import Checkpoint, StepError
from lrt.conversion.kinds import KINDS, kind_of
from lrt.data.tokenizer import MARKER
from lrt.tables import ReadTable


class Inspection(NamedTuple):
    """A checkpoint in words."""

    kind: str
    whole: bool
    problem: str | None  # why it is not whole
    checkpoint: Checkpoint | None
    parts: Mapping[str, int]  # parameters by part
    dtypes: Mapping[str, int]  # parameters by dtype


def inspect_checkpoint(path: str | Path, *, step: int | None = None) -> Inspection:
    """Say what a checkpoint is: kind, config, parameters by part, step, recipe, dtype, and whether it is whole.

    Args:
        path: any checkpoint that ``convert`` reads.
        step: which one of a run; None = the newest.

    Raises:
        ValueError: nothing known lies there. A checkpoint that is known but not whole is reported, not raised.
        StepError: a step is asked of a folder that holds one model.
    """
    kind = kind_of(Path(path))
    try:
        found = read_memory(Path(path)) if kind == "adapter" else KINDS[kind].read(Path(path), step=step)
        for tensor in found.tensors.values():  # the ends of every file, so that a truncated one is noticed
            tensor.read().flatten()[-1:].clone()
    except StepError:
        raise
    except ValueError as error:
        return Inspection(kind, False, str(error), None, {}, {})
    if kind == "official" and found.config["recurrence"] is None:
        kind = "nanochat or official baseline"
    parts: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for name, tensor in found.tensors.items():
        count, dtype = torch.Size(tensor.shape).numel(), str(tensor.dtype).removeprefix("torch.")
        parts[part_of(name)] = parts.get(part_of(name), 0) + count
        dtypes[dtype] = dtypes.get(dtype, 0) + count
    return Inspection(kind, True, None, found, parts, dtypes)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    if is_memory(name):
        return "memory"
    if "value_embeddings" in name:
        return "value embeddings"
    if name.startswith("blocks."):
        return "blocks"
    return "head" if ".head." in name else "scales" if name.endswith("_scales") else "token embedding"


def describe(found: Inspection, path: str | Path) -> list[str]:
    """Lines for the user."""
    if found.checkpoint is None:
        return [f"{path}: {found.kind}, NOT WHOLE", f"  {found.problem}"]
    checkpoint = found.checkpoint
    lines = [f"{path}: {found.kind}, whole ({checkpoint.where})"]
    lines.append(f"  step        {checkpoint.step if checkpoint.step is not None else 'not recorded'}")
    if "recipe" in checkpoint.about:
        about = checkpoint.about
        lines.append(
            f"  recipe      {about['recipe']} (recipe.toml in the checkpoint), written by "
            f"{about['ranks that wrote it']} ranks"
        )
    lines.append(f"  dtype       {', '.join(f'{name} ({count:,})' for name, count in found.dtypes.items())}")
    lines.append(f"  parameters  {sum(found.parts.values()):,}")
    lines += [f"    {part:17s} {count:,}" for part, count in sorted(found.parts.items())]
    if "adapted" in checkpoint.config:
        lines.append(
            f"  adapts      {checkpoint.config['adapted']['architecture']} "
            f"{checkpoint.config['adapted'].get('name') or ''}"
        )
    for section in ("model", "recurrence", "schedule"):
        lines.append(
            f"  {section:11s} {_plain(checkpoint.config[section]) if checkpoint.config.get(section) else 'none'}"
        )
    if checkpoint.tokenizer:
        lines.append(f"  tokenizer   {', '.join(sorted(n for n in checkpoint.tokenizer if n != MARKER))}")
    return lines + [f"  note        {note}" for note in checkpoint.notes]


def _plain(section: ReadTable) -> str:
    return ", ".join(f"{key} = {value}" for key, value in section.items() if value is not None)
