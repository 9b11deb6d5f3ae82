"""Folders of token ids, written once by ``tools/prepare_data.py tokenize`` and then memory-mapped.

    manifest.json      tokenizer fingerprint, dtype, and for each shard its counts and a checksum per group
    shard_00000.bin    ids of all documents, one after the other, little-endian uint16 or uint32, no separators
    shard_00000.idx    where each document begins, int64, one more than there are documents
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .sources import CorruptShard, fingerprint_files
from .tokenizer import Tokenizer

MANIFEST = "manifest.json"
VERSION = 1
GROUP = 1024  # documents that share a checksum
_KEYS = ("version", "tokenizer", "vocab_size", "dtype", "shards")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a tokenized folder.

    Raises:
        ValueError: it is not one of ours.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        assert all(key in manifest for key in _KEYS) and manifest["version"] == VERSION
    except (OSError, ValueError, AssertionError, TypeError):
        raise ValueError(
            f"{folder / MANIFEST} is not a manifest of version {VERSION}: write the folder again with tools/prepare_data.py tokenize"
        ) from None
    return manifest


def shard_paths(folder: Path) -> list[Path]:
    """The token files that the manifest lists, in order."""
    return [folder / f"{shard['name']}.bin" for shard in read_manifest(folder)["shards"]]


def write_shard(folder: Path, name: str, *, documents: Sequence[np.ndarray], dtype: str) -> dict[str, Any]:
    """Write one shard; a shard that exists under its name is whole.

    Args:
        folder: where to.
        name: file name without ending.
        documents: token ids of each document, without separators.
        dtype: "uint16" or "uint32".

    Returns:
        The shard's entry of the manifest.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in documents], dtype=np.int64)]).astype("<i8")
    tokens = np.concatenate([np.empty(0, dtype=kind), *documents]).astype(kind)
    for ending, content in ((".idx", offsets), (".bin", tokens)):
        unfinished = folder / f"{name}{ending}.tmp"
        content.tofile(unfinished)
        unfinished.rename(folder / f"{name}{ending}")
    sums = [_checksum(tokens, offsets, first) for first in range(0, len(documents), GROUP)]
    return {"name": name, "documents": len(documents), "tokens": int(offsets[-1]), "checksums": sums}


def _checksum(tokens: np.ndarray, offsets: np.ndarray, first: int) -> int:
    """crc32 of a group's offsets and tokens."""
    borders = offsets[first : first + GROUP + 1]
    return zlib.crc32(tokens[borders[0] : borders[-1]].tobytes(), zlib.crc32(borders.tobytes()))


class TokenizedDocuments:
    """Memory-mapped documents; a group's checksum is verified when it is first read."""

    skipped = 0

    def __init__(self, files: Sequence[Path], *, manifest: dict[str, Any], tokenizer: Tokenizer, key: str) -> None:
        if manifest["tokenizer"] != tokenizer.fingerprint:
            raise ValueError(
                f"{key} = {str(files[0].parent)!r} was tokenized with another tokenizer (hash {manifest['tokenizer'][:12]}, "
                f"data.tokenizer has {tokenizer.fingerprint[:12]}): set data.tokenizer to the one used, or tokenize again"
            )
        entries = {shard["name"]: shard for shard in manifest["shards"]}
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shards = [(path, entries[path.stem]) for path in files]
        for path, entry in self._shards:
            for file, size in ((path, entry["tokens"] * self._dtype.itemsize), (path.with_suffix(".idx"), 8 * (entry["documents"] + 1))):
                found = file.stat().st_size if file.is_file() else 0
                if found != size:
                    raise CorruptShard(f"{file} has {found} bytes, the manifest says {size}: copy or tokenize it again")
        per_shard = [[min(GROUP, e["documents"] - first) for first in range(0, e["documents"], GROUP)] for _, e in self._shards]
        self._groups = [(number, group) for number, sizes in enumerate(per_shard) for group in range(len(sizes))]
        self.sizes = np.array([size for sizes in per_shard for size in sizes], dtype=np.int64)
        self.fingerprint = fingerprint_files([(path.name, sizes) for (path, _), sizes in zip(self._shards, per_shard)])
        if not self.sizes.sum():
            raise ValueError(f"{key} = {str(files[0].parent)!r} is an empty corpus (no documents): tokenize files with text")
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._verified: set[int] = set()

    def name(self, group: int) -> str:
        number, part = self._groups[group]
        return f"{self._shards[number][0]}[{part}]"

    def read(self, group: int, documents: Sequence[int]) -> list[np.ndarray]:
        number, part = self._groups[group]
        path, entry = self._shards[number]
        if number not in self._maps:
            self._maps[number] = (_map(path, self._dtype), _map(path.with_suffix(".idx"), np.dtype("<i8")))
        tokens, offsets = self._maps[number]
        first = part * GROUP
        if group not in self._verified:
            if _checksum(tokens, offsets, first) != entry["checksums"][part]:
                raise CorruptShard(
                    f"{path} does not have the checksum of its manifest in documents {first}..: copy or tokenize it again, "
                    f'or set data.on_corrupt = "skip"'
                )
            self._verified.add(group)
        return [tokens[offsets[first + i] : offsets[first + i + 1]] for i in documents]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
