"""Folders of training runs as the trainer leaves them, with curves that are known by formula."""

import json
import math
import random

import lrt
from lrt.config import dump_recipe

STEPS = 60


def score(tokens, *, gain=0.0, seed=1):
    """Bits per byte at the end of a run, linear in the logarithm of its tokens; seeds differ by 0.004."""
    return (1.3 - 0.05 * math.log2(tokens / 1e8)) * (1 - gain) + 0.004 * (seed - 2)


def write_run(
    folder, *, tokens=100_000_000, seed=1, plain=False, cost=1.0, gain=0.0, speed=1e6, data="abc", evaluate=True,
    first=1, steps=STEPS, bpb=None, overrides=(), about=True, buckets=4, every=10,
):  # fmt: skip
    """One run; ``cost`` times the FLOPs and 1 / cost of the speed of the plain twin, ``gain`` less bits per byte.

    ``first`` is the first step; past 1 the run goes on from another one.
    """
    folder.mkdir(parents=True)
    off = ("recurrence=false", "schedule.kind=baseline") if plain else ()
    sets = [f"run.seed={seed}", f"training.tokens={tokens}", f"run.name={folder.name}", *off, *overrides]
    (folder / "recipe.toml").write_text(dump_recipe(lrt.load_recipe("lrt_tiny", overrides=sets)))
    noise, records = random.Random(seed), []
    for step in range(first, steps + 1):
        done = tokens * step // STEPS
        loss = 1.0 + 3.0 * math.exp(-step / 6) + 0.02 * noise.random() - 0.1 * gain
        records.append({
            "kind": "train", "step": step, "tokens": done, "flops": 6e6 * cost * done,
            "loss": loss, "groups": [loss] if plain else [loss + 0.05, loss], "grad_norm": 0.5 + noise.random(),
            "tokens_per_second": speed / cost / (50 if step == 1 else 1),
            "lr_scale": min(1.0, 2 * (1 - step / STEPS)),
        })  # fmt: skip
        if evaluate and (step % every == 0 or step == STEPS):
            end = score(tokens, gain=gain, seed=seed) + 0.1 * (1 - step / STEPS)
            modes = {"zero": end if plain else end + 0.05, "parallel": end if plain else end - 0.004, "decode": end}
            modes = bpb if bpb is not None and step == STEPS else modes
            by_position = {m: [v + 0.1 * 0.5**i for i in range(buckets)] for m, v in modes.items() if v is not None}
            records.append({
                "kind": "evaluation", "step": step, "tokens": done, "bpb": modes, "bpb_of_buckets": by_position,
                "scored": {"tokens": 65536, "bytes": 65000}, "seconds": 3.0,
            })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if about:
        attempt = {
            "state": "done", "device": "NVIDIA H200", "commit": "0123456789abcdef", "changed": False,
            "versions": {"torch": "2.11.0", "python": "3.12.3", "lrt": "0.1.0"},
        }  # fmt: skip
        fingerprints = {"train": data, "validation": "def", "tokenizer": "0"}
        (folder / "run.json").write_text(json.dumps({"steps": STEPS, "data": fingerprints, "attempts": [attempt]}))
    return folder
