"""Train a recipe: ``python recipes/run.py --recipe lrt_tiny`` or ``torchrun --nproc_per_node=8 recipes/run.py --recipe
lrt_24l``."""

from __future__ import annotations

import argparse
import errno
import os
import sys

from lrt.commands.frame import framed
from lrt.commands.options import whole_number
from lrt.commands.torchtitan import hand_over, refuse_torchtitan
from lrt.config import load_recipe, shipped_recipes
from lrt.config.environment import place_of_process

ENGINE = (
    "whose trainer runs: lrt's own (default), or torchtitan's with lrt.titan, "
    "for recipes/titan_*.toml (docs/torchtitan.md)"
)
OVERRIDE = (
    "override one value; may be repeated. A horizon or a kind of schedule replaces what the file says of another one"
)


def main(arguments: list[str] | None = None) -> int:
    """Train a recipe; returns the exit code (1: stopped without its end, 2: bad input, 130: interrupted)."""
    parser = argparse.ArgumentParser(
        description="Train a recipe; the same command again continues a run that was stopped."
    )
    parser.add_argument("--recipe", default="lrt_tiny", help="name in recipes/, or a path (default: lrt_tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=OVERRIDE)
    parser.add_argument("--engine", choices=("lrt", "torchtitan"), default="lrt", help=ENGINE)
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run would need and how long it would take, and stop"
    )
    gpus = "only with --dry-run: GPUs to plan for (default: torchrun's WORLD_SIZE, or up to 8)"
    parser.add_argument("--gpus", type=whole_number, metavar="N", help=gpus)
    parser.add_argument("--list", action="store_true", help="list the recipes")
    args = parser.parse_args(arguments)
    if args.gpus is not None and (not args.dry_run or args.gpus < 1):
        parser.error(
            "--gpus needs --dry-run and a number of 1 or more; torchrun --nproc_per_node says how many GPUs a run has"
        )

    if args.dry_run and args.engine != "lrt":
        parser.error("--dry-run plans a run of lrt's own trainer: leave --engine torchtitan out")
    return framed(lambda: run(args), interrupted="the same command goes on from the newest checkpoint")


def run(args: argparse.Namespace) -> int:
    if args.list:
        for path in shipped_recipes():
            print(f"{path.stem:<28} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return 0
    try:
        if args.engine == "torchtitan":
            hand_over(args.recipe, overrides=args.set)
        refuse_torchtitan(args.recipe)
        recipe = load_recipe(args.recipe, overrides=args.set)
        if args.dry_run:
            from lrt.train.dry_run import dry_run

            place = place_of_process()
            if place.rank == 0:
                print(dry_run(recipe, world_size=args.gpus or (place.size if "WORLD_SIZE" in os.environ else None)))
            return 0
        from lrt.train.monitor.faults import HangError, NonFiniteError, NotSavedError
        from lrt.train.trainer import train

        try:
            train(recipe)
        except (NonFiniteError, NotSavedError) as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
        except HangError as error:
            print(f"stopped: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # threads that wait for the lost rank would keep the process alive
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(
            f"error: run.output: cannot use {error.filename}: {error.strerror}; choose a folder that can be written",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"stopped: {error.filename or 'run.output'}: no space left: "
            "make room and give the same command, which goes on",
            file=sys.stderr,
        )
        return 1
    return 0
