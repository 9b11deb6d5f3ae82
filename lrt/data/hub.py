"""Datasets of the Hugging Face hub, fetched once into its cache."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PREFIX = "hf://datasets/"
LESS = "a folder or a glob of files behind the dataset, as in hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT"


class _Listing(NamedTuple):
    """What the hub says of a dataset's parquet files."""

    all: list[str]
    wanted: list[str]
    missing: list[int]  # bytes of each wanted file that the cache lacks


def download(spec: str, *, key: str) -> str:
    """Fetch the parquet files of a dataset, with a progress bar; a broken download goes on where it stopped.

    Before it begins, rank 0 says how much will be fetched; of the processes that share a cache one fetches,
    the others wait.

    Args:
        spec: ``hf://datasets/OWNER/NAME``, optionally ``@REVISION`` and a folder or glob inside it, such as
            ``hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT``.
        key: recipe key, for the messages.

    Returns:
        The local folder, glob or file.

    Raises:
        ValueError: not such an address, nothing there, or it could not be fetched.
    """
    parts = spec.removeprefix(PREFIX).strip("/").split("/")
    if not spec.startswith(PREFIX) or len(parts) < 2 or not all(parts):
        raise ValueError(f"{key} = {spec!r}: write hf://datasets/OWNER/NAME, with a folder or glob behind it if wanted")
    import huggingface_hub

    name, _, revision = parts[1].partition("@")
    repository = f"{parts[0]}/{name}"
    inside = "/".join(parts[2:])
    exact = inside.endswith(".parquet")
    patterns = [inside] if exact else [f"{inside}/*.parquet" if inside else "*.parquet"]
    listing = _list(repository, revision=revision or None, patterns=patterns)
    if listing is not None and not listing.wanted:
        folders = sorted({str(PurePosixPath(file).parent) for file in listing.all})
        where = (
            f"they lie in {', '.join(folders[:6])}{', ...' if len(folders) > 6 else ''}"
            if folders
            else "nor anywhere else in it"
        )
        raise ValueError(
            f"{key} = {spec!r}: no parquet files there, {where}; name {LESS} (a glob of files ends in .parquet)"
        )
    if listing is not None and listing.missing:
        _announce(spec, listing)
    try:
        with _turn(repository) if listing is not None and listing.missing else nullcontext():
            folder = huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision or None, allow_patterns=patterns
            )
    except _failures() as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{key} = {spec!r} could not be fetched ({first_line}): "
            "check the name and the connection, or give local files"
        ) from None
    return f"{folder}/{inside}" if inside else str(folder)


def _list(repository: str, *, revision: str | None, patterns: list[str]) -> _Listing | None:
    """Ask the hub; None when it does not answer, and then the cache may hold everything, or ``snapshot_download`` says
    what is wrong."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    except _failures():
        return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".parquet")}
    wanted = list(filter_repo_objects(sizes, allow_patterns=patterns))
    cached = {
        file
        for file in wanted
        if isinstance(try_to_load_from_cache(repository, file, revision=info.sha, repo_type="dataset"), str)
    }
    return _Listing(list(sizes), wanted, [sizes[file] for file in wanted if file not in cached])


def _failures() -> tuple[type[BaseException], ...]:
    """Errors of the file system, the hub, and (the base of the hub's own) the library that it connects with,
    which differs by version."""
    from huggingface_hub.utils import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _announce(spec: str, listing: _Listing) -> None:
    """Say how much will be fetched and how to need less."""
    if os.environ.get("RANK", "0") != "0":
        return
    cache = _cache()
    present = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    print(
        f"{spec}: fetching {len(listing.missing)} of {len(listing.wanted)} files, "
        f"{sum(listing.missing) / 2**30:.2f} GiB, before anything is read, "
        f"into {cache} ({shutil.disk_usage(present).free / 2**30:.0f} GiB free; HF_HOME moves it); to need less, "
        f"name {LESS}",
        file=sys.stderr,
        flush=True,
    )


def _turn(repository: str) -> AbstractContextManager[object]:
    """Held by the process that fetches; the others find the files in the cache when their turn comes."""
    from huggingface_hub.utils import WeakFileLock

    folder = _cache() / ".locks" / f"datasets--{repository.replace('/', '--')}"
    folder.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(folder / "lrt_fetch.lock")


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()
