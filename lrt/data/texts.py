"""Files of text, parquet or plain: opened as far as their number of documents, read a group at a time."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lrt.data.documents import corrupt, fingerprint_files
from lrt.data.tokenizer import Measured, Tokenizer

TEXT_GROUP = 16  # documents of a text file that form a group: few, because groups are what is shuffled
GROUPS_HELD = 4  # groups of text kept in memory by a stream


class Shard(NamedTuple):
    """A file of texts, opened as far as its number of documents."""

    path: Path
    sizes: list[int]  # documents of each group
    read: Callable[[int], list[str]]  # texts of a group
    content: str  # tells it from another file of the same name and sizes


class TextDocuments:
    """Texts of some shards, tokenized when they are read."""

    def __init__(self, shards: Sequence[Shard], tokenizer: Tokenizer, *, skipped: int = 0) -> None:
        self._groups = [(shard, group) for shard in shards for group in range(len(shard.sizes))]
        self._tokenizer = tokenizer
        self._held: OrderedDict[int, list[str]] = OrderedDict()
        self.sizes = np.array([size for shard in shards for size in shard.sizes], dtype=np.int64)
        self.skipped = skipped
        self.fingerprint = fingerprint_files([(shard.path.name, shard.sizes, shard.content) for shard in shards])

    def name(self, group: int) -> str:
        shard, number = self._groups[group]
        return f"{shard.path}[{number}]"

    def texts(self, group: int) -> list[str]:
        """All texts of a group."""
        if group not in self._held:
            shard, number = self._groups[group]
            self._held[group] = shard.read(number)
            if len(self._held) > GROUPS_HELD:
                self._held.popitem(last=False)
        return self._held[group]

    def measure(self, group: int, documents: Sequence[int]) -> list[Measured]:
        texts = self.texts(group)
        return self._tokenizer.measure([texts[i] for i in documents])

    def read(self, group: int, documents: Sequence[int]) -> list[np.ndarray]:
        texts = self.texts(group)
        return [np.asarray(ids, dtype=np.int64) for ids in self._tokenizer.encode_documents([texts[i] for i in documents])]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict()}


# ------------------------------------------------------------------ the two kinds of text file


def _read_parquet(path: Path, column: str, group: int) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            texts = file.read_row_group(group, columns=[column], use_threads=False).column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise corrupt(path, error) from None
    return [text or "" for text in texts]


def _parquet_content(path: Path, column: str) -> str:
    """The text column, the bytes of the file, and a hash of its footer (sizes and extreme values of every part of a column)."""
    with open(path, "rb") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)
        return f"{column} {size} {hashlib.sha256(file.read()).hexdigest()}"


def _text_content(documents: Sequence[str]) -> str:
    content = hashlib.sha256()
    for document in documents:
        content.update(f"{document}\n\n".encode())
    return content.hexdigest()


def _read_text(path: Path, group: int) -> list[str]:
    return _split_text(path)[group * TEXT_GROUP : (group + 1) * TEXT_GROUP]


def open_shard(path: Path, *, column: str, key: str) -> Shard:
    """Look at a .parquet or .txt file.

    Raises:
        ValueError: the text column is missing or no text.
        CorruptShard: the file cannot be read.
    """
    if path.suffix == ".txt":
        documents = _split_text(path)
        sizes = [min(TEXT_GROUP, len(documents) - first) for first in range(0, len(documents), TEXT_GROUP)]
        return Shard(path, sizes, functools.partial(_read_text, path), _text_content(documents))
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, metadata, content = file.schema_arrow, file.metadata, _parquet_content(path, column)
    except (pa.ArrowException, OSError) as error:
        raise corrupt(path, error) from None
    kinds = {field.name: field.type for field in schema}
    if column not in kinds:
        raise ValueError(f'data.text_column = "{column}" is not in {path} of {key}: its columns are {", ".join(kinds)}; choose one of them')
    if not (pa.types.is_string(kinds[column]) or pa.types.is_large_string(kinds[column])):
        raise ValueError(
            f'data.text_column = "{column}" of {path} holds {kinds[column]}, not text: choose a text column of {", ".join(kinds)}'
        )
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return Shard(path, sizes, functools.partial(_read_parquet, path, column), content)


def _split_text(path: Path) -> list[str]:
    """Documents of a text file: what blank lines separate."""
    try:
        return _split_text_as_of(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise corrupt(path, error) from None


@functools.lru_cache(maxsize=4)
def _split_text_as_of(path: Path, _: int) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise corrupt(path, error) from None
    lines = (line if line.strip() else "" for line in text.split("\n"))
    return [document.strip("\n") for document in "\n".join(lines).split("\n\n") if document.strip("\n")]
