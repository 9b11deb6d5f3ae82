"""Every kind of checkpoint, written into a folder that exists and is empty; memory for one shard."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lrt.conversion.adapters import decoder_weights, is_memory, refuse_peft
from lrt.conversion.checkpoints import Checkpoint
from lrt.conversion.official import official_from_native, official_tensors
from lrt.conversion.tokenizers import hub_files, write_files, write_nanochat
from lrt.data.tokenizer import load_tokenizer
from lrt.serialization.fingerprint import fingerprint
from lrt.serialization.tensors import LazyTensor, write_folder
from lrt.serialization.writing import write_description
from lrt.tables import Table

Progress = Callable[[int], None]  # bytes written since the last call


def write_lrt(folder: Path, source: Checkpoint, *, shard_size: int | None, progress: Progress) -> list[str]:
    """Our folder: safetensors, config.json, tokenizer."""
    write_folder(folder, source.tensors, shard_size=shard_size, progress=progress)
    dtype = next(iter(source.tensors.values())).dtype
    step = {} if source.step is None else {"step": source.step}
    config = {**source.config, "torch_dtype": str(dtype).removeprefix("torch."), **step}
    write_description(folder, config)
    write_files(folder, source.tokenizer)
    return []


def write_adapter(folder: Path, source: Checkpoint, *, shard_size: int | None, progress: Progress) -> list[str]:
    """Only the memory parameters, for ``lrt.load(folder, base=decoder)`` or --from adapter --base."""
    if source.config["recurrence"] is None:
        raise ValueError(f"{source.where} has no recurrence, so there is nothing to put into an adapter")
    refuse_peft(source.config, source.where)
    memory = {name: t for name, t in source.tensors.items() if is_memory(name)}
    config = {**source.config, "adapter_only": True, "base_fingerprint": fingerprint(decoder_weights(source.tensors))}
    return write_lrt(folder, replace(source, tensors=memory, config=config), shard_size=shard_size, progress=progress)


def write_hf(folder: Path, source: Checkpoint, *, shard_size: int | None, progress: Progress) -> list[str]:
    """Our folder and what transformers and the Hub expect beside it."""
    write_lrt(folder, source, shard_size=shard_size, progress=progress)
    write_files(folder, hub_files(source.tokenizer, context=source.context))
    if "generation_config.json" in source.tokenizer:
        return []
    generation: Table = {"do_sample": True, "temperature": 1.0}
    if "tokenizer.json" in source.tokenizer:
        tokenizer = load_tokenizer(folder)
        # Documents have no end token in pretraining: the next document's separator ends one.
        generation |= {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id,
        }
        generation |= {"pad_token_id": generation["eos_token_id"]}
    _write_json(folder / "generation_config.json", generation)
    return []


def write_official(
    folder: Path, source: Checkpoint, *, shard_size: int | None, progress: Progress, nanochat: bool = False
) -> list[str]:
    """A base folder of the official code: base_checkpoints/dL/model_NNNNNN.pt, its meta file, and the tokenizer.

    Raises:
        ValueError: the official code cannot express this model.
    """
    model_config, notes = official_from_native(source.config, nanochat=nanochat)
    place, step = folder / "base_checkpoints" / f"d{model_config['n_layer']}", source.step or 0
    place.mkdir(parents=True)
    _write_pt(place / f"model_{step:06d}.pt", official_tensors(source.config, source.tensors), progress)
    recorded = source.about.get("meta", {}) if source.kind in ("official", "nanochat") else {}
    _write_json(place / f"meta_{step:06d}.json", {**recorded, "step": step, "model_config": model_config})
    if "tokenizer.json" in source.tokenizer:
        notes += write_nanochat(folder / "tokenizer", source.tokenizer, vocab_size=model_config["vocab_size"])
    return notes


def _write_pt(path: Path, tensors: Mapping[str, LazyTensor], progress: Progress) -> None:
    """torch.save of a state dict that is never in memory: the file is laid out first, then filled through a map of
    it."""
    try:
        with torch.serialization.skip_data():
            torch.save({name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}, path)
    except RuntimeError as error:  # torch's writer has no OSError of its own
        raise OSError(f"{path.name} cannot be laid out: {error}") from None
    if hasattr(os, "posix_fallocate"):  # a full disk must be an error here, not a crash while the map is written
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(path, mmap=True, weights_only=True)
    for name, tensor in tensors.items():
        mapped[name].copy_(tensor.read())
        progress(tensor.nbytes)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
