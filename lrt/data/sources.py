"""Where documents come from: text files, the demo, a Hugging Face dataset, tokenized folders, or several of them.

Every source is a list of groups (a parquet row group, a stretch of a text file); a group is what is read at once.
"""

from __future__ import annotations

import functools
import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lrt.config import DataConfig
from lrt.config.files import local_path
from lrt.data.documents import CorruptShard, Documents, LeftOut
from lrt.data.mixture import SeveralDocuments
from lrt.data.texts import KINDS as TEXT_KINDS
from lrt.data.texts import TextDocuments, kind_of, open_shard
from lrt.data.tokenized import (
    MANIFEST,
    UNFINISHED,
    TokenizedDocuments,
    check_shard,
    check_tokenizer,
    read_manifest,
    shard_paths,
)
from lrt.data.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parent / "demo"
KINDS = (
    '"demo", a .parquet, .jsonl (also .gz and .zst), .csv or .txt file, a folder or glob of them, a folder written by '
    "tools/prepare_data.py tokenize, or hf://datasets/NAME"
)


def open_documents(data: DataConfig, *, tokenizer: Tokenizer, split: str) -> Documents:
    """The documents of ``data.train`` or ``data.validation``; of several sources as one, in their order.

    Args:
        data: section ``data`` of the recipe.
        tokenizer: makes token ids of texts; tokenized folders must have been written with the same one.
        split: "train" or "validation".

    Raises:
        ValueError: nothing there, no held-out part, or wrong contents; the message names the recipe key.
    """
    if not data.sources or (split == "validation" and data.validation != "auto"):
        return _open(data, tokenizer=tokenizer, split=split, key="data.train")
    parts = [_open(one, tokenizer=tokenizer, split=split, key=key) for key, one in each_source(data)]
    return SeveralDocuments(parts)


def each_source(data: DataConfig) -> list[tuple[str, DataConfig]]:
    """Every source of ``data.sources`` as if it were ``data.train``, with its recipe key;
    of ``data.train`` itself where there are none."""
    if not data.sources:
        return [("data.train", data)]
    return [
        (
            f"data.sources[{index}].path",
            replace(data, train=source.path, text_column=source.text_column or data.text_column, sources=()),
        )
        for index, source in enumerate(data.sources)
    ]


T = TypeVar("T")


def _open_each(files: Sequence[Path], open_file: Callable[[Path], T], *, on_corrupt: str) -> list[T]:
    """The files that can be opened; one that cannot is left out and named, or ends it all."""
    opened, left_out = [], LeftOut()
    for path in files:
        try:
            opened.append(open_file(path))
        except CorruptShard as error:
            if on_corrupt == "stop":
                raise
            left_out.name(error)
    return opened


def _open(data: DataConfig, *, tokenizer: Tokenizer, split: str, key: str) -> Documents:
    held_out = split == "validation" and data.validation == "auto"
    key = key if split == "train" or held_out else "data.validation"
    files = _split(data, split=split, key=key)
    tokenized = files[0].suffix == ".bin"
    documents: Documents
    if tokenized:
        manifest = read_manifest(files[0].parent)
        check_tokenizer(files[0].parent, manifest=manifest, tokenizer=tokenizer, key=key)
        shards = _open_each(files, functools.partial(check_shard, manifest=manifest), on_corrupt=data.on_corrupt)
        skipped = len(files) - len(shards)
        documents = TokenizedDocuments(shards, dtype=manifest["dtype"], tokenizer=tokenizer, skipped=skipped)
    else:
        open_file = functools.partial(open_shard, column=data.text_column, key=key)
        texts = _open_each(files, open_file, on_corrupt=data.on_corrupt)
        documents = TextDocuments(texts, tokenizer, skipped=len(files) - len(texts))
    if not documents.sizes.sum():
        if held_out and data.train != "demo":
            raise ValueError(
                f'{key}: its last file, {files[-1]}, which data.validation = "auto" holds out, has no documents: '
                f"take it away, or give data.validation ({KINDS})"
            )
        spec = data.validation if key == "data.validation" else data.train
        raise ValueError(
            f"{key} = {spec!r} is an empty corpus ({len(files)} files, no documents): give files with text"
        )
    return documents


def split_files(data: DataConfig, *, split: str) -> list[Path]:
    """The files of one side of the split, of all sources; the other side's are not among them.

    Raises:
        ValueError: nothing there, or ``validation = "auto"`` finds nothing to hold out.
    """
    if split == "validation" and data.validation != "auto":
        return _split(data, split=split, key="data.validation")
    return [path for key, one in each_source(data) for path in _split(one, split=split, key=key)]


def _split(data: DataConfig, *, split: str, key: str) -> list[Path]:
    if data.train == "demo" and (split == "train" or data.validation == "auto"):
        return sorted(DEMO.glob(f"*_{split}.txt"))
    if split == "validation" and data.validation != "auto":
        return find_files(data.validation, key="data.validation", demo="validation")
    files = find_files(data.train, key=key, demo="train")
    if data.validation == "auto":
        if split == "train":
            return files[:-1] or files
        if len(files) < 2:
            raise ValueError(
                f'data.validation = "auto" holds out the last shard of {key}, but {data.train!r} has only one: '
                f"give data.validation ({KINDS})"
            )
        return files[-1:]
    held_out = {path.resolve() for path in find_files(data.validation, key="data.validation", demo="validation")}
    kept = [path for path in files if path.resolve() not in held_out]
    if not kept:
        raise ValueError(f"data.validation = {data.validation!r} holds every file of {key}: give other files")
    return kept


def find_files(spec: str, *, key: str, demo: str = "train") -> list[Path]:
    """Files that a source names, sorted, all of one of ``TEXT_KINDS``, or the .bin shards of a tokenized folder.

    Links are followed. Files and folders whose names begin with a dot are left out, unless the source names them
    itself.

    Raises:
        ValueError: there are none.
    """
    if spec == "demo":
        return sorted(DEMO.glob(f"*_{demo}.txt"))
    if spec.startswith("hf://"):
        from lrt.data.hub import download

        return find_files(download(spec, key=key), key=key)
    path = local_path(spec, key=key)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return shard_paths(path)
        if (path / UNFINISHED).is_file():
            raise ValueError(
                f"{key} = {spec!r}: tokenizing into this folder was not finished; "
                f"run the same tools/prepare_data.py tokenize command again, it goes on where it stopped"
            )
        found = _of_one_kind(list(_walk(path, inside=frozenset())), folder=path)
    elif path.is_file():
        found = [path]
    else:
        found = [file for file in sorted(Path(name) for name in glob.glob(str(path), recursive=True)) if file.is_file()]
    wrong = [file for file in found if kind_of(file) is None]
    if not found or wrong:
        *kinds, last = TEXT_KINDS
        names = f"{', '.join(kinds)} {{}} {last}"
        what = (
            f"{wrong[0]} is neither {names.format('nor')}"
            if wrong
            else f"no such file, or no {names.format('or')} file in it"
        )
        raise ValueError(f"{key} = {spec!r}: {what}; use {KINDS}")
    return found


def _walk(folder: Path, *, inside: frozenset[Path]) -> Iterator[Path]:
    """Files below a folder; one that links lead back to is not entered again."""
    if folder.resolve() in inside:
        return
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, inside=inside | {folder.resolve()})
        elif path.is_file():
            yield path


def _of_one_kind(files: list[Path], *, folder: Path) -> list[Path]:
    """The files of the first kind there is; which others are left out is said."""
    kinds = {kind: sorted(file for file in files if kind_of(file) == kind) for kind in TEXT_KINDS}
    first = next((kind for kind, found in kinds.items() if found), None)
    others = [f"{len(found)} {kind}" for kind, found in kinds.items() if found and kind != first]
    if others and os.environ.get("RANK", "0") == "0":
        glob_of_all = folder / "**" / f"*{others[0].split()[1]}"
        print(
            f"{folder}: its {first} files are read, and {' and '.join(others)} files left out; "
            f"{glob_of_all} would name those",
            file=sys.stderr,
        )
    return kinds[first] if first is not None else []
