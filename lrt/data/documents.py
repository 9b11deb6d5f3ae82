"""What every source of documents is: groups of token ids, a fingerprint, and an error that names the file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lrt.data.tokenizer import Measured


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


def corrupt(path: Path, error: object) -> CorruptShard:
    """The error for a file that cannot be read."""
    first_line = (str(error).splitlines() or ["unreadable"])[0].rstrip(". ")
    return CorruptShard(f'{path} cannot be read ({first_line}): replace the file, or set data.on_corrupt = "skip"')


def fingerprint_files(files: Sequence[tuple[str, Sequence[int], str]]) -> str:
    """sha256 of names, group sizes and contents of files, in the order they are read: the same data, wherever they lie."""
    return hashlib.sha256(repr([(name, list(map(int, sizes)), content) for name, sizes, content in files]).encode()).hexdigest()
