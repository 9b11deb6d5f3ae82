"""The window of steps that a recipe has profiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lrt.config import Recipe
from lrt.train.distributed.world import World


@contextlib.contextmanager
def profiler(recipe: Recipe, folder: Path, world: World) -> Iterator[Callable[[int], None]]:
    """A function to call before every step; records the window that the recipe asks for, or what a run that ends inside
    it has of it."""
    start, count = recipe.metrics.profile_start, recipe.metrics.profile_steps
    running: torch.profiler.profile | None = None

    def finish() -> None:
        nonlocal running
        if running is not None:
            running.stop()
            (folder / "profile").mkdir(exist_ok=True)
            running.export_chrome_trace(str(folder / "profile" / f"rank{world.rank}_step{start}.json"))
            running = None

    def before(step: int) -> None:
        nonlocal running
        if step == start:
            running = torch.profiler.profile()
            running.start()
        elif start is not None and step == start + count:
            finish()

    yield before
    finish()
