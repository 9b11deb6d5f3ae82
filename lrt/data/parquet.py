"""Parquet files: the text column of a row group, row by row, and never more of it than fits."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lrt.data.documents import LARGEST_GROUP, CorruptShard, Shard, Text, corrupt

if TYPE_CHECKING:
    import pyarrow as pa

LARGEST_ROWS = 1 << 24  # of a row group; a few bytes can claim any number
SMALLER = "write it again with smaller row groups, as in pyarrow.parquet.write_table(..., row_group_size=1000)"


def open_parquet(path: Path, *, column: str, key: str) -> Shard:
    """Look at a parquet file as far as its footer.

    Args:
        path: of the file.
        column: that holds the text.
        key: recipe key that named the file, for the messages.

    Raises:
        ValueError: the text column is missing, stands there twice, or is no text.
        CorruptShard: the file cannot be read, or a row group is too large.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as raw, pq.ParquetFile(raw) as file:
            schema, metadata = file.schema_arrow, file.metadata
            content = _content(path, column)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise corrupt(path, error) from None
    _check_column(schema, column, path=path, key=key)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    for group, rows in enumerate(sizes):
        if rows > LARGEST_ROWS:
            raise corrupt(path, f"row group {group} has {rows:,} rows, more than {LARGEST_ROWS:,}; {SMALLER}")
    return Shard(path, sizes, functools.partial(_read, path, column), content)


def _check_column(schema: pa.Schema, column: str, *, path: Path, key: str) -> None:
    names = list(schema.names)
    texts = list(dict.fromkeys(field.name for field in schema if _is_text(field.type)))
    choose = (
        f"choose one of {', '.join(map(repr, texts))}" if texts else "no column of it holds text: give another file"
    )
    where = f'data.text_column = "{column}"'
    if column not in names:
        raise ValueError(f"{where} is not in {path} of {key}: its columns are {', '.join(names)}; {choose}")
    if names.count(column) > 1:
        others = " or ".join(repr(name) for name in texts if name != column)
        raise ValueError(
            f"{where}: {path} of {key} has {names.count(column)} columns of that name: give them different names"
            + (f", or choose {others}" if others else "")
        )
    kind = schema.field(column).type
    if not _is_text(kind):
        raise ValueError(f"{where} of {path} holds {_word(kind)}, not text: {choose}")


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _word(kind: pa.DataType) -> str:
    """A type as a reader of the message knows it."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return f"a struct of {', '.join(kind.field(i).name for i in range(kind.num_fields))}"
    return "lists" if pa.types.is_list(kind) or pa.types.is_large_list(kind) else str(kind)


def _content(path: Path, column: str) -> str:
    """The text column, the file's bytes, and a hash of its footer (sizes and extreme values of every part of a
    column)."""
    with open(path, "rb") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)
        return f"{column} {size} {hashlib.sha256(file.read()).hexdigest()}"


def _read(path: Path, column: str, group: int) -> list[Text]:
    """Texts of a row group; read as a dictionary, so that a value repeated a million times is held once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as raw, pq.ParquetFile(raw, read_dictionary=[column]) as file:
            parts = file.metadata.row_group(group)
            chunks = (parts.column(i) for i in range(parts.num_columns))
            _check_size(
                path, group, sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
            )
            table = file.read_row_group(group, columns=[column], use_threads=False)
        array = table.column(table.schema.get_field_index(column))
        texts = [text for chunk in array.chunks for text in _texts(chunk, path=path, group=group)]
    except (pa.ArrowException, OSError) as error:
        raise corrupt(path, error) from None
    _check_size(path, group, sum(len(text) for text in texts if isinstance(text, str)))
    return texts


def _check_size(path: Path, group: int, size: int) -> None:
    if size > LARGEST_GROUP:
        gib = f"{size / 2**30:,.1f} GiB of text, more than {LARGEST_GROUP / 2**30:g}"
        raise corrupt(path, f"row group {group} unpacks to {gib}; {SMALLER}")


def _texts(chunk: pa.Array, *, path: Path, group: int) -> list[Text]:
    import pyarrow as pa

    chunk = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
    values: list[Text]
    try:
        values = chunk.dictionary.to_pylist()
    except UnicodeDecodeError:
        raw = chunk.dictionary.cast(pa.binary()).to_pylist()
        values = [_decoded(value, path=path, group=group) for value in raw]
    return ["" if i is None else values[i] for i in chunk.indices.to_pylist()]


def _decoded(value: bytes, *, path: Path, group: int) -> str | CorruptShard:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        behind = value[max(0, error.start - 20) : error.start]
        return corrupt(
            path, f"a text of row group {group} is not UTF-8: byte 0x{value[error.start]:02x} behind {behind!r}"
        )
