"""Train a recipe: ``python recipes/run.py --recipe lrt_tiny`` or ``torchrun --nproc_per_node=8 recipes/run.py --recipe lrt_24l``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed works from any folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a recipe; the same command again continues a run that was stopped.")
    parser.add_argument("--recipe", default="lrt_tiny", help="name in recipes/, or a path (default: lrt_tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would need and how long it would take, and stop")
    parser.add_argument("--list", action="store_true", help="list the recipes")
    args = parser.parse_args()

    from lrt.config import load_recipe

    if args.list:
        for path in sorted(Path(__file__).resolve().parent.glob("*.toml")):
            print(f"{path.stem:<28} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return 0
    try:
        recipe = load_recipe(args.recipe, overrides=args.set)
        if args.dry_run:
            from lrt.train.dry_run import dry_run

            world_size = os.environ.get("WORLD_SIZE")
            print(dry_run(recipe, world_size=None if world_size is None else int(world_size)))
            return 0
        from lrt.train.faults import HangError, NonFiniteError
        from lrt.train.trainer import train

        try:
            train(recipe)
        except NonFiniteError as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
        except HangError as error:
            print(f"stopped: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # threads that wait for the lost rank would keep the process alive
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(f"error: run.output: cannot use {error.filename}: {error.strerror}; choose a folder that can be written", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
