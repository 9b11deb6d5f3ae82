"""Whether what lrt is built on is there, said in one line before the first import fails, and an import that is
not cut in half; imports nothing."""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NEEDED = ("torch", "torchdata", "safetensors", "numpy", "tokenizers", "pyarrow", "huggingface_hub", "rich", "tomli_w")


def check_installed() -> None:
    """Name every package that is missing.

    Raises:
        ImportError: some are; the message says how to install them.
        SystemExit: the same, where ``python -m lrt`` or the command ``lrt`` is what imports lrt.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        message = (
            f"lrt needs {', '.join(missing)}, which this Python does not have. Activate the environment of the "
            "checkout (. .venv/bin/activate), or make it: python3 -m venv .venv && . .venv/bin/activate && pip "
            "install torch && pip install -e ."
        )
        if is_command(sys.argv[:1]):
            sys.exit(f"error: {message}")
        raise ImportError(message)


def is_command(program: list[str]) -> bool:
    """Whether a program's name says that Python was asked for lrt itself: no code of the user's could catch an error.

    Args:
        program: ``sys.argv[:1]``; ``python -m`` calls itself "-m" while it looks for what it is to run.
    """
    return bool(program) and program[0].replace("\\", "/").rsplit("/", 1)[-1] in ("-m", "lrt", "lrt.exe")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until what is imported inside is imported.

    torch swallows one that falls into its import of numpy, goes on with half of numpy, and fails much later.
    """
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if heard:
        raise KeyboardInterrupt
