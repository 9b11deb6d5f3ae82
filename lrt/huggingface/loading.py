"""What the many arguments of ``from_pretrained`` mean for a folder of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from lrt import serialization
from lrt.huggingface.config import LRTConfig, dtype_of, refuse_changed
from lrt.model import LatentRecurrentModel
from lrt.serialization.description import read_config
from lrt.tables import ReadTable, Table
from lrt.types import Device

HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Nothing is ever unpickled, no code of the folder is run, and its tensors must fit: whatever these say, it is so.
WITHOUT_MEANING = frozenset(
    {"trust_remote_code", "_from_auto", "_commit_hash", "adapter_kwargs", "code_revision", "low_cpu_mem_usage",
     "weights_only", "strict", "ignore_mismatched_sizes", "use_safetensors"}
)  # fmt: skip
# Of save_pretrained: whoever saves writes whole safetensors alone, and what push_to_hub takes goes there.
UPLOAD = ("repo_id", "private", "token", "commit_message", "revision", "create_pr")
SAVING = frozenset(
    {"is_main_process", "max_shard_size", "safe_serialization", "save_function", "save_peft_format", *UPLOAD}
)
ONE_MODEL = (
    "a folder holds one model with one config.json, so another dtype goes into a folder of its own, "
    'read with subfolder="..."'
)
# settings of calls, which a config may change
CALLS = ("use_cache", "return_dict", "output_hidden_states", "output_attentions")
STRUCTURE = ("model", "adapted", "recurrence", "schedule")
DeviceMap = Device | Mapping[str, Device]
SEVERAL = ("auto", "balanced", "balanced_low_0", "sequential")


def refuse_unknown(more: ReadTable, positional: tuple[object, ...]) -> None:
    """Raises ValueError for an argument that would have no effect; None and False ask for nothing."""
    unknown = [
        name for name, value in more.items() if name not in WITHOUT_MEANING and value is not None and value is not False
    ]
    if more.get("use_safetensors") is False:
        unknown.append("use_safetensors=False")
    if unknown or positional:
        instead = ONE_MODEL if unknown == ["variant"] else "lrt.load, then change the model"
        raise ValueError(
            f"from_pretrained of an lrt model takes no {', '.join(unknown) or 'positional arguments'}: {instead}"
        )


def refuse_unsaved(more: ReadTable, positional: tuple[object, ...]) -> None:
    """Raises ValueError for an argument of ``save_pretrained`` that would have no effect;
    None and False ask for nothing."""
    unknown = [name for name, value in more.items() if name not in SAVING and value is not None and value is not False]
    if more.get("safe_serialization") is False:
        unknown.append("safe_serialization=False")
    if unknown or positional:
        instead = ONE_MODEL if unknown == ["variant"] else "a folder always holds safetensors under our names"
        raise ValueError(
            f"save_pretrained of an lrt model takes no {', '.join(unknown) or 'positional arguments'}: {instead}"
        )


def of_tensors(config: LRTConfig, state: Mapping[str, torch.Tensor]) -> Table:
    """The config.json of a model whose tensors are given."""
    return config.to_dict() | {
        "torch_dtype": str(next(t.dtype for t in state.values() if t.is_floating_point())).removeprefix("torch.")
    }


def local_folder(name: str | Path | None, *, subfolder: str, hub: ReadTable) -> Path:
    """The folder itself, or a snapshot of a repository of the hub; ``subfolder`` may be empty.

    Raises:
        ValueError: there is no name.
    """
    if name is None:
        raise ValueError(
            "from_pretrained reads a folder, or from_pretrained(None, config=config, "
            "state_dict=tensors) builds a model of both"
        )
    folder = Path(str(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        given = {
            key: value for key, value in hub.items() if value is not None and not (key == "token" and value is False)
        }
        folder = Path(snapshot_download(str(name), **given))
    return folder / subfolder


def device_of(
    device_map: DeviceMap, folder: Path | None = None, *, max_memory: Mapping[int | str, int | str] | None = None
) -> Device:
    """The one device that a ``device_map`` names; "auto" and its kin mean the first accelerator,
    where the model fits it.

    Without a ``device_map`` it is the one of a surrounding ``with torch.device(...)``.

    Raises:
        ValueError: several devices, or a model that does not fit.
        RuntimeError: a surrounding ``with torch.device("meta")``, as transformers says it.
    """
    if device_map is None:
        around = torch.get_default_device()
        if around.type == "meta":
            raise RuntimeError(
                "You are using `from_pretrained` with a meta device context manager, "
                "where no weight could be loaded: leave it out, or use from_config, which builds an empty model there"
            )
        return around
    advice = "for several, load the decoder with it and lrt.load(folder, base=decoder)"
    if isinstance(device_map, Mapping):
        places = {str(place): place for place in device_map.values()}
        if len(places) != 1:
            raise ValueError(f"device_map = {device_map!r}: give one device; {advice}")
        return next(iter(places.values()))
    if device_map not in SEVERAL or folder is None:
        return device_map
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return "cpu"
    needed = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = torch.get_device_module(accelerator).mem_get_info(0)[0]
    limit = (max_memory or {}).get(0, free)
    if isinstance(limit, int) and needed > limit:
        raise ValueError(
            f'device_map = "{device_map}": {needed / 1e9:.1f} GB of weights do not fit the {limit / 1e9:.1f} GB of one '
            f"device; {advice}"
        )
    return torch.device(accelerator.type, 0)


def check_config(config: LRTConfig, folder: Path) -> None:
    """Raises ValueError when a config describes another model than the folder holds."""
    stored = read_config(folder)
    for name in STRUCTURE:
        if getattr(config, name, stored.get(name)) != stored.get(name):
            raise ValueError(
                f"config.{name} is not what {folder} holds: load it as it is, then change the model "
                "(model.train_schedule, lrt.adapt)"
            )
    refuse_changed(config, vars(type(config)(**stored)))


def carry_over(config: LRTConfig, onto: LRTConfig) -> None:
    """Settings of calls that a given config has changed."""
    for name in CALLS:
        if getattr(config, name, None) != getattr(onto, name, None):
            setattr(onto, name, getattr(config, name))


def open_pretrained(
    face: Callable[[LatentRecurrentModel], Any],
    name: str | Path | None,
    positional: tuple[object, ...],
    *,
    config: LRTConfig | None,
    more: Table,
) -> Any:
    """What ``LRTForCausalLM.from_pretrained`` returns.

    Args:
        face: gives a model the Hugging Face face.
        name, positional, config, more: the arguments of ``from_pretrained``; what is used leaves ``more``.

    Raises:
        ValueError: as ``from_pretrained``.
    """
    dtype = dtype_of(more.pop("dtype", more.pop("torch_dtype", None)))
    device_map, max_memory, backend, settings = (
        more.pop(key, None) for key in ("device_map", "max_memory", "attn_implementation", "generation_config")
    )
    informed, subfolder = more.pop("output_loading_info", False), more.pop("subfolder", None)
    state = more.pop("state_dict", None) if name is None else None
    hub = {key: more.pop(key, None) for key in HUB}
    refuse_unknown(more, positional)
    if state is not None and config is not None:
        folder, about = None, of_tensors(config, state)
        loaded = serialization.filled(
            about, serialization.in_memory(state), where="state_dict", dtype=dtype, device=device_of(device_map)
        )
    else:
        folder = local_folder(name, subfolder=subfolder or "", hub=hub)
        if config is not None:
            check_config(config, folder)
        loaded = serialization.load(folder, dtype=dtype, device=device_of(device_map, folder, max_memory=max_memory))
    model = face(loaded)
    if config is not None:
        carry_over(config, model.config)
        backend = config._attn_implementation if backend is None else backend  # where the Auto classes put it
    if backend is not None:
        model.set_attn_implementation(backend)
    if settings is not None:
        model.generation_config = settings
    elif folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    fits: Table = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model, fits) if informed else model
