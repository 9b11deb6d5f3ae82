"""Two or four GPUs of one host: speed against one, what runs beside nothing, scores, a changed number of ranks.

    python tools/experiments/several_gpus.py --data shards --out results --gpus 2
    python tools/experiments/several_gpus.py --data shards --out results --gpus 2 --tiny   # a rehearsal on processors

Parts, in order, each within what is left of ``--limit``: ``overlap`` (d20, FSDP2, overlap.py's candidates), ``decode``
(tools/evaluate.py in mode decode over all GPUs and over one), ``resume`` (plain, then narrow with memory: 2, 1, 2
ranks, or 2, 4, 1, across the border of the phases), ``faults`` (a killed rank), ``suite`` (the dist suite with NCCL),
``lrt_24l`` (20 steps, its memory beside the estimate). ``results.json`` is written after every part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from eight_gpus import PHASES, Size, estimate, recipe_line, speeds
from host import Host, records
from overlap import CANDIDATES

PARTS = ("overlap", "decode", "resume", "faults", "suite", "lrt_24l")
FOLDER = Path(__file__).parent


def overlap(host: Host, gpus: int, *, tiny: bool) -> None:
    """Steps of every candidate, and their factor over one GPU."""
    found: dict[str, Any] = {}
    for candidate in CANDIDATES:
        if candidate == "replicas" and gpus < 4 and not tiny:
            continue
        out = host.work / f"{candidate}.json"
        line = (str(FOLDER / "overlap.py"), "--candidate", candidate, "--out", str(out))
        host.run(candidate, *line, "--suite", "tiny" if tiny else "d20", processes=gpus, limit=100)
        with contextlib.suppress(FileNotFoundError):
            found[candidate] = json.loads(out.read_text())
    one = found.get("one")
    for candidate, many in found.items() if one is not None else ():
        if candidate != "one":
            for name, row in many["steps"].items():
                row["x"] = gpus * one["steps"][name]["ms"] / row["ms"]
            if "many" in many and "many" in one:
                many["many"]["x"] = gpus * one["many"]["ms"] / many["many"]["ms"]
    host.keep(overlap=found)
    for candidate, many in found.items():
        print(candidate, {n: {k: round(v, 3) for k, v in r.items()} for n, r in many["steps"].items()})
        print(candidate, "of many micro-batches:", many.get("many"))


def decode(host: Host, gpus: int, *, tiny: bool) -> None:
    """Seconds of scoring in mode decode; the difference of two sizes leaves captures and compilation out."""
    shape = (
        "model.n_layers=3,model.width=32,model.n_heads=2,model.gate_channels=8,recurrence.gate_channels=8,"
        "model.sequence_length=64,model.vocab_size=320" if tiny else ""
    )  # fmt: skip
    code = (
        "import sys, lrt\nfrom lrt.config import load_recipe\n"
        "sets = [f'data.tokenizer={sys.argv[2]}', *filter(None, sys.argv[3].split(','))]\n"
        "lrt.save(lrt.build(load_recipe('lrt_12l', overrides=sets)), sys.argv[1])"
    )
    model, tokenizer = str(host.work / "model"), str(host.work / "tokenizer")
    host.run("model", "-c", code, model, tokenizer, shape)
    rows, length = (2, 64) if tiny else (64, 2048)
    small, large = rows * gpus, rows * gpus * (2 if tiny else 5)
    data = str(next((host.work / "shards").glob("*.parquet")))
    seconds: dict[str, float] = {}
    for processes in (1, gpus):
        for size in (small, large):
            name, out = f"decode_{processes}_{size}", host.work / f"decode_{processes}_{size}.json"
            line = ("tools/evaluate.py", model, "--tokenizer", tokenizer, "--data", data, "--memory", "decode")
            sizes = ("--tokens", str(size * length), "--rows", str(rows), "--json", str(out))
            if host.run(name, *line, *sizes, processes=processes, limit=90):
                seconds[name] = json.loads(out.read_text())["seconds"]
    result: dict[str, Any] = {"rows": [small, large], "seconds": seconds}
    if len(seconds) == 4:
        took = {n: seconds[f"decode_{n}_{large}"] - seconds[f"decode_{n}_{small}"] for n in (1, gpus)}
        result |= {"seconds_of_the_difference": took, "x": took[1] / took[gpus]}
    host.keep(decode=result)
    print("decode", result)


def resume(host: Host, gpus: int, *, tiny: bool) -> None:
    """A whole run, and the same one with other numbers of ranks from two checkpoints on."""
    steps, cuts = (12, (4, 8)) if tiny else (24, (8, 16))
    counts = (2, 4, 1) if gpus >= 4 else (2, 1, 2)
    work, batch = host.work, 512 if tiny else 65536
    sets = [
        f"data.train={work / 'shards'}", f"data.validation={work / 'held_out.parquet'}",
        f"data.tokenizer={work / 'tokenizer'}", "data.workers=2", f"training.steps={steps}",
        f"training.batch_tokens={batch}", "training.micro_batch=8", f"checkpoint.every={cuts[0]}",
        "checkpoint.keep_last=9", "checkpoint.export_at_end=false", "metrics.every=1", "metrics.plot=false",
        f"evaluation.tokens={batch // 4}", "evaluation.modes=[\"zero\"]", "evaluation.sample_tokens=0", "run.name=run",
        PHASES.format(ramp=4),
    ]  # fmt: skip
    sets += [
        "model.n_layers=4", "model.width=32", "model.n_heads=2", "recurrence.blocks=[2,3,4]", "model.gate_channels=8",
        "recurrence.gate_channels=8", "model.sequence_length=64", "model.vocab_size=320", "parallel.compile=false",
        "parallel.param_dtype=float32",
    ] if tiny else ["model.n_layers=6", "model.width=512", "recurrence.blocks=[3,4,5,6]"]  # fmt: skip

    def run(name: str, folder: str, count: int) -> bool:
        pairs = [x for pair in (*sets, f"run.output={work / folder}") for x in ("--set", pair)]
        line = (str(FOLDER / "noted_run.py"), "--recipe", "lrt_12l", *pairs)
        return host.run(name, *line, processes=count, limit=200, PIECES=str(work / f"pieces_{name}"))

    def pieces(name: str, first: int, last: int, ran: int) -> list[str]:
        """Of the first ``last - first`` of ``ran`` steps, on all ranks."""
        found = []
        for file in work.glob(f"pieces_{name}.*"):
            lines = file.read_text().splitlines()
            found += [p for line in lines[: len(lines) * (last - first) // ran] for p in line.split("\t")]
        return found

    mixed = work / "mixed" / "run"
    if not run("whole", "whole", counts[0]):
        return
    read = pieces("whole", 0, cuts[0], steps)
    name = f"step_{cuts[0]:08d}"
    checkpoints = mixed / "checkpoints"
    shutil.copytree(work / "whole" / "run" / "checkpoints" / name, checkpoints / name, copy_function=os.link)
    shutil.copy(work / "whole" / "run" / "metrics.jsonl", mixed)
    if not run("second", "mixed", counts[1]):
        return
    read += pieces("second", cuts[0], cuts[1], steps - cuts[0])
    for later in checkpoints.glob("step_*"):
        if later.name > f"step_{cuts[1]:08d}":
            shutil.rmtree(later)
    if not run("third", "mixed", counts[2]):
        return
    read += pieces("third", cuts[1], steps, steps - cuts[1])
    ours, theirs = records(mixed), records(work / "whole" / "run")
    result = {
        "ranks": counts, "cuts": cuts, "border": steps // 2, "pieces": len(read),
        "read_twice": len(read) - len(set(read)), "loss": [round(r["loss"], 4) for r in ours],
        "loss_of_the_whole_run": [round(r["loss"], 4) for r in theirs],
        "same_schedules": [r["schedule"] for r in ours] == [r["schedule"] for r in theirs],
        "largest_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs)),
    }  # fmt: skip
    host.keep(resume=result)
    print("resume", result)


def tests(host: Host, name: str, *, limit: float, tiny: bool) -> None:
    """A part of the test suite on the GPUs."""
    marks = "dist" if tiny else "gpu and dist"
    chosen = ["tests/train/test_dist_faults.py", "-k", "killed_rank_restarts" + (" and cpu" if tiny else "")]
    if name == "suite":
        chosen = ["tests/train/test_dist_training.py", *(["-k", "cpu and mesh"] if tiny else [])]
    host.run(name, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, *chosen, limit=limit)
    log = host.work / f"{name}.log"
    host.keep(**{name: log.read_text(errors="replace").splitlines()[-12:] if log.exists() else "left out"})


def largest(host: Host, gpus: int, *, tiny: bool) -> None:
    """``lrt_24l`` for 20 steps."""
    size = Size(gpus, tiny=tiny)
    sets = (f"training.steps={4 if tiny else 20}", f"training.batch_tokens={size.batch}")
    more = ("checkpoint.export_at_end=false", 'evaluation.modes=["zero"]', "evaluation.tokens=32768")
    line = recipe_line(host, size, "lrt_24l", *sets, *more, ramp=2)
    expected = estimate(host, "dry_run", line, gpus=gpus)
    host.run("lrt_24l", *line, processes=gpus, limit=200)
    host.keep(lrt_24l={**speeds(host.work / "runs" / "lrt_24l"), "estimated_gib": expected})
    print("lrt_24l", host.results["lrt_24l"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of parquet shards with a column text")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json and work/")
    parser.add_argument("--gpus", type=int, default=2, help="of this host (default: 2)")
    parser.add_argument("--limit", type=float, default=560, help="seconds in all (default: 560)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in order")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on processors, in tiny shapes")
    options = parser.parse_args()
    shards = sorted(path.resolve() for path in Path(options.data).glob("*.parquet"))
    if len(shards) < 2 or options.gpus < 2:
        parser.error("--data needs two parquet files or more, the last of them held out, and --gpus 2 or more")
    host = Host(options.out.resolve(), seconds=options.limit, processors=options.tiny)
    size, what = Size(options.gpus, tiny=options.tiny), {"tiny": options.tiny}
    host.keep(gpus=options.gpus)
    (host.work / "held_out.parquet").symlink_to(shards[-1])
    (host.work / "shards").mkdir()
    (host.work / "shards" / shards[0].name).symlink_to(shards[0])
    tokenizer, source = str(host.work / "tokenizer"), str(host.work / "shards")
    prepare = ("tools/prepare_data.py", "train-tokenizer", "--train", source, "--output", tokenizer)
    made = None  # beside the first part, which needs none of it
    if {"decode", "resume", "lrt_24l"} & set(options.parts):
        sizes = ("--vocab-size", str(size.vocabulary), "--limit-mb", str(0.2 if options.tiny else 12))
        made = host.start("tokenizer", *prepare, *sizes)
    for part in PARTS:
        if part not in options.parts:
            continue
        if part != "overlap" and made is not None:
            host.wait(made)
            made = None
        if part == "overlap":
            overlap(host, options.gpus, **what)
        elif part == "decode":
            decode(host, options.gpus, **what)
        elif part == "resume":
            resume(host, options.gpus, **what)
        elif part == "lrt_24l":
            (host.work / "tokens").symlink_to(host.work / "shards")  # tokenized by the loader's workers
            largest(host, options.gpus, **what)
        else:
            tests(host, part, limit=200 if part == "faults" else 300, **what)
    host.keep()
    return 0 if not host.results["left_out"] and not any(host.results["exit_codes"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
