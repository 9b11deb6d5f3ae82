"""Checkpoints of ``lrt.titan``: what torchtitan's trainer wrote, read as data; torchtitan itself is not needed.

torchtitan writes PyTorch's distributed checkpoints: tensors in ``*.distcp`` files and a pickled table of contents,
``.metadata``. Of the table only the classes that describe tensors are accepted, and a tensor is read with
``weights_only=True``. Which model it is stands in ``lrt_titan.json`` in the job's dump folder.
"""

from __future__ import annotations

import importlib
import io
import json
import pickle
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lrt.adaptation import adapt
from lrt.config import RecurrenceConfig
from lrt.conversion.checkpoints import TOKENIZER_HELP, Checkpoint, expected_shapes, model_reading, tokenizer_files
from lrt.serialization.decoders import causal_class, config_from_table
from lrt.serialization.description import config_of, schedule_of
from lrt.serialization.tensors import LazyTensor, check_shapes
from lrt.tables import ReadTable, Table

DESCRIPTION, CONTENTS = "lrt_titan.json", ".metadata"
FORMAT = 1
_STEP = re.compile(r"step-(\d+)")

# ------------------------------------------------------------------ finding


def steps_in(path: Path) -> dict[int, Path]:
    """Checkpoints of torchtitan by step: a checkpoint itself, those of its folder, or those of a job's dump folder."""
    found = (
        [path]
        if (path / CONTENTS).is_file()
        else [contents.parent for level in ("*", "*/*") for contents in path.glob(f"{level}/{CONTENTS}")]
    )
    numbered = ((_STEP.fullmatch(folder.name), folder) for folder in found)
    return {int(match[1]): folder for match, folder in numbered if match}


def is_titan(path: Path) -> bool:
    """Whether a path is, or holds, a checkpoint of torchtitan."""
    return path.is_dir() and bool(steps_in(path))


def description_of(path: Path) -> Table:
    """What ``lrt.titan`` wrote about the model whose checkpoint lies at ``path``.

    Raises:
        ValueError: nothing does, or it is of a newer format.
    """
    place = next(
        (folder / DESCRIPTION for folder in (path, *path.absolute().parents[:2]) if (folder / DESCRIPTION).is_file()),
        None,
    )
    if place is None:
        raise ValueError(
            f"{path} is a checkpoint of torchtitan, but no {DESCRIPTION} lies there or up to two folders above: "
            "lrt.titan writes it into job.dump_folder; copy it beside the checkpoint. "
            "Checkpoints of torchtitan's own models are read by torchtitan alone"
        )
    try:
        about = json.loads(place.read_text(encoding="utf-8"))
        known = about["format"] == FORMAT and isinstance(about["config"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: not a description that lrt.titan wrote: {error!r}") from None
    if not known:
        raise ValueError(f"{place}: format {about['format']!r}, but this version of lrt reads {FORMAT}: update lrt")
    return about  # type: ignore[no-any-return]


# ------------------------------------------------------------------ reading

_PARTS = (
    "backbone",
    "blocks",
    "memory_projection",
    "injection",
)  # of a model; the rest is of the optimizer and the job


def read_titan(path: Path, *, step: int | None = None) -> Checkpoint:
    """A checkpoint of ``lrt.titan``, written by any number of ranks; its weights alone.

    Args:
        path: the job's dump folder, its checkpoint folder, or one checkpoint.
        step: which one; None = the newest.

    Raises:
        ValueError: there is none, it is not whole, or it holds another model than its description says.
    """
    steps = steps_in(path)
    if not steps or step is not None and step not in steps:
        known = f"; it has {', '.join(map(str, sorted(steps)))}" if steps else ""
        raise ValueError(f"{path} holds no checkpoint of torchtitan{'' if step is None else f' of step {step}'}{known}")
    number = max(steps) if step is None else step
    folder, about = steps[number], description_of(steps[number])
    stored = {name: tensor for name, tensor in sharded(folder).items() if name.split(".")[0] in _PARTS}
    config = about["config"]
    if "decoder" in about:
        config, stored = _as_hugging_face(about, stored, where=folder)
    shapes = expected_shapes(config)
    found = {name: tensor for name, tensor in stored.items() if name in shapes}
    check_shapes(str(folder), found, shapes)
    files, notes = tokenizer_files(
        about["tokenizer"],
        note=f"model.hf_assets_path = {about['tokenizer']!r} of the job was not found from here; {TOKENIZER_HELP}",
    )
    tensors = {name: found[name] for name in shapes}
    return Checkpoint(
        "titan",
        folder,
        config,
        tensors,
        model_reading(config, tensors),
        files,
        number,
        {"model": about["name"], "flavor": about["flavor"]},
        notes,
    )


def sharded(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a distributed checkpoint, none of them read yet; one in several parts is put together when read.

    Raises:
        ValueError: the table of contents is none, or names something that is no description of tensors.
    """
    table = _contents(folder / CONTENTS)

    def part(index: MetadataIndex) -> Tensor:
        place = table.storage_data[index]
        file = folder / place.relative_path
        if Path(place.relative_path).name != place.relative_path or not file.is_file():
            raise ValueError(f"{folder}: {place.relative_path} is missing: the checkpoint is not whole")
        with file.open("rb") as stream:
            stream.seek(place.offset)
            content = stream.read(place.length)
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - a damaged file fails in any way
            raise ValueError(f"{file}: damaged at byte {place.offset}: {type(error).__name__}") from None

    def whole(name: str, entry: TensorStorageMetadata) -> Tensor:
        if len(entry.chunks) == 1:
            return part(MetadataIndex(name, entry.chunks[0].offsets))
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            tensor[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes))] = part(
                MetadataIndex(name, chunk.offsets)
            )
        return tensor

    entries = {
        name: entry for name, entry in table.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    return {name: LazyTensor(tuple(e.size), e.properties.dtype, partial(whole, name, e)) for name, e in entries.items()}


_METADATA = "torch.distributed.checkpoint.metadata"
_ACCEPTED = {
    (_METADATA, name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip


class _Contents(pickle.Unpickler):
    """Unpickles a table of contents, and nothing that could do anything."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "pathlib":
            return PurePosixPath  # where it was written, which is not read
        if (module, name) in _ACCEPTED or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _contents(file: Path) -> Metadata:
    try:
        with file.open("rb") as stream:
            return _Contents(stream).load()
    except Exception as error:  # noqa: BLE001 - a damaged or foreign pickle fails in any way
        raise ValueError(f"{file}: refused, not a table of contents of tensors alone ({error})") from None


# ------------------------------------------------------------------ torchtitan's Llama 3 as Hugging Face's

_LAYER = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_ROTATED_KEYS = re.compile(r"(memory_projection|blocks\.\d+\.projection)\.key\.weight|.*\.attention\.wk\.weight")


def _as_hugging_face(
    about: ReadTable, stored: Mapping[str, LazyTensor], *, where: Path
) -> tuple[Table, dict[str, LazyTensor]]:
    """config.json and tensors of the same model around transformers' LlamaForCausalLM.

    torchtitan rotates neighbouring channels of a head, transformers its halves: the rows of what makes queries and keys
    change places, those of the memory's key projection too.
    """
    args = about["decoder"]
    heads, kv_heads = args["n_heads"], args["n_kv_heads"] or args["n_heads"]
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(".attention.wq.weight"):
            tensor = _halves(tensor, heads)
        elif _ROTATED_KEYS.fullmatch(name):
            tensor = _halves(tensor, kv_heads)
        begin, dot, rest = name.partition(".block.layer.")
        tensors[f"{begin}{dot}{_LAYER[rest.removesuffix('.weight')]}.weight" if dot else name] = tensor
    first = stored.get("blocks.0.block.layer.feed_forward.w1.weight")
    if first is None:
        raise ValueError(f"{where} holds another model than the {about['name']} of its description")
    scaling = args["rope_scaling_args"]
    table = {
        "model_type": "llama",
        "hidden_size": args["dim"],
        "intermediate_size": first.shape[0],
        "num_hidden_layers": args["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": args["vocab_size"],
        "rms_norm_eps": args["norm_eps"],
        "max_position_embeddings": max(
            args["max_seq_len"], int(scaling["scaling_factor"] * scaling["original_max_position_embeddings"])
        ),
        "rope_theta": args["rope_theta"],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling["scaling_factor"],
            **{
                key: scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            },
        },
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = about["config"]
    llama = causal_class("LlamaForCausalLM")
    assert llama is not None
    with torch.device("meta"):
        decoder = llama(config_from_table(table))
        adapted = adapt(decoder, RecurrenceConfig(**config["recurrence"]), train_schedule=schedule_of(config))
        return {**config_of(adapted), "torch_dtype": "float32"}, tensors


def _halves(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Rows of a projection (heads K, D) in the order of a rotation by halves."""

    def read() -> Tensor:
        rows = tensor.read()
        return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)

    return tensor._replace(read=read)
