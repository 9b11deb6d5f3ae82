"""Folders of models that are written over: the old model or the new one is there at every instant, never parts of both.

The new files are written into a folder inside, which one rename declares written; only then do they take the places of
the old ones. A process that is killed before the rename leaves the old model; after it, whoever opens the folder next
finishes the moves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lrt.serialization.permissions import usual_permissions
from lrt.serialization.syncing import sync

WRITING, WRITTEN, LIST = ".lrt-writing", ".lrt-written", ".files.json"
# What a save owns, and therefore removes where the new model has no such file.
# What else lies there (a tokenizer, a trainer's state) stays.
OWNED = re.compile(
    r"config\.json|generation_config\.json|modeling_lrt\.py|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json|adapter_model(-\d+-of-\d+)?\.safetensors|adapter_model\.safetensors\.index\.json"
)


@contextmanager
def renewed_folder(folder: str | Path) -> Iterator[Path]:
    """A place for files that replace the model in ``folder`` together, when the block ends without an error.

    Args:
        folder: may exist and hold a model; files that are not a model's stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_renewal(folder)
    place = folder / WRITING
    for left in (place, folder / WRITTEN):
        shutil.rmtree(left, ignore_errors=True)
    place.mkdir()
    try:
        yield place
        usual_permissions(place)
        names = sorted(file.name for file in place.iterdir())
        (place / LIST).write_text(json.dumps(names), encoding="utf-8")
        for path in (*place.rglob("*"), place):
            sync(path)
        place.rename(folder / WRITTEN)
        sync(folder)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    finish_renewal(folder)


def config_file(folder: str | Path) -> Path:
    """config.json of a folder that may hold a model, after whatever a killed save left to be done."""
    finish_renewal(folder)
    return Path(folder) / "config.json"


def finish_renewal(folder: str | Path) -> None:
    """Do what a killed save left to be done; nothing in the usual case.

    Raises:
        ValueError: the folder cannot be written, so it stays half old and half new.
    """
    written = Path(folder) / WRITTEN
    if written.is_symlink() or not (written / LIST).is_file():
        return
    try:
        names = json.loads((written / LIST).read_text(encoding="utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("its list of files was changed")
        for old in Path(folder).iterdir():
            if OWNED.fullmatch(old.name) and old.name not in names:
                old.unlink(missing_ok=True)
        for name in names:
            with suppress(FileNotFoundError):  # moved before
                os.replace(written / name, Path(folder) / name)
        shutil.rmtree(written)
    except FileNotFoundError:
        return  # another process was quicker
    except (OSError, ValueError) as error:
        mend = "open it once where it may be written"
        raise ValueError(
            f"a save into {folder} was interrupted and cannot be finished here ({error}): {mend}"
        ) from None
