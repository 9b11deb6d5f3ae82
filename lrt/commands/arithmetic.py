"""Write word problems of several steps as JSONL for supervised tuning, made from a seed.

    python tools/arithmetic.py problems --count 20000 --held-out 300
    python recipes/run.py --recipe sft_tiny --set tuning.train=problems/train.jsonl --set
    tuning.validation=problems/validation.jsonl

A line has prompt, completion (equations, then the answer behind "####"), answer and steps.
No question stands in both files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lrt.commands.frame import framed
from lrt.commands.options import at_least
from lrt.data.arithmetic import problems


def main(arguments: list[str] | None = None) -> int:
    """Write train.jsonl and validation.jsonl; returns the exit code (2: bad input)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder, must not exist")
    parser.add_argument("--count", type=at_least(1), default=20000, help="problems to train on (default: 20000)")
    parser.add_argument("--held-out", type=at_least(1), default=300, help="other problems, to score (default: 300)")
    parser.add_argument(
        "--steps", type=at_least(1), nargs="+", default=[1, 2, 3], help="numbers of steps (default: 1 2 3)"
    )
    parser.add_argument("--largest", type=at_least(4), default=10, help="of all values (default: 10)")
    parser.add_argument("--direct", action="store_true", help="completions are the answer alone, without the equations")
    parser.add_argument("--seed", type=at_least(0), default=1, help="the same seed writes the same files (default: 1)")
    args = parser.parse_args(arguments)
    return framed(lambda: run(args), interrupted="the folder may lack a file: take it away")


def run(args: argparse.Namespace) -> None:
    made = problems(count=args.held_out + args.count, seed=args.seed, steps=args.steps, largest=args.largest)
    try:
        args.output.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{args.output} already exists: choose a new folder") from None
    for name, part in (("validation", made[: args.held_out]), ("train", made[args.held_out :])):
        lines = [json.dumps(one.record(direct=args.direct)) for one in part]
        (args.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.count:,} problems to train on and {args.held_out:,} to score, written to {args.output}")
