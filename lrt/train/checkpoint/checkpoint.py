"""Checkpoints that survive: written beside, made whole by one rename, readable on any number of ranks.

A checkpoint is a folder ``step_00001000`` with

    shard-*.safetensors   tensors of the model and the optimizer, each rank its own rows (DCP)
    rank_00000.pt         what belongs to one rank alone: the loader's place, random number states
    meta.json             step, tokens and the like
    recipe.toml           the resolved recipe
    complete.json         the size of every file; written last, so a folder without it is not a checkpoint

It is written as ``.writing_step_00001000`` and renamed when every rank has flushed its files. Nothing in
it is unpickled: safetensors, JSON, TOML, and ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lrt.config import CheckpointConfig, Recipe, dump_recipe, parse_recipe, recipe_to_table

# One process is a normal way to train here; DCP warns of it at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

FORMAT = "lrt training checkpoint 1"
_NAME = re.compile(r"step_(\d{8,})")


class Loaded(NamedTuple):
    """What a checkpoint held beside its tensors."""

    meta: dict[str, Any]
    rank_states: list[dict[str, Any]]  # one a rank of the run that wrote it


# ------------------------------------------------------------------ finding and checking


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def damage(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint, in words; None when it is one."""
    marker = folder / "complete.json"
    if not marker.is_file():
        return f"{folder} holds no complete checkpoint (complete.json is missing)"
    try:
        content = json.loads(marker.read_text())
        files = dict(content["files"])
    except (ValueError, KeyError, TypeError):
        return f"{marker} cannot be read: it was not written by this trainer, or is damaged"
    if content.get("format") != FORMAT:
        return f"{folder} has format {content.get('format')!r}, but this version reads {FORMAT!r}"
    for name, size in files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            return f"{path} has {actual if actual is not None else 'no'} bytes, but {size} were written: the checkpoint is damaged"
    return None


def whole(folder: str | Path, *, report: Callable[[str], None] = warnings.warn) -> list[Path]:
    """Whole checkpoints below a folder, oldest first; damaged ones are reported and left out."""
    candidates = sorted((p for p in Path(folder).glob("step_*") if step_of(p) >= 0), key=step_of)
    good = []
    for candidate in candidates:
        problem = damage(candidate)
        if problem is None:
            good.append(candidate)
        else:
            report(f"checkpoint left out: {problem}")
    return good


def latest(folder: str | Path, *, report: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest whole checkpoint below a folder, or None."""
    found = whole(folder, report=report)
    return found[-1] if found else None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` names: itself, or the newest in it or in its ``checkpoints`` folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(path)
    if step_of(path) >= 0 or (path / "complete.json").exists():
        problem = damage(path)
        if problem is not None:
            raise ValueError(f"{problem}; name another checkpoint")
        return path
    found = latest(path) or latest(path / "checkpoints")
    if found is None:
        raise ValueError(
            f"{path} holds no checkpoint (no folder step_NNNNNNNN with complete.json): name a run folder, a checkpoint of it, or a folder "
            "that was exported (with config.json)"
        )
    return found


def check_same_model(folder: Path, recipe: Recipe) -> None:
    """Refuse a checkpoint whose tensors belong to another model.

    Raises:
        ValueError: the recipe stored there builds another model; the differing keys are named.
    """
    stored, here = _stored_recipe(folder), recipe_to_table(recipe)
    different = []
    for section, keys in (("model", None), ("recurrence", None), ("run", ("backbone",)), ("optimizer", ("kind",)), ("training", ("stage",))):
        a, b = stored[section], here[section]
        if not isinstance(a, dict) or not isinstance(b, dict):
            different += [f"{section} = {'on' if a else 'off'} there, {'on' if b else 'off'} here"] if bool(a) != bool(b) else []
            continue
        different += [f"{section}.{k} = {a.get(k)!r} there, {b[k]!r} here" for k in keys or b if _plain(a.get(k)) != _plain(b[k])]
    if different:
        raise ValueError(
            f"{folder} belongs to another model: {'; '.join(different)}. Choose another run.name, or set checkpoint.resume = false and "
            f"training.init_from for a warm start"
        )


def stored_recipe(folder: Path) -> Recipe:
    """The recipe that a checkpoint was trained with."""
    return parse_recipe((folder / "recipe.toml").read_text(encoding="utf-8"))


def check_same_schedule(folder: Path, recipe: Recipe) -> None:
    """Refuse another schedule for a run that is over: its export would name a schedule that never trained it.

    Raises:
        ValueError: the recipe stored there has another schedule.
    """
    there, here = _stored_recipe(folder)["schedule"], recipe_to_table(recipe)["schedule"]
    keys = sorted({*there, *here}, key=[*here, *there].index)
    different = [f"schedule.{k} = {there.get(k)!r} there, {here.get(k)!r} here" for k in keys if _plain(there.get(k)) != _plain(here.get(k))]
    if different:
        raise ValueError(
            f"{folder} has reached its end with another schedule: {'; '.join(different)}. Choose another run.name, "
            f"or a longer horizon (training.steps) to go on with the new schedule"
        )


def _stored_recipe(folder: Path) -> dict[str, Any]:
    return recipe_to_table(stored_recipe(folder))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------ reading


def read_tensors(folder: Path, tensors: dict[str, Tensor], *, process_group: dist.ProcessGroup | None = None) -> None:
    """Fill ``tensors`` in place from a checkpoint, on any number of ranks.

    Raises:
        ValueError: a tensor is missing, has another shape, or a file cannot be read.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        dcp.load(tensors, storage_reader=reader, process_group=process_group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise ValueError(f"{folder} cannot be read into this model: {causes}") from None


def read_rest(folder: Path) -> Loaded:
    """The part of a checkpoint that is not tensors of the model or the optimizer."""
    meta = json.loads((folder / "meta.json").read_text())
    files = [folder / _rank_file(rank) for rank in range(meta["world_size"])]
    return Loaded(meta, [_read_rank(file) for file in files])


def _read_rank(file: Path) -> Any:
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 - a damaged or foreign file fails in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: refused, not a whole file of this trainer ({reason})") from None


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


# ------------------------------------------------------------------ writing


class _Writer(dcp.HuggingFaceStorageWriter):
    """DCP's safetensors writer; its protocol carries an error on any rank to all, so everything is written inside it."""

    def __init__(self, folder: Path, *, before: Callable[[Path], None], publish: Callable[[Path], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._folder, self._before, self._publish = folder, before, publish

    def write_data(self, plan: Any, planner: Any) -> Any:  # every rank
        self._folder.mkdir(parents=True, exist_ok=True)
        self._before(self._folder)
        return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:  # rank 0, after all ranks have written
        self._publish(self._folder)


class CheckpointManager:
    """Writes the checkpoints of one run, in the background, and drops old ones.

    Args:
        folder: where the checkpoints lie; shared by all ranks.
        config: ``every``, ``keep_last``, ``keep_every``, ``asynchronous``.
        recipe: stored with every checkpoint.
        rank, world_size: of this process.
        process_group: a gloo group for the background thread alone; None for one process.
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
        report: Callable[[str], None] = print,
    ) -> None:
        self.folder, self._config, self._recipe = Path(folder), config, recipe
        self._rank, self._world_size, self._group, self._report = rank, world_size, process_group, report
        self._pending: tuple[int, Future] | None = None
        self.last_saved = -1
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.folder.glob(".writing_*"), *self.folder.glob(".deleting_*")]:
                shutil.rmtree(leftover, ignore_errors=True)
        if process_group is not None:
            dist.barrier(process_group)  # no rank writes into a folder that rank 0 still clears

    def save(self, step: int, *, tensors: dict[str, Tensor], rank_state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Start writing a checkpoint; returns when the tensors are copied, so training may change them.

        Args:
            step: optimizer steps done.
            tensors: everything that is sharded or replicated over ranks.
            rank_state: this rank's own state: plain values and tensors.
            meta: plain values, the same on every rank.
        """
        self.wait()
        if step == self.last_saved:
            return
        full_meta = {**meta, "step": step, "world_size": self._world_size, "torch": torch.__version__}
        writer = _Writer(
            self.folder / f".writing_step_{step:08d}",
            before=lambda folder: _save_synced(folder / _rank_file(self._rank), dict(rank_state)),
            publish=lambda folder: self._publish(folder, full_meta),
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
        causes = [str(cause) for cause, _ in problem.failures.values()] if isinstance(problem, CheckpointException) else [str(problem)]
        if self._rank == 0:
            shutil.rmtree(self.folder / f".writing_step_{step:08d}", ignore_errors=True)
            kept = latest(self.folder, report=self._report)
            self._report(f"checkpoint of step {step} was not written ({'; '.join(dict.fromkeys(causes))}); newest whole one: {kept or 'none'}")
        return False

    def _publish(self, folder: Path, meta: dict[str, Any]) -> None:
        _write_synced(folder / "meta.json", json.dumps(meta, indent=1))
        _write_synced(folder / "recipe.toml", dump_recipe(self._recipe))
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        _write_synced(folder / "complete.json", json.dumps({"format": FORMAT, "files": sizes}, indent=1))
        _sync_folder(folder)
        target = self.folder / folder.name.removeprefix(".writing_")
        if target.exists():  # damaged, or from a run that was not resumed
            _delete(target)
        folder.rename(target)
        _sync_folder(self.folder)
        self._prune()

    def _prune(self) -> None:
        found = whole(self.folder, report=lambda _: None)
        for old in found[: -max(1, self._config.keep_last)]:
            if not (self._config.keep_every and step_of(old) % self._config.keep_every == 0):
                _delete(old)


def _delete(folder: Path) -> None:
    gone = folder.with_name(f".deleting_{folder.name}")  # a kill half-way leaves no folder with a checkpoint's name
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _save_synced(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
