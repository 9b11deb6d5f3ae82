"""Files and paths as people have them: text with or without a byte-order mark, ``~`` and empty names."""

from __future__ import annotations

import codecs
import contextlib
from pathlib import Path

LONGEST_NAME = 255  # bytes of a file's name
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Args:
        path: of the file.

    Raises:
        ValueError: it is not UTF-8; the message names the file, what it seems to be, and how to convert it.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: {not_utf8(path.read_bytes())}") from None


def not_utf8(data: bytes) -> str:
    """What bytes that are not UTF-8 seem to be, and how to convert them.

    Args:
        data: of the file, from its beginning.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is not None:
        return f"it begins with the byte-order mark of {encoding}; convert it with iconv -f {encoding} -t UTF-8"
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"byte 0x{error.object[error.start]:02x} in line {line}"
        if b"\0" in data[:1000]:
            return f"{where}, and zero bytes: it is binary, or UTF-16 without a byte-order mark"
        return f"{where}; it may be latin-1 (or cp1252), which iconv -f LATIN1 -t UTF-8 converts"
    return "its bytes have changed while they were read"


def local_path(spec: str | Path, *, key: str) -> Path:
    """A path that a user gave, with ``~`` and ``~user`` resolved.

    Args:
        spec: as given.
        key: recipe key or option, for the messages.

    Raises:
        ValueError: it is empty, holds a zero byte, or names an unknown user.
    """
    text = str(spec)
    if not text.strip():
        raise ValueError(f"{key} = {text!r} is empty, perhaps an unset variable: give a path (. is the present folder)")
    if "\0" in text:
        raise ValueError(f"{key} = {text!r} holds a zero byte, which no path has: give another path")
    if longest_part(text) > LONGEST_NAME:
        raise ValueError(f"{key} = {text[:100]!r}... has a name of more than {LONGEST_NAME} bytes: give another path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{key} = {text!r}: there is no user {text.split('/')[0][1:]!r} here: give the path without ~"
        ) from None


def longest_part(path: str) -> int:
    """Bytes of the longest name in a path."""
    return max(len(part.encode(errors="replace")) for part in path.split("/"))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, also where the disk is full.

    Args:
        path: of the file.
        content: text, written as UTF-8, or bytes.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    beside = path.with_name(f"{path.name}.tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
