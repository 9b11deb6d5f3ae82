"""The files of CORE: nanochat's bundle as the user has it, or as it is downloaded, whole and checked or not at all."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from lrt.eval.core.tasks import Item, Task, read_item

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"  # as of October 2025 to June 2026
ROOTS = (
    "eval_bundle/eval_data/",
    "eval_data/",
    "",
)  # of the zip file, of the unpacked bundle, of LLM Foundry's local_data
PIECE = 1 << 20
TIMEOUT_S = 60


class Bundle:
    """A folder or zip file with the tasks' files.

    Args:
        path: eval_bundle.zip, the folder that it unpacks to, or LLM Foundry's local_data.

    Raises:
        ValueError: there is nothing of the kind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._zip: zipfile.ZipFile | None = None
        if self.path.is_file():
            try:
                self._zip = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise ValueError(
                    f"{path}: no whole zip file ({error}): fetch it again, python -m lrt.eval.core --download"
                ) from None
        elif not self.path.is_dir():
            raise ValueError(
                f"{path}: there is no bundle; name eval_bundle.zip or its folder, or fetch it: "
                "python -m lrt.eval.core --download"
            )

    def items(self, task: Task) -> list[Item] | None:
        """The items of a task in the order of its file; None where the bundle lacks the file.

        Raises:
            ValueError: the file is damaged.
        """
        for root in ROOTS:
            text = self._read(root + task.file)
            if text is not None:
                return _parsed(task, text, where=f"{self.path}: {root + task.file}")
        return None

    def _read(self, name: str) -> str | None:
        try:
            data = (self.path / name).read_bytes() if self._zip is None else self._zip.read(name)
            return data.decode("utf-8")
        except (FileNotFoundError, KeyError):
            return None
        except (zipfile.BadZipFile, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: {name} cannot be read ({error}): fetch the bundle again") from None


def _parsed(task: Task, text: str, *, where: str) -> list[Item]:
    items = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                items.append(read_item(task, json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{where}, line {number}: {error}; fetch the bundle again") from None
    if not items:
        raise ValueError(f"{where} is empty: fetch the bundle again")
    return items


# ------------------------------------------------------------------ where it lies


def default_path() -> Path:
    """Where ``--download`` puts the bundle: LRT_CACHE, or ~/.cache/lrt."""
    return Path(os.environ.get("LRT_CACHE") or Path.home() / ".cache" / "lrt") / "eval_bundle.zip"


def find_bundle(path: str | Path | None) -> Bundle | None:
    """The bundle that is named, else the downloaded one, else nanochat's own; None where there is none.

    Raises:
        ValueError: what is named is none.
    """
    if path is not None:
        return Bundle(path)
    nanochat = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat") / "eval_bundle"
    return next((Bundle(place) for place in (default_path(), nanochat) if place.exists()), None)


# ------------------------------------------------------------------ download


def download(
    url: str = URL,
    *,
    to: Path | None = None,
    sha256: str = SHA256,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Fetch the bundle, unless it is there; it appears only when it is whole and its checksum is right.

    Args:
        url: of the zip file.
        to: file to write; None = ``default_path()``.
        sha256: of the file.
        progress: called with (bytes so far, bytes in all; 0 where the server does not say).

    Returns:
        The file.

    Raises:
        ValueError: it could not be fetched whole, or is another file.
    """
    target = default_path() if to is None else Path(to).expanduser()
    if target.is_file() and _sha256(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=target.name, suffix=".part", dir=target.parent)
    partial = Path(name)
    instead = (
        f"Nothing is left of it: give the same command again, or fetch {url} by other means and name it with --bundle"
    )
    done = total = 0
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            total = int(response.headers.get("Content-Length") or 0)
            digest = hashlib.sha256()
            while piece := response.read(PIECE):
                file.write(piece)
                digest.update(piece)
                done += len(piece)
                progress(done, total)
        if total and done != total:
            raise OSError("the connection ended early")
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{url}: the file has the SHA-256 {digest.hexdigest()}, but {sha256} was expected, "
                f"so it is damaged or another version. {instead}, which takes any version"
            )
        partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        amount = f" after {done / 1e6:.1f}{f' of {total / 1e6:.1f}' if total else ''} MB" if done else ""
        raise ValueError(f"{url} could not be fetched{amount} ({error}). {instead}") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
