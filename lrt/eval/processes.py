"""Processes that share the rows of an evaluation; every one holds the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lrt.config.environment import not_met, place_of_process

T = TypeVar("T")


class Sharing(Protocol):
    """Processes that share work: number of this one, and of all; and a sum over all of them, of a tensor on the CPU,
    in place."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def total(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started, or alone.

    Attributes:
        rank, size: number of this process, and of all.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, of a tensor on the CPU, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the main process, in every one; so its ValueError or OSError."""
        return work() if self.size == 1 else from_main(work, main=self.main)

    def least(self, number: int) -> int:
        """The smallest of what all processes give."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)


def from_main(work: Callable[[], T], *, main: bool, group: dist.ProcessGroup | None = None) -> T:
    """What ``work`` gives in the main process, in every process of a group; so its ValueError or OSError.

    The others wait for it, and none waits for one that has failed.

    Args:
        work: called in the main process alone.
        main: whether this is the main process.
        group: of the processes; None = all.
    """
    answer: list[Any] = [None, None]
    if main:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes of torchrun over gloo: what is shared are small sums on the CPU.

    Raises:
        ValueError: the processes do not find each other.
    """
    size = place_of_process().size
    if size == 1:
        yield Processes()
        return
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise not_met(error) from None
    try:
        yield Processes(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def own_device(name: str | None) -> torch.device:
    """The device of this process: the one that is named, else its GPU, else the CPU.

    Raises:
        ValueError: it cannot be used here.
    """
    local = place_of_process().local
    device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu") if name is None else _parsed(name)
    try:
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device}: not usable here ({str(error).splitlines()[0]}); use cpu, or cuda where there is a GPU"
        ) from None
    return device


def _parsed(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device ({str(error).splitlines()[0]}); use cpu or cuda:0") from None
