"""Run many settings of a recipe: ``python tools/sweep.py SPEC.toml --out FOLDER``.

What a spec holds is in ``lrt.train.sweep.spec``; examples are in tools/experiments/frontier. The same command goes on
after any interruption and skips what is done. FOLDER/results.jsonl has one line a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

from lrt.commands.frame import framed
from lrt.commands.options import path, whole_number
from lrt.train.sweep.pool import run_sweep, visible_devices
from lrt.train.sweep.results import Results, table
from lrt.train.sweep.spec import read_spec


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep; returns the exit code (1: a run failed, 2: bad input, nothing was started)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=path, help="a TOML file")
    parser.add_argument("--out", required=True, type=path, metavar="FOLDER", help="where runs and results go")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of every run; may be repeated",
    )
    parser.add_argument(
        "--minutes", type=float, help="start nothing new after this time (default: the spec's budget_minutes)"
    )
    parser.add_argument(
        "--side-by-side",
        type=whole_number,
        metavar="N",
        help="runs at once on one device (default: the spec's side_by_side)",
    )
    parser.add_argument("--devices", metavar="0,1", help="GPUs to use (default: all that are visible)")
    parser.add_argument("--show", action="store_true", help="print the table of what is done, and stop")
    args = parser.parse_args(arguments)
    if args.side_by_side is not None and args.side_by_side < 1:
        parser.error(f"--side-by-side {args.side_by_side}: use 1 or more")
    return framed(lambda: run(args), interrupted="the same command goes on")


def run(args: argparse.Namespace) -> int:
    sweep = read_spec(args.spec, overrides=args.set)
    if args.side_by_side is not None:
        sweep = dataclasses.replace(sweep, side_by_side=args.side_by_side)
    failed = False
    if not args.show:
        devices = args.devices.split(",") if args.devices else visible_devices()
        minutes = sweep.budget_minutes if args.minutes is None else args.minutes
        launch = [sys.executable, "-m", "lrt", "train"]
        say = functools.partial(print, flush=True)
        summary = run_sweep(sweep, Path(args.out), launch=launch, devices=devices, minutes=minutes, say=say)
        failed = summary.failed > 0
        stopped = f"; {summary.stopped}" if summary.stopped else ""
        print(f"\n{summary.done} done, {summary.failed} failed, {summary.left} left{stopped}")
        if summary.left:
            print("the same command goes on")
    print("\n" + table(sweep, Results(Path(args.out) / "results.jsonl"), folder=Path(args.out)))
    return 1 if failed else 0
