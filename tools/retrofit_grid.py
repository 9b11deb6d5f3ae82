"""Retrofit a pretrained decoder with memory, against a twin that trains on the same tokens without.

    python tools/retrofit_grid.py tokens MODEL_FOLDER TOKENS_FOLDER 'train_*.parquet' 'val_*.parquet'
    python tools/retrofit_grid.py run MODEL_FOLDER TOKENS_FOLDER results.jsonl

``run`` trains the settings of GRID and the twin at every learning rate of the grid, chooses the setting of the lowest
``decode`` bits per byte on validation text, and repeats it and the best twin with three seeds. A line is written after
every run. Twins see the same rows in the same order; both are scored in bfloat16 on the same validation tokens.
"""

from __future__ import annotations

import argparse
import copy
import glob
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lrt
from lrt import decoding
from lrt.config import Recipe, RecipeError
from lrt.recurrence import RecurrentBlock
from lrt.schedules import from_config
from lrt.scoring import score

RECIPE = "retrofit_smollm2.toml"
STAGE_1 = 0.2  # of the tokens: only the memory trains
# At most eight: what differs from the recipe.
GRID: dict[str, tuple[str, ...]] = {
    "refine 2": (),
    "refine 2, lr 3e-5": ("optimizer.adamw_lr=3e-5",),
    "refine 2, lr 3e-4": ("optimizer.adamw_lr=3e-4",),
    "refine 2, memory lr 3e-3": ("optimizer.adamw_memory_lr=3e-3",),
    "refine 2, layerwise": ("recurrence.sharing=layerwise",),
    "refine 1": ("schedule.passes=1", "schedule.weights=[0.3, 0.7]"),
    "interleaved 2": ("schedule.kind=interleaved", "schedule.weights=paper"),
    "refine 2, paper weights": ("schedule.weights=paper",),
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


def train(model: Any, recipe: Recipe, rows: Tensor, *, seed: int, tokens: int) -> float:
    """Train in place for ``tokens`` tokens; returns seconds."""
    optimizer_settings, batch = recipe.optimizer, recipe.training.batch_tokens // recipe.model.sequence_length
    steps = tokens // recipe.training.batch_tokens
    memory = model.memory_parameters() if isinstance(model, lrt.LatentRecurrentModel) else {}
    added = {id(p) for p in memory.values()}
    backbone = [p for p in model.parameters() if id(p) not in added]
    groups = [{"params": backbone, "rate": optimizer_settings.adamw_lr}]
    if memory:
        groups.append({"params": list(memory.values()), "rate": optimizer_settings.adamw_memory_lr or optimizer_settings.adamw_lr})
    fused = rows.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optimizer_settings.betas, eps=optimizer_settings.eps, weight_decay=0.0, fused=fused)
    schedule = from_config(recipe.schedule)
    model.train()
    order = batches(len(rows), batch, seed)
    first = int(STAGE_1 * steps) if memory else 0
    _wait(rows.device)
    start = time.perf_counter()
    for step in range(steps):
        for parameter in backbone:
            parameter.requires_grad_(step >= first)
        rate = min((step + 1) / (recipe.training.warmup_steps + 1), (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        chosen = rows[next(order)]
        for part in chosen.split(recipe.training.micro_batch):
            with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
                if memory:
                    loss = model(part[:, :-1], targets=part[:, 1:], schedule=schedule).loss
                else:
                    logits = model(part[:, :-1]).logits
                    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
            (loss * len(part) / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], recipe.training.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    _wait(rows.device)
    return time.perf_counter() - start


def batches(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, the same for every model of a seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (part for part in torch.randperm(rows, generator=generator).split(batch) if len(part) == batch)


@torch.no_grad()
def bits_per_byte(model: Any, recipe: Recipe, rows: Tensor, sizes: Tensor, *, runner: decoding.Runner) -> dict[str, float]:
    """Validation bits per byte in each memory mode; a plain decoder has one."""
    kept = copy.deepcopy(model).to(torch.bfloat16).eval() if rows.device.type == "cuda" else copy.deepcopy(model).eval()
    schedules = {"zero": lrt.baseline(), "parallel": from_config(recipe.schedule)}
    nats: dict[str, float] = dict.fromkeys([*schedules, "decode"] if isinstance(kept, lrt.LatentRecurrentModel) else ["plain"], 0.0)
    total = 0
    for part in rows.split(recipe.evaluation.batch):
        ids, targets = part[:, :-1], part[:, 1:]
        counted = sizes[targets] > 0
        total += int(sizes[targets].sum())
        if "plain" in nats:
            logits = kept(ids).logits.float().flatten(0, 1)
            each = {"plain": torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)}
        else:
            each = {name: kept.score(ids, targets, schedule)[-1] for name, schedule in schedules.items()}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens")
    run = commands.add_parser("run")
    for command in (tokens, run):
        command.add_argument("model", type=Path)
        command.add_argument("tokens", type=Path)
    tokens.add_argument("train")
    tokens.add_argument("validation")
    tokens.add_argument("--count", type=int, default=8_100_000)
    run.add_argument("results", type=Path)
    run.add_argument("--grid-tokens", type=int, default=1_000_000)
    run.add_argument("--final-tokens", type=int, default=None, help="of each run with seeds; default: the recipe's")
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--seconds", type=float, default=math.inf, help="start no run after so long")
    run.add_argument("--decode", choices=["graphed", "eager"], default="graphed", help="how single tokens run")
    run.add_argument("--compile", action="store_true")
    run.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    try:
        recipe = lrt.load_recipe(RECIPE, overrides=getattr(args, "overrides", []))
    except RecipeError as error:
        raise SystemExit(str(error)) from None
    if args.command == "tokens":
        separator = recipe.recurrence.separator if recipe.recurrence else 0
        make_tokens(
            args.model, args.tokens, args.train, args.validation, separator=separator or 0, count=args.count, held_out=recipe.evaluation.tokens + 1
        )
    else:
        experiment(args, recipe)


def experiment(args: argparse.Namespace, recipe: Recipe) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length = recipe.model.sequence_length
    rows, held_out = (rows_of(args.tokens, name, length, device) for name in ("train", "validation"))
    sizes = torch.from_numpy(np.load(args.tokens / "bytes.npy").astype(np.int64)).to(device)
    compiled = torch.compile(RecurrentBlock.forward, fullgraph=True, dynamic=False) if args.compile else None
    pristine = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    begin, table = time.perf_counter(), []

    def one(phase: str, name: str, overrides: tuple[str, ...], *, seed: int, tokens: int) -> None:
        if time.perf_counter() - begin > args.seconds:
            return
        settings = lrt.load_recipe(RECIPE, overrides=[*args.overrides, *overrides])
        model: Any = copy.deepcopy(pristine)
        recurrent = not name.startswith("twin")
        if recurrent:
            model = lrt.adapt(model, settings.recurrence)
            if compiled is not None:
                share_one_graph(model, compiled)
        seconds = train(model, settings, rows, seed=seed, tokens=tokens) if tokens else 0.0
        if recurrent and compiled is not None:
            for block in model.blocks:
                del block.forward
        line = {"phase": phase, "name": name, "seed": seed, "tokens": tokens, "train_seconds": round(seconds, 2)}
        start = time.perf_counter()
        line |= bits_per_byte(model, settings, held_out, sizes, runner=getattr(decoding, args.decode))
        line["evaluation_seconds"] = round(time.perf_counter() - start, 2)
        line["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else 0.0
        table.append(line)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    one("start", "twin", (), seed=0, tokens=0)
    one("start", "adapted", (), seed=0, tokens=0)
    for name, overrides in {**TWINS, **GRID}.items():
        one("grid", name, overrides, seed=0, tokens=args.grid_tokens)
    grid = [line for line in table if line["phase"] == "grid"]
    twins, settings = [x for x in grid if "plain" in x], [x for x in grid if "decode" in x]
    if not twins or not settings:
        return
    chosen = min(settings, key=lambda x: x["decode"])["name"]
    twin = min(twins, key=lambda x: x["plain"])["name"]
    final = args.final_tokens or recipe.training.tokens or 0
    for seed in range(1, args.seeds + 1):
        one("final", chosen, GRID[chosen], seed=seed, tokens=final)
        one("final", twin, TWINS[twin], seed=seed, tokens=final)


if __name__ == "__main__":
    main()
