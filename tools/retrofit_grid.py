"""Retrofit a pretrained decoder with memory, against a twin that trains on the same tokens without.

    python tools/retrofit_grid.py tokens MODEL_FOLDER TOKENS_FOLDER 'train_*.parquet' 'val_*.parquet'
    python tools/retrofit_grid.py run MODEL_FOLDER TOKENS_FOLDER results.jsonl --compile --seconds 400
    python tools/retrofit_grid.py table results.jsonl

``run`` trains the settings of GRID and the twin at every learning rate of the grid, chooses the setting of the lowest
``decode`` bits per byte on validation text, and repeats it and the best twin with three seeds (of the order of the rows:
memory starts at zero). A line is written after every run, and the same command skips what is written already. Twins see
the same rows in the same order under the same schedule of rates; all are scored in bfloat16 on the same validation tokens.
"""

from __future__ import annotations

import argparse
import copy
import gc
import glob
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed works from any folder
import lrt  # noqa: E402
from lrt import decoding  # noqa: E402
from lrt.config import Recipe, RecipeError  # noqa: E402
from lrt.model import LatentRecurrentModel  # noqa: E402
from lrt.recurrence import RecurrentBlock  # noqa: E402
from lrt.schedules import from_config  # noqa: E402
from lrt.scoring import score  # noqa: E402
from lrt.train.metrics import read_records  # noqa: E402

RECIPE = "retrofit_smollm2.toml"
STAGE_1 = 0.2  # of the tokens: only the memory trains
# At most eight: what differs from the recipe.
GRID: dict[str, tuple[str, ...]] = {
    "refine 2": (),
    "refine 2, lr 3e-4": ("optimizer.adamw_lr=3e-4",),
    "refine 2, memory lr 3e-3": ("optimizer.adamw_memory_lr=3e-3",),
    "refine 2, lr 3e-5": ("optimizer.adamw_lr=3e-5",),
    "refine 2, paper weights": ("schedule.weights=paper",),
    "refine 1": ("schedule.passes=1", "schedule.weights=[0.3, 0.7]"),
    "interleaved 2": ("schedule.kind=interleaved", "schedule.weights=paper"),  # this and the next compile graphs of their own
    "refine 2, layerwise": ("recurrence.sharing=layerwise",),
}
TWINS: dict[str, tuple[str, ...]] = {f"twin, lr {lr}": (f"optimizer.adamw_lr={lr}",) for lr in ("3e-5", "1e-4", "3e-4")}


# ------------------------------------------------------------------ tokens


def make_tokens(model: Path, folder: Path, train: str, validation: str, *, separator: int, count: int, held_out: int) -> None:
    """Tokenize text once: a separator before every document, in one stream of uint16."""
    import pyarrow.parquet as parquet
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
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


# ------------------------------------------------------------------ one run


def prepare(decoder: Any, recipe: Recipe, *, recurrent: bool) -> Any:
    """The decoder with memory, or its twin: the same blocks under the same code without any."""
    model = lrt.adapt(decoder, recipe.recurrence if recurrent else lrt.RecurrenceConfig(init="identity", kv_projection=False))
    if not recurrent:
        model = LatentRecurrentModel(model.backbone, [block.block for block in model.blocks], None)
    model.backbone.loss_chunk = recipe.parallel.loss_chunk
    return model


def train(model: Any, recipe: Recipe, rows: Tensor, *, seed: int, tokens: int, deadline: float = math.inf) -> float | None:
    """Train in place for ``tokens`` tokens; returns seconds, or None where the deadline came before the end."""
    optimizer_settings, batch = recipe.optimizer, recipe.training.batch_tokens // recipe.model.sequence_length
    steps = tokens // recipe.training.batch_tokens
    memory = model.memory_parameters()
    added = {id(p) for p in memory.values()}
    backbone = [p for p in model.parameters() if id(p) not in added]
    groups = [{"params": backbone, "rate": optimizer_settings.adamw_lr}]
    if memory:
        groups.append({"params": list(memory.values()), "rate": optimizer_settings.adamw_memory_lr or optimizer_settings.adamw_lr})
    fused = rows.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optimizer_settings.betas, eps=optimizer_settings.eps, weight_decay=0.0, fused=fused)
    schedule = from_config(recipe.schedule) if memory else lrt.baseline()
    model.train()
    order = batches(len(rows), batch, seed)
    first = int(STAGE_1 * steps) if memory else 0
    _wait(rows.device)
    start = time.perf_counter()
    for step in range(steps):
        if step % 8 == 0:  # otherwise the host runs ahead of the device, and of the deadline
            _wait(rows.device)
            if time.perf_counter() > deadline:
                return None
        for parameter in backbone:
            parameter.requires_grad_(step >= first)
        rate = min((step + 1) / (recipe.training.warmup_steps + 1), (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        chosen = rows[next(order)]
        for part in chosen.split(recipe.training.micro_batch):
            with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
                loss = model(part[:, :-1], targets=part[:, 1:], schedule=schedule).loss
            (loss * len(part) / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], recipe.training.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    _wait(rows.device)
    return time.perf_counter() - start


def batches(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, the same for every model of a seed."""
    if rows < batch:
        raise ValueError(f"{rows} rows of text, but a batch has {batch}: make more tokens (--count), or lower training.batch_tokens")
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (part for part in torch.randperm(rows, generator=generator).split(batch) if len(part) == batch)


@torch.no_grad()
def bits_per_byte(model: Any, recipe: Recipe, rows: Tensor, sizes: Tensor, *, runner: decoding.Runner) -> dict[str, float]:
    """Validation bits per byte in each memory mode; the twin has one, ``plain``."""
    kept = copy.deepcopy(model).to(torch.bfloat16).eval() if rows.device.type == "cuda" else copy.deepcopy(model).eval()
    recurrent = kept.recurrence is not None
    schedules = {"zero": lrt.baseline(), "parallel": from_config(recipe.schedule)} if recurrent else {"plain": lrt.baseline()}
    nats: dict[str, float] = dict.fromkeys([*schedules, "decode"] if recurrent else schedules, 0.0)
    total = 0
    for part in rows.split(recipe.evaluation.batch):
        ids, targets = part[:, :-1], part[:, 1:]
        counted = sizes[targets] > 0
        total += int(sizes[targets].sum())
        each = {name: kept.score(ids, targets, schedule)[-1] for name, schedule in schedules.items()}
        if recurrent:
            each["decode"] = score(kept, ids, targets, runner=runner)[0]
        for name, values in each.items():
            nats[name] += float(values.double().mul(counted).sum())
    return {name: value / math.log(2) / total for name, value in nats.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def share_one_graph(model: Any, compiled: Any) -> None:
    """One compiled forward for all blocks: their parameters are its inputs."""
    for block in model.blocks:
        block.forward = lambda *args, block=block: compiled(block, *args)


# ------------------------------------------------------------------ the experiment


class Task(NamedTuple):
    """One run: what it is called, and what differs from the recipe."""

    phase: str  # start, grid or final
    name: str
    seed: int
    tokens: int
    overrides: tuple[str, ...] = ()

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
        from transformers import AutoModelForCausalLM

        torch.set_float32_matmul_precision("high")
        self.args, self.begin = args, time.perf_counter()
        self.lines = read_lines(args.results)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        length = recipe.model.sequence_length
        self.rows, self.held_out = (rows_of(args.tokens, name, length, self.device) for name in ("train", "validation"))
        self.sizes = torch.from_numpy(np.load(args.tokens / "bytes.npy").astype(np.int64)).to(self.device)
        self.compiled = torch.compile(RecurrentBlock.forward, fullgraph=True, dynamic=False) if args.compile else None
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # windows, memory or none, stages, stores
        self.pristine = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(self.device)
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
        gc.collect()  # the run before: models hold cycles
        recipe = lrt.load_recipe(RECIPE, overrides=[*self.args.overrides, *task.overrides])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = prepare(copy.deepcopy(self.pristine), recipe, recurrent=task.recurrent)
        if self.compiled is not None:
            share_one_graph(model, self.compiled)
        seconds = train(model, recipe, self.rows, seed=task.seed, tokens=task.tokens, deadline=deadline) if task.tokens else 0.0
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
    common = tuple(args.overrides)
    final = args.final_tokens or recipe.training.tokens or 0
    tasks = [Task("start", "twin", 0, 0, common), Task("start", "adapted", 0, 0, common)]
    tasks += [Task("grid", name, 0, args.grid_tokens, (*common, *more)) for name, more in {**TWINS, **GRID}.items()]
    grid = [line for task in tasks if (line := bench.run(task, until=min(args.seconds, args.grid_seconds))) and line["phase"] == "grid"]
    twins, settings = ([x for x in grid if math.isfinite(x.get(mode, math.nan))] for mode in ("plain", "decode"))
    if twins and settings:
        chosen = min(settings, key=lambda x: x["decode"])["name"]
        twin = min(twins, key=lambda x: x["plain"])["name"]
        for seed in range(1, args.seeds + 1):
            for name, more in ((chosen, GRID), (twin, TWINS)):
                bench.run(Task("final", name, seed, final, (*common, *more[name])), until=args.seconds)
    print(table(bench.lines))
    print(f"{time.perf_counter() - bench.begin:.0f} s; what is missing runs by the same command")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Bits per byte of every run by memory mode, and per seed what the memory changed, in markdown."""
    modes = ("zero", "parallel", "decode")
    text = ["| phase | setting | seed | tokens | zero | parallel | **decode** | twin (no memory) | training s |", "|" + "---|" * 9]
    for x in lines:
        scores = [f"{x[mode]:.4f}" if mode in x else "" for mode in (*modes, "plain")]
        text.append(f"| {x['phase']} | {x['name']} | {x['seed']} | {x['tokens']:,} | {' | '.join(scores)} | {x['train_seconds']:.0f} |")
    final = [x for x in lines if x["phase"] == "final"]
    twins = {(x["seed"], x["tokens"]): x["plain"] for x in final if "plain" in x}
    for name, tokens in sorted({(x["name"], x["tokens"]) for x in final if "decode" in x}):
        pairs = [(x, twins[x["seed"], tokens]) for x in final if (x["name"], x["tokens"]) == (name, tokens) and (x["seed"], tokens) in twins]
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
    run.add_argument("--grid-seconds", type=float, default=math.inf, help="choose among what the grid has by then")
    run.add_argument("--decode", choices=["graphed", "eager"], default="graphed", help="how single tokens run")
    run.add_argument("--compile", action="store_true", help="compile one graph for all blocks")
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
