"""Text files: plain text, JSON lines (also compressed) and CSV, document by document."""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from lrt.config.files import not_utf8, read_text
from lrt.data.documents import LARGEST_GROUP, CorruptShard, Shard, Text, corrupt

TEXT_GROUP = 16  # documents of a text file that form a group: few, because groups are what is shuffled
LINES_GROUP, BYTES_GROUP = 256, 1 << 23  # a group of JSON lines ends with one of them

# ------------------------------------------------------------------ plain text


def open_text(path: Path) -> Shard:
    """Split a .txt file into its documents.

    Raises:
        CorruptShard: the file cannot be read.
    """
    documents = _split_text(path)
    sizes = [min(TEXT_GROUP, len(documents) - first) for first in range(0, len(documents), TEXT_GROUP)]
    return Shard(path, sizes, functools.partial(_read_text, path), _text_content(documents))


def _text_content(documents: Sequence[str]) -> str:
    content = hashlib.sha256()
    for document in documents:
        content.update(f"{document}\n\n".encode())
    return content.hexdigest()


def _read_text(path: Path, group: int) -> list[Text]:
    return list(_split_text(path)[group * TEXT_GROUP : (group + 1) * TEXT_GROUP])


def _split_text(path: Path) -> list[str]:
    """Documents of a text file: what blank lines separate."""
    try:
        return _split_text_as_of(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise corrupt(path, error) from None


@functools.lru_cache(maxsize=4)
def _split_text_as_of(path: Path, _: int) -> list[str]:
    try:
        text = read_text(path)
    except ValueError as error:
        raise corrupt(path, str(error).removeprefix(f"{path} ")) from None
    lines = (line if line.strip() else "" for line in text.split("\n"))
    return [document.strip("\n") for document in "\n".join(lines).split("\n\n") if document.strip("\n")]


# ------------------------------------------------------------------ JSON lines


def open_json_lines(path: Path, *, column: str, key: str) -> Shard:
    """Read through a .jsonl file, plain or compressed, once: how many lines it has and where its groups begin.

    A compressed file is one group, because it can only be read from its beginning.

    Raises:
        ValueError: the first line has no such column, or no text in it.
        CorruptShard: the file cannot be read.
    """
    packed = path.suffix != ".jsonl"
    content = hashlib.sha256()
    begins, sizes, place = [0], [0], 0
    first = b""
    with _reading(path), _unpacked(path) as file:
        for number, line in enumerate(_lines(file, path)):
            if not number:
                first = line.removeprefix(b"\xef\xbb\xbf")
            content.update(line)
            if not packed and (sizes[-1] == LINES_GROUP or place - begins[-1] >= BYTES_GROUP):
                begins.append(place)
                sizes.append(0)
            sizes[-1] += 1
            place += len(line)
            if packed and place > LARGEST_GROUP:
                raise corrupt(path, f"it unpacks to more than {LARGEST_GROUP / 2**30:g} GiB; split it, or unpack it")
    if first:
        _check_first(first, column, path=path, key=key)
    read = functools.partial(_read_json_lines, path, column, [*begins, place], sizes)
    return Shard(path, sizes if first else [], read, f"{column} {content.hexdigest()}")


def _check_first(line: bytes, column: str, *, path: Path, key: str) -> None:
    """Tell a wrong column from a damaged line: the first line shows the layout."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise corrupt(path, not_utf8(line))
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return  # left to the reading of the line
    if not isinstance(found, dict):
        raise ValueError(
            f'{path} of {key} holds {_kind(found)} a line, not an object: write lines such as {{"{column}": "..."}}'
        )
    texts = [repr(name) for name, value in found.items() if isinstance(value, str)]
    choose = f"choose one of {', '.join(texts)}" if texts else "no key of its first line holds text: give another file"
    where = f'data.text_column = "{column}"'
    if column not in found:
        raise ValueError(
            f"{where} is not in {path} of {key}: the keys of its first line are {', '.join(map(repr, found))}; {choose}"
        )
    if not isinstance(found[column], (str, type(None))):
        raise ValueError(f"{where} of {path} holds {_kind(found[column])}, not text: {choose}")


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
    }
    return names.get(type(value), "nothing")


def _read_json_lines(path: Path, column: str, borders: Sequence[int], sizes: Sequence[int], group: int) -> list[Text]:
    with _reading(path), _unpacked(path) as file:
        if group:  # a compressed file has one group, and cannot seek
            file.seek(borders[group])
        raw = file.read(borders[group + 1] - borders[group])
    lines = raw.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [
        _text_of(line, column, path=path, number=number)
        for number, line in enumerate(lines, start=1 + sum(sizes[:group]))
    ]


def _text_of(line: bytes, column: str, *, path: Path, number: int) -> Text:
    """The text of a line; none in an empty line and in one that lacks it."""
    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    if not line.strip():
        return ""
    try:
        found = json.loads(line.decode("utf-8"))
        text = found.get(column) if isinstance(found, dict) else found
        if text is None and isinstance(found, dict):
            return ""
        if not isinstance(found, dict) or not isinstance(text, str):
            raise ValueError(
                f"{column} is {_kind(text)}, not text" if isinstance(found, dict) else f"{_kind(found)}, not an object"
            )
        text.encode()  # an escape such as \ud800 makes half a character
    except UnicodeDecodeError as error:
        return corrupt(
            path, f"line {number} is not UTF-8: byte 0x{line[error.start]:02x} at {error.start}, perhaps latin-1"
        )
    except (ValueError, RecursionError) as error:
        return corrupt(path, f"line {number}: {error}")
    return str(text)


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    while line := file.readline(LARGEST_GROUP):
        if len(line) == LARGEST_GROUP:
            raise corrupt(path, f"a line is longer than {LARGEST_GROUP / 2**30:g} GiB")
        yield line


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Failures of the file, of its compression and of CSV as one kind of error."""
    import pyarrow as pa

    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error) as error:
        raise corrupt(path, error) from None


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            with gzip.open(raw) as file:
                yield file  # type: ignore[misc]
        elif path.suffix == ".zst":
            import pyarrow as pa

            stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
            yield io.BufferedReader(stream)
        else:
            yield raw


# ------------------------------------------------------------------ CSV


def open_csv(path: Path, *, column: str, key: str) -> Shard:
    """Read through a .csv file once; it is one group, because its rows cannot be found without reading those before.

    Raises:
        ValueError: the text column is missing, or stands there twice.
        CorruptShard: the file cannot be read.
    """
    with _reading(path):
        size = path.stat().st_size
        if size > LARGEST_GROUP:
            raise corrupt(path, f"it has more than {LARGEST_GROUP / 2**30:g} GiB; split it, or write parquet")
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        rows = _csv_rows(path)
    header, number = rows[0] if rows else [], len(rows) - 1
    if header.count(column) != 1:
        what = "is not in" if column not in header else f"stands {header.count(column)} times in"
        raise ValueError(
            f'data.text_column = "{column}" {what} the first line of {path} of {key}: its columns are '
            f"{', '.join(header) or 'none'}; choose one that stands there once"
        )
    return Shard(path, [number] if number else [], functools.partial(_read_csv, path, column), f"{column} {content}")


def _read_csv(path: Path, column: str, group: int) -> list[Text]:
    assert group == 0
    with _reading(path):
        header, *rows = _csv_rows(path)
    place = header.index(column)
    return [_field(row, place, width=len(header), path=path, number=number) for number, row in enumerate(rows, start=2)]


def _field(row: list[str], place: int, *, width: int, path: Path, number: int) -> str | CorruptShard:
    if len(row) != width:
        return corrupt(path, f"row {number} has {len(row)} fields, the first row {width}")
    return row[place]


def _csv_rows(path: Path) -> list[list[str]]:
    """Rows that are not empty."""
    try:
        text = read_text(path)
    except ValueError as error:
        raise corrupt(path, str(error).removeprefix(f"{path} ")) from None
    before = csv.field_size_limit(LARGEST_GROUP)  # a setting of the process: 128 kB a field otherwise
    try:
        return [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    finally:
        csv.field_size_limit(before)
