"""A part of decoding.py, no command: seconds, the rate of a copy, and kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - began


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of a large copy, those read and those written."""
    source = torch.randint(0, 100, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(seconds_of(lambda: target.copy_(source), device) for _ in range(10))


def profile(run: Callable[[], None], title: str) -> None:
    """Print the kernels of one step on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    print(f"kernels of a step, {title}: calls, us (they overlap: the sum is more than the step)")
    for event in sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)[:14]:
        print(f"  {event.key[:70]:70s} {event.count / 10:6.1f} {event.self_device_time_total / 10:9.1f}")
