"""Which residual is small enough: the default tol of prefill.fixed_point, measured on a trained model.

    python tools/measure_tolerance.py --recipe lrt_tiny --out measured                     # trains first
    python tools/measure_tolerance.py --model runs/x/export --recipe runs/x/recipe.toml --out measured

For bf16 and fp32 and 4, 8 and 16 groups: residual, true error and bits-per-byte gap to exact prefill, by
sweep and by tol. Writes residuals.png and tolerance.json; the last line is that JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import lrt
from lrt import decoding, prefill
from lrt.data import build_loader, load_tokenizer
from lrt.loss import IGNORE

TOLS = {"float32": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "bfloat16": (3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 2e-1)}
GAP = 0.001  # bits per byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lrt_tiny", help="of the model: its data are scored; trained first unless --model is given")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--model", help="a folder that lrt.save wrote")
    parser.add_argument("--out", default="measured")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--sweeps", type=int, default=10, help="sweeps of the picture")
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(TOLS))
    args = parser.parse_args()
    recipe = lrt.load_recipe(args.recipe, overrides=args.set)
    if args.model is None:
        from lrt.train.trainer import train

        train(recipe)
        args.model = newest_model(Path(recipe.run.output) / recipe.run.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    limit = args.rows * recipe.model.sequence_length
    loader = build_loader(
        recipe.data, tokenizer=tokenizer, sequence_length=recipe.model.sequence_length, rows=args.rows, rank=0, world_size=1,
        seed=recipe.run.seed, split="validation", limit_tokens=limit,
    )  # fmt: skip
    batch = next(iter(loader))
    tokens, targets = batch.input_ids[: args.rows].to(device), batch.targets[: args.rows].to(device)
    sizes = torch.zeros(recipe.model.vocab_size, dtype=torch.int64)
    known = torch.from_numpy(tokenizer.token_bytes())
    sizes[: len(known)] = known
    sizes = torch.where(targets == IGNORE, 0, sizes.to(device)[targets.clamp_min(0)])
    result: dict = {"model": args.model, "device": device, "rows": len(tokens), "tokens_a_row": tokens.shape[1]}
    result |= {"by_sweep": [], "by_tol": [], "default": {}}
    for name in args.dtypes:
        model = lrt.load(args.model, dtype=getattr(torch, name), device=device)
        exact = measure(model, tokens, targets, sizes, prefill.exact(), None)
        result["by_tol"].append({"dtype": name, "method": "exact", "bpb": exact["bpb"], "seconds": exact["seconds"]})
        good: list[set[float]] = []
        for groups in args.groups:
            most = min(args.sweeps, math.ceil((tokens.shape[1] - 1) / groups))
            for sweeps in range(1, most + 1):
                row = measure(model, tokens, targets, sizes, prefill.fixed_point(groups, tol=1e-30, max_sweeps=sweeps), exact)
                result["by_sweep"].append(report(name, groups, {"sweeps": sweeps}, row))
            good.append(set())
            for tol in TOLS[name]:
                row = measure(model, tokens, targets, sizes, prefill.fixed_point(groups, tol=tol), exact)
                result["by_tol"].append(report(name, groups, {"tol": tol}, row))
                if abs(row["gap"]) < GAP:
                    good[-1].add(tol)
        fits = [tol for tol in TOLS[name] if all(all(t in g for t in TOLS[name] if t <= tol) for g in good)]
        result["default"][name] = max(fits) if fits else None
        print(f"{name}: largest tol whose gap is under {GAP} bpb for {args.groups} groups, as are all smaller ones: {result['default'][name]}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    picture(result["by_sweep"], out / "residuals.png")
    (out / "tolerance.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


@torch.no_grad()
def measure(model, tokens, targets, sizes, method, exact) -> dict:
    """Bits per byte, residual and distance from the exact run of one prefill."""
    began = time.perf_counter()
    done = prefill.run(model, tokens, method=method, everywhere=True, runner=decoding.graphed)
    seconds = time.perf_counter() - began
    nats = model.backbone.loss(done.hidden, targets)[1].double()
    bpb = float(torch.where(sizes > 0, nats, 0.0).sum()) / (math.log(2) * int(sizes.sum()))
    row = {"bpb": bpb, "hidden": done.hidden.float(), "seconds": round(seconds, 3), "report": done.report}
    if exact is not None:
        error = (row["hidden"] - exact["hidden"]).norm(dim=-1) / exact["hidden"].norm(dim=-1)
        row |= {"gap": bpb - exact["bpb"], "largest_error": float(error.max()), "mean_error": float(error.mean())}
    return row


def report(dtype: str, groups: int, setting: dict, row: dict) -> dict:
    done = row["report"]
    found = {"dtype": dtype, "groups": groups, **setting, "gap_bpb": row["gap"]}
    found |= {"largest_error": row["largest_error"], "mean_error": row["mean_error"], "residual": max(done.residual)}
    found |= {"mean_residual": sum(done.residual) / len(done.residual), "most_sweeps": max(done.sweeps)}
    found |= {"mean_sweeps": sum(done.sweeps) / len(done.sweeps), "unconverged": done.converged.count(False), "seconds": row["seconds"]}
    print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in found.items()))
    return found


def picture(rows: list[dict], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: install the extra, pip install lrt[plot]", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 4), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes):
        for i, groups in enumerate(sorted({row["groups"] for row in rows})):
            mine = [row for row in rows if row["dtype"] == dtype and row["groups"] == groups]
            sweeps = [row["sweeps"] for row in mine]
            axis.semilogy(sweeps, [max(row["residual"], 1e-9) for row in mine], f"C{i}o-", label=f"{groups} groups: residual")
            axis.semilogy(sweeps, [max(row["largest_error"], 1e-9) for row in mine], f"C{i}s--", markerfacecolor="none", label="largest true error")
        axis.set(title=dtype, xlabel="sweep")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative change of the memory, or error of the output")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def newest_model(folder: Path) -> str:
    """The exported model below a run's folder."""
    found = sorted((p.parent for p in folder.rglob("config.json") if (p.parent / "model.safetensors").is_file()), key=lambda p: p.stat().st_mtime)
    if not found:
        sys.exit(f"error: {folder} holds no exported model: set checkpoint.export_at_end = true, or name one with --model")
    return str(found[-1])


if __name__ == "__main__":
    main()
