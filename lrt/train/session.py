"""What surrounds a run from its first line to its last: processes, signals, a watch over hangs, the folder it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lrt.config import Recipe
from lrt.data.locks import locked
from lrt.train.distributed.world import World, check_same_on_all, open_world
from lrt.train.monitor.faults import HangError, Heartbeat, StopSignal, hang_message, start_compile_workers
from lrt.train.run import run_folder


class Session(NamedTuple):
    """Of one call of ``train``."""

    world: World
    signals: StopSignal
    heart: Heartbeat


@contextlib.contextmanager
def open_session(recipe: Recipe) -> Iterator[Session]:
    """Join the other processes, and hold the run's folder while the block runs.

    Raises:
        ValueError: the processes do not find each other or have different settings, or another run holds the folder.
        HangError: a rank died or hangs; the message names the step.
    """
    with open_world(recipe) as world, StopSignal() as signals:
        if recipe.parallel.compile and world.device.type == "cuda":
            # a stop that ends these workers too would leave the next compilation waiting for ever
            with signals.unheard():
                start_compile_workers()
        timeout = 60 * recipe.parallel.timeout_minutes
        with Heartbeat(timeout_s=timeout, rank=world.rank) as heart, _named_hangs(heart, world, timeout_s=timeout):
            check_same_on_all(recipe, world)
            with _held_folder(recipe, world):
                yield Session(world, signals, heart)


@contextlib.contextmanager
def _held_folder(recipe: Recipe, world: World) -> Iterator[None]:
    """Rank 0 holds the run's folder, alone among all processes of the machine or the file system,
    while the block runs."""
    with contextlib.ExitStack() as held:
        world.from_main(lambda: held.enter_context(locked(run_folder(recipe), advice="choose another run.name")))
        yield


@contextlib.contextmanager
def _named_hangs(heart: Heartbeat, world: World, *, timeout_s: float) -> Iterator[None]:
    """A collective that failed says in which step.

    Errors of other classes, ours and those of a callback, may hold the same words: in the name of a folder, say.
    """
    try:
        yield
    except RuntimeError as error:  # so is torch.distributed.DistError
        failed = isinstance(error, torch.distributed.DistError) or (
            type(error) is RuntimeError and any(word in str(error).lower() for word in ("gloo", "timeout"))
        )
        if world.size == 1 or not failed:
            raise
        message = hang_message(heart.where, timeout_s, silent_s=heart.silent_s)
        raise HangError(f"{message} ({str(error).splitlines()[0]})") from error
