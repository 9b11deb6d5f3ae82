"""Folders of token ids, written once by ``tools/prepare_data.py tokenize`` and then memory-mapped.

manifest.json      tokenizer fingerprint, dtype, and for each shard its counts and a checksum per group
shard_00000.bin    ids of all documents, one after the other, little-endian uint16 or uint32, no separators
shard_00000.idx    where each document begins, int64, one more than there are documents

Until the manifest is written, unfinished.json says what the folder is being filled with.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lrt.data.documents import CorruptShard, fingerprint_files
from lrt.data.tokenizer import Measured, Tokenizer
from lrt.tables import Table

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
VERSION = 1
GROUP = 1024  # documents that share a checksum
_KEYS = ("version", "tokenizer", "vocab_size", "dtype", "shards")


def read_manifest(folder: Path) -> Table:
    """The manifest of a tokenized folder.

    Raises:
        ValueError: it is not one of ours.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        right = all(key in manifest for key in _KEYS) and manifest["version"] == VERSION and _is_ours(manifest)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        right = False
    if not right:
        raise ValueError(
            f"{folder / MANIFEST} is not a manifest of version {VERSION}: "
            "write the folder again with tools/prepare_data.py tokenize"
        )
    return manifest


def _is_ours(manifest: Table) -> bool:
    """Whether every entry has the kind that ``write_shard`` writes."""
    counts = ("documents", "tokens")
    return (
        manifest["dtype"] in ("uint16", "uint32")
        and isinstance(manifest["shards"], list)
        and bool(manifest["shards"])
        and isinstance(manifest["tokenizer"], str)
        and all(type(shard[key]) is int and shard[key] >= 0 for shard in manifest["shards"] for key in counts)
        and all(len(shard["checksums"]) == -(-shard["documents"] // GROUP) for shard in manifest["shards"])
        and all(Path(shard["name"]).name == shard["name"] for shard in manifest["shards"])
    )


def shard_paths(folder: Path) -> list[Path]:
    """The token files that the manifest lists, in order."""
    return [folder / f"{shard['name']}.bin" for shard in read_manifest(folder)["shards"]]


def write_shard(folder: Path, name: str, *, documents: Iterable[np.ndarray], dtype: str) -> Table:
    """Write one shard, a group at a time; a shard that exists under its name is whole.

    Args:
        folder: where to.
        name: file name without ending.
        documents: token ids of each document, without separators.
        dtype: "uint16" or "uint32".

    Returns:
        The shard's entry of the manifest.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    offsets, sums = [np.zeros(1, dtype="<i8")], []
    rest = iter(documents)
    with open(folder / f"{name}.bin.tmp", "wb") as file:
        while group := list(itertools.islice(rest, GROUP)):
            tokens = np.concatenate(group).astype(kind)
            borders = offsets[-1][-1] + np.cumsum([0, *map(len, group)], dtype="<i8")
            sums.append(_checksum(tokens, borders))
            offsets.append(borders[1:])
            tokens.tofile(file)
    borders = np.concatenate(offsets)
    borders.tofile(folder / f"{name}.idx.tmp")
    for ending in (".idx", ".bin"):
        (folder / f"{name}{ending}.tmp").rename(folder / f"{name}{ending}")
    return {"name": name, "documents": len(borders) - 1, "tokens": int(borders[-1]), "checksums": sums}


def _checksum(tokens: np.ndarray, borders: np.ndarray) -> int:
    """crc32 of a group's borders and tokens."""
    return zlib.crc32(np.ascontiguousarray(tokens).data, zlib.crc32(np.ascontiguousarray(borders).data))


def check_shard(path: Path, *, manifest: Table) -> tuple[Path, Table]:
    """A token file and its entry of the manifest.

    Raises:
        CorruptShard: it does not have the size that the manifest says.
    """
    entry = next(shard for shard in manifest["shards"] if shard["name"] == path.stem)
    width = np.dtype(manifest["dtype"]).itemsize
    for file, size in ((path, entry["tokens"] * width), (path.with_suffix(".idx"), 8 * (entry["documents"] + 1))):
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise CorruptShard(
                f"{file} has {found} bytes, the manifest says {size}: copy or tokenize it again, "
                'or set data.on_corrupt = "skip"'
            )
    return path, entry


def check_tokenizer(folder: Path, *, manifest: Table, tokenizer: Tokenizer, key: str) -> None:
    """Refuse ids of another tokenizer.

    Raises:
        ValueError: the manifest names another hash than the tokenizer's.
    """
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(
            f"{key} = {str(folder)!r} was tokenized with another tokenizer (hash {manifest['tokenizer'][:12]}, "
            f"data.tokenizer has {tokenizer.fingerprint[:12]}): set data.tokenizer to the one used, or tokenize again"
        )


class TokenizedDocuments:
    """Memory-mapped documents; a group's checksum is verified when it is first read."""

    def __init__(
        self, shards: Sequence[tuple[Path, Table]], *, dtype: str, tokenizer: Tokenizer, skipped: int = 0
    ) -> None:
        self._shards, self._tokenizer, self.skipped = shards, tokenizer, skipped
        self._dtype = np.dtype(dtype).newbyteorder("<")
        per_shard = [
            [min(GROUP, e["documents"] - first) for first in range(0, e["documents"], GROUP)] for _, e in self._shards
        ]
        self._groups = [(number, group) for number, sizes in enumerate(per_shard) for group in range(len(sizes))]
        self.sizes = np.array([size for sizes in per_shard for size in sizes], dtype=np.int64)
        self.fingerprint = fingerprint_files(
            [
                (path.name, sizes, f"{entry['tokens']} {entry['checksums']}")
                for (path, entry), sizes in zip(self._shards, per_shard)
            ]
        )
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
            borders = offsets[first : first + GROUP + 1]
            if _checksum(tokens[borders[0] : borders[-1]], borders) != entry["checksums"][part]:
                raise CorruptShard(
                    f"{path} does not have the checksum of its manifest in documents {first}..: "
                    'copy or tokenize it again, or set data.on_corrupt = "skip"'
                )
            self._verified.add(group)
        return [tokens[offsets[first + i] : offsets[first + i + 1]] for i in documents]

    def measure(self, group: int, documents: Sequence[int]) -> list[Measured]:
        return [Measured(ids.astype(np.int64), self._table[ids]) for ids in self.read(group, documents)]

    @cached_property
    def _table(self) -> np.ndarray:
        return self._tokenizer.token_bytes()

    def __getstate__(self) -> Table:
        return self.__dict__ | {"_maps": {}}


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
