"""Writing a model as a folder: safetensors, config.json and a model card.

A new folder is written beside its place and renamed, so a broken save leaves nothing half-written;
``renewal`` writes over a model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from lrt.lora import adapter_names, describe_adapter
from lrt.model import LatentRecurrentModel
from lrt.serialization.adapted import decoder_tensors, is_foreign, model_card, refuse_whole, without_ties
from lrt.serialization.description import config_of
from lrt.serialization.fingerprint import fingerprint
from lrt.serialization.permissions import usual_permissions
from lrt.serialization.tensors import in_memory, size_in_bytes, write_folder
from lrt.tables import ReadTable


def save(
    model: LatentRecurrentModel, folder: str | Path, *, adapter_only: bool = False, shard_size: int | str | None = None
) -> Path:
    """Write a model to ``folder``: safetensors, config.json and a model card.

    Args:
        model: the model, on any device.
        folder: must not exist yet, or be empty.
        adapter_only: only the memory of an adapted model, and a PEFT adapter beside it, a few MB;
            ``load`` then needs the decoder with the weights that it has now, and a fingerprint of them is kept. Where
            the decoder was trained too, save the whole model.
        shard_size: bytes of the largest file, or text such as "5GB"; None = one file.

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
    shard_size: int | str | None = None,
) -> None:
    """Write a model's files into a folder that exists; see ``save``.

    Args:
        tensors: gathered elsewhere, under the names of ``model.state_dict()``; None = the model's own.
    """
    if adapter_only and model.original is None:
        raise ValueError("adapter_only = True, but this model was not made by lrt.adapt: save it whole")
    if is_foreign(model) and not adapter_only:
        refuse_whole(model)
    every = model.state_dict() if tensors is None else tensors
    config, chosen = config_of(model), without_ties(model, every)
    adapter = describe_adapter(model, None if model.original is None else model.original[0])
    config |= {"adapter": adapter} if adapter else {}
    if adapter_only:
        config |= {"adapter_only": True, "base_fingerprint": fingerprint(decoder_tensors(model, every).items())}
        chosen = {
            name: every[name]
            for name in (*model.memory_parameters(), *sorted(adapter_names(model) - {*model.memory_parameters()}))
        }
    write_folder(place, in_memory(chosen), shard_size=size_in_bytes(shard_size))
    write_description(place, config)
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.save_pretrained(place)


def write_description(place: Path, config: ReadTable) -> None:
    """config.json and the model card; beside a whole model the file that opens it where lrt was not imported."""
    table = {key: value for key, value in config.items() if key != "auto_map"}
    if not config.get("adapter_only"):
        table["auto_map"] = {
            "AutoConfig": "modeling_lrt.LRTConfig",
            "AutoModelForCausalLM": "modeling_lrt.LRTForCausalLM",
        }
        shutil.copyfile(Path(__file__).parents[1] / "huggingface" / "modeling_lrt.py", place / "modeling_lrt.py")
    (place / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (place / "README.md").write_text(model_card(table), encoding="utf-8")


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
        usual_permissions(place)
        if target.exists():
            target.rmdir()
        place.rename(target)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
