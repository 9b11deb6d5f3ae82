"""Every kind of checkpoint, written into a folder that exists and is empty; memory for one shard."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lrt.config import RecurrenceConfig
from lrt.conversion.checkpoints import Checkpoint
from lrt.conversion.official import official_from_native, official_tensors
from lrt.conversion.tokenizers import hub_files, write_files, write_nanochat
from lrt.data.tokenizer import load_tokenizer
from lrt.shards import LazyTensor, write_folder

Progress = Callable[[int], None]  # bytes written since the last call


def write_lrt(folder: Path, source: Checkpoint, *, shard_size: int | None, progress: Progress) -> list[str]:
    """Our folder: safetensors, config.json, tokenizer."""
    write_folder(folder, source.tensors, shard_size=shard_size, progress=progress)
    dtype = next(iter(source.tensors.values())).dtype
    step = {} if source.step is None else {"step": source.step}
    _write_json(folder / "config.json", {**source.config, "torch_dtype": str(dtype).removeprefix("torch."), **step})
    write_files(folder, source.tokenizer)
    return []


def write_hf(folder: Path, source: Checkpoint, *, shard_size: int | None, progress: Progress) -> list[str]:
    """Our folder and what transformers and the Hub expect beside it."""
    write_lrt(folder, source, shard_size=shard_size, progress=progress)
    write_files(folder, hub_files(source.tokenizer, context=source.config["model"]["sequence_length"]))
    generation: dict[str, Any] = {"do_sample": True, "temperature": 1.0}
    if "tokenizer.json" in source.tokenizer:
        tokenizer = load_tokenizer(folder)
        # Documents have no end token in pretraining: the next document's separator ends one.
        generation |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id}
        generation |= {"pad_token_id": generation["eos_token_id"]}
    _write_json(folder / "generation_config.json", generation)
    (folder / "README.md").write_text(model_card(source), encoding="utf-8")
    return []


def write_official(folder: Path, source: Checkpoint, *, shard_size: int | None, progress: Progress, nanochat: bool = False) -> list[str]:
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
    if source.tokenizer:
        notes += write_nanochat(folder / "tokenizer", source.tokenizer, vocab_size=model_config["vocab_size"])
    return notes


def _write_pt(path: Path, tensors: Mapping[str, LazyTensor], progress: Progress) -> None:
    """torch.save of a state dict that is never in memory: the file is laid out first, then filled through a map of it."""
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}, path)
    if hasattr(os, "posix_fallocate"):  # a full disk must be an error here, not a crash while the map is written
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(path, mmap=True, weights_only=True)
    for name, tensor in tensors.items():
        mapped[name].copy_(tensor.read())
        progress(tensor.nbytes)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_card(source: Checkpoint) -> str:
    """README.md of a Hugging Face folder: what it is, how to load it, what a score of it means."""
    model, recurrence = source.config["model"], source.config["recurrence"]
    count = sum(torch.Size(t.shape).numel() for t in source.tensors.values())
    memory = "none (plain decoder)"
    if recurrence is not None:
        source_block = RecurrenceConfig(**recurrence).source_index(model["n_layers"])
        memory = f"{recurrence['sharing']} projections, source block {source_block} of {model['n_layers']}"
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(folder)\n" if "tokenizer.json" in source.tokenizer else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [lrt, latent-recurrent-transformer]
---
# Latent Recurrent Transformer

A decoder whose every position also receives the latent state of the position before it (arXiv 2605.26797).

| | |
|---|---|
| parameters | {count:,} |
| blocks, context | {model["n_layers"]}, {model["sequence_length"]} |
| memory | {memory} |
| training step | {source.step if source.step is not None else "not recorded"} |

```python
import lrt  # registers the architecture: pip install "lrt[hf]"
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
{tokenizer}```

Every document starts with the separator token, in training and in prompts. Decoding carries a recurrent state of one vector a sequence beside
the key/value cache: a score of this model should say whether it was computed with that state (`decode`) or without it (`zero`).
"""
