"""What a training process takes of its host: threads of torch's pool, and time in which data were the limit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from lrt.eval.runs import Record

LIMIT = 0.05  # share of the time spent waiting for data from which a run says so


@contextlib.contextmanager
def host_threads(device: torch.device, *, threads: int | None = None) -> Iterator[None]:
    """Threads that torch shares an operation out over on the host.

    A process with a GPU computes nothing on the host but copies of batches. Several threads make these slower, and on a
    busy host 400 times slower, because each copy waits until every thread had its turn.

    Args:
        device: of the computation.
        threads: their number; None = what OMP_NUM_THREADS says, otherwise 1 with a GPU and torch's choice without.
    """
    before = torch.get_num_threads()
    if threads is None and device.type != "cpu" and "OMP_NUM_THREADS" not in os.environ:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share_waited(records: Sequence[Record]) -> float:
    """Share of a run's time that was spent waiting for data.

    Args:
        records: of its metrics.jsonl; the first step of each schedule is left out, because it compiles.
    """
    known: set[str | None] = set()  # None: records of before they named their schedule
    total = waited = 0.0
    for record in records:
        if record["kind"] != "train":
            continue
        if record.get("schedule") in known:
            seconds = 1 / record["tokens_per_second"]  # in steps' tokens, which are alike
            total, waited = total + seconds, waited + seconds * record["data_wait"]
        known.add(record.get("schedule"))
    return waited / total if total else 0.0


def data_was_the_limit(share: float, *, workers: int) -> str | None:
    """What a run says at its end when it waited for data; None when it did not.

    Args:
        share: of its time.
        workers: that read and tokenized, a rank.
    """
    if share < LIMIT:
        return None
    return (
        f"data were a limit of this run: {100 * share:.0f} % of the time went into waiting for them. "
        f"Raise data.workers (now {workers}), or tokenize once: python tools/prepare_data.py tokenize"
    )
