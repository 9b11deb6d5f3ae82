"""Score a model on held-out text: bits per byte in the memory modes zero, parallel and decode, on the same tokens.

    python tools/evaluate.py runs/lrt_tiny                                  # the run's own validation rows
    python tools/evaluate.py runs/lrt_tiny/export --data my_text.txt --json scores.json
    python tools/evaluate.py FOLDER --data a.parquet b.parquet --memory decode --documents documents.npz
    torchrun --nproc_per_node=8 tools/evaluate.py FOLDER --data tokenized
    python tools/evaluate.py FOLDER --answers problems/validation.jsonl     # exact match, in place of bits per byte

The last line of stdout is one JSON object. decode is exact unless --decode names a faster way,
whose error on a sample of rows is printed beside the score.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from lrt.commands.chat import template
from lrt.commands.frame import framed
from lrt.commands.options import MOST_ROWS, at_least, parse_prefill, path
from lrt.config.environment import place_of_process
from lrt.conversion.opening import open_model, open_tokenizer
from lrt.data.examples import read_examples
from lrt.eval.answers import MODES, exact_match
from lrt.eval.folders import Settings, evaluate_folder
from lrt.eval.processes import joined, own_device

if TYPE_CHECKING:
    from rich.progress import TaskID

# nothing that --answers asks
OF_BITS = ("data", "decode", "tokens", "sequence_length", "rows", "text_column", "documents")


def main(arguments: list[str] | None = None) -> int:
    """Evaluate one folder; returns the exit code (2: bad input, nothing was scored)."""
    args = _parser().parse_args(arguments)
    return framed(lambda: run(args), interrupted="nothing was scored")


def run(args: argparse.Namespace) -> int:
    refuse_idle(args)
    settings = Settings(
        data=tuple(args.data), memory=args.memory, tokens=args.tokens, sequence_length=args.sequence_length,
        rows=args.rows, tokenizer=args.tokenizer, base=args.base, text_column=args.text_column,
        decode=parse_prefill(args.decode, option="--decode"),
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
    )  # fmt: skip
    for option in (args.json, args.documents):
        if option is not None and not Path(option).resolve().parent.is_dir():
            raise ValueError(f"{option} cannot be written: there is no folder {Path(option).resolve().parent}")
    if args.answers is not None:
        return ask(args, settings)
    with joined() as processes:
        bar = Bar(sys.stderr if processes.main else None)
        with bar:
            found = evaluate_folder(
                args.folder, settings, device=own_device(args.device), processes=processes, progress=bar
            )
        if not processes.main:
            return 0
    line = json.dumps(found.to_json(), allow_nan=False)
    if args.json is not None:
        Path(args.json).write_text(line + "\n", encoding="utf-8")
    if args.documents is not None:
        found.documents().save(args.documents)
    print(found.table())
    print(line)
    return 0


def refuse_idle(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that has no effect beside the others."""
    usual, asked = _parser().parse_args([args.folder]), args.answers is not None
    idle = [name for name in (OF_BITS if asked else ("answer_tokens",)) if getattr(args, name) != getattr(usual, name)]
    if idle:
        option = f"--{idle[0].replace('_', '-')}"
        raise ValueError(
            f"{option} has no effect {'with' if asked else 'without'} --answers, which counts right answers "
            "alone: leave one out"
        )


def ask(args: argparse.Namespace, settings: Settings) -> int:
    """Let the model answer conversations, and count the right answers."""
    if settings.memory == "parallel":
        raise ValueError("--memory parallel has no answers, because an answer is decoded: use decode, zero or all")
    if place_of_process().size > 1:
        raise ValueError("--answers are given by one process: start it without torchrun")
    device = own_device(args.device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    opened = open_model(args.folder, base=settings.base, dtype=settings.dtype or default, device=device)
    tokenizer = open_tokenizer(opened, name=settings.tokenizer, base=settings.base)
    chat = template(opened, tokenizer, name=settings.tokenizer)
    examples = read_examples(args.answers, key="--answers")
    modes = MODES if settings.memory == "all" else (settings.memory,)
    began = time.perf_counter()
    found = exact_match(opened.model, examples, chat, tokenizer, modes=modes, max_new_tokens=args.answer_tokens)
    table = {mode: {"value": one.value, "by_steps": one.by_steps} for mode, one in found.items()}
    line = json.dumps(
        {"exact_match": table, "answers": len(examples), "seconds": round(time.perf_counter() - began, 3)}
    )
    if args.json is not None:
        Path(args.json).write_text(line + "\n", encoding="utf-8")
    print(
        f"{opened.folder}: exact match of {len(examples)} answers, the first of them "
        f"{next(iter(found.values())).first!r}"
    )
    print("\n".join(f"  {mode}: {one.describe()}" for mode, one in found.items()))
    print(line)
    return 0


class Bar:
    """A progress bar on a terminal, a line for every tenth elsewhere.

    Args:
        stream: where it is shown; None = nowhere.
        done, of: what is done with what.
    """

    def __init__(self, stream: TextIO | None, *, done: str = "scored", of: str = "batches") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._stream, self._tenths, self._done, self._of = stream, 0, done, of
        console = Console(file=stream)
        self._shown = stream is not None and console.is_terminal
        self._progress = Progress(
            done, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, disable=not self._shown
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._stream is None:
            return
        if self._shown:
            self._task = self._progress.add_task("", total=total) if self._task is None else self._task
            self._progress.update(self._task, completed=done)
        elif total and 10 * done // total > self._tenths:
            self._tenths = 10 * done // total
            print(f"{self._done} {done} of {total} {self._of}", file=self._stream, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "folder",
        help="an export, a training run or one of its checkpoints, a Hugging Face folder, "
        "or the memory alone (with --base)",
    )
    add(
        "--data",
        nargs="+",
        type=path,
        default=[],
        metavar="DATA",
        help="as data.train names texts and tokenized folders (default: the run's own)",
    )
    add("--memory", choices=["zero", "parallel", "decode", "all"], default="all", help="memory mode (default: all)")
    add(
        "--decode",
        default="exact",
        metavar="WAY",
        help="exact, fixed_point, fixed_point:GROUPS:TOL or refine:K (default: exact)",
    )
    add(
        "--tokens",
        type=at_least(1),
        metavar="N",
        help="score the first N tokens of each source (default: all; of a run: evaluation.tokens)",
    )
    add("--sequence-length", type=at_least(1), metavar="T", help="tokens of a row (default: as trained)")
    add("--rows", type=at_least(1, most=MOST_ROWS), metavar="B", help="rows of a batch (default: as many as fit)")
    add("--text-column", default="text", help="column of parquet, CSV and JSON lines (default: text)")
    add("--tokenizer", type=path, help='"bytes", a tokenizer.json, or its folder (default: the model\'s)')
    add("--base", type=path, help="the decoder of a folder that holds the memory alone")
    add(
        "--answers",
        type=path,
        metavar="JSONL",
        help="conversations whose answers are compared with the model's; nothing else is scored then",
    )
    add("--answer-tokens", type=at_least(1), default=96, help="of an answer at most (default: 96)")
    add("--device", help="such as cpu or cuda:0 (default: this process's GPU, else the CPU)")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float64"],
        help="of the model (default: bfloat16 on CUDA, float32 elsewhere)",
    )
    add("--json", type=path, metavar="OUT", help="write the last line to a file too")
    add(
        "--documents",
        type=path,
        metavar="OUT",
        help="write what each document cost (.npz), for comparing models in pairs",
    )
    return parser
