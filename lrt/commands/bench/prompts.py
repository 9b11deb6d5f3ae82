"""A part of decoding.py, no command: seconds of prefill methods on one prompt, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

import lrt
from lrt.commands.bench.clocks import seconds_of
from lrt.commands.bench.decoders import LAYERWISE, PLAIN
from lrt.decoding import prefill
from lrt.decoding import step as decoding
from lrt.tables import Table

EXACT_TURNS = 3  # it takes a hundred times as long as the others


@torch.no_grad()
def prefill_rows(
    size: str, fast: Table, length: int, rounds: int, keep: Callable[[Table], None], *, trained: bool = False
) -> None:
    """Seconds of every method on every variant but the layerwise one, which runs what the shared one runs.

    Args:
        size: what rows name the models by.
        fast: models by variant.
        length: tokens of the prompt.
        rounds: twice the turns.
        keep: takes each row.
        trained: whether a fixed point means something: random weights get a fixed number of sweeps.
    """
    device = next(next(iter(fast.values())).parameters()).device
    vocabulary = next(iter(fast.values())).backbone.vocab_size
    tokens = torch.randint(1, vocabulary, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    sweeps = None if trained else 5
    methods = {
        "refine(1)": prefill.refine(1),
        f"fixed_point({'' if trained else '5 sweeps'})": prefill.fixed_point(max_sweeps=sweeps),
        "exact": prefill.exact(),
    }
    jobs: dict[tuple[str, str], prefill.Prefill | None] = {}
    if PLAIN in fast:
        jobs[PLAIN, "plain"] = prefill.exact()
    else:
        jobs[next(iter(fast)), "one forward"] = None
    for name in fast:
        if name not in (PLAIN, LAYERWISE):
            jobs |= {(name, method): made for method, made in methods.items()}
    compile_s, reports = {}, {}
    times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}

    def once(job: tuple[str, str]) -> None:
        if jobs[job] is None:
            getattr(fast[job[0]], "plain", fast[job[0]])(tokens, schedule=lrt.baseline(), return_logits=False)
        else:
            reports[job] = prefill.run(fast[job[0]], tokens, method=jobs[job], runner=decoding.graphed).report

    for job in jobs:
        compile_s[job] = seconds_of(lambda: once(job), device)  # noqa: B023
        seconds_of(lambda: once(job), device)  # noqa: B023
    for turn in range(max(3, rounds // 2)):
        for job in jobs:
            if job[1] != "exact" or turn < EXACT_TURNS:
                times[job].append(seconds_of(lambda: once(job), device))  # noqa: B023
    median = {job: statistics.median(times[job]) for job in jobs}
    base = next(iter(median.values()))
    for job, t in median.items():
        variant, report = job[0], reports.get(job)
        row = {
            "size": size,
            "variant": variant,
            "prompt": length,
            "method": job[1],
            "seconds": round(t, 5),
            "share_of_plain_speed": round(base / t, 3),
        }
        if (variant, "exact") in median:
            row["times_faster_than_exact"] = round(median[variant, "exact"] / t, 1)
        row["compile_s"] = round(compile_s[job], 2)
        if report is not None:
            row |= {
                "sweeps": report.sweeps[0],
                "residual": report.residual[0],
                "converged": report.converged[0],
                "flops": report.flops,
            }
        keep(row)
