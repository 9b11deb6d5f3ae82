"""Sweep the tiles of products of few rows, each by itself, and time whole steps of decoding; one GPU, three minutes.

    python tools/experiments/few_rows.py --out sweep.jsonl

A product is timed over the weights of 20 blocks as one CUDA graph, so that they come from memory, and compared with the
same product in float32. Processes compile side by side first, because compiling takes longer than timing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lrt.commands.bench import decoders
from lrt.commands.bench.clocks import copy_bandwidth, profile, seconds_of
from lrt.decoding import step as decoding
from lrt.decoding.fast import tiles
from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.fast.launching import linear
from lrt.decoding.fast.tiles import Share, Tile

BLOCKS, FEW_OF = 20, tiles.few_of
PRODUCTS = {  # name -> outputs, inputs, settings
    "d20 qkv": (3840, 1280, {"norm": True}),
    "d20 out": (1280, 1280, {"residual": True}),
    "d20 mlp_in": (5120, 1280, {"norm": True, "relu2": True}),
    "d20 mlp_out": (1280, 5120, {"residual": True}),
    "d20 head": (32768, 1280, {"norm": True, "cap": 15.0}),
    "1b qkv": (3072, 2048, {"norm": True}),
    "1b out": (2048, 2048, {"residual": True}),
    "1b gate_up": (16384, 2048, {"norm": True}),
    "1b down": (2048, 8192, {"residual": True}),
    "135m gate_up": (3072, 576, {"norm": True}),
    "135m down": (576, 1536, {"residual": True}),
}
SHAPES = [
    (8, 32, 8), (8, 64, 4), (8, 64, 8), (8, 64, 16), (16, 32, 4), (16, 32, 8), (16, 64, 2), (16, 64, 4), (16, 64, 8),
    (16, 64, 16), (16, 128, 4), (16, 128, 8), (32, 64, 4), (32, 64, 8), (32, 32, 8), (64, 64, 4), (64, 32, 8),
]  # fmt: skip


def candidates(outputs: int, width: int) -> list[Tile]:
    """Tiles that leave no warp without inputs, weights in at most 112 registers."""
    found = []
    for n, k, warps in SHAPES:
        turns = -(-width // (k * warps))
        held = min(turns, max(1, 112 * 64 // (n * k)))
        if k * warps < 2 * width and (n < 64 or outputs > 8000):
            found.append(Tile(n, k, warps, held))
    return found


def product(name: str, rows: int, device: torch.device, *, blocks: int = BLOCKS):
    outputs, width, settings = PRODUCTS[name]
    blocks = 4 if outputs > 20000 else blocks
    generator = torch.Generator(device=device).manual_seed(1)
    made = {
        "dtype": torch.bfloat16 if device.type == "cuda" else torch.float16,
        "device": device,
        "generator": generator,
    }
    weights = [torch.randn(outputs, width, **made) / width**0.5 for _ in range(blocks)]
    x = torch.randn(rows, width, **made)
    residual = torch.randn(rows, outputs, **made) if settings.get("residual") else None
    more = {k: v for k, v in settings.items() if k != "residual"}

    def run():
        return [linear(x, [w], residual=residual, **more)[0] for w in weights]

    def expected():
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-7) if more.get("norm") else y
        y = y @ weights[0].float().T
        y = y.relu().square() if more.get("relu2") else y
        y = y if residual is None else y + residual.float()
        return torch.tanh(y / more["cap"]) * more["cap"] if "cap" in more else y

    return run, expected, blocks * outputs * width * 2


def use(tile: Tile | None) -> None:
    tiles.FEW = 0 if tile is None else 32
    if tile is not None:
        tiles.few_of = lambda rows, outputs, width: tile


def turns(run, device: torch.device) -> float:
    """Median seconds."""
    return statistics.median(seconds_of(lambda: [run() for _ in range(8)], device) / 8 for _ in range(9))


def captured(run):
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def products(jobs, keep, left) -> None:
    """Microseconds and share of the copy's rate of every product under every tile."""
    device = torch.device("cuda")
    copy, best = copy_bandwidth(device, 2**31), {}
    for name, rows, tile in jobs:
        if left() < 0:
            break
        use(tile)
        try:
            run, expected, moved = product(name, rows, device)
            want = expected()
            error = float((run()[0].float() - want).norm() / want.norm())
            graph = captured(run)
            t = turns(graph.replay, device)
        except Exception as failed:
            keep({"kind": "product", "name": name, "rows": rows, "tile": tile, "failed": str(failed)[:200]})
            continue
        share = moved / t / copy
        keep({"kind": "product", "name": name, "rows": rows, "tile": tile, "share": round(share, 3), "error": error})
        best.setdefault((name, rows), []).append((share, tile, error))
    for (name, rows), found in best.items():
        old = next((share for share, tile, _ in found if tile is None), 0.0)
        top = sorted((f for f in found if f[1] is not None), key=lambda f: -f[0])[:4]
        told = "  ".join(f"{tuple(tile)} {share:.2f}" for share, tile, _ in top)
        worst = max(f[2] for f in found)
        print(f"{name:14s} {rows:3d} rows: before {old:.2f}  few: {told}  largest error {worst:.1e}", flush=True)


ATTENTION = (
    Share(32, 4, 2, 400, 96), Share(32, 4, 2, 1056, 96), Share(32, 4, 3, 660, 128), Share(64, 4, 1, 264),
    Share(64, 4, 1, 660), Share(64, 8, 1, 264), Share(16, 4, 3, 660, 96),
)  # fmt: skip


def step_jobs():
    """Batch, context, tile of products (False: the kernels of before), share of attention."""
    shapes = [(8, 1024), (2, 1024), (4, 1024), (16, 1024), (32, 1024), (8, 8192)]
    jobs = [(*shape, few, None) for shape in shapes for few in (False, True)]
    return jobs[:2] + [(8, 1024, True, share) for share in ATTENTION] + jobs[2:]


def steps(jobs, keep, left, *, timed: bool = True) -> None:
    """Whole steps of d20 with shared memory: the kernels of before, the new ones, other shares of attention."""
    device, table = torch.device("cuda"), tiles.SHARES
    tiles.few_of = FEW_OF
    model = decoders.native(decoders.NATIVE["d20"], decoders.SHARED, device, torch.bfloat16)
    fast = accelerate(model)
    copy = copy_bandwidth(device, 2**31) if timed else 1.0
    for batch, context, few, share in jobs:
        if left() < 0:
            break
        tiles.FEW, tiles.SHARES = (32 if few else 0), table if share is None else ((tiles.ANY, tiles.ANY, share),)
        state = decoders.random_state(model, batch, context + 400, context - 200)
        if not timed:
            decoders.greedy(fast, state)[0]()
            continue
        run = decoding.graphed(*decoders.greedy(fast, state))
        run()
        t = turns(run, device)
        reached = decoders.bytes_moved(model, batch, context) / t / copy
        row = {"kind": "step", "batch": batch, "context": context, "few": few, "attention": share}
        keep({**row, "us": round(1e6 * t, 1), "share": round(reached, 3)})
        told = f"{'few' if few else 'before'} {'' if share is None else tuple(share)}"
        print(f"step {batch:3d} rows {context:5d} {told:36s} {1e6 * t:8.1f} us  {100 * reached:.1f} %", flush=True)
        if share is None and (batch, context) == (8, 1024):
            profile(run, told)
    tiles.SHARES = table


def warm(job) -> None:
    """Compile some of the kernels."""
    made, whole = job
    with torch.no_grad():
        for name, rows, tile in made:
            use(tile)
            try:
                product(name, rows, torch.device("cuda"), blocks=1)[0]()
                torch.cuda.synchronize()
            except Exception as error:
                print("compile", name, rows, tile, type(error).__name__, str(error)[:100], flush=True)
        if whole:
            steps(whole, lambda row: None, lambda: 1.0, timed=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended")
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 16, 32, 2])
    parser.add_argument("--processes", type=int, default=14, help="that compile")
    parser.add_argument("--limit", type=float, default=165, help="seconds in all")
    args = parser.parse_args()
    began = time.perf_counter()

    def left() -> float:
        return args.limit - (time.perf_counter() - began)

    def keep(row) -> None:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    made = [
        (name, rows, tile)
        for rows in args.rows
        for name in PRODUCTS
        if name.startswith("d20") or rows == 8
        for tile in [None, *candidates(*PRODUCTS[name][:2])]
    ]
    unlike = [job for job in made if job[1] != 2]  # two rows run the kernels of eight
    whole, n = step_jobs(), args.processes
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        pool.map(
            warm, [([], whole[i::n]) for i in range(n)] + [(unlike[i :: 2 * n], []) for i in range(2 * n)], chunksize=1
        )
    print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    with torch.no_grad():
        steps(whole, keep, left)
        products(made, keep, left)
    print(f"done after {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
