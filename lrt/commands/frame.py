"""A part of the other tools, no command: how every command ends, whatever happens in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

BROKEN_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended


def framed(work: Callable[[], int | None], *, interrupted: str) -> int:
    """Do a command's work; returns its exit code (2: bad input, 130: interrupted, 141: nobody reads on).

    Args:
        work: returns an exit code, None for 0. What it raises becomes one line on stderr.
        interrupted: said after Ctrl-C: what became of the work.
    """
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a terminal or a file in another encoding than UTF-8 gets escapes, not an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        return BROKEN_PIPE
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    return code or 0


def silence_stdout() -> None:
    """Let what is still written to a broken pipe, by Python's own end too, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
