"""Held-out data beside the validation rows of a run, each source scored by itself."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from lrt.config import Recipe
from lrt.data import Tokenizer, build_loader
from lrt.data.sources import split_files
from lrt.tables import Table
from lrt.train.distributed.world import World


def open_sources(recipe: Recipe, tokenizer: Tokenizer, world: World) -> Table:
    """Rows of every entry of ``evaluation.sources``, by name.

    Args:
        recipe: ``evaluation.sources`` holds paths, or NAME=PATH; a path's name is that of its file or folder.
        tokenizer: of the run.
        world: the processes, which share the rows.

    Raises:
        ValueError: a source that cannot be read, that the run trains on, or whose name another one has.
    """
    found: Table = {}
    if not recipe.evaluation.sources:
        return found
    trained = {path.resolve() for path in split_files(recipe.data, split="train")}
    for spec in recipe.evaluation.sources:
        name, path = _named(spec)
        if name in found:
            raise ValueError(f"evaluation.sources: two are called {name!r}: give them names, as NAME=PATH")
        data = dataclasses.replace(recipe.data, validation=path, workers=0)
        try:
            both = trained & {file.resolve() for file in split_files(data, split="validation")}
            if both:
                raise ValueError(f"{min(both)} is also in data.train, so its score would be of text that was learned")
            found[name] = build_loader(
                data, tokenizer=tokenizer, sequence_length=recipe.model.sequence_length, rows=recipe.evaluation.batch,
                rank=world.rank, world_size=world.size, split="validation", limit_tokens=recipe.evaluation.tokens,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"evaluation.sources: {spec!r}: {error}") from None
    return found


def _named(spec: str) -> tuple[str, str]:
    """Name and path of a source."""
    given = re.fullmatch(r"([\w.-]+)=(.+)", spec)
    return (given[1], given[2]) if given else (Path(spec).stem, spec)
