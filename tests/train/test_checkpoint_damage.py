"""Checkpoints that are damaged, changed, of another version, or full of numbers that are none:
named, left out, never lost."""

import json
import os
import shutil
import time
import zlib

import pytest
import torch
from checkpoints import manager, saved, tensors
from safetensors.torch import load_file, save_file

from lrt.train.checkpoint import damage, find_checkpoint, latest, newest, read_rest, read_tensors, step_of, whole


def as_before_checksums(folder):
    """The same checkpoint as this trainer's first format has it."""
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "complete.json"}
    (folder / "complete.json").write_text(json.dumps({"format": "lrt training checkpoint 1", "files": sizes}))


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_file_is_listed_with_its_checksum(tmp_path):
    saved(tmp_path, [3])
    folder = tmp_path / "step_00000003"
    content = json.loads((folder / "complete.json").read_text())
    others = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "complete.json"}
    assert content["files"] == {name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in others.items()}


@pytest.mark.parametrize("name", ["shard", "rank_00000.pt", "meta.json", "recipe.toml", "complete.json"])
def test_a_flipped_bit_anywhere_is_seen_and_named_and_the_one_before_is_used(tmp_path, name):
    saved(tmp_path, [1, 2])
    folder = tmp_path / "step_00000002"
    file = next(folder.glob(f"{name}*"))
    data = bytearray(file.read_bytes())
    for place in sorted({0, 8, len(data) // 3, len(data) // 2, len(data) - 1}):
        for bit in (1, 32):
            flipped = bytearray(data)
            flipped[place] ^= bit
            file.write_bytes(flipped)
            problem = damage(folder)
            if problem is None:  # white space of the list itself
                assert name == "complete.json" and json.loads(flipped) == json.loads(data)
                continue
            assert "step_00000002" in problem and len(problem.splitlines()) == 1
            if name != "complete.json":
                assert file.name in problem
            said = []
            assert step_of(newest(tmp_path, report=said.append)) == 1
            assert len(said) == 1 and "step_00000002" in said[0] and "step_00000001 is used" in said[0]


CHANGES = {
    "extra shard": (
        lambda f: save_file({"model.w": torch.ones(64, 32)}, f / "shard-00009-model-00001-of-00001.safetensors"),
        "is not listed in complete.json",
    ),
    "extra file": (lambda f: (f / "notes.txt").write_text("x"), r"notes.txt is not listed"),
    "lists nothing": (lambda f: rewrite(f, lambda c: c["files"].clear()), "is not listed"),
    "only the list": (
        lambda f: (
            [p.unlink() for p in f.iterdir() if p.name != "complete.json"] and rewrite(f, lambda c: c["files"].clear())
        ),
        "lists no",
    ),
    "newer": (
        lambda f: rewrite(f, lambda c: c.update(format="lrt training checkpoint 9")),
        "has format 'lrt training checkpoint 9', but this version reads",
    ),
    "list of lists": (lambda f: rewrite(f, lambda c: c.update(files=[[["a"]]])), "complete.json cannot be read"),
    "a path": (
        lambda f: rewrite(f, lambda c: c["files"].update({"../x": {"bytes": 1, "crc32": 1}})),
        "complete.json cannot be read",
    ),
    "no JSON at all": (lambda f: (f / "complete.json").write_bytes(b"\xff\x00"), "complete.json cannot be read"),
    "deep": (lambda f: (f / "complete.json").write_text("[" * 100000), "complete.json cannot be read"),
}


def rewrite(folder, change):
    path = folder / "complete.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("change", CHANGES)
def test_exactly_the_listed_files_make_a_checkpoint(tmp_path, change):
    saved(tmp_path, [1, 2])
    alter, words = CHANGES[change]
    alter(tmp_path / "step_00000002")
    with pytest.raises(ValueError, match=f"(?s).*{words}") as caught:
        find_checkpoint(tmp_path / "step_00000002")
    assert len(str(caught.value).splitlines()) == 1
    assert step_of(latest(tmp_path, report=lambda _: None)) == 1


OLD = {
    "meta.json": [
        b"{",
        b"[]",
        b'{"step": 2, "world_size": 1000000000}',
        b'{"step": 9, "world_size": 1}',
        b'{"world_size": 1}',
        b"[" * 100000,
    ],
    "rank_00000.pt": [b"", b"PK\x03\x04", b"\x80\x04\x95", b"hello" * 9],
    "shard": [
        b"",
        b"\xff" * 40,
        b"\x02\0\0\0\0\0\0\0[]",
        b'\x3a\0\0\0\0\0\0\0{"a":{"dtype":"Z9","shape":[1],"data_offsets":[0,4]}}       \0\0\0\0',
    ],
}


@pytest.mark.parametrize("name, content", [(name, content) for name, every in OLD.items() for content in every])
def test_damage_without_checksums_is_one_line_that_names_the_file(tmp_path, name, content):
    saved(tmp_path, [1, 2])
    for folder in tmp_path.iterdir():
        as_before_checksums(folder)
    assert (
        step_of(latest(tmp_path, report=pytest.fail)) == 2
    )  # what was written before there were checksums is still read
    folder = tmp_path / "step_00000002"
    file = next(folder.glob(f"{name}*"))
    file.write_bytes(content)
    as_before_checksums(folder)
    problem = damage(folder)
    assert problem is not None and str(file) in problem and len(problem.splitlines()) == 1
    assert step_of(latest(tmp_path, report=lambda _: None)) == 1


def test_numbers_that_are_none_make_no_checkpoint_of_the_first_format(tmp_path):
    saved(tmp_path, [1, 2])
    (shard,) = (tmp_path / "step_00000002").glob("*.safetensors")
    ruined = {name: t * float("nan") if name == "model.g" else t for name, t in load_file(shard).items()}
    save_file(ruined, shard)
    as_before_checksums(tmp_path / "step_00000002")
    assert "model.g that are not finite" in damage(tmp_path / "step_00000002")


def test_hundred_thousands_of_empty_tensors_are_refused_in_seconds(tmp_path):
    saved(tmp_path, [1])
    (shard,) = (tmp_path / "step_00000001").glob("*.safetensors")
    header = json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}
    ).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    as_before_checksums(tmp_path / "step_00000001")
    began = time.process_time()
    with pytest.raises(ValueError, match="cannot be read into this model.*holds no model.g"):
        read_tensors(tmp_path / "step_00000001", tensors(0.0))
    assert time.process_time() - began < 20


def test_where_none_can_be_used_nothing_is_chosen_and_nothing_touched(tmp_path):
    saved(tmp_path, [1, 2])
    rewrite(tmp_path / "step_00000001", lambda c: c.update(format="lrt training checkpoint 9"))
    (tmp_path / "step_00000002" / "meta.json").unlink()
    before = files_of(tmp_path)
    with pytest.raises(
        ValueError,
        match="none can be used, and nothing in it was changed: .*meta.json.*checkpoint 9.*Choose another run.name",
    ) as caught:
        newest(tmp_path, report=pytest.fail)
    assert len(str(caught.value).splitlines()) == 1 and files_of(tmp_path) == before
    assert newest(tmp_path / "empty", report=pytest.fail) is None


def test_what_cannot_be_used_is_moved_aside_when_its_place_is_needed_and_never_counted(tmp_path):
    saved(tmp_path, [1, 2, 3], keep_last=9)
    (tmp_path / "step_00000002" / "meta.json").write_text("{}")
    rewrite(tmp_path / "step_00000003", lambda c: c.update(format="lrt training checkpoint 9"))
    before = {n: files_of(tmp_path / f"step_{n:08d}") for n in (2, 3)}
    saved(tmp_path, [2], keep_last=2)
    assert [step_of(p) for p in whole(tmp_path, report=lambda _: None)] == [1, 2]
    saved(tmp_path, [3], keep_last=1)
    assert {n: files_of(tmp_path / f"unusable_step_{n:08d}") for n in (2, 3)} == before
    assert [step_of(p) for p in whole(tmp_path, report=pytest.fail)] == [3]


def test_without_pruning_the_older_ones_stay(tmp_path):
    m = manager(tmp_path, keep_last=1)
    for step, prune in ((1, True), (2, False), (3, False), (4, True)):
        m.save(step, tensors=tensors(step), rank_state={}, meta={}, prune=prune)
        assert m.wait()
        assert [step_of(p) for p in whole(tmp_path)] == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [4]}[step]


def test_a_folder_that_was_deleted_is_not_made_again(tmp_path):
    said = []
    m = manager(tmp_path / "run", report=said.append)
    shutil.rmtree(tmp_path / "run")
    m.save(1, tensors=tensors(1.0), rank_state={}, meta={})
    assert not m.wait() and "was deleted under the run" in said[0] and not (tmp_path / "run").exists()


def test_files_have_the_permissions_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        saved(tmp_path / "run", [1])
    finally:
        os.umask(before)
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "run" / "step_00000001").iterdir()}
    assert modes == {"0o640"} and (tmp_path / "run" / "step_00000001").stat().st_mode & 0o777 == 0o750
    assert read_rest(tmp_path / "run" / "step_00000001").meta["step"] == 1
