"""Checkpoints: whole or not there at all, bounded in number, readable, and never unpickled."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import manager, saved, tensors

from lrt.config import parse_recipe
from lrt.train.checkpoint import (
    check_same_model,
    damage,
    find_checkpoint,
    latest,
    read_rest,
    read_tensors,
    step_of,
    whole,
)


def test_what_is_saved_is_what_is_read(tmp_path):
    saved(tmp_path, [7])
    folder = latest(tmp_path)
    assert step_of(folder) == 7
    read = tensors(0.0)
    read_tensors(folder, read)
    assert all(torch.equal(a, b) for a, b in zip(read.values(), tensors(7.0).values()))
    rest = read_rest(folder)
    assert rest.meta["step"] == 7 and rest.meta["tokens"] == 70 and rest.rank_states[0]["loader"] == {"row": 7}


def test_saving_copies_first_so_that_training_may_go_on(tmp_path):
    m, values = manager(tmp_path), tensors(1.0)
    m.save(1, tensors=values, rank_state={}, meta={})
    for tensor in values.values():
        tensor.zero_()
    assert m.wait()
    read = tensors(0.0)
    read_tensors(latest(tmp_path), read)
    assert read["model.w"].eq(1.0).all() and read["optimizer.w.step"] == 1.0


def test_keeps_the_last_and_every_nth(tmp_path):
    saved(tmp_path, range(1, 11), keep_last=2, keep_every=4)
    assert [step_of(p) for p in whole(tmp_path)] == [4, 8, 9, 10]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("harm", ["no marker", "truncated", "missing file", "bad marker", "foreign"])
def test_a_damaged_checkpoint_is_never_taken_for_whole(tmp_path, harm):
    saved(tmp_path, [1, 2])
    folder = tmp_path / "step_00000002"
    shard = next(folder.glob("*.safetensors"))
    if harm == "no marker":
        (folder / "complete.json").unlink()
    elif harm == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif harm == "missing file":
        (folder / "rank_00000.pt").unlink()
    elif harm == "bad marker":
        (folder / "complete.json").write_text("{")
    else:
        (folder / "complete.json").write_text(json.dumps({"format": "other", "files": {}}))
    said = []
    assert step_of(latest(tmp_path, report=said.append)) == 1
    assert len(said) == 1 and "step_00000002" in said[0]
    assert damage(folder) is not None
    with pytest.raises(ValueError, match="step_00000002.*name another checkpoint"):
        find_checkpoint(folder)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint .*name a run folder"):
        find_checkpoint(tmp_path)
    saved(tmp_path / "checkpoints", [3])
    assert step_of(find_checkpoint(tmp_path)) == 3


def test_another_models_checkpoint_is_refused_with_the_keys(tmp_path):
    saved(tmp_path, [1])
    check_same_model(latest(tmp_path), parse_recipe("", overrides=["training.steps=5"]))
    with pytest.raises(
        ValueError,
        match="another model: model.n_layers = 12 there, 6 here; recurrence.sharing = 'shared' there, 'layerwise' here",
    ):
        check_same_model(
            latest(tmp_path), parse_recipe("", overrides=["model.n_layers=6", "recurrence.sharing=layerwise"])
        )
    with pytest.raises(ValueError, match="recurrence = on there, off here"):
        check_same_model(latest(tmp_path), parse_recipe("", overrides=["recurrence=false", "schedule.kind=baseline"]))


def test_missing_tensors_and_other_shapes_are_named(tmp_path):
    saved(tmp_path, [1])
    with pytest.raises(ValueError, match="cannot be read into this model.*model.new"):
        read_tensors(latest(tmp_path), {**tensors(0.0), "model.new": torch.zeros(2)})
    with pytest.raises(ValueError, match="cannot be read into this model.*(?i:size)"):
        read_tensors(latest(tmp_path), {"model.w": torch.zeros(64, 16)})


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path):
    saved(tmp_path, [1])

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    file = latest(tmp_path) / "rank_00000.pt"
    torch.save(Payload(), file)
    with pytest.raises(Exception, match="(?i:weights_only|unsupported)"):
        read_rest(file.parent)
    assert not (tmp_path / "owned").exists()


FULL_DISK = """
import ctypes, os, resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
folder = {folder!r}
os.makedirs(folder, exist_ok=True)
small = ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=96k") == 0
from checkpoints import manager, tensors
from lrt.train.checkpoint import latest, read_tensors
import torch
said = []
m = manager(folder, report=said.append)
m.save(1, tensors=tensors(1.0), rank_state={{}}, meta={{}})
assert m.wait(), said
if not small:  # mounting is not allowed here: a file size limit is the quota
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
m.save(2, tensors={{**tensors(2.0), "model.big": torch.zeros(100000)}}, rank_state={{}}, meta={{}})
assert not m.wait()
assert "checkpoint of step 2 was not written" in said[-1] and "step_00000001" in said[-1], said
assert "No space left" in said[-1] or "too large" in said[-1], said
assert not [p for p in os.listdir(folder) if p.startswith(".")]
read = tensors(0.0)
read_tensors(latest(folder), read)
assert read["model.w"].eq(1.0).all()
m.save(3, tensors=tensors(3.0), rank_state={{}}, meta={{}})
assert m.wait(), said
print("kept")
"""


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path):
    here = Path(__file__).parent.parent
    code = FULL_DISK.format(tests=str(here / "lib"), root=str(here.parent), folder=str(tmp_path / "disk"))
    own_mounts = (
        ["unshare", "-rm"] if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0 else []
    )
    result = subprocess.run([*own_mounts, sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "kept" in result.stdout, result.stderr


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from checkpoints import manager, tensors
from lrt.train.checkpoint import latest, step_of
m = manager({folder!r})
start = latest({folder!r})
step = step_of(start) if start else 0
print("ready", flush=True)
while True:
    step += 1
    m.save(step, tensors=tensors(float(step)), rank_state={{"row": step}}, meta={{}})
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_instant_the_newest_whole_checkpoint_reads(tmp_path, kills):
    here = Path(__file__).parent.parent
    code = KILLED.format(tests=str(here / "lib"), root=str(here.parent), folder=str(tmp_path))
    drawn, before = random.Random(kills), 0
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().strip() == "ready"
        time.sleep(drawn.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        newest = latest(tmp_path, report=lambda text: pytest.fail(text))
        if newest is None:
            continue
        step, read = step_of(newest), tensors(0.0)
        read_tensors(newest, read)
        assert all(t.eq(step).all() for t in read.values()) and read_rest(newest).rank_states[0]["row"] == step
        assert step >= before
        before = step
    assert before > 0
