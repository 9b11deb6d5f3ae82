"""A folder written over holds the old model or the new one, at every instant, and nothing stale."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_decoders import make, stir
from strategies import randomized

import lrt
from lrt.config import parse_recipe
from lrt.huggingface import LRTForCausalLM
from lrt.serialization.renewal import renewed_folder
from lrt.serialization.writing import write_model

NATIVE = "[model]\nn_layers = 1\nwidth = 32\nn_heads = 2\nvocab_size = 128\nsequence_length = 16"
TOKENS = torch.arange(9)[None]


def adapted(seed: int, layers: int = 3) -> Any:
    return stir(lrt.adapt(make("llama", dtype=torch.float32, seed=seed, layers=layers)), seed=seed)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, schedule=lrt.refine(1)).logits


def sharded(folder: Path) -> None:
    lrt.save(adapted(1), folder, shard_size=4000)


def save_pretrained(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def in_few_shards(model: Any, folder: Path) -> None:
    with renewed_folder(folder) as place:
        write_model(model, place, shard_size=9000)


OLD: dict[str, Callable[[Path], Any]] = {
    "sharded": sharded,
    "one file": lambda folder: lrt.save(adapted(1), folder),
    "deeper and sharded": lambda folder: lrt.save(adapted(1, layers=5), folder, shard_size=4000),
    "the memory alone": lambda folder: lrt.save(adapted(1), folder, adapter_only=True),
    "a plain decoder in shards": lambda folder: make("llama", dtype=torch.float32, layers=5).save_pretrained(
        folder, max_shard_size="6KB"
    ),
    "nothing": lambda folder: folder.mkdir(),
}


@pytest.mark.parametrize("write", [save_pretrained, in_few_shards])
@pytest.mark.parametrize("old", OLD)
def test_the_new_model_is_read_and_nothing_stale_is_left(old: str, write: Any, tmp_path: Path) -> None:
    folder, fresh = tmp_path / "folder", tmp_path / "fresh"
    OLD[old](folder)
    for other in ("tokenizer.json", "optimizer.pt", "notes.safetensors"):
        (folder / other).write_text("mine")
    (folder / "checkpoint-5").mkdir()
    new = adapted(2)
    write(new, folder)
    write(new, fresh)
    assert torch.equal(logits(lrt.load(folder)), logits(new))
    others = {"tokenizer.json", "optimizer.pt", "notes.safetensors", "checkpoint-5"}
    assert {p.name for p in folder.iterdir()} == {p.name for p in fresh.iterdir()} | others
    assert (folder / "optimizer.pt").read_text() == "mine"


def test_a_model_is_on_the_disk_before_it_is_declared_written(tmp_path: Path, monkeypatch: Any) -> None:
    synced, seen, rename = set(), [], Path.rename

    def declare(place: Path, target: Path) -> Path:
        seen.extend(path for path in (*place.rglob("*"), place) if path.stat().st_ino not in synced)
        assert len(list(place.iterdir())) > 3
        synced.clear()
        return rename(place, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", declare)
    with renewed_folder(tmp_path / "folder") as place:
        write_model(adapted(1), place, shard_size=9000)
    assert not seen and (tmp_path / "folder").stat().st_ino in synced


def killed_at(count: int, act: Callable[[], Any], folder: Path) -> bool:
    """Run ``act`` in a child that dies, without any cleaning up, at the count-th change of ``folder``;
    whether it died."""
    child = os.fork()
    if child == 0:
        changes = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal changes
            writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
            if (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")) and str(folder) in str(
                arguments[0]
            ):
                changes += 1
                if changes > count:
                    os._exit(9)

        sys.addaudithook(watch)
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_kill_at_any_change_leaves_one_model_or_the_other(tmp_path: Path) -> None:
    def native(seed: int) -> Any:
        return LRTForCausalLM.of(randomized(lrt.build(parse_recipe(NATIVE)), seed)).eval()

    lrt.save(native(1), tmp_path / "old", shard_size=30000)
    assert len(list((tmp_path / "old").glob("model-*"))) > 3
    old, new, third = logits(lrt.load(tmp_path / "old")), native(2), native(3)
    wanted, seen, count = logits(new), [], 0
    while True:
        folder = shutil.copytree(tmp_path / "old", tmp_path / f"folder_{count}")
        died = killed_at(count, lambda folder=folder: new.save_pretrained(folder), folder)  # type: ignore[misc]
        found = logits(lrt.load(folder))
        seen.append("old" if torch.equal(found, old) else "new")
        assert torch.equal(found, old if seen[-1] == "old" else wanted)
        assert torch.equal(logits(lrt.load(folder)), found)
        if not died:
            break
        third.save_pretrained(folder)  # and the next save leaves nothing of either
        assert (
            torch.equal(logits(lrt.load(folder)), logits(third))
            and not list(folder.glob(".lrt*"))
            and not list(folder.glob("model-*"))
        )
        shutil.rmtree(folder)
        count += 1
    assert count > 20 and seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)


def test_an_interrupted_save_that_cannot_be_finished_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    sharded(folder)
    (folder / ".lrt-written").mkdir()
    for text in ('["../model.safetensors"]', "[1]", "{", "7"):
        (folder / ".lrt-written" / ".files.json").write_text(text)
        with pytest.raises(
            ValueError, match="was interrupted and cannot be finished here .*: open it once where it may be written"
        ):
            lrt.load(folder)
    (folder / ".lrt-written" / ".files.json").unlink()
    assert torch.equal(logits(lrt.load(folder)), logits(adapted(1)))


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    sharded(folder)
    before = sorted(p.name for p in folder.iterdir())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lrt.serialization.tensors.save_file", full)
    with pytest.raises(OSError, match="No space"):
        adapted(2).save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == before
