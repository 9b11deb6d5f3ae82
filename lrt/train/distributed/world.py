"""The processes of a run: who this one is, on which device, and how sums over all of them are made."""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lrt.config import Recipe, dump_recipe, parse_recipe
from lrt.config.environment import not_met, place_of_process
from lrt.eval.processes import from_main
from lrt.train.checkpoint.same_run import changes
from lrt.train.monitor.faults import HangError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank, size: number of this process, and of all.
        device: on which it computes.
        sharded: FSDP holds the parameters; False = a plain module on one process.
        working_copy: the plain module holds masters, and a copy in the computation's dtype computes.
        checkpoint_group: gloo group for the thread that writes checkpoints; None for a plain module.
    """

    rank: int
    size: int
    device: torch.device
    sharded: bool
    checkpoint_group: dist.ProcessGroup | None = None
    working_copy: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        if self.size == 1:
            return number
        shared = torch.tensor([number], device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared.item())

    def from_main(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on rank 0, on every rank; so its ValueError or OSError."""
        return function() if self.size == 1 else from_main(function, main=self.main, group=self.checkpoint_group)

    def barrier(self) -> None:
        if self.checkpoint_group is not None:
            dist.barrier(self.checkpoint_group)


@contextlib.contextmanager
def open_world(recipe: Recipe) -> Iterator[World]:
    """Join the process group that torchrun describes, or be alone.

    FSDP is used where there are several processes, and on a CPU where the computation's dtype differs from the
    masters' float32. On one GPU the model stays a plain module: a working copy in the computation's dtype costs one
    cast per step (``lrt.train.distributed.graphs``), FSDP's copies for one rank several.

    Raises:
        ValueError: the environment describes no process group, or the processes do not find each other.
    """
    place = place_of_process()
    size, rank, device = place.size, place.rank, torch.device("cpu")
    if torch.cuda.is_available():
        if place.local >= torch.cuda.device_count():
            raise ValueError(
                f"process {place.local} of this machine has no GPU of its own, because it has "
                f"{torch.cuda.device_count()}: use torchrun --nproc_per_node={torch.cuda.device_count()}, or less"
            )
        device = torch.device("cuda", place.local)
        torch.cuda.set_device(device)
    sharded = size > 1 or (recipe.parallel.param_dtype != "float32" and device.type == "cpu")
    if not sharded:
        yield World(rank, size, device, sharded, working_copy=device.type == "cuda")
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=recipe.parallel.timeout_minutes)
    store = _store(timeout) if size > 1 else dist.HashStore()
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(
            rank, size, device, sharded, dist.new_group(backend="gloo", timeout=max(timeout, timedelta(minutes=30)))
        )
    except HangError:
        raise  # leaving the group would wait for the rank that is gone
    except BaseException:
        _leave()
        raise
    _leave()


def check_same_on_all(recipe: Recipe, world: World) -> None:
    """Refuse ranks that were started with different settings: they would train one model by several recipes.

    Raises:
        ValueError: on every rank; the differing keys are named.
    """
    if world.size == 1:
        return
    text = dump_recipe(recipe)
    digests = [""] * world.size
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest(), group=world.checkpoint_group)
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    texts: list[str] = [""] * world.size
    dist.all_gather_object(texts, text, group=world.checkpoint_group)
    found = changes(parse_recipe(texts[0]), parse_recipe(texts[other]))
    different = "; ".join(f"{c.key} = {c.there!r} on rank 0, {c.here!r} on rank {other}" for c in found)
    raise ValueError(
        f"the ranks have different settings: {different}: start all with the same recipe and the same --set"
    )


_GRAPHS: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def register_graph(graph: torch.cuda.CUDAGraph) -> None:
    """Have a graph reset when its process group is left, for NCCL waits until no graph holds one of its collectives
    (pytorch issue 115388)."""
    _GRAPHS.add(graph)


def _leave() -> None:
    for graph in list(_GRAPHS):
        graph.reset()
    _GRAPHS.clear()
    dist.destroy_process_group()


def _store(timeout: timedelta) -> dist.Store:
    """Where the ranks find each other, apart for every restart.

    torchrun keeps one store over its restarts, and the addresses of ranks that are gone would be found in it
    (pytorch issue 135712); TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes it start a fresh one instead.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:  # an address in use or unknown, a rank that never came
        raise not_met(error) from None
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":
        return store
    return dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
