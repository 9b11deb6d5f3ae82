"""Where documents come from: text and parquet files, the demo, a Hugging Face dataset, tokenized folders.

Every source is a list of groups (a parquet row group, a stretch of a text file); a group is what is read at once.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lrt.config import DataConfig
from lrt.data.tokenizer import Measured, Tokenizer

DEMO = Path(__file__).resolve().parent / "demo"
KINDS = (
    '"demo", a .parquet or .txt file, a folder or glob of them, a folder written by tools/prepare_data.py tokenize, or hf://datasets/NAME'
)
TEXT_GROUP = 16  # documents of a text file that form a group: few, because groups are what is shuffled
GROUPS_HELD = 4  # groups of text kept in memory by a stream


class CorruptShard(ValueError):
    """A file that cannot be read, named in the message."""


class Documents(Protocol):
    """Tokenized documents in groups."""

    sizes: np.ndarray  # (groups,) documents of each group
    skipped: int  # files left out because they could not be opened
    fingerprint: str  # see fingerprint_files

    def name(self, group: int) -> str:
        """Where the group lies: file and row group."""

    def read(self, group: int, documents: Sequence[int]) -> list[np.ndarray]:
        """Token ids of some documents of a group, without separators.

        Raises:
            CorruptShard: the file cannot be read.
        """

    def measure(self, group: int, documents: Sequence[int]) -> list[Measured]:
        """The same, with the bytes that each token stands for.

        Raises:
            CorruptShard: the file cannot be read.
            ValueError: there are no texts, and the tokenizer does not tell their bytes.
        """


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


def fingerprint_files(files: Sequence[tuple[str, Sequence[int], str]]) -> str:
    """sha256 of names, group sizes and contents of files, in the order they are read: the same data, wherever they lie."""
    return hashlib.sha256(repr([(name, list(map(int, sizes)), content) for name, sizes, content in files]).encode()).hexdigest()


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


def corrupt(path: Path, error: object) -> CorruptShard:
    """The error for a file that cannot be read."""
    first_line = (str(error).splitlines() or ["unreadable"])[0].rstrip(". ")
    return CorruptShard(f'{path} cannot be read ({first_line}): replace the file, or set data.on_corrupt = "skip"')


# ------------------------------------------------------------------ from the recipe to documents


def open_documents(data: DataConfig, *, tokenizer: Tokenizer, split: str) -> Documents:
    """The documents of ``data.train`` or ``data.validation``.

    Args:
        data: section ``data`` of the recipe.
        tokenizer: makes token ids of texts; tokenized folders must have been written with the same one.
        split: "train" or "validation".

    Raises:
        ValueError: nothing there, no held-out part, or wrong contents; the message names the recipe key.
    """
    from lrt.data.tokenized import TokenizedDocuments, check_shard, check_tokenizer, read_manifest

    key = "data.train" if split == "train" or data.validation == "auto" else "data.validation"
    files = split_files(data, split=split)
    tokenized = files[0].suffix == ".bin"
    manifest: dict[str, Any] = {}
    open_file: Callable[[Path], Any] = functools.partial(open_shard, column=data.text_column, key=key)
    if tokenized:
        manifest = read_manifest(files[0].parent)
        check_tokenizer(files[0].parent, manifest=manifest, tokenizer=tokenizer, key=key)
        open_file = functools.partial(check_shard, manifest=manifest)
    opened, skipped = [], 0
    for path in files:
        try:
            opened.append(open_file(path))
        except CorruptShard:
            if data.on_corrupt == "stop":
                raise
            skipped += 1
    documents: Documents
    if tokenized:
        documents = TokenizedDocuments(opened, dtype=manifest["dtype"], tokenizer=tokenizer, skipped=skipped)
    else:
        documents = TextDocuments(opened, tokenizer, skipped=skipped)
    if not documents.sizes.sum():
        raise ValueError(f"{key} = {getattr(data, key[5:])!r} is an empty corpus ({len(files)} files, no documents): give files with text")
    return documents


def split_files(data: DataConfig, *, split: str) -> list[Path]:
    """The files of one side of the split; the other side's are not among them.

    Raises:
        ValueError: nothing there, or ``validation = "auto"`` finds nothing to hold out.
    """
    if data.train == "demo" and (split == "train" or data.validation == "auto"):
        return sorted(DEMO.glob(f"*_{split}.txt"))
    if split == "validation" and data.validation != "auto":
        return find_files(data.validation, key="data.validation", demo="validation")
    files = find_files(data.train, key="data.train", demo="train")
    if data.validation == "auto":
        if split == "train":
            return files[:-1] or files
        if len(files) < 2:
            raise ValueError(
                f'data.validation = "auto" holds out the last shard of data.train, but {data.train!r} has only one: '
                f"give data.validation ({KINDS})"
            )
        return files[-1:]
    held_out = {path.resolve() for path in find_files(data.validation, key="data.validation", demo="validation")}
    kept = [path for path in files if path.resolve() not in held_out]
    if not kept:
        raise ValueError(f"data.validation = {data.validation!r} holds every file of data.train: give other files")
    return kept


def find_files(spec: str, *, key: str, demo: str = "train") -> list[Path]:
    """Files that a source names, sorted: all .parquet, or all .txt, or the .bin shards of a tokenized folder.

    Raises:
        ValueError: there are none.
    """
    if spec == "demo":
        return sorted(DEMO.glob(f"*_{demo}.txt"))
    if spec.startswith("hf://"):
        from lrt.data.hub import download

        return find_files(download(spec, key=key), key=key)
    path = Path(spec).expanduser()
    if path.is_dir():
        from lrt.data.tokenized import MANIFEST, UNFINISHED, shard_paths

        if (path / MANIFEST).is_file():
            return shard_paths(path)
        if (path / UNFINISHED).is_file():
            raise ValueError(
                f"{key} = {spec!r}: tokenizing into this folder was not finished; run the same tools/prepare_data.py tokenize command "
                f"again, it goes on where it stopped"
            )
        found = sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.txt"))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    found = [file for file in found if file.is_file()]
    wrong = [file for file in found if file.suffix not in (".parquet", ".txt")]
    if not found or wrong:
        what = f"{wrong[0]} is neither .parquet nor .txt" if wrong else "no such file, or no .parquet or .txt file in it"
        raise ValueError(f"{key} = {spec!r}: {what}; use {KINDS}")
    return found
