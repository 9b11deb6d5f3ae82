"""What every source of documents is: groups of token ids, a fingerprint, and an error that names the file."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from lrt.data.tokenizer import Measured

LARGEST_GROUP = 2 << 30  # bytes of text that are read at once
NAMED = 10  # unreadable files and texts that a process names; the others are counted
Found = TypeVar("Found")


class CorruptShard(ValueError):
    """A file, or a text in it, that cannot be read, named in the message."""


Text = str | CorruptShard  # of a document; what is wrong with it


class Shard(NamedTuple):
    """A file of texts, opened as far as its number of documents."""

    path: Path
    sizes: list[int]  # documents of each group
    read: Callable[[int], list[Text]]  # texts of a group
    content: str  # tells it from another file of the same name and sizes


class Documents(Protocol):
    """Tokenized documents in groups."""

    sizes: np.ndarray  # (groups,) documents of each group
    skipped: int  # files left out because they could not be opened
    fingerprint: str  # see fingerprint_files

    def name(self, group: int) -> str:
        """Where the group lies: file and row group."""

    def read(self, group: int, documents: Sequence[int]) -> Sequence[np.ndarray | CorruptShard]:
        """Token ids of some documents of a group, without separators; what is wrong with those that are no text.

        Raises:
            CorruptShard: the file cannot be read.
        """

    def measure(self, group: int, documents: Sequence[int]) -> Sequence[Measured | CorruptShard]:
        """The same, with the bytes that each token stands for.

        Raises:
            CorruptShard: the file cannot be read.
            ValueError: there are no texts, and the tokenizer does not tell their bytes.
        """


def corrupt(path: Path, error: object) -> CorruptShard:
    """The error for a file that cannot be read."""
    first_line = (str(error).splitlines() or ["unreadable"])[0].rstrip(". ")
    return CorruptShard(f'{path} cannot be read ({first_line}): replace the file, or set data.on_corrupt = "skip"')


class LeftOut:
    """Names on stderr what is left out, each file or text once, up to ``NAMED`` of them."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def name(self, error: CorruptShard) -> None:
        """Name one."""
        text = str(error)
        if text in self._named or len(self._named) > NAMED:
            return
        self._named.add(text)
        shown = text.partition(": replace the file, or set data.on_corrupt")[0]
        more = "left out: more like these, which are counted but not named"
        print(f"left out: {shown}" if len(self._named) <= NAMED else more, file=sys.stderr, flush=True)


class Reader(Generic[Found]):
    """Reads documents; where ``on_corrupt`` is "skip", those that cannot be read are None, and named.

    Args:
        read: a method of ``Documents``, from a group and some of its documents.
        on_corrupt: "stop" or "skip".
    """

    def __init__(
        self, read: Callable[[int, Sequence[int]], Sequence[Found | CorruptShard]], *, on_corrupt: str
    ) -> None:
        self._read, self._stop, self._left_out = read, on_corrupt == "stop", LeftOut()

    def __call__(self, group: int, documents: Sequence[int]) -> list[Found | None]:
        """What ``read`` finds of some documents of a group.

        Raises:
            CorruptShard: one of them cannot be read, and is not to be left out.
        """
        found: Sequence[Found | CorruptShard]
        try:
            found = self._read(group, documents)
        except CorruptShard as error:
            found = [error] * len(documents)
        wrong = [one for one in found if isinstance(one, CorruptShard)]
        if wrong and self._stop:
            raise wrong[0]
        for one in wrong:
            self._left_out.name(one)
        return [None if isinstance(one, CorruptShard) else one for one in found]


def fingerprint_files(files: Sequence[tuple[str, Sequence[int], str]]) -> str:
    """sha256 of names, group sizes and contents of files, in the order they are read:
    the same data, wherever they lie."""
    return hashlib.sha256(
        repr([(name, list(map(int, sizes)), content) for name, sizes, content in files]).encode()
    ).hexdigest()
