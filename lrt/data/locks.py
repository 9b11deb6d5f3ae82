"""One writer a folder: a lock of the operating system, which ends with its process however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path, *, advice: str, patience_s: float = 3.0) -> Iterator[Path]:
    """Hold a folder alone while the block runs; it is made where it is missing, and removed again where it stays empty.

    The lock belongs to this process alone: its children do not inherit it, and a kill releases it.

    Args:
        folder: to hold.
        advice: what a user can do in place of waiting, such as "choose another run.name".
        patience_s: seconds to wait for a process that is just ending.

    Raises:
        ValueError: another process holds the folder.
    """
    folder = Path(folder)
    made = not folder.exists()
    file = _acquire(folder, advice=advice, until=time.monotonic() + patience_s)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now
            if file is not None and _is_at(file, folder / LOCK):
                (folder / LOCK).unlink()  # while it is held: who waits for it sees that its file is gone
            if made:
                folder.rmdir()  # fails where something was written
        if file is not None:
            file.close()


def _acquire(folder: Path, *, advice: str, until: float) -> IO[str] | None:
    """The locked file; None where the file system knows no locks, which is said."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+", encoding="utf-8")
        except FileNotFoundError:  # whoever held it has just removed the folder
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                file.close()
                words = (
                    f"its file system has no locks ({error.strerror}), so a second process that writes here is not "
                    "noticed"
                )
                warnings.warn(f"{folder}: {words}", stacklevel=3)
                return None
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            if time.monotonic() > until:
                raise ValueError(
                    f"{folder} is in use by another process ({holder}): wait for its end, stop it, or {advice}"
                ) from None
            time.sleep(0.1)
            continue
        if _is_at(file, path):
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its words
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return file
        file.close()  # whoever held it has removed it


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
