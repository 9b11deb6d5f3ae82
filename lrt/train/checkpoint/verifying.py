"""Whether a folder is a checkpoint: exactly the files that were written, each with its checksum,
and all of them readable."""

from __future__ import annotations

import json
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from lrt.serialization.tensors import open_file
from lrt.tables import Table

FORMAT = "lrt training checkpoint 2"
FORMATS = ("lrt training checkpoint 1", FORMAT)  # 1: without checksums
COMPLETE = "complete.json"
LEFT_OUT = "checkpoint left out: "
BLOCK = 1 << 24  # bytes hashed at once
_NAME = re.compile(r"step_(\d{8,})")
_RANK = re.compile(r"rank_\d{5}\.pt")


class Written(NamedTuple):
    """What is known of a file of a checkpoint."""

    size: int  # bytes
    crc32: int | None  # None = written before there were checksums


class Loaded(NamedTuple):
    """What a checkpoint held beside its tensors."""

    meta: Table
    rank_states: list[Table]  # one per rank of the run that wrote it


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 where the name is none of a checkpoint."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def candidates(folder: str | Path) -> list[Path]:
    """Everything below a folder that has a checkpoint's name, oldest first."""
    return sorted((path for path in Path(folder).glob("step_*") if step_of(path) >= 0), key=step_of)


# ------------------------------------------------------------------ one checkpoint


def damage(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint, in one line that names the file; None when it is one.

    Every byte is read: the checksums of all files are compared, or, where there are none, everything is opened.
    """
    problem = incomplete(folder)
    if problem is not None:
        return problem
    try:
        files = _listed(folder)
        with ThreadPoolExecutor(8) as pool:  # crc32 and reading let go of the interpreter
            list(pool.map(lambda item: _check_file(folder / item[0], item[1]), files.items()))
        read_rest(folder)
    except (ValueError, OSError) as error:
        return _one_line(error)
    return None


def incomplete(folder: Path) -> str | None:
    """Why a folder does not hold exactly the files that were written, by their names and sizes alone;
    None when it does."""
    try:
        files = _listed(folder)
        there = {
            path.name for path in folder.iterdir() if not path.name.startswith(".") or path.suffix == ".safetensors"
        }
        extra = sorted(there - files.keys() - {COMPLETE})
        if extra:
            return f"{folder / extra[0]} is not listed in {COMPLETE}: the checkpoint was changed"
        for name, written in files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != written.size:
                return (
                    f"{path} has {'no' if size is None else size} bytes, but {written.size} were written: "
                    "the checkpoint is damaged"
                )
        missing = {"meta.json", "recipe.toml", rank_file(0)} - files.keys()
        if missing or not any(name.endswith(".safetensors") for name in files):
            return f"{folder / COMPLETE} lists no {min(missing, default='tensors')}: the checkpoint is damaged"
    except (ValueError, OSError) as error:
        return _one_line(error)
    return None


def _listed(folder: Path) -> dict[str, Written]:
    """The files that were written, by name.

    Raises:
        ValueError: there is no list of them, or none that this version can read.
    """
    marker = folder / COMPLETE
    if not marker.is_file():
        raise ValueError(f"{folder} holds no complete checkpoint ({COMPLETE} is missing)")
    unreadable = f"{marker} cannot be read: it was not written by this trainer, or is damaged"
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        form, files = content.get("format"), content["files"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(unreadable) from None
    if form not in FORMATS:
        raise ValueError(f"{folder} has format {form!r}, but this version reads {' and '.join(map(repr, FORMATS))}")
    try:
        listed = {
            name: Written(entry, None) if form != FORMAT else Written(entry["bytes"], entry["crc32"])
            for name, entry in files.items()
        }
    except (KeyError, TypeError, AttributeError):
        raise ValueError(unreadable) from None
    wrong = [
        name
        for name, w in listed.items()
        if Path(name).name != name or type(w.size) is not int or type(w.crc32) is not int and form == FORMAT
    ]
    if wrong:
        raise ValueError(unreadable)
    return listed


def _check_file(path: Path, written: Written) -> None:
    """Raises ValueError when a file is not what was written."""
    if written.crc32 is not None and checksum(path) != written.crc32:
        raise ValueError(f"{path} does not have the checksum that it was written with: the checkpoint is damaged")
    if path.suffix == ".safetensors":
        for name, tensor in open_file(path).items():
            if written.crc32 is None and not is_finite(tensor.read()):
                raise ValueError(f"{path} holds numbers in {name} that are not finite")


def checksum(path: Path) -> int:
    """crc32 of a file."""
    crc, block = 0, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            crc = zlib.crc32(block[:size], crc)
    return crc


def is_finite(tensor: torch.Tensor) -> bool:
    return (
        not tensor.is_floating_point()
        or tensor.numel() == 0
        or bool(torch.linalg.vector_norm(tensor, float("inf")).isfinite())
    )


def read_rest(folder: Path) -> Loaded:
    """The part of a checkpoint that is not tensors of the model or the optimizer.

    Raises:
        ValueError: a file of it is damaged.
    """
    path = folder / "meta.json"
    ranks = sum(_RANK.fullmatch(file.name) is not None for file in folder.iterdir())
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        step, size = meta["step"], meta["world_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {_one_line(error)}): the checkpoint is damaged"
        ) from None
    if size != ranks or step_of(folder) >= 0 and step != step_of(folder):
        raise ValueError(
            f"{path} speaks of step {step} on {size} ranks, but {folder} holds {ranks} rank files: "
            "the checkpoint is damaged"
        )
    return Loaded(meta, [_rank_state(folder / rank_file(rank)) for rank in range(ranks)])


def _rank_state(path: Path) -> Table:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # zip, pickle and torch have an exception each for a damaged file
        raise ValueError(
            f"{path} cannot be read with weights_only ({_one_line(error)}): "
            "it is damaged, or was not written by this trainer"
        ) from None
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, not the state of a rank: it was not written by this trainer"
        )
    return dict(state)


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------ all of a run


def whole(folder: str | Path, *, report: Callable[[str], None] = warnings.warn) -> list[Path]:
    """Whole checkpoints below a folder, oldest first; damaged ones are reported and left out."""
    return [candidate for candidate in candidates(folder) if _reported(candidate, report)]


def latest(folder: str | Path, *, report: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest whole checkpoint below a folder, or None; newer ones that are damaged are reported."""
    return next((candidate for candidate in reversed(candidates(folder)) if _reported(candidate, report)), None)


def _reported(candidate: Path, report: Callable[[str], None]) -> bool:
    problem = damage(candidate)
    if problem is not None:
        report(f"{LEFT_OUT}{problem}")
    return problem is None


def newest(folder: Path, *, report: Callable[[str], None]) -> Path | None:
    """The checkpoint from which a run goes on; None where none was ever written.

    Raises:
        ValueError: there are some, and none can be used.
    """
    problems: list[str] = []
    found = latest(folder, report=lambda text: problems.append(text.removeprefix(LEFT_OUT)))
    if found is None and problems:
        raise ValueError(
            f"{folder} holds checkpoints, but none can be used, and nothing in it was changed: {'; '.join(problems)}. "
            f"Choose another run.name, or move the folder away"
        )
    for problem in problems:
        report(f"{LEFT_OUT}{problem}; {found} is used")
    return found


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` names: itself, or the newest in it or in its ``checkpoints`` folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(path)
    if step_of(path) >= 0 or (path / COMPLETE).exists():
        problem = damage(path)
        if problem is not None:
            raise ValueError(f"{problem}; name another checkpoint")
        return path
    found = latest(path) or latest(path / "checkpoints")
    if found is None:
        raise ValueError(
            f"{path} holds no checkpoint (no folder step_NNNNNNNN with {COMPLETE}): "
            "name a run folder, a checkpoint of it, or a folder that was exported (with config.json)"
        )
    return found
