"""The end of a run: evaluation, export, curves, a sample, and the table that says it all."""

from __future__ import annotations

import dataclasses
import math

from safetensors import SafetensorError

from lrt.eval.runs import Record, read_records, scores_of
from lrt.train.checkpoint.weights import export
from lrt.train.evaluation import evaluate_run
from lrt.train.monitor.curves import plot_curves
from lrt.train.monitor.faults import NonFiniteError, NotSavedError
from lrt.train.monitor.host import data_was_the_limit, share_waited
from lrt.train.monitor.metrics import core_lines, memory_table, source_lines
from lrt.train.run import Run, RunResult
from lrt.train.samples import decode_sample, write_sample


def finish(run: Run, result: RunResult) -> RunResult:
    """Evaluate, export, draw and print what a finished run is worth; every rank must call this."""
    record = evaluate_run(run)
    bad = [mode for mode, value in record["bpb"].items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"bits per byte of the trained model are not finite (in mode {', '.join(bad)}), so nothing is exported"
        )
    run.heart.beat("export")
    exported = run.folder / "export" if run.recipe.checkpoint.export_at_end else None
    try:
        plain = export(run.model, run.recipe, exported, run.world, tokenizer=run.tokenizer, step=run.state.step)
    except (OSError, SafetensorError) as error:
        raise NotSavedError(
            f"{exported} could not be written ({error}): make room and give the same command, "
            f"which exports from the checkpoint of step {run.state.step}"
        ) from None
    result = dataclasses.replace(result, bpb=dict(record["bpb"]))
    if plain is not None:
        result = dataclasses.replace(result, sample=decode_sample(plain.to(run.world.device), run))
        write_sample(run, result.sample)
        if run.recipe.metrics.plot:
            try:
                plot_curves(
                    read_records(run.folder / "metrics.jsonl"), run.folder / "curves.png", title=run.recipe.run.name
                )
            except ValueError as error:
                run.say(f"metrics.plot = true: {error}, or set metrics.plot = false")
            except OSError as error:
                raise NotSavedError(
                    f"{run.folder / 'curves.png'} could not be written ({error}): the same command draws it again"
                ) from None
        run.recorder.check()
        run.say(summary(run, result, record))
    run.world.barrier()
    return result


def summary(run: Run, result: RunResult, record: Record) -> str:
    """The final table, what the memory does, the sample, and where everything lies.

    Args:
        run: that has ended.
        result: of the run.
        record: of its last evaluation.
    """
    parts, scores = run.parameters, scores_of(record)
    waited = share_waited(read_records(run.folder / "metrics.jsonl"))
    rows = [
        *(
            ("bits per byte" + (f", {mode}" if len(scores) > 1 else ""), f"{value:.4f}")
            for mode, value in scores.items()
        ),
        *((f"exact match, {mode}", f"{100 * value:.1f} %") for mode, value in record.get("exact_match", {}).items()),
        ("tokens trained", f"{run.state.tokens:,} in {run.state.step:,} steps"),
        ("tokens a second", f"{result.tokens_per_second:,.0f}"),
        ("waiting for data", f"{100 * waited:.1f} % of the time"),
        ("parameters", f"{parts.total:,}, of which the memory's {parts.memory:,}"),
        ("skipped steps", f"{run.state.skipped}"),
        ("unreadable texts", f"{run.loader.skipped}"),
        *(("rows from", f"{100 * share:.1f} % {path}") for path, share in run.loader.shares.items()),
    ]
    width = max(len(name) for name, _ in rows)
    lines = ["", run.recipe.run.name, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    sources = source_lines(record)
    lines += ["", "  bits per byte of", *(f"    {line}" for line in sources)] if sources else []
    lines += ["", *(f"  {line}" for line in core_lines(record))] if core_lines(record) else []
    memory = memory_table(record)
    lines += ["", *(f"  {line}" for line in memory)] if memory else []
    if result.sample is not None:
        lines += ["", "sample:", *(f"  {line}" for line in result.sample.splitlines())]
    limit = data_was_the_limit(waited, workers=run.loader.workers)
    lines += [] if limit is None else ["", limit]
    written = [
        path
        for path in ("recipe.toml", "run.json", "metrics.jsonl", "curves.png", "checkpoints", "export")
        if (run.folder / path).exists()
    ]
    return "\n".join([*lines, "", f"written to {run.folder.resolve()}: {', '.join(written)}"])
