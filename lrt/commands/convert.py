"""Convert a checkpoint from one kind to another, and prove the result before it appears.

python tools/convert.py --from official --to hf --input base_checkpoints/d20 --output d20-hf --dtype bf16
python tools/convert.py --list
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from typing import TYPE_CHECKING, TextIO

import torch

from lrt.commands.frame import framed
from lrt.commands.options import path, whole_number
from lrt.conversion import KINDS, convert, verify

if TYPE_CHECKING:
    from rich.progress import TaskID

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def main(arguments: list[str] | None = None) -> int:
    """Run one conversion; returns the exit code (2: bad input, nothing was written)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        return framed(show_kinds, interrupted="nothing was written")
    missing = [f"--{name}" for name in ("to", "input", "output") if getattr(options, name) is None]
    if missing:
        parser.error(f"missing {', '.join(missing)} (or --list)")
    signal.signal(signal.SIGTERM, _stop)
    return framed(lambda: run(options), interrupted="nothing was written")


def show_kinds() -> None:
    print("\n".join(f"{name:9s} {kind.holds}\n          lossless for: {kind.lossless}" for name, kind in KINDS.items()))


def run(options: argparse.Namespace) -> None:
    with _Bar(sys.stderr) as bar:
        done = convert(
            options.input, options.output, source=getattr(options, "from"), target=options.to,
            dtype=DTYPES.get(options.dtype), step=options.step, tokenizer=options.tokenizer, base=options.base,
            compare=verify if options.verify else None, shard_size=options.shard_size, progress=bar,
        )  # fmt: skip
    print(f"{done.output} written" + ("" if done.verification else ", not verified (--no-verify)"))


def _stop(*_: object) -> None:
    raise KeyboardInterrupt  # so that what lies beside the output is removed


class _Bar:
    """A progress bar on a terminal; silent elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        console = Console(file=stream)
        columns = ("writing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("", total=total)
        self._progress.update(self._task, completed=done)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: write a size such as 5GB or 500MB")
    return int(size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the kinds and what is lossless")
    parser.add_argument("--from", choices=list(KINDS), help="kind of the input (default: what lies there)")
    parser.add_argument("--to", choices=[name for name, kind in KINDS.items() if kind.write], help="kind of the output")
    parser.add_argument("--input", type=path, help="the checkpoint; of a training run the newest export or checkpoint")
    parser.add_argument("--output", type=path, help="a folder that does not exist yet")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="of the written tensors (default: the narrowest that holds the source exactly)",
    )
    parser.add_argument("--step", type=whole_number, help="which checkpoint of a run (default: the newest)")
    parser.add_argument("--base", type=path, help="with --from adapter: the decoder that it belongs to")
    parser.add_argument(
        "--tokenizer", type=path, help="a folder or tokenizer.json (default: the one found beside the checkpoint)"
    )
    parser.add_argument("--shard-size", type=_bytes, default="5GB", help="largest safetensors file (default: 5GB)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the output with its source (default: yes)",
    )
    return parser
