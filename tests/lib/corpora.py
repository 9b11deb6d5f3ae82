"""Small corpora on disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lrt.config import DataConfig
from lrt.data import build_loader, load_tokenizer
from lrt.data.sources import open_documents
from lrt.data.stream import in_order

BYTES = load_tokenizer("bytes")


def write_parquet(path: Path, texts, *, column="text", row_group_size=4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=row_group_size)
    return path


def write_shards(folder: Path) -> Path:
    for i in range(3):
        write_parquet(folder / f"part_{i}.parquet", [f"shard {i} document {j} " * 3 for j in range(10)])
    return folder


def texts_of(data: DataConfig, split="train") -> list[str]:
    documents = open_documents(data, tokenizer=BYTES, split=split)
    return [BYTES.decode(piece.tokens) for piece in in_order(documents, on_corrupt=data.on_corrupt)]


def first_batch(data: DataConfig, **more):
    return next(iter(build_loader(data, tokenizer=BYTES, sequence_length=16, rows=2, **more)))
