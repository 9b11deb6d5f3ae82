"""What a run records of its steps: numbers are read one step late, so that nothing waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.accounting import peak_flops
from lrt.data import Batch
from lrt.schedules import describe
from lrt.train.monitor.metrics import Clock, LateReader, peak_memory_gib
from lrt.train.optim.groups import rate_of
from lrt.train.optim.rates import Rates
from lrt.train.run import Run
from lrt.train.step import StepNumbers
from lrt.types import Schedule


class Passed(NamedTuple):
    """What is known of a step when it is queued, for its record."""

    rates: Rates
    schedule: Schedule
    tokens: int  # of all steps so far
    flops: float  # of all steps so far
    sources: list[str]
    shares: dict[str, float]  # of data.sources, in the rows so far
    seconds: float  # taken when the step is queued: read late, the last step would seem to take no time
    waited: float  # share of them spent waiting for data


class StepLog:
    """The records of a run's steps.

    Args:
        run: whose steps they are.

    Attributes:
        stopped: some rank was asked to stop, as far as has been read.
    """

    def __init__(self, run: Run) -> None:
        self.stopped = False
        self._run, self._late, self._clock = run, LateReader(), Clock()
        self._speeds: list[float] = []

    @property
    def speed(self) -> float:
        """Tokens a second of the median step, over all ranks; 0 without a step."""
        return sorted(self._speeds)[len(self._speeds) // 2] if self._speeds else 0.0

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Time inside is spent waiting for data."""
        return self._clock.waiting(self._late)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is no training time, and processes that it starts hear no signals."""
        with self._clock.paused(), self._run.signals.unheard():
            yield

    def push(self, numbers: Tensor, batches: Sequence[Batch], *, rates: Rates, schedule: Schedule) -> None:
        """Queue the numbers of the step that the run's state has counted last."""
        run = self._run
        sources = [source for batch in batches for source in batch.source]
        state, shares = run.state, run.loader.shares
        passed = Passed(rates, schedule, state.tokens, state.flops, sources, shares, *self._clock.lap())
        self._late.push(state.step, numbers, passed)

    def read(self, *, keep: int) -> None:
        """Record all steps but the newest ``keep``.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
        """
        for past in self._late.pop(keep=keep):
            self._record(StepNumbers.of(past), past.note)

    def _record(self, numbers: StepNumbers, passed: Passed) -> None:
        run = self._run
        run.guard.see(
            numbers.step, skipped=not numbers.finite, loss=numbers.loss, norm=numbers.norm, sources=passed.sources
        )
        run.state.skipped = run.guard.total
        speed = run.horizon.batch_tokens / passed.seconds
        self._speeds.append(speed)
        device = run.world.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        flops = speed * run.flops_a_token[passed.schedule]
        run.recorder.write(
            {
                "kind": "train",
                "step": numbers.step,
                "loss": numbers.loss,
                "groups": list(numbers.groups),
                "schedule": describe(passed.schedule),
                "lr_scale": passed.rates.lr_scale,
                "lr": {group["name"]: rate_of(group, passed.rates) for group in run.optimizer.param_groups},
                "grad_norm": numbers.norm,
                "tokens": passed.tokens,
                "tokens_per_second": speed,
                "flops": passed.flops,
                "flops_per_second": flops,
                **({} if peak is None else {"mfu": flops / run.world.size / peak}),
                "data_wait": passed.waited,
                **({"data_shares": passed.shares} if passed.shares else {}),
                "peak_memory_gib": peak_memory_gib(device),
                "skipped": run.guard.total,
            }
        )
        self.stopped |= numbers.stop
