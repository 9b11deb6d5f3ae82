"""A part of training.py, no command: a training step as a subject of measurement, warmed up, timed in turns,
profiled."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from lrt.accounting import mfu
from lrt.tables import Table
from lrt.train.distributed.world import World


class Subject:
    """A name and a function that does one forward and backward."""

    def __init__(
        self, name: str, step: Callable[[], None], *, own_bytes: int, flops: float | None, world: World, tokens: int
    ) -> None:
        self.name, self.step, self.own_bytes, self.flops = name, step, own_bytes, flops
        self.world, self.tokens = world, tokens
        self.times: list[float] = []
        self.peak_gib: float | None = None
        self.compile_s = 0.0
        self.graphs = self.recompiles = 0
        self.syncs: str = ""

    def warm_up(self, steps: int = 3) -> None:
        """Compile, then see what the steady state costs: graphs, recompiles, host syncs;
        peak memory from the first pass on."""
        cuda = self.world.device.type == "cuda"
        held = 0
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        before, began = graph_count(), time.perf_counter()
        self.step()
        self.step()
        synchronize(self.world)
        self.compile_s, self.graphs = time.perf_counter() - began, graph_count() - before
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                self.step()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        synchronize(self.world)
        where = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        self.syncs = f"{len(where) / steps:.1f} a step, at {', '.join(sorted(set(where)))}" if where else ""
        self.recompiles = graph_count() - before - self.graphs
        if cuda:
            self.peak_gib = (torch.cuda.max_memory_allocated() - held + self.own_bytes) / 2**30

    def measure(self, steps: int) -> None:
        self.step()  # the clocks and caches of the subject before are not this one's
        marks = [mark(self.world)]
        for _ in range(steps):
            self.step()
            marks.append(mark(self.world))
        synchronize(self.world)
        self.times += [span(a, b) for a, b in zip(marks, marks[1:])]

    def row(self) -> Table:
        ms = statistics.median(self.times)
        row = {
            "variant": self.name,
            "ms": ms,
            "spread_ms": max(self.times) - min(self.times),
            "peak_gib": self.peak_gib,
        }
        row |= {
            "compile_s": self.compile_s,
            "graphs": self.graphs,
            "recompiles": self.recompiles,
            "host_syncs": self.syncs or "none",
        }
        row["tokens_per_second"] = self.tokens * self.world.size / ms * 1e3
        if self.flops is not None:
            row["mfu"] = mfu(self.flops * self.tokens / ms * 1e3, device_name(self.world))
        return row


def graph_count() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def mark(world: World) -> float | torch.cuda.Event:
    if world.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def span(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Milliseconds between two marks."""
    if isinstance(start, float) and isinstance(end, float):
        return (end - start) * 1e3
    assert isinstance(start, torch.cuda.Event)
    return start.elapsed_time(end)


def device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"


def profiled(subject: Subject, steps: int = 2) -> list[tuple[str, int, float]]:
    """Device time of every kernel a step: name, calls, milliseconds."""
    if subject.world.device.type != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as log:
        for _ in range(steps):
            subject.step()
        torch.cuda.synchronize()
    rows = [(e.key[:110], e.count // steps, e.self_device_time_total / steps / 1e3) for e in log.key_averages()]
    return sorted(rows, key=lambda row: -row[2])
