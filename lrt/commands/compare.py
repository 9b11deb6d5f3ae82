"""Put runs beside each other: ``python tools/compare.py RUN [RUN ...] --out REPORT``.

A RUN is the folder of a training run, of a sweep, or one that holds runs. Runs that differ by their seed alone are one
setting. The report is a Markdown page with figures and all numbers as JSON: mean and deviation over seeds, and
differences at equal tokens, at equal training compute with every pass counted, and at equal seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lrt.commands.frame import framed
from lrt.commands.options import path
from lrt.eval.compare import compare
from lrt.eval.compare_page import differences_table, scores_table, text_table, write_report


def main(arguments: list[str] | None = None) -> int:
    """Compare runs; returns the exit code (2: bad input, nothing was written)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="folder of a run, of a sweep, or of runs")
    parser.add_argument(
        "--out", required=True, type=path, metavar="REPORT", help="folder for report.md, or a path that ends in .md"
    )
    parser.add_argument(
        "--reference", metavar="LABEL", help="setting to hold the others against (default: the one without memory)"
    )
    parser.add_argument("--different-data", action="store_true", help="compare runs although their data differ")
    args = parser.parse_args(arguments)
    return framed(lambda: run(args), interrupted="nothing was written")


def run(args: argparse.Namespace) -> None:
    found = compare(args.runs, reference=args.reference, different_data=args.different_data)
    page = write_report(found, Path(args.out))
    print(text_table(scores_table(found)))
    if len(found.curves) > 1:
        print(f"\nagainst {found.reference.label}:\n{text_table(differences_table(found))}")
    print(f"\nwritten to {page}")
