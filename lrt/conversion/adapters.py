"""A memory without its decoder, and a decoder without memory, as checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lrt.adaptation import adapt
from lrt.conversion.checkpoints import Checkpoint, expected_shapes, model_reading, no_step
from lrt.conversion.tokenizers import read_files
from lrt.serialization import config_of, read_config
from lrt.serialization.adapted import without_ties
from lrt.serialization.decoders import in_one_line, open_decoder
from lrt.serialization.fingerprint import fingerprint, same_weights
from lrt.serialization.tensors import LazyTensor, check_shapes, in_memory, open_folder
from lrt.tables import ReadTable


def read_adapter(path: Path, *, base: Checkpoint, step: int | None = None) -> Checkpoint:
    """The memory parameters of one folder around the decoder of another.

    Args:
        path: a folder of ``lrt.save(model, folder, adapter_only=True)``, or of kind adapter.
        base: the decoder; a memory of its own is left out.

    Raises:
        ValueError: it was made for another decoder, or is not whole.
    """
    no_step(step, "adapter")
    alone = read_memory(path)
    config, memory = alone.config, alone.tensors
    for key in ("model", "adapted"):
        theirs, ours = base.config.get(key), config.get(key)
        different = (
            theirs != ours if key == "model" else (theirs or {}).get("architecture") != (ours or {}).get("architecture")
        )
        if different:
            raise ValueError(
                f"{path} was made for another decoder than {base.where}: "
                "name the one that it was trained on with --base"
            )
    if not same_weights(config.pop("base_fingerprint", None), fingerprint(decoder_weights(base.tensors))):
        raise ValueError(
            f"{path} was trained on other weights than those of {base.where}: "
            "name the decoder that it was trained on with --base"
        )
    tensors = {name: t for name, t in base.tensors.items() if not is_memory(name)} | memory
    shapes = expected_shapes(config)
    check_shapes(f"{path} on {base.where}", tensors, shapes)
    tensors = {name: tensors[name] for name in shapes}
    return replace(
        alone, tensors=tensors, reading=model_reading(config, tensors), tokenizer=alone.tokenizer or base.tokenizer
    )


def read_memory(path: Path) -> Checkpoint:
    """The memory parameters of an adapter folder alone; they cannot be run.

    Raises:
        ValueError: a folder of another kind, or not whole.
    """
    config, memory = read_config(path), open_folder(path)
    if not config.pop("adapter_only", False):
        raise ValueError(f"{path} holds a whole model: use --from lrt or hf")
    refuse_peft(config, path)
    check_shapes(str(path), memory, {name: shape for name, shape in expected_shapes(config).items() if is_memory(name)})
    return Checkpoint(
        "adapter", path, config, memory, model_reading(config, memory), read_files(path), config.get("step")
    )


def read_decoder(path: Path) -> Checkpoint:
    """A plain Hugging Face decoder (the base of an adapter), as a model that has no memory yet."""
    model = in_one_line(str(path), {}, lambda: adapt(open_decoder(path, dtype="auto")))
    tensors = in_memory({n: t for n, t in without_ties(model, model.state_dict()).items() if not is_memory(n)})
    config = config_of(model)
    return Checkpoint("hf", path, config, tensors, model_reading(config, tensors), read_files(path))


def decoder_weights(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The decoder's own tensors, read one after the other."""
    return ((name, tensor.read()) for name, tensor in tensors.items() if not is_memory(name))


def refuse_peft(config: ReadTable, where: str | Path) -> None:
    """Raises ValueError where a PEFT adapter lies beside the memory, which the target or the base knows nothing of."""
    if config.get("adapter"):
        raise ValueError(
            f"{where} holds a LoRA adapter beside the memory: lrt.load it, merge it (merge_and_unload), "
            "and lrt.save the whole model"
        )


def is_memory(name: str) -> bool:
    """Whether a parameter belongs to the recurrence rather than to the decoder."""
    parts = name.split(".")
    return parts[0] in ("memory_projection", "injection") or (
        parts[0] == "blocks" and parts[2] in ("gate", "projection")
    )
