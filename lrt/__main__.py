"""The console command: ``lrt NAME ...``, or ``python -m lrt NAME ...``; ``torchrun -m lrt train`` on several
processes."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path

COMMANDS = {  # name -> module of lrt.commands, what it does
    "train": ("train", "train a recipe, or go on with it"),
    "prepare": ("prepare", "train a tokenizer, tokenize text"),
    "arithmetic": ("arithmetic", "write word problems of several steps, to tune on"),
    "generate": ("generate", "continue text with a saved model"),
    "convert": ("convert", "checkpoints in, checkpoints out, compared before they are believed"),
    "inspect": ("inspect", "say what a checkpoint is and whether it is whole"),
    "evaluate": ("evaluate", "bits per byte in the memory modes zero, parallel and decode"),
    "core": ("core", "CORE, 22 tasks by nanochat's rules, in the memory mode asked for"),
    "compare": ("compare", "runs beside each other at equal tokens, compute and seconds"),
    "sweep": ("sweep", "many settings of a recipe, side by side"),
    "diagnose": ("diagnose", "what the memory does inside a model"),
    "bench": ("bench", "time training, decoding or the tolerance of prefill on this device"),
}
BENCHMARKS = {"training": "training", "adapted": "adapted", "decoding": "decoding", "prefill": "prefill_tolerance"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2: there is no such command)."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        print(f"error: lrt {name}: no such command\n{usage()}", file=sys.stderr)
        return 2
    module = f"lrt.commands.{COMMANDS[name][0]}"
    if name == "bench":
        if not rest or rest[0] not in BENCHMARKS:
            print(f"error: lrt bench {' '.join(rest[:1])}: use one of {', '.join(BENCHMARKS)}", file=sys.stderr)
            return 2
        name, module, rest = f"bench {rest[0]}", f"{module}.{BENCHMARKS[rest[0]]}", rest[1:]
    note = shadowing()
    if note:
        print(note, file=sys.stderr)
    sys.argv[0] = f"lrt {name}"  # what --help and errors call the command
    return int(importlib.import_module(module).main(rest))


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:<10} {says}" for name, (_, says) in COMMANDS.items()]
    return "\n".join(["usage: lrt COMMAND ...; lrt COMMAND --help says more", "", *lines])


def shadowing() -> str | None:
    """A line where another lrt than the installed one runs: ``python -m`` prefers the present folder."""
    try:
        installed = Path(str(importlib.metadata.distribution("lrt").locate_file("lrt")))
    except importlib.metadata.PackageNotFoundError:
        return None
    here = Path(__file__).resolve().parent
    if not (installed / "__init__.py").is_file() or installed.resolve() == here:
        return None
    return f"note: this is the lrt of {here}, not the installed one of {installed}"


if __name__ == "__main__":
    sys.exit(main())
