"""Say what a checkpoint is: kind, step, recipe, dtype, parameters by part, config, and whether it is whole.

python tools/inspect_checkpoint.py runs/lrt
"""

from __future__ import annotations

import argparse

from lrt.commands.frame import framed
from lrt.commands.options import path, whole_number
from lrt.conversion.inspection import describe, inspect_checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Describe one checkpoint; returns the exit code (1: not whole, 2: nothing known there)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=path, help="a folder or file of any kind that tools/convert.py reads")
    parser.add_argument("--step", type=whole_number, help="which checkpoint of a run (default: the newest)")
    options = parser.parse_args(arguments)
    return framed(lambda: run(options), interrupted="nothing was changed")


def run(options: argparse.Namespace) -> int:
    found = inspect_checkpoint(options.checkpoint, step=options.step)
    print("\n".join(describe(found, options.checkpoint)))
    return 0 if found.whole else 1
