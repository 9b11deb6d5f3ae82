"""Hugging Face folders, opened as data: nothing is run, asked or fetched because a folder says so.

This is the only module that opens a foreign decoder or its tokenizer; a folder may come from anywhere, and so may the
run whose recipe names it. transformers asks on the terminal before it runs a folder's code, fetches attention kernels
that a config names, and follows an adapter to its base model: all three are shut here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from lrt.config.files import read_text
from lrt.config.ranges import MOST_LAYERS
from lrt.serialization.renewal import config_file
from lrt.serialization.tensors import INDEX, WEIGHTS, open_folder
from lrt.tables import ReadTable, Table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
SAFE: Table = {"trust_remote_code": False, "local_files_only": True}
LONGEST_REASON = 1000  # characters of what transformers says
ATTENTIONS = ("eager", "sdpa", "flex_attention")  # part of torch; a config may name no other
INSTALL = 'pip install -e ".[hf]" in a checkout of lrt'


def open_config(folder: str | Path, *, where: str | None = None) -> PreTrainedConfig:
    """The config of a Hugging Face decoder.

    Args:
        folder: holds config.json.
        where: how messages name the folder, such as the recipe key; None = its path.

    Raises:
        ValueError: there is none, it needs code of its own, or it names what would have to be fetched.
    """
    where = where or str(folder)
    table = read_json(config_file(folder), where=where)
    check_table(table, where=where)
    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"{where} is a PEFT adapter: merge it into its decoder (merge_and_unload), save that, "
            "and give the merged folder"
        )
    config = in_one_line(where, table, lambda: transformers().AutoConfig.from_pretrained(folder, **SAFE))
    config.__dict__.pop("auto_map", None)  # so that no class built from this config looks for code
    return config


def open_decoder(folder: str | Path, *, dtype: torch.dtype | str, where: str | None = None) -> PreTrainedModel:
    """A Hugging Face decoder and its weights, from safetensors alone.

    Args:
        folder: holds config.json and model.safetensors, or shards and their index.
        dtype: as ``from_pretrained`` takes it.
        where: how messages name the folder; None = its path.

    Raises:
        ValueError: as ``open_config``; weights that are missing, damaged, quantized or of another format.
    """
    where = where or str(folder)
    config = open_config(folder, where=where)
    if not any((Path(folder) / name).is_file() for name in (WEIGHTS, INDEX)):
        other = sorted(
            p.name
            for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
            for p in Path(folder).glob(pattern)
        )
        found = f" but {', '.join(other[:3])}, which lrt does not open" if other else ""
        mend = "load it with transformers, and its save_pretrained writes safetensors"
        raise ValueError(f"{where} cannot be read as a causal language model: it holds no {WEIGHTS}{found}: {mend}")
    open_folder(folder)
    make = transformers().AutoModelForCausalLM.from_pretrained
    return in_one_line(where, {}, lambda: make(folder, config=config, dtype=dtype, use_safetensors=True, **SAFE))


def decoder_of_shapes(
    folder: str | Path, *, dtype: torch.dtype | None = None, where: str | None = None
) -> PreTrainedModel:
    """The decoder of a folder without its weights, on the current default device.

    Raises:
        ValueError: as ``open_config``.
    """
    config = open_config(folder, where=where)
    more = {} if dtype is None else {"dtype": dtype}
    make = transformers().AutoModelForCausalLM.from_config
    return in_one_line(where or str(folder), {}, lambda: make(config, trust_remote_code=False, **more))


def open_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder.

    Raises:
        ValueError: there is none, or it needs code of its own.
    """
    table = Path(folder) / "tokenizer_config.json"
    content = read_json(table, where=str(folder)) if table.is_file() else {}
    return in_one_line(
        str(folder), content, lambda: transformers().AutoTokenizer.from_pretrained(folder, **SAFE), what="a tokenizer"
    )


def open_saved(folder: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """A folder that lrt wrote, as ``AutoModelForCausalLM`` gives it to its users;
    where transformers is not installed, that is an error.

    Args:
        folder: its config.json was read before, and is one of ours.
        dtype: as ``from_pretrained`` takes it.
    """
    return transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **SAFE)


def is_plain(folder: Path) -> bool:
    """Whether it is a Hugging Face folder that lrt did not write."""
    config = config_file(folder)
    return config.is_file() and '"lrt_format"' not in config.read_text(encoding="utf-8", errors="replace")


def causal_class(name: object) -> type[PreTrainedModel] | None:
    """A class of transformers by its name, such as "LlamaForCausalLM"; None when there is no such causal language
    model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not isinstance(name, str):
        return None
    known = {
        one
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for one in ([names] if isinstance(names, str) else names)
    }
    return getattr(transformers(), name, None) if name in known else None


def config_from_table(table: Table) -> PreTrainedConfig:
    """The config that a config.json describes, of a type that transformers knows.

    Raises:
        ValueError: it knows no such type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(table.get("model_type"))
    if kind not in CONFIG_MAPPING:
        version = transformers().__version__
        raise ValueError(
            f'transformers {version} knows no model_type "{kind[:100]}": install the version that the model was saved '
            "with"
        )
    return CONFIG_MAPPING[kind].from_dict(table)


def check_table(table: ReadTable, *, where: str) -> None:
    """Refuse the entries of a config.json with which transformers would fetch or run something.

    Raises:
        ValueError: the config is quantized, names a kernel of the hub, code for a part of the model,
            or layers without end.
    """
    if table.get("quantization_config") is not None:
        raise ValueError(f"{where} is quantized, and its matrices cannot train: save it dequantized first")
    if table.get("transformers_weights") is not None:
        raise ValueError(
            f"{where}: config.json names its own file of weights (transformers_weights): rename that file to {WEIGHTS}"
        )
    check_attention(table, where=where)
    for path, value in _leaves(table):
        if path[-1].endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"{where}: config.json names {value!r} in {'.'.join(path)}, a kernel to be fetched from the "
                "hub: leave it out"
            )
        if "layer" in path[-1] and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(
                f"{where}: config.json names {value} layers ({'.'.join(path)}), but at most {MOST_LAYERS} are "
                "built: it was changed"
            )
        if "auto_map" in path[1:]:
            raise ValueError(
                f"{where}: config.json names code for a part of the model ({'.'.join(path)}), "
                "and lrt runs no code of a folder"
            )


def check_attention(table: ReadTable, *, where: str) -> None:
    """Refuse a config.json that chooses an attention which transformers would fetch from the hub where it is not
    installed.

    Raises:
        ValueError: it names another one than those of ``ATTENTIONS``.
    """
    for path, value in _leaves(table):
        if value is not None and value not in ATTENTIONS and any(part.endswith("attn_implementation") for part in path):
            raise ValueError(
                f"{where}: config.json names {value!r} in {'.'.join(path)}, "
                "a kernel to be fetched from the hub where it is not installed: "
                f"leave it out ({', '.join(ATTENTIONS)} may stay), and give attn_implementation where you load or call "
                "set_attn_implementation"
            )


def read_json(path: Path, *, where: str) -> Table:
    """A JSON object from a file.

    Raises:
        ValueError: no such file, or not a JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{where} {'holds no ' + path.name if path.parent.is_dir() else 'is no folder'}")
    try:
        table = json.loads(read_text(path))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{where}: {path.name} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {path.name} is not a JSON object")
    return table


def transformers() -> ModuleType:
    """The library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import transformers as library
    except ImportError:
        raise ValueError(f"Hugging Face decoders need transformers: {INSTALL}") from None
    return library


def _leaves(table: ReadTable) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every value of a JSON object with its path; without recursion, because a hostile file nests as deep as it
    likes."""
    waiting: list[tuple[tuple[str, ...], object]] = [((), table)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, (Mapping, list)):
            items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            waiting += [((*path, str(key)), inner) for key, inner in items]
        else:
            yield path, value


def in_one_line(where: str, table: ReadTable, make: Callable[[], T], *, what: str = "a causal language model") -> T:
    """What ``make`` returns; whatever transformers raises becomes one line."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - a foreign config fails in any way
        if table.get("auto_map"):
            raise ValueError(
                f"{where} needs code of its own (auto_map), and lrt runs no code of a folder: "
                "where you trust it, load it with transformers yourself and give the decoder to lrt.adapt"
            ) from None
        if isinstance(error, ValueError) and where in str(error):
            raise  # said already
        reason = " ".join(str(error).split()) or type(error).__name__
        shown = reason if len(reason) < LONGEST_REASON else f"{reason[:LONGEST_REASON]} ..."
        raise ValueError(f"{where} cannot be read as {what}: {shown}") from None
