"""Which residual is small enough: the default tol of prefill.fixed_point, measured on a trained model.

    python tools/bench/prefill_tolerance.py --recipe lrt_tiny --out measured                     # trains first
    python tools/bench/prefill_tolerance.py --model runs/x/export --recipe runs/x/recipe.toml --out measured

One model, the same rows in both precisions: exact prefill, then for every number of groups residual, true error
of the memory, bits-per-byte gap to exact prefill and seconds after each sweep. Rows stop by themselves, so what
a tol would have given follows from its rows' residuals. Writes residuals.png and tolerance.json; the last line
is that JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lrt
from lrt.commands.options import at_least
from lrt.config import Recipe
from lrt.data import build_loader, load_tokenizer
from lrt.decoding import step as decoding
from lrt.decoding.prefill_passes import Span
from lrt.decoding.state import DecodeState
from lrt.eval.figures import figure
from lrt.loss import IGNORE
from lrt.model import LatentRecurrentModel
from lrt.tables import Table
from lrt.train.trainer import train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOLS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
GAP = 0.001  # bits per byte
FLOOR = 1e-7  # below it the figure shows nothing


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--recipe",
        default="lrt_tiny",
        help="of the model: its data are scored; trained first unless --model is given (default: lrt_tiny)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="a setting that wins over the recipe; may be given several times",
    )
    add("--model", metavar="FOLDER", help="a folder that lrt.save wrote")
    add("--out", metavar="FOLDER", default="measured", help="for residuals.png and tolerance.json (default: measured)")
    add("--rows", type=at_least(1), metavar="N", default=16, help="validation rows that are scored (default: 16)")
    add("--sweeps", type=at_least(1), metavar="N", default=8, help="sweeps at most (default: 8)")
    add(
        "--groups",
        type=at_least(1),
        metavar="N",
        nargs="+",
        default=[1, 2, 4, 8, 16],
        help="numbers of groups (default: 1 2 4 8 16)",
    )
    add(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16"],
        help="precisions (default: both)",
    )
    args = parser.parse_args(arguments)
    try:
        measure(args)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace) -> None:
    recipe, out = lrt.load_recipe(args.recipe, overrides=args.set), Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file; name a folder")
    if args.model is None:
        if recipe.recurrence is None:
            raise ValueError(
                f"--recipe {args.recipe}: a model without recurrence has nothing to measure; "
                "use one with a [recurrence] section"
            )
        train(recipe)
        args.model = newest_model(Path(recipe.run.output) / recipe.run.name)
    check(args.model, recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, targets, sizes = scored_rows(recipe, args.rows, device)
    result: Table = {"model": args.model, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    result |= {
        "rows": len(tokens),
        "tokens_a_row": tokens.shape[1],
        "exact": {},
        "by_sweep": [],
        "by_tol": [],
        "default": {},
    }
    for name in args.dtypes:
        model = lrt.load(args.model, dtype=getattr(torch, name), device=device)
        score = Scorer(model, targets, sizes)
        began = time.perf_counter()
        hidden, memory = run_exactly(model, tokens)
        nats = score(hidden)
        result["exact"][name] = {"bpb": score.bpb(nats), "seconds": round(time.perf_counter() - began, 2)}
        curves = {groups: sweep(model, tokens, memory, score, groups, args.sweeps) for groups in args.groups}
        for groups, curve in curves.items():
            result["by_sweep"] += [
                {
                    "dtype": name,
                    "groups": groups,
                    "sweeps": n,
                    "gap_bpb": score.bpb(point["nats"]) - score.bpb(nats),
                    **summary(point),
                }
                for n, point in enumerate(curve)
            ]
            for tol in TOLS:
                result["by_tol"].append(
                    {"dtype": name, "groups": groups, "tol": tol, **stopped(curve, tol, score, nats)}
                )
        table(name, [row for row in result["by_sweep"] if row["dtype"] == name], result["exact"][name])
        result["default"][name] = largest_tol([row for row in result["by_tol"] if row["dtype"] == name])
        print(
            f"{name}: largest tol whose gap is under {GAP} bpb for {args.groups} groups, "
            f"as are all smaller ones: {result['default'][name]}\n"
        )
        del model, score, hidden, memory
    out.mkdir(parents=True, exist_ok=True)
    picture(result["by_sweep"], out / "residuals.png")
    (out / "tolerance.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def check(folder: str, recipe: Recipe) -> None:
    """Refuse a model that cannot be measured on the recipe's data."""
    model = lrt.load(folder)
    if model.recurrence is None:
        raise ValueError(f"--model {folder}: a model without recurrence has nothing to measure")
    if model.vocab_size != recipe.model.vocab_size:
        raise ValueError(
            f"--model {folder} has {model.vocab_size} tokens, but the recipe's model.vocab_size is "
            f"{recipe.model.vocab_size}: name the recipe that it was trained with, --recipe"
        )


# ------------------------------------------------------------------ what is scored


def scored_rows(recipe: Recipe, rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Validation tokens, targets and the bytes of every target, each (rows, T)."""
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    length = recipe.model.sequence_length
    loader = build_loader(
        recipe.data, tokenizer=tokenizer, sequence_length=length, rows=rows, rank=0, world_size=1, seed=recipe.run.seed,
        split="validation", limit_tokens=rows * length,
    )  # fmt: skip
    batch = next(iter(loader))
    tokens, targets = batch.input_ids[:rows].to(device), batch.targets[:rows].to(device)
    sizes = torch.zeros(recipe.model.vocab_size, dtype=torch.int64)
    known = torch.from_numpy(tokenizer.token_bytes())
    sizes[: len(known)] = known
    return tokens, targets, torch.where(targets == IGNORE, 0, sizes.to(device)[targets.clamp_min(0)])


class Scorer:
    """Nats of each row, and bits per byte of all of them."""

    def __init__(self, model: LatentRecurrentModel, targets: torch.Tensor, sizes: torch.Tensor) -> None:
        self.model, self.targets, self.sizes = model, targets, sizes
        self.bytes = int(sizes.sum())

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> list[float]:
        nats = self.model.backbone.loss(hidden, self.targets)[1].double()
        return torch.where(self.sizes > 0, nats, 0.0).sum(1).tolist()

    def bpb(self, nats: list[float]) -> float:
        return sum(nats) / (math.log(2) * self.bytes)


# ------------------------------------------------------------------ runs


@torch.no_grad()
def run_exactly(model: LatentRecurrentModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: the last block's output and the memory, each (B, T, D)."""
    batch, length = tokens.shape
    state = DecodeState.empty(model, batch=batch, capacity=length)
    assert state.memory is not None
    active = torch.ones(batch, dtype=torch.bool, device=tokens.device)
    column = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    hidden, memory = (state.memory.new_zeros(batch, length, model.backbone.width) for _ in range(2))

    def step() -> None:
        out = decoding.stepper_of(model).step(state, tokens.index_select(1, column)[:, 0], active)
        hidden.index_copy_(1, column, out[:, None])
        memory.index_copy_(1, column, state.memory[:, None])
        column.add_(active.any())

    run = decoding.graphed(step, active)
    for _ in range(length):
        run()
    return hidden, memory


@torch.no_grad()
def sweep(
    model: LatentRecurrentModel, tokens: torch.Tensor, exact: torch.Tensor, score: Scorer, groups: int, most: int
) -> list[dict]:
    """After the first forward and after every sweep: per row residual, error of the memory and nats;
    seconds of all rows so far."""
    batch, length = tokens.shape
    counts = torch.full((batch,), length, dtype=torch.int64, device=tokens.device)
    state, rows = DecodeState.empty(model, batch=batch, capacity=1), list(range(batch))
    curve, seconds = [], 0.0
    for number in range(min(most, math.ceil((length - 1) / groups)) + 1):
        began = now()
        if number == 0:
            span, residual = Span(model, state, tokens, counts), None
            span.first()
        else:
            residual = span.round(rows, groups=groups, number=number - 1, longest=length)
        seconds += now() - began
        began = now()
        hidden = span.finish()
        last = now() - began
        error = (span.memory[:, 1:].float() - exact.float()).norm(dim=-1) / exact.float().norm(dim=-1)
        curve.append(
            {
                "residual": residual, "nats": score(hidden), "largest_error": error.amax(1).tolist(),
                "mean_error": error.mean(1).tolist(), "seconds": seconds + last,
            }
        )  # fmt: skip
    return curve


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ------------------------------------------------------------------ what it says


def summary(point: dict) -> dict:
    """One number for all rows."""
    found = {"residual": None, "mean_residual": None}  # of the first forward there is none
    if point["residual"] is not None:
        found = {"residual": max(point["residual"]), "mean_residual": mean(point["residual"])}
    error = {"largest_error": max(point["largest_error"]), "mean_error": mean(point["mean_error"])}
    return found | error | {"seconds": round(point["seconds"], 4)}


def stopped(curve: list[dict], tol: float, score: Scorer, exact: list[float]) -> dict:
    """What fixed_point with this tol would have given: each row ends at the first sweep whose residual is within it."""
    rows = range(len(exact))
    ends = [
        next((n for n, point in enumerate(curve) if n and point["residual"][row] <= tol), len(curve) - 1)
        for row in rows
    ]
    nats = [curve[end]["nats"][row] for row, end in zip(rows, ends)]
    reached = sum(curve[end]["residual"][row] <= tol for row, end in zip(rows, ends))
    return {
        "gap_bpb": score.bpb(nats) - score.bpb(exact),
        "mean_sweeps": mean(ends),
        "most_sweeps": max(ends),
        "unconverged": len(ends) - reached,
    }


def largest_tol(rows: list[dict]) -> float | None:
    """The largest tol whose gap is small with every number of groups, as is that of every smaller tol."""
    best = None
    for tol in sorted({row["tol"] for row in rows}):
        if any(abs(row["gap_bpb"]) >= GAP for row in rows if row["tol"] == tol):
            break
        best = tol
    return best


def table(dtype: str, rows: list[dict], exact: dict) -> None:
    groups = sorted({row["groups"] for row in rows})
    print(
        f"{dtype}: exact {exact['bpb']:.5f} bpb in {exact['seconds']} s; "
        "gap in bpb (largest residual, largest error of the memory; ms) by sweep"
    )
    print("sweeps  " + "".join(f"{f'groups {g}':^40}" for g in groups))
    for sweeps in range(max(row["sweeps"] for row in rows) + 1):
        cells = []
        for g in groups:
            row = next((row for row in rows if (row["groups"], row["sweeps"]) == (g, sweeps)), None)
            change = "-" if row is None or row["residual"] is None else f"{row['residual']:.2g}"
            cells.append(
                ""
                if row is None
                else f"{row['gap_bpb']:+.1e} ({change}, {row['largest_error']:.2g}; {row['seconds'] * 1e3:.0f})"
            )
        print(f"{sweeps:6d}  " + "".join(f"{cell:^40}" for cell in cells))


def picture(rows: list[dict], path: Path) -> None:
    """Residual, error and gap by sweep: one column per precision, one line per number of groups."""
    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    sweeps = sorted({row["sweeps"] for row in rows})
    panels = (
        ("residual", "largest change of the memory"),
        ("largest_error", "largest error of the memory"),
        ("gap_bpb", "|gap to exact|, bits per byte"),
    )
    try:
        with figure(path, rows=3, columns=len(dtypes), size=(4.8 * len(dtypes), 8.0)) as axes:
            for column, dtype in enumerate(dtypes):
                for line, (key, label) in enumerate(panels):
                    panel = axes[line][column]
                    _lines(panel, [row for row in rows if row["dtype"] == dtype and row[key] is not None], key)
                    panel.set(title=dtype if line == 0 else "", xlabel="sweep", ylabel="" if column else label)
                    lowest = min(max(abs(row[key]), FLOOR) for row in rows if row[key] is not None)
                    panel.set_ylim(lowest / 2, 2.0)
                    panel.set_xlim(sweeps[0] - 0.2, sweeps[-1] + 0.2)
                axes[2][column].axhline(GAP, color="black", linestyle=":", linewidth=1.2)
            handles = axes[0][0].get_legend_handles_labels()
            axes[0][0].figure.legend(*handles, loc="outside lower center", ncols=len(handles[1]))
    except ValueError as error:  # no matplotlib
        print(f"no picture: {error}", file=sys.stderr)


def _lines(panel: Axes, rows: list[dict], key: str) -> None:
    for marker, groups in zip("osD^vP*X", sorted({row["groups"] for row in rows})):
        mine = [row for row in rows if row["groups"] == groups]
        heights = [max(abs(row[key]), FLOOR) for row in mine]
        label = f"{groups} group{'s' * (groups > 1)}"
        panel.semilogy([row["sweeps"] for row in mine], heights, marker=marker, markersize=4.5, label=label)
    panel.xaxis.get_major_locator().set_params(integer=True)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def newest_model(folder: Path) -> str:
    """The exported model below a run's folder."""
    found = sorted(
        (p.parent for p in folder.rglob("config.json") if (p.parent / "model.safetensors").is_file()),
        key=lambda p: p.stat().st_mtime,
    )
    if not found:
        raise ValueError(
            f"{folder} holds no exported model: set checkpoint.export_at_end = true, or name one with --model"
        )
    return str(found[-1])
