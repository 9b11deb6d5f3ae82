"""What the environment says of this process: its place among those of torchrun."""

from __future__ import annotations

import os
from typing import NamedTuple


class Place(NamedTuple):
    """Which process this is, as torchrun wrote it into the environment; alone where it did not."""

    size: int  # processes on all machines
    rank: int
    local: int  # on this machine


def place_of_process() -> Place:
    """Read WORLD_SIZE, RANK and LOCAL_RANK.

    Raises:
        ValueError: they are no numbers of a process group.
    """
    usual = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    told = {name: os.environ.get(name, value) for name, value in usual.items()}
    numbers = all(value.isdecimal() for value in told.values())
    if not numbers or int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        said = ", ".join(f"{name} = {os.environ.get(name)!r}" for name in told)
        raise ValueError(
            f"the environment describes no process of a group ({said}): "
            f"start with torchrun, which sets these variables, or unset them"
        )
    return Place(*(int(value) for value in told.values()))


def not_met(error: BaseException) -> ValueError:
    """The error for processes that do not find each other.

    Args:
        error: what the rendezvous said.
    """
    address, port = (os.environ.get(name, f"{name} is unset") for name in ("MASTER_ADDR", "MASTER_PORT"))
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"the processes do not find each other at {address}:{port} ({first_line}): "
        f"start them with torchrun, give another --master_port or --rdzv_endpoint, or end what uses that address"
    )
