"""The largest recipe on eight GPUs of one host, and what comes after it, in one command under nine minutes.

    python tools/experiments/eight_gpus.py --data 'shards/train_*.parquet' --out results
    python tools/experiments/eight_gpus.py --data shards --out results --gpus 4        # or any other even number
    python tools/experiments/eight_gpus.py --data shards --out results --gpus 2 --tiny # a rehearsal on processors

In order: a tokenizer of 32,768 ids and tokens; ``lrt_24l`` as shipped but for its data and 60 steps, stopped by a
signal at step 25 and gone on with by the same command; ``baseline_24l`` for 20 steps; then side by side the checkpoint
of step 25 gone on with on half of the GPUs, one GPU at equal rows a GPU, the export in three memory modes, and its
conversion to Hugging Face with 50 decoded tokens. A ramp of 100 steps does not fit into 30, so it is 10 here.

``results.json`` is written after every part and says what was left out for want of time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

from host import Host, records

PHASES = (
    'schedule.phases=[{{until=0.5,kind="baseline"}},{{until=1.0,kind="mixture",ramp={ramp},mix=['
    '{{share=0.3,kind="baseline"}},'
    '{{share=0.7,kind="refine",passes=1,weights=[0.0,1.0],cut_gradient="initialization"}}]}}]'
)
TINY = (
    "model.n_layers=3", "model.width=32", "model.n_heads=2", "model.gate_channels=8", "recurrence.gate_channels=8",
    "model.sequence_length=64", "training.micro_batch=2", "evaluation.tokens=1024", "evaluation.batch=4",
    "parallel.compile=false", "parallel.param_dtype=float32", "data.workers=1", "optimizer.reference_batch_tokens=512",
)  # fmt: skip


class Size:
    """How much is done: as asked for, or of a rehearsal."""

    def __init__(self, gpus: int, *, tiny: bool) -> None:
        self.gpus, self.half, self.tiny = gpus, max(1, gpus // 2), tiny
        self.steps, self.stop, self.twin, self.more, self.one = (12, 5, 4, 3, 4) if tiny else (60, 25, 20, 8, 20)
        self.batch = 256 * gpus if tiny else 65536 * gpus
        self.vocabulary, self.megabytes = (320, 0.2) if tiny else (32768, 50)


def speeds(folder: Path, *, above: int = 0) -> dict[str, Any]:
    """Medians of the steps by schedule, without the first three of each kind after a start; loss and memory."""
    found = [r for r in records(folder) if r["step"] > above]
    by: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        by.setdefault(record["schedule"], []).append(record)
    result: dict[str, Any] = {"steps": [found[0]["step"], found[-1]["step"]] if found else []}
    for name, rows in by.items():
        kept = rows[3:] or rows
        result[name] = {
            key: statistics.median(r[key] for r in kept) for key in ("tokens_per_second", "mfu") if key in kept[0]
        }
        result[name]["most_data_wait"] = max(r["data_wait"] for r in kept)
    if found:
        result |= {"loss": [found[0]["loss"], found[-1]["loss"]], "tokens": found[-1]["tokens"]}
        result["peak_memory_gib"] = max(r["peak_memory_gib"] or 0.0 for r in found)
    return result


def estimate(host: Host, name: str, line: list[str], *, gpus: int) -> float | None:
    """GiB of one GPU by the dry run."""
    host.run(name, *line, "--dry-run", "--gpus", str(gpus))
    found = re.search(r"memory of one GPU, GiB: ([\d.]+)", (host.work / f"{name}.log").read_text())
    return float(found[1]) if found else None


def recipe_line(
    host: Host, size: Size, name: str, *sets: str, ramp: int | None = None, output: str = "runs"
) -> list[str]:
    """The command of a run, data given; ``ramp``: of a recipe with phases."""
    work = host.work
    given = [f"data.train={work / 'tokens'}", f"data.tokenizer={work / 'tokenizer'}", f"run.output={work / output}"]
    given += [f"data.validation={work / 'held_out.parquet'}"]
    given += [] if ramp is None else [PHASES.format(ramp=ramp)]
    if size.tiny:
        drop = ("recurrence",) if ramp is None else ()
        given += [f"model.vocab_size={size.vocabulary}", *(s for s in TINY if not s.startswith(drop))]
    return ["recipes/run.py", "--recipe", name, *(x for pair in (*given, *sets) for x in ("--set", pair))]


def train(host: Host, size: Size) -> None:
    """The recipe on all GPUs, stopped and gone on with, and its twin."""
    runs = host.work / "runs"
    lrt_sets = (f"training.steps={size.steps}", f"training.batch_tokens={size.batch}")
    line = recipe_line(host, size, "lrt_24l", *lrt_sets, ramp=2 if size.tiny else 10)
    host.keep(estimated_gib={"lrt_24l": estimate(host, "dry_run", line, gpus=size.gpus)})
    job = host.start("lrt_24l", *line, processes=size.gpus)
    if job is not None:
        job.stop_at(runs / "lrt_24l", size.stop)
    host.wait(job)
    for checkpoint in sorted((runs / "lrt_24l" / "checkpoints").glob("step_*"))[-1:]:  # the half goes on from it too
        beside = host.work / "half" / "lrt_24l"
        shutil.copytree(checkpoint, beside / "checkpoints" / checkpoint.name, copy_function=os.link)
        shutil.copy(runs / "lrt_24l" / "metrics.jsonl", beside)
        host.keep(stopped_at=records(beside)[-1]["step"], before_the_signal=speeds(beside))
    host.run("lrt_24l_again", *line, processes=size.gpus)
    with contextlib.suppress(FileNotFoundError):
        host.keep(about=json.loads((runs / "lrt_24l" / "run.json").read_text(encoding="utf-8")))
    host.keep(lrt_24l=speeds(runs / "lrt_24l", above=host.results.get("stopped_at", 0)))
    sets = (f"training.steps={size.twin}", f"training.batch_tokens={size.batch}", "checkpoint.export_at_end=false")
    twin = recipe_line(host, size, "baseline_24l", *sets)
    host.results["estimated_gib"]["baseline_24l"] = estimate(host, "dry_run_twin", twin, gpus=size.gpus)
    host.run("baseline_24l", *twin, processes=size.gpus)
    host.keep(baseline_24l=speeds(runs / "baseline_24l"))


def afterwards(host: Host, size: Size) -> None:
    """Side by side: half of the GPUs, one GPU, the export in three memory modes and as a Hugging Face folder."""
    work = host.work
    half, rest = range(size.half), range(size.half, size.gpus)
    steps = (f"training.steps={size.steps}", f"training.batch_tokens={size.batch}")
    ramp = 2 if size.tiny else 10
    on_half = host.start(
        "half", *recipe_line(host, size, "lrt_24l", *steps, ramp=ramp, output="half"), processes=size.half, gpus=half
    )
    single = (
        "run.name=one", f"training.steps={size.one}", f"training.batch_tokens={size.batch // size.gpus}",
        "checkpoint.export_at_end=false", "evaluation.modes=[\"zero\"]",
        f"evaluation.tokens={1024 if size.tiny else 16384}",
    )  # fmt: skip
    if on_half is not None:
        enough = host.results.get("stopped_at", 0) + size.more
        threading.Thread(target=on_half.stop_at, args=(work / "half" / "lrt_24l", enough), daemon=True).start()
    alone = host.start("one", *recipe_line(host, size, "lrt_24l", *single, ramp=2), processes=1, gpus=rest[:1])
    export = work / "runs" / "lrt_24l" / "export"
    scores = work / "scores.json"
    others = rest[2:] or rest[-1:]
    asked = ("--tokens", str(1024 if size.tiny else 131072), "--json", str(scores))
    scored = host.start("evaluate", "tools/evaluate.py", str(export), "--data", str(work / "held_out.parquet"), *asked,
                        processes=len(others), gpus=others)  # fmt: skip
    other = rest[1:2] or rest[-1:]
    convert = ("tools/convert.py", "--input", str(export), "--to", "hf", "--output", str(work / "hf"))
    host.run("convert", *convert, gpus=other)
    said = ("--prompt", "The ", "--max-new-tokens", "50", "--temperature", "0")
    if host.run("generate", "tools/generate.py", str(work / "hf"), *said, gpus=other):
        host.keep(decoded=(work / "generate.log").read_text(errors="replace")[-600:])
    if host.wait(scored):
        host.keep(scores=json.loads(scores.read_text()))
    host.wait(on_half)
    host.keep(half=speeds(work / "half" / "lrt_24l", above=host.results.get("stopped_at", 0)))
    host.wait(alone)
    host.keep(one=speeds(work / "runs" / "one"))


def conclude(host: Host) -> None:
    """The factors over one GPU and the memory beside the estimate."""
    results = host.results
    for name in ("lrt_24l", "half"):
        for schedule, one in results.get("one", {}).items():
            many = results.get(name, {}).get(schedule)
            if isinstance(one, dict) and isinstance(many, dict):
                many["x_one_gpu"] = many["tokens_per_second"] / one["tokens_per_second"]
    for name, expected in results.get("estimated_gib", {}).items():
        measured = results.get(name, {}).get("peak_memory_gib")
        if expected and measured:
            results[name]["memory_over_estimate"] = measured / expected
    host.keep()
    print(json.dumps({k: v for k, v in results.items() if k != "scores"}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of parquet shards with a column text")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json and work/")
    parser.add_argument("--gpus", type=int, default=8, help="of this host (default: 8)")
    parser.add_argument("--limit", type=float, default=535, help="seconds in all (default: 535)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on processors, in a tiny shape")
    options = parser.parse_args()
    shards = sorted(path.resolve() for path in Path(options.data).glob("*.parquet"))
    if len(shards) < 2 or options.gpus < 2:
        parser.error("--data needs two parquet files or more, the last of them held out, and --gpus 2 or more")
    size = Size(options.gpus, tiny=options.tiny)
    host = Host(options.out.resolve(), seconds=options.limit, processors=options.tiny)
    host.keep(gpus=size.gpus)
    (host.work / "held_out.parquet").symlink_to(shards[-1])
    (host.work / "shards").mkdir()
    for shard in shards[-1:] if size.tiny else shards[:-1]:
        (host.work / "shards" / shard.name).symlink_to(shard)
    source = ("--train", str(host.work / "shards"))
    sizes = ("--vocab-size", str(size.vocabulary), "--limit-mb", str(size.megabytes))
    tokenizer = str(host.work / "tokenizer")
    made = host.run("tokenizer", "tools/prepare_data.py", "train-tokenizer", *source, *sizes, "--output", tokenizer)
    corpus = ("--tokenizer", tokenizer, "--output", str(host.work / "tokens"))
    if made and host.run("tokenize", "tools/prepare_data.py", "tokenize", *source, *corpus):
        train(host, size)
        afterwards(host, size)
    conclude(host)
    return 0 if not host.results["left_out"] and not any(host.results["exit_codes"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
