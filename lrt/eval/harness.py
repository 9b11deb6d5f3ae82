"""lm-evaluation-harness with the memory mode in the results: its own command line, and its own tasks.

    python -m lrt.eval.harness --model lrt --model_args pretrained=FOLDER,memory=decode --tasks arc_easy,hellaswag

lm-evaluation-harness finds no models of other packages by itself: ``lm_eval --model lrt`` knows this one only after
this module was imported. ``lm_eval.simple_evaluate(model="lrt", model_args=...)`` works after ``import
lrt.eval.harness``.
"""

from __future__ import annotations

import sys

from lrt.eval.harness_model import LatentRecurrentLM

__all__ = ["LatentRecurrentLM", "main"]


def main() -> int:
    """lm-evaluation-harness's own command line, with this model registered; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
