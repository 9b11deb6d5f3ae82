"""Tensors in safetensors files, whole or in shards, read and written one shard at a time.

A folder holds ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on beside
``model.safetensors.index.json`` (the names that Hugging Face libraries expect).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrt.config.files import read_text
from lrt.types import Device

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class LazyTensor(NamedTuple):
    """A tensor known by shape and dtype until it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def own(self, *, device: Device = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in memory of its own, aligned as torch aligns every tensor.

        What ``read`` gives may begin at any address of a file's bytes, where kernels may sum in another order:
        only a copy gives the same bits as the tensor that was saved.

        Args:
            device: None = CPU.
            dtype: None = as stored.
        """
        return self.read().to(device=device, dtype=dtype, copy=True)


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors that are already loaded, or mapped from a file."""
    return {
        name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t)  # type: ignore[misc]
        for name, t in tensors.items()
    }


def open_folder(folder: str | Path) -> dict[str, LazyTensor]:
    """The tensors of a folder, none of them read yet.

    Raises:
        ValueError: a file is missing, truncated or not safetensors, or the shards are not what their index says.
    """
    index = Path(folder) / INDEX
    if not index.is_file():
        return open_file(Path(folder) / WEIGHTS)
    try:
        files = {str(name): str(file) for name, file in json.loads(read_text(index))["weight_map"].items()}
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of safetensors shards: {error}") from None
    tensors: dict[str, LazyTensor] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r}: shards lie beside their index, so this folder was changed")
        tensors |= open_file(Path(folder) / file)
    if tensors.keys() != files.keys():
        different = sorted(tensors.keys() ^ files.keys())[:4]
        raise ValueError(f"{index} and its shards hold different tensors ({different}): the folder is not whole")
    return tensors


def open_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file, none of them read yet.

    Raises:
        ValueError: missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder is not whole")

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                entry = file.get_slice(name)
                code = entry.get_dtype()
                if code not in DTYPES:
                    raise ValueError(
                        f"{path}: tensor {name} has dtype {code}, which lrt does not read: it reads {', '.join(DTYPES)}"
                    )
                tensors[name] = LazyTensor(tuple(entry.get_shape()), DTYPES[code], functools.partial(read, name))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    return tensors


def size_in_bytes(size: int | str | None) -> int | None:
    """Bytes from a number, or from text such as "10KB", "1.5 GB" or "2GiB"; None stays None.

    Raises:
        ValueError: text that is no size, or a size below 1 byte.
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), flags=re.IGNORECASE)
    found = (
        0
        if match is None
        else int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    )
    if found < 1:
        raise ValueError(f'shard_size = {size!r}: give bytes of the largest file, such as 5000000000, "5GB" or "5GiB"')
    return found


def check_shapes(where: str, found: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not exactly those that the layout asks for.

    Raises:
        ValueError: tensors are missing, unexpected, or have another shape.
    """
    problems = [f"{n} is missing (expected {expected[n]})" for n in sorted(expected.keys() - found.keys())]
    problems += [f"{n} is unexpected" for n in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    problems += [
        f"{n} has shape {found[n].shape}, expected {expected[n]}" for n in both if found[n].shape != expected[n]
    ]
    if problems:
        more = f", and {len(problems) - 6} more" if len(problems) > 6 else ""
        shown = "; ".join(problems[:6]) + more
        raise ValueError(
            f"{where}: {len(problems)} tensors do not fit its config: {shown}. It is not whole, or was changed"
        )


def write_folder(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    shard_size: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write tensors into a folder that exists, reading each only when its shard is written.

    Args:
        folder: where the files go.
        tensors: in the order in which they are written.
        shard_size: bytes of the largest file; None = one file. A single larger tensor gets a file of its own.
        progress: called with the bytes written since the last call.

    Returns:
        The files that were written.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shard_size is not None and shards[-1] and filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    files = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, names in zip(files, shards):
        save_file(
            {name: tensors[name].read().detach().contiguous().cpu() for name in names},
            folder / file,
            metadata={"format": "pt"},
        )
        progress(sum(tensors[name].nbytes for name in names))
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        content = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [folder / file for file in files]
