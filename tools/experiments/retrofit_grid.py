"""Retrofit a pretrained decoder with memory, against a twin that trains on the same tokens without.

    python tools/experiments/retrofit_grid.py tokens MODEL_FOLDER TOKENS_FOLDER 'train_*.parquet' 'val_*.parquet'
    python tools/experiments/retrofit_grid.py run MODEL_FOLDER TOKENS_FOLDER results.jsonl --compile --seconds 400
    python tools/experiments/retrofit_grid.py table results.jsonl

``run`` trains the settings of GRID and the twin at every learning rate of the grid, chooses the setting of the lowest
``decode`` bits per byte on validation text, and repeats it and the best twin with three seeds (of the order of the rows:
memory starts at zero). A line is written after every run, and the same command skips what is written already. Twins see
the same rows in the same order under the same schedule of rates; all are scored in bfloat16 on the same validation tokens.

Several GPUs share the work, one process each, on one file of results:

    for i in 0 1 2 3; do CUDA_VISIBLE_DEVICES=$i python tools/experiments/retrofit_grid.py run ... --share $i/4 & done

On a GPU ``--compile`` trains as the trainer does (``lrt.train.distributed.graphs``): float32 masters, a working copy in bfloat16, and
forward and backward as one CUDA graph; ``--no-graphs`` trains under autocast, one kernel after the other.
"""

from __future__ import annotations

import argparse
import copy
import glob
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed works from any folder
from retrofit_training import bits_per_byte, free, prepare, share_one_graph, train  # noqa: E402

import lrt  # noqa: E402
from lrt.config import Recipe, RecipeError  # noqa: E402
from lrt.decoding import step as decoding  # noqa: E402
from lrt.eval.runs import read_records  # noqa: E402
from lrt.recurrence import RecurrentBlock  # noqa: E402
from lrt.serialization.decoders import open_decoder, open_tokenizer  # noqa: E402
from lrt.train.distributed.graphs import single_device  # noqa: E402
from lrt.train.distributed.world import World  # noqa: E402

RECIPE = "retrofit_smollm2.toml"


class Setting(NamedTuple):
    """What differs from the recipe, and the share of the tokens on which only the memory trains."""

    overrides: tuple[str, ...] = ()
    stage_1: float = 0.0


# At most eight, around the recipe. A stage 1 costs the backbone its tokens, so only one setting has it (docs/results.md).
MEMORY_RATE = "optimizer.adamw_memory_lr=3e-3"
GRID: dict[str, Setting] = {
    "refine 2, stage 1 of a fifth": Setting(stage_1=0.2),
    "refine 2": Setting(),
    "refine 2, memory lr 3e-3": Setting((MEMORY_RATE,)),
    "refine 2, lr 1e-3": Setting(("optimizer.adamw_lr=1e-3", MEMORY_RATE)),
    "refine 2, last pass heavier": Setting((MEMORY_RATE, "schedule.weights=[0.0, 0.2, 0.8]")),
    "refine 2, paper weights": Setting((MEMORY_RATE, "schedule.weights=paper")),
    "refine 1": Setting((MEMORY_RATE, "schedule.passes=1", "schedule.weights=[0.3, 0.7]")),
    "interleaved 2": Setting((MEMORY_RATE, "schedule.kind=interleaved", "schedule.weights=paper")),
}
TWINS: dict[str, Setting] = {f"twin, lr {lr}": Setting((f"optimizer.adamw_lr={lr}",)) for lr in ("3e-4", "1e-3", "1e-4")}


# ------------------------------------------------------------------ tokens


def make_tokens(model: Path, folder: Path, train: str, validation: str, *, separator: int, count: int, held_out: int) -> None:
    """Tokenize text once: a separator before every document, in one stream of uint16."""
    import pyarrow.parquet as parquet
    tokenizer = open_tokenizer(model)
    folder.mkdir(parents=True)
    for name, pattern, wanted in (("train", train, count), ("validation", validation, held_out)):
        stream: list[int] = []
        files = sorted(glob.glob(pattern))
        if not files:
            raise ValueError(f"no file matches {pattern!r}: give a glob of parquet files with a column 'text'")
        texts = (row for file in files for row in parquet.read_table(file, columns=["text"])["text"].to_pylist())
        for text in texts:
            stream += [separator, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            if len(stream) >= wanted:
                break
        np.save(folder / f"{name}.npy", np.array(stream[:wanted], dtype=np.uint16))
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    np.save(
        folder / "bytes.npy", np.array([0 if i in special else len(n) for i, n in enumerate(names)], dtype=np.uint8)
    )  # byte-level: a letter a byte


def rows_of(folder: Path, name: str, length: int, device: torch.device) -> Tensor:
    """(rows, length + 1) tokens, contiguous."""
    stream = torch.from_numpy(np.load(folder / f"{name}.npy").astype(np.int64))
    count = (len(stream) - 1) // length
    return torch.stack([stream[i * length : i * length + length + 1] for i in range(count)]).to(device)


# ------------------------------------------------------------------ the experiment


class Task(NamedTuple):
    """One run: what it is called, and what differs from the recipe."""

    phase: str  # start, grid or final
    name: str
    seed: int
    tokens: int
    overrides: tuple[str, ...] = ()
    stage_1: float = 0.0
    graphs: bool = False  # the runner's arithmetic differs from autocast's: one comparison has one of them

    @property
    def recurrent(self) -> bool:
        return not self.name.startswith("twin")

    @property
    def fields(self) -> dict[str, Any]:
        return {**self._asdict(), "overrides": list(self.overrides)}  # as JSON gives them back

    def is_written(self, line: dict[str, Any]) -> bool:
        return all(line.get(key) == value for key, value in self.fields.items())


class Experiment:
    """Runs tasks, writes a line each, and skips what a file holds already.

    Args:
        args: of the command line.
        recipe: with its overrides.
    """

    def __init__(self, args: argparse.Namespace, recipe: Recipe) -> None:
        torch.set_float32_matmul_precision("high")
        self.args, self.begin = args, time.perf_counter()
        self.lines = read_lines(args.results)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        length = recipe.model.sequence_length
        self.rows, self.held_out = (rows_of(args.tokens, name, length, self.device) for name in ("train", "validation"))
        self.sizes = torch.from_numpy(np.load(args.tokens / "bytes.npy").astype(np.int64)).to(self.device)
        self.graphs = args.compile and args.graphs and self.device.type == "cuda"
        one = args.compile and not self.graphs
        self.compiled = torch.compile(RecurrentBlock.forward, fullgraph=True, dynamic=False) if one else None
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # windows, memory or none, stages, stores
        self.pristine = open_decoder(args.model, dtype=torch.float32).to(self.device)
        self.runner: decoding.Runner = getattr(decoding, args.decode)

    def done(self, task: Task) -> dict[str, Any] | None:
        """The line of a task that was run before."""
        return next((line for line in self.lines if task.is_written(line)), None)

    def run(self, task: Task, *, until: float) -> dict[str, Any] | None:
        """The task's line; None where it would not end within ``until`` seconds of this call of the tool."""
        found = self.done(task)
        if found is not None:
            return found
        deadline = self.begin + until - self._seconds_of_scores(task)
        if time.perf_counter() + self._seconds_of_training(task) > deadline:
            return None
        free()  # the run before
        recipe = lrt.load_recipe(RECIPE, overrides=[*self.args.overrides, *task.overrides])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = prepare(copy.deepcopy(self.pristine), recipe, recurrent=task.recurrent)
        if self.compiled is not None:
            share_one_graph(model, self.compiled)
        world = World(0, 1, self.device, sharded=False, working_copy=True)
        more: dict[str, Any] = {"make_runner": partial(single_device, config=recipe.parallel, world=world) if task.graphs else None}
        more |= {"seed": task.seed, "tokens": task.tokens, "stage_1": task.stage_1, "deadline": deadline}
        seconds = train(model, recipe, self.rows, **more) if task.tokens else 0.0
        if self.compiled is not None:
            for block in model.blocks:
                del block.forward
        if seconds is None:
            return None
        line = {**task.fields, "train_seconds": round(seconds, 2)}
        start = time.perf_counter()
        line |= self._scores(model, recipe)
        line["evaluation_seconds"] = round(time.perf_counter() - start, 2)
        line["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device.type == "cuda" else 0.0
        self.lines.append(line)
        write_line(self.args.results, line)
        print(json.dumps(line), flush=True)
        return line

    def _scores(self, model: Any, recipe: Recipe) -> dict[str, float]:
        """Bits per byte; a decoder that cannot be captured as a graph is scored without one from then on."""
        try:
            return bits_per_byte(model, recipe, self.held_out, self.sizes, runner=self.runner)
        except RuntimeError as error:
            if self.runner is decoding.eager:
                raise
            print(f"--decode graphed failed ({str(error).splitlines()[0]}): eager from here on", file=sys.stderr, flush=True)
            self.runner = decoding.eager
            return bits_per_byte(model, recipe, self.held_out, self.sizes, runner=self.runner)

    def wait_for(self, tasks: Sequence[Task], *, until: float) -> list[dict[str, Any]]:
        """The lines of tasks that ran; none where others run shares of them and not all have ended ``until`` seconds from the start."""
        waiting = False
        while True:
            found = [line for task in tasks if (line := self.done(task))]
            if self.args.share[1] == 1 or len(found) == len(tasks):
                return found
            if time.perf_counter() - self.begin > until:
                print(f"{len(tasks) - len(found)} runs of other shares are missing: nothing is chosen", file=sys.stderr, flush=True)
                return []
            if not waiting:
                print(f"waiting for {len(tasks) - len(found)} runs of other shares", file=sys.stderr, flush=True)
            waiting = True
            time.sleep(1)
            self.lines = read_lines(self.args.results)

    def seconds_of(self, task: Task) -> float:
        """What a run would take, as far as its likes tell; 0 where it is written already."""
        return 0.0 if self.done(task) else self._seconds_of_training(task) + self._seconds_of_scores(task)

    def _seconds_of_training(self, task: Task) -> float:
        """At the best speed of its likes so far (the first compiled); 0 where there is none."""
        likes = [line for line in self.lines if line["tokens"] and ("plain" not in line) == task.recurrent]
        same = [line for line in likes if line["name"] == task.name] or likes
        return task.tokens * min((line["train_seconds"] / line["tokens"] for line in same), default=0.0)

    def _seconds_of_scores(self, task: Task) -> float:
        return 1.2 * max((line["evaluation_seconds"] for line in self.lines if ("plain" not in line) == task.recurrent), default=10.0)


def write_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line; one that was cut short by a kill is ended first."""
    cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return read_records(path) if path.is_file() else []


def experiment(args: argparse.Namespace, recipe: Recipe) -> None:
    """The whole comparison, or as much of it as the time allows."""
    bench = Experiment(args, recipe)
    share, shares = args.share
    final = args.final_tokens or recipe.training.tokens or 0
    make = partial(_task, common=tuple(args.overrides), graphs=bench.graphs)
    tasks = [make("start", name, 0, 0, Setting()) for name in ("twin", "adapted")]
    tasks += [make("grid", name, 0, args.grid_tokens, setting) for name, setting in {**TWINS, **GRID}.items()]
    until = min(args.seconds, args.grid_seconds)
    for task in tasks[share::shares]:
        bench.run(task, until=until)
    grid = [line for line in bench.wait_for(tasks, until=until) if line["phase"] == "grid"]
    twins, settings = ([x for x in grid if math.isfinite(x.get(mode, math.nan))] for mode in ("plain", "decode"))
    if twins and settings:
        chosen = min(settings, key=lambda x: x["decode"])["name"]
        twin = min(twins, key=lambda x: x["plain"])["name"]
        for seed in range(1, args.seeds + 1)[share::shares]:  # in pairs: one without the other says nothing
            ours, theirs = make("final", chosen, seed, final, GRID[chosen]), make("final", twin, seed, final, TWINS[twin])
            if bench.run(ours, until=args.seconds - bench.seconds_of(theirs)) is None or bench.run(theirs, until=args.seconds) is None:
                break
    print(table(read_lines(args.results)))
    print(f"{time.perf_counter() - bench.begin:.0f} s; what is missing runs by the same command")


def _task(phase: str, name: str, seed: int, tokens: int, setting: Setting, *, common: tuple[str, ...], graphs: bool) -> Task:
    return Task(phase, name, seed, tokens, (*common, *setting.overrides), setting.stage_1, graphs)


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, as in 0/4")
    return int(index), int(count)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Bits per byte of every run by memory mode, and per seed what the memory changed, in markdown."""
    modes = ("zero", "parallel", "decode")
    text = ["| phase | setting | seed | tokens | zero | parallel | **decode** | twin (no memory) | training s |", "|" + "---|" * 9]
    for x in lines:
        scores = [f"{x[mode]:.4f}" if mode in x else "" for mode in (*modes, "plain")]
        text.append(f"| {x['phase']} | {x['name']} | {x['seed']} | {x['tokens']:,} | {' | '.join(scores)} | {x['train_seconds']:.0f} |")
    final = [x for x in lines if x["phase"] == "final"]
    like = ("tokens", "graphs")  # only runs of one length and arithmetic are compared
    twins = {(x["seed"], *map(x.get, like)): x["plain"] for x in final if "plain" in x}
    kinds = dict.fromkeys((x["name"], *map(x.get, like)) for x in final if "decode" in x)
    for name, tokens, graphs in kinds:
        ours = [x for x in final if (x["name"], *map(x.get, like)) == (name, tokens, graphs)]
        pairs = [(x, twins[x["seed"], tokens, graphs]) for x in ours if (x["seed"], tokens, graphs) in twins]
        for mode in modes if pairs else ():
            gaps = [x[mode] - twin for x, twin in pairs]
            spread = f", standard deviation {statistics.stdev(gaps):.4f}" if len(gaps) > 1 else ""
            each = ", ".join(f"{gap:+.4f}" for gap in gaps)
            text.append(f"\n{name}, {tokens:,} tokens, {mode} minus twin, bits per byte: {statistics.mean(gaps):+.4f}{spread} (by seed: {each})")
    return "\n".join(text)


# ------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="tokenize the text once")
    run = commands.add_parser("run", help="train and score")
    show = commands.add_parser("table", help="print the table of results")
    show.add_argument("results", type=Path)
    for command in (tokens, run):
        command.add_argument("model", type=Path, help="Hugging Face folder of the decoder")
        command.add_argument("tokens", type=Path, help="folder of the tokens")
    tokens.add_argument("train")
    tokens.add_argument("validation")
    tokens.add_argument("--count", type=int, default=8_100_000)
    run.add_argument("results", type=Path)
    run.add_argument("--grid-tokens", type=int, default=1_000_000)
    run.add_argument("--final-tokens", type=int, default=None, help="of each run with seeds; default: the recipe's")
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--seconds", type=float, default=math.inf, help="end within so many; the same command goes on")
    run.add_argument("--grid-seconds", type=float, default=math.inf, help="choose among what the grid has by then; shares: all or none")
    run.add_argument("--share", type=_share, default=(0, 1), metavar="I/N", help="run the I-th of N shares, from 0; other processes run the others")
    run.add_argument("--decode", choices=["graphed", "eager"], default="graphed", help="how single tokens run")
    run.add_argument("--compile", action="store_true", help="compile the blocks, which share graphs; on a GPU a step is one CUDA graph")
    run.add_argument("--no-graphs", action="store_false", dest="graphs", help="compiled blocks under autocast, without CUDA graphs")
    run.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    args = parser.parse_args(arguments)
    try:
        recipe = lrt.load_recipe(RECIPE, overrides=getattr(args, "overrides", []))
        if args.command == "table":
            print(table(read_records(args.results)))
        elif args.command == "tokens":
            separator = (recipe.recurrence.separator if recipe.recurrence else None) or 0
            length = recipe.evaluation.tokens + 1
            make_tokens(args.model, args.tokens, args.train, args.validation, separator=separator, count=args.count, held_out=length)
        else:
            experiment(args, recipe)
    except (RecipeError, ValueError, OSError) as error:
        print(f"error: {error}" if isinstance(error, RecipeError) else f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
