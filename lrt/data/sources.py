"""Where documents come from: text and parquet files, the demo, a Hugging Face dataset, tokenized folders.

Every source is a list of groups (a parquet row group, a stretch of a text file); a group is what is read at once.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrt.config import DataConfig
from lrt.data.documents import CorruptShard, Documents
from lrt.data.texts import TextDocuments, open_shard
from lrt.data.tokenized import MANIFEST, UNFINISHED, TokenizedDocuments, check_shard, check_tokenizer, read_manifest, shard_paths
from lrt.data.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parent / "demo"
KINDS = (
    '"demo", a .parquet or .txt file, a folder or glob of them, a folder written by tools/prepare_data.py tokenize, or hf://datasets/NAME'
)


def open_documents(data: DataConfig, *, tokenizer: Tokenizer, split: str) -> Documents:
    """The documents of ``data.train`` or ``data.validation``.

    Args:
        data: section ``data`` of the recipe.
        tokenizer: makes token ids of texts; tokenized folders must have been written with the same one.
        split: "train" or "validation".

    Raises:
        ValueError: nothing there, no held-out part, or wrong contents; the message names the recipe key.
    """
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
