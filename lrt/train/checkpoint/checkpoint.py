"""Checkpoints that survive: written beside, made whole by one rename, readable on any number of ranks.

A checkpoint is a folder ``step_00001000`` with

    shard-*.safetensors   tensors of the model and the optimizer, each rank its own rows (DCP)
    rank_00000.pt         what belongs to one rank alone: the loader's place, random number states
    meta.json             step, tokens and the like
    recipe.toml           the resolved recipe
    complete.json         size and checksum of every file; written last, so a folder without it is not a checkpoint

It is written as ``.writing_step_00001000`` and renamed when every rank has flushed its files. Nothing in
it is unpickled: safetensors, JSON, TOML, and ``torch.load(weights_only=True)``. A checkpoint that cannot be used
(``lrt.train.checkpoint.verifying``) is never deleted; one whose place is needed is moved aside.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from lrt.config import CheckpointConfig, Recipe, dump_recipe
from lrt.serialization.syncing import sync
from lrt.serialization.tensors import open_file
from lrt.tables import ReadTable, Table
from lrt.train.checkpoint.verifying import COMPLETE, FORMAT, Written, candidates, incomplete, rank_file, step_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from typing_extensions import Buffer

# One process is a normal way to train here; DCP warns of it at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# ------------------------------------------------------------------ reading


def read_tensors(folder: Path, tensors: dict[str, Tensor], *, process_group: dist.ProcessGroup | None = None) -> None:
    """Fill ``tensors`` in place from a checkpoint, on any number of ranks.

    Raises:
        ValueError: a tensor is missing, has another shape, or a file cannot be read.
    """
    found = {name for path in folder.glob("*.safetensors") for name in open_file(path)}
    if not tensors.keys() <= found:
        raise ValueError(f"{folder} cannot be read into this model: it holds no {min(tensors.keys() - found)}")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        dcp.load(tensors, storage_reader=reader, process_group=process_group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise ValueError(f"{folder} cannot be read into this model: {causes}") from None


# ------------------------------------------------------------------ writing


class _Hashing(io.RawIOBase):
    """A file whose checksum another thread computes while it is written and flushed."""

    def __init__(self, file: io.IOBase) -> None:
        self._file, self._pool = file, ThreadPoolExecutor(1)
        self._size, self._crc32 = 0, 0

    def write(self, data: Buffer) -> int:
        self._pool.submit(self._take, data)
        return int(self._file.write(data))

    def _take(self, data: Buffer) -> None:
        self._size, self._crc32 = self._size + memoryview(data).nbytes, zlib.crc32(data, self._crc32)

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        self._file.flush()  # DCP asks for it to flush the file to the disk, and leaves the end of it in Python's buffer
        return int(self._file.fileno())

    def written(self) -> Written:
        self._pool.shutdown()
        return Written(self._size, self._crc32)


class _Files(FileSystem):
    """DCP's files, with checksums of what was written."""

    def __init__(self) -> None:
        self.written: dict[str, Written] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            stream = _Hashing(file)
            yield stream
        self.written[Path(path).name] = stream.written()


class _Writer(dcp.HuggingFaceStorageWriter):
    """DCP's safetensors writer; its protocol carries an error on any rank to all, so everything is written inside
    it."""

    def __init__(
        self, folder: Path, *, rank_state: tuple[str, bytes], publish: Callable[[Path, dict[str, Written]], None]
    ) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._rank_state, self._publish = folder, rank_state, publish
        self.fs = self._files = _Files()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:  # every rank, first
        if not self._folder.parent.is_dir():
            raise FileNotFoundError(f"{self._folder.parent} was deleted under the run")
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:  # every rank
        self._folder.mkdir(exist_ok=True)
        name, content = self._rank_state
        _write_synced(self._folder / name, content, self._files.written)
        results = super().write_data(plan, planner).wait()
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([*results, WriteResult(MetadataIndex(COMPLETE), 0, self._files.written)])
        return done

    def finish(
        self, metadata: Metadata, results: list[list[WriteResult]]
    ) -> None:  # rank 0, after all ranks have written
        files: dict[str, Written] = {}
        for of_rank in results:
            files |= of_rank[-1].storage_data
        self._publish(self._folder, files)


class CheckpointManager:
    """Writes the checkpoints of one run, in the background, and drops old ones.

    Args:
        folder: where the checkpoints lie; shared by all ranks.
        config: ``every``, ``keep_last``, ``keep_every``, ``asynchronous``.
        recipe: stored with every checkpoint.
        rank, world_size: of this process.
        process_group: a gloo group for the background thread alone; None for one process.
        last_saved: step whose checkpoint is there already.
        report: receives one line for the user.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: CheckpointConfig,
        recipe: Recipe,
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        last_saved: int = -1,
        report: Callable[[str], None] = print,
    ) -> None:
        self.folder, self._config, self._recipe = Path(folder), config, recipe
        self._rank, self._world_size, self._group, self._report = rank, world_size, process_group, report
        self._pending: tuple[int, Future[object]] | None = None
        self.last_saved = last_saved
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.folder.glob(".writing_*"), *self.folder.glob(".deleting_*")]:
                shutil.rmtree(leftover, ignore_errors=True)
        if process_group is not None:
            dist.barrier(process_group)  # no rank writes into a folder that rank 0 still clears

    def save(
        self, step: int, *, tensors: dict[str, Tensor], rank_state: ReadTable, meta: ReadTable, prune: bool = True
    ) -> None:
        """Start writing a checkpoint; returns when the tensors are copied, so training may change them.

        Args:
            step: optimizer steps done.
            tensors: everything that is sharded or replicated over ranks.
            rank_state: this rank's own state: plain values and tensors.
            meta: plain values, the same on every rank.
            prune: drop old checkpoints once this one is whole.
        """
        self.wait()
        if step == self.last_saved:
            return
        full_meta = {**meta, "step": step, "world_size": self._world_size, "torch": torch.__version__}
        state = io.BytesIO()
        torch.save(dict(rank_state), state)
        writer = _Writer(
            self.folder / f".writing_step_{step:08d}",
            rank_state=(rank_file(self._rank), state.getvalue()),
            publish=lambda folder, files: self._publish(folder, files, meta=full_meta, prune=prune),
        )
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        self._pending = (step, future)  # type: ignore[assignment]
        if not self._config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Report a background save that has ended; never waits."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> bool:
        """Wait for the background save; False when it failed (said to the user, older checkpoints are untouched)."""
        if self._pending is None:
            return True
        step, future = self._pending
        self._pending = None
        problem = future.exception()
        if problem is None:
            self.last_saved = step
            return True
        causes = (
            [str(cause) for cause, _ in problem.failures.values()]
            if isinstance(problem, CheckpointException)
            else [str(problem)]
        )
        if self._rank == 0:
            shutil.rmtree(self.folder / f".writing_step_{step:08d}", ignore_errors=True)
            kept = next((folder for folder in reversed(candidates(self.folder)) if incomplete(folder) is None), None)
            self._report(
                f"checkpoint of step {step} was not written ({'; '.join(dict.fromkeys(causes))}); "
                f"newest whole one: {kept or 'none'}"
            )
        return False

    def _publish(self, folder: Path, files: dict[str, Written], *, meta: Table, prune: bool) -> None:
        _write_synced(folder / "meta.json", json.dumps(meta, indent=1).encode(), files)
        _write_synced(folder / "recipe.toml", dump_recipe(self._recipe).encode(), files)
        content = {
            "format": FORMAT,
            "files": {name: {"bytes": files[name].size, "crc32": files[name].crc32} for name in sorted(files)},
        }
        _write_synced(folder / COMPLETE, json.dumps(content, indent=1).encode(), {})
        problem = incomplete(folder)
        if problem is not None:
            raise OSError(f"{problem}; the folder must be shared by all ranks")
        sync(folder)
        target = self.folder / folder.name.removeprefix(".writing_")
        if target.exists():  # it could not be used, or this run would have gone on from it
            _set_aside(target, self._report)
        folder.rename(target)
        sync(self.folder)
        if prune:
            self._prune(step_of(target))

    def _prune(self, newest: int) -> None:
        """Drop old checkpoints; one behind the newest belongs to a run that did not come to be,
        and none that is damaged is counted."""
        found = [
            folder for folder in candidates(self.folder) if step_of(folder) <= newest and incomplete(folder) is None
        ]
        for old in found[: -max(1, self._config.keep_last)]:
            if not (self._config.keep_every and step_of(old) % self._config.keep_every == 0):
                _delete(old)


def _set_aside(folder: Path, report: Callable[[str], None]) -> None:
    numbers = (f"unusable_{folder.name}{f'_{n}' if n else ''}" for n in range(1 << 20))
    aside = next(path for path in map(folder.with_name, numbers) if not path.exists())
    folder.rename(aside)
    report(f"{folder}, which could not be used, is now {aside.name}")


def _delete(folder: Path) -> None:
    gone = folder.with_name(f".deleting_{folder.name}")  # a kill half-way leaves no folder with a checkpoint's name
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _write_synced(path: Path, content: bytes, written: dict[str, Written]) -> None:
    """Write a small file to the disk, and note it in ``written``."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    written[path.name] = Written(len(content), zlib.crc32(content))
