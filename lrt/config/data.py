"""Settings of the data, and rules for everything in a recipe that names a file or folder; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lrt.config.files import LONGEST_NAME, longest_part

if TYPE_CHECKING:
    from lrt.config.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of training data."""

    path: str  # file, folder, glob or address, as data.train
    weight: float = 1.0  # its share of the rows, in proportion to the other sources
    text_column: str | None = None  # column of the text; None = data.text_column


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    # "demo", a parquet/jsonl/csv/text file, folder or glob, a tokenized folder, or hf://datasets/NAME
    train: str = "demo"
    sources: tuple[SourceConfig, ...] = ()  # several sources in place of train, mixed by their weights
    # held-out data of the same kinds; "auto" = the demo's held-out part, or the last shard of train, or of every source
    validation: str = "auto"
    text_column: str = "text"  # column of the text in parquet, jsonl and csv
    tokenizer: str = "bytes"  # "bytes", a tokenizer.json, or a folder that holds one
    # processes per rank that read and tokenize; 0 = the training process; None = 3 with a GPU, 0 without
    workers: int | None = None
    buffer_documents: int = 256  # documents among which a row's best fit is searched
    shuffle_seed: int | None = None  # seed of the order of data; None = run.seed
    on_corrupt: Literal["stop", "skip"] = "stop"  # what happens at a shard, or a text in it, that cannot be read


def data_errors(c: DataConfig) -> list[str]:
    """Sources that do not go together with the rest of [data]."""
    errors = []
    if c.sources and c.train != DataConfig.train:
        errors.append(
            f"data.train = {c.train!r} has no effect beside data.sources: make it one of them, or leave it out"
        )
    paths = [source.path for source in c.sources]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        errors.append(f"data.sources names {twice[0]!r} twice: give it once, with the sum of the weights")
    return errors


def path_errors(r: Recipe) -> list[str]:
    """Empty paths, which an unset variable of a shell leaves, and names that no file system takes."""
    errors = []
    for key, value in _paths(r):
        if isinstance(value, str) and not value.strip():
            errors.append(
                f"{key} = {value!r} is empty, perhaps an unset variable: give a path (. is the present folder)"
            )
        elif isinstance(value, str) and any(ord(character) < 32 for character in value):
            errors.append(f"{key} = {value!r} holds a zero byte, a line break or the like: give another path")
        elif isinstance(value, str) and longest_part(value) > LONGEST_NAME:
            errors.append(f"{key} = {value[:100]!r}... has a name of more than {LONGEST_NAME} bytes: give another path")
    return errors + _name_errors(r.run.name)


def _paths(r: Recipe) -> Iterator[tuple[str, object]]:
    for key in ("train", "validation", "tokenizer"):
        yield f"data.{key}", getattr(r.data, key)
    for index, source in enumerate(r.data.sources):
        yield f"data.sources[{index}].path", source.path
    for index, path in enumerate(r.evaluation.sources):
        yield f"evaluation.sources[{index}]", path
    if r.tuning is not None:
        yield from (("tuning.train", r.tuning.train), ("tuning.validation", r.tuning.validation))
    yield "run.output", r.run.output
    yield "run.backbone", r.run.backbone
    for key in ("init_from", "branch_from"):
        yield f"training.{key}", getattr(r.training, key)


def _name_errors(name: object) -> list[str]:
    if not isinstance(name, str):
        return [f"run.name = {name!r}: expected a text"]
    parts = name.split("/")
    wrong = (
        "is empty, perhaps an unset variable" if not name.strip()
        else "holds characters that cannot be printed" if not name.isprintable()
        else f"has a part of more than {LONGEST_NAME} bytes" if longest_part(name) > LONGEST_NAME
        else "leads out of run.output" if not all(parts) or {".", ".."} & set(parts)
        else None
    )  # fmt: skip
    shown = name if len(name) < 100 else f"{name[:100]}..."
    return (
        []
        if wrong is None
        else [f"run.name = {shown!r} {wrong}: give the name of a folder inside run.output, such as first_try"]
    )
