"""The kinds of checkpoints: how each is read and written, and what it can hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lrt.conversion.adapters import read_adapter, read_decoder
from lrt.conversion.checkpoints import Checkpoint, read_dcp, read_hf, read_lrt, read_official
from lrt.conversion.nanochat import MODEL_TYPE, read_any
from lrt.conversion.titan import is_titan, read_titan
from lrt.conversion.writing import write_adapter, write_hf, write_lrt, write_official
from lrt.serialization import read_config
from lrt.serialization.decoders import is_plain, read_json
from lrt.serialization.renewal import config_file

NOT_WRITTEN = "read only; weights and config, not the optimizer"


class Kind(NamedTuple):
    """A kind of checkpoint: how it is read and written, and what it can hold."""

    read: Callable[..., Checkpoint]
    write: Callable[..., list[str]] | None
    holds: str
    lossless: str


KINDS = {
    "lrt": Kind(read_lrt, write_lrt, "our folder: safetensors, config.json, tokenizer", "everything"),
    "dcp": Kind(read_dcp, None, "a training checkpoint, sharded over any number of ranks", NOT_WRITTEN),
    "titan": Kind(read_titan, None, "a checkpoint of lrt.titan, written by torchtitan's trainer", NOT_WRITTEN),
    "official": Kind(
        read_official,
        write_official,
        "base folder or checkpoint of the official LRT code, plain models included",
        "models that it can express (layerwise, last block, bfloat16 rotary tables); others are refused",
    ),
    "nanochat": Kind(
        read_any,
        partial(write_official, nanochat=True),
        "base folder or checkpoint of nanochat, or NanoChatForCausalLM of transformers (read only)",
        "plain models with alternating value embeddings and gates from 32 channels; others are refused",
    ),
    "adapter": Kind(
        read_adapter,
        write_adapter,
        "the memory parameters alone; --base names the decoder they belong to",
        "the memory of any recurrent model",
    ),
    "hf": Kind(read_hf, write_hf, "Hugging Face folder for AutoModelForCausalLM (after import lrt)", "everything"),
}


def kind_of(path: Path) -> str:
    """The kind of checkpoint that lies at ``path``.

    Raises:
        ValueError: none that is known.
    """
    if config_file(path).is_file():
        if is_plain(path) and read_json(config_file(path), where=str(path)).get("model_type") == MODEL_TYPE:
            return "nanochat"
        if is_plain(path):
            raise ValueError(
                f"{path}: a Hugging Face model that lrt did not write: "
                "lrt.adapt makes it recurrent, --base takes it as it is"
            )
        config = read_config(path)
        return (
            "adapter" if config.get("adapter_only") else "hf" if (path / "generation_config.json").is_file() else "lrt"
        )
    if any((path / name).exists() for name in ("complete.json", "checkpoints")) or any(path.glob("step_*")):
        return "dcp"
    if is_titan(path):
        return "titan"
    if path.suffix == ".pt" or any(path.glob("model_*.pt")) or any(path.glob("base_checkpoints/*/model_*.pt")):
        return "official"
    known = ", ".join(KINDS)
    raise ValueError(
        f"{path}: no checkpoint of a known kind ({known}): give a folder with config.json, a run, or a nanochat folder"
    )


def read_base(path: Path) -> Checkpoint:
    """The decoder of an adapter: a checkpoint of any kind, or a plain Hugging Face decoder."""
    return read_decoder(path) if is_plain(path) else KINDS[kind_of(path)].read(path)
