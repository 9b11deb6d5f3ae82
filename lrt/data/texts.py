"""Files of text as documents: opened as far as their number of documents, read and tokenized a group at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from lrt.data.documents import CorruptShard, Shard, Text, fingerprint_files
from lrt.data.lines import open_csv, open_json_lines, open_text
from lrt.data.parquet import open_parquet
from lrt.data.tokenizer import Measured, Tokenizer
from lrt.tables import Table

GROUPS_HELD, TEXT_HELD = 4, 1 << 30  # groups of text, and characters of them, kept in memory by a stream; one at least
KINDS = {  # kind -> endings of its files, in the order in which a folder is searched
    ".parquet": (".parquet",),
    ".jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    ".csv": (".csv",),
    ".txt": (".txt",),
}
Found = TypeVar("Found")


def kind_of(path: Path) -> str | None:
    """The kind of a text file by its name; None = another file."""
    return next((kind for kind, endings in KINDS.items() if path.name.endswith(endings)), None)


def open_shard(path: Path, *, column: str, key: str) -> Shard:
    """Look at a file of one of ``KINDS``.

    Args:
        path: of the file.
        column: of parquet and CSV, and key of JSON lines, that holds the text.
        key: recipe key that named the file, for the messages.

    Raises:
        ValueError: the text column is missing or no text.
        CorruptShard: the file cannot be read.
    """
    kind = kind_of(path)
    if kind == ".txt":
        return open_text(path)
    opened = {".parquet": open_parquet, ".jsonl": open_json_lines, ".csv": open_csv}
    assert kind in opened
    return opened[kind](path, column=column, key=key)


class TextDocuments:
    """Texts of some shards, tokenized when they are read."""

    def __init__(self, shards: Sequence[Shard], tokenizer: Tokenizer, *, skipped: int = 0) -> None:
        self._groups = [(shard, group) for shard in shards for group in range(len(shard.sizes))]
        self._tokenizer = tokenizer
        self._held: OrderedDict[int, list[Text]] = OrderedDict()
        self.sizes = np.array([size for shard in shards for size in shard.sizes], dtype=np.int64)
        self.skipped = skipped
        self.fingerprint = fingerprint_files([(shard.path.name, shard.sizes, shard.content) for shard in shards])

    def name(self, group: int) -> str:
        shard, number = self._groups[group]
        return f"{shard.path}[{number}]"

    def texts(self, group: int, documents: Sequence[int]) -> list[Text]:
        """Texts of some documents of a group."""
        if group not in self._held:
            shard, number = self._groups[group]
            self._held[group] = shard.read(number)
            while len(self._held) > 1 and (len(self._held) > GROUPS_HELD or self._characters() > TEXT_HELD):
                self._held.popitem(last=False)
        return [self._held[group][i] for i in documents]

    def _characters(self) -> int:
        return sum(len(text) for texts in self._held.values() for text in texts if isinstance(text, str))

    def measure(self, group: int, documents: Sequence[int]) -> list[Measured | CorruptShard]:
        return self._tokenized(group, documents, self._tokenizer.measure)

    def read(self, group: int, documents: Sequence[int]) -> list[np.ndarray | CorruptShard]:
        return self._tokenized(
            group,
            documents,
            lambda texts: [np.asarray(i, dtype=np.int64) for i in self._tokenizer.encode_documents(texts)],
        )

    def _tokenized(
        self, group: int, documents: Sequence[int], tokenize: Callable[[list[str]], Sequence[Found]]
    ) -> list[Found | CorruptShard]:
        texts = self.texts(group, documents)
        found = iter(tokenize([text for text in texts if isinstance(text, str)]))
        return [next(found) if isinstance(text, str) else text for text in texts]

    def __getstate__(self) -> Table:
        return self.__dict__ | {"_held": OrderedDict()}
