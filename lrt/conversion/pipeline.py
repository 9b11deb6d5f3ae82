"""``convert``: read, write beside the output, read again, compare, and only then rename."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from lrt.conversion.checkpoints import Checkpoint
from lrt.conversion.kinds import KINDS, kind_of, read_base
from lrt.conversion.opening import find_model
from lrt.conversion.tokenizers import read_files, read_nanochat
from lrt.conversion.verification import Verification, verify
from lrt.serialization import new_folder
from lrt.serialization.lazy import cast, common_dtype

SHARD_SIZE = 5 * 10**9


class Converted(NamedTuple):
    """What ``convert`` did."""

    output: Path
    source: Checkpoint
    verification: Verification | None
    notes: tuple[str, ...]


def convert(
    path: str | Path,
    output: str | Path,
    *,
    source: str | None = None,
    target: str,
    dtype: torch.dtype | None = None,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    compare: Callable[..., Verification] | None = verify,
    shard_size: int | None = SHARD_SIZE,
    report: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Convert a checkpoint; the output appears whole and compared with its source, or not at all.

    Args:
        path: the checkpoint.
        output: a folder that does not exist yet.
        source: one of ``KINDS``; None = the kind that lies there. Of a training run the newest export or checkpoint is
            meant.
        target: one of ``KINDS``.
        dtype: of the written tensors; None = the narrowest that holds the source exactly.
        step: which checkpoint of a run; None = the newest.
        tokenizer: folder (or tokenizer.json) whose tokenizer travels; None = the one found beside the checkpoint.
        base: for source "adapter": the decoder that it belongs to, a folder of any kind or a plain Hugging Face
            decoder.
        compare: proves the output against the source; None writes without proof.
        shard_size: bytes of the largest safetensors file.
        report: receives lines for the user.
        progress: called with (bytes done, bytes in all) while tensors are written.

    Raises:
        ValueError: the input cannot be read or expressed in the target, the output exists, there is no space, or the
            comparison fails. The source is never changed, and nothing is left at the output.
    """
    for name, role in ((source, "--from"), (target, "--to")):
        if name is not None and name not in KINDS:
            raise ValueError(f"{role} {name}: unknown kind; use one of {', '.join(KINDS)}")
    write = KINDS[target].write
    if write is None:
        raise ValueError(
            f"--to {target}: {KINDS[target].holds} is only read; use one of "
            f"{', '.join(k for k, v in KINDS.items() if v.write)}"
        )
    if not Path(path).exists():
        raise ValueError(f"--input {path}: there is nothing")
    newest = step is None and source in (None, "lrt", "hf")
    path = find_model(path) if newest else Path(path)
    source = source or kind_of(path)
    if (base is not None) != (source == "adapter"):
        raise ValueError("--base names the decoder of an adapter: give it with --from adapter, and only there")
    more = {} if base is None else {"base": read_base(Path(base))}
    opened: Checkpoint = KINDS[source].read(path, step=step, **more)
    if tokenizer is not None:
        opened = dataclasses.replace(opened, tokenizer=_given_tokenizer(Path(tokenizer)), notes=())
    kept = dtype or common_dtype(opened.tensors)
    rounded = dataclasses.replace(
        opened, tensors={n: cast(t, kept) if t.dtype != kept else t for n, t in opened.tensors.items()}
    )
    total = sum(t.nbytes for t in rounded.tensors.values())
    _check_space(Path(output), total)
    done = 0

    def advance(written: int) -> None:
        nonlocal done
        done += written
        progress(done, total)

    verification = None
    try:
        with new_folder(output) as place:
            notes = (*opened.notes, *write(place, rounded, shard_size=shard_size, progress=advance))
            for note in notes:
                report(f"note: {note}")
            if compare is not None:
                around = {"base": rounded} if target == "adapter" else {}
                verification = compare(opened, KINDS[target].read(place, **around), report=report)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{output} could not be written ({error}): nothing is left there") from None
    return Converted(Path(output), opened, verification, notes)


def _given_tokenizer(path: Path) -> dict[str, bytes]:
    if path.is_file():
        files = read_files(path.parent) | {"tokenizer.json": path.read_bytes()}
    else:
        files = read_nanochat(path)
    files.pop("generation_config.json", None)  # of the model that lies there
    if "tokenizer.json" not in files:
        raise ValueError(f"--tokenizer {path}: no tokenizer.json or tokenizer.pkl there")
    return files


def _check_space(output: Path, needed: int) -> None:
    """Refuse before the first byte when the disk cannot hold the output."""
    parent = next(p for p in [output.absolute().parent, *output.absolute().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"--output {output}: {_size(needed)} are needed, {_size(free)} are free there: choose another place"
        )


def _size(count: int) -> str:
    """Bytes as people read them: three digits and a unit, which no small number loses."""
    unit = min(3, max(0, (len(str(count)) - 1) // 3))
    return f"{count} bytes" if unit == 0 else f"{count / 1000**unit:,.1f} {'kMG'[unit - 1]}B"
