"""A fuzzer of damaged checkpoints: whatever happens to the files, what is read is what was written,
or is named in one line.

LRT_FUZZ_SECONDS says for how long (20), LRT_FUZZ_SEED with which seed (0); a finding names its seed and try.
"""

import os
import random
import shutil
import time

import pytest
import torch
from checkpoints import saved, tensors

from lrt.train.checkpoint import damage, find_checkpoint, newest, read_rest, read_tensors, step_of

SECONDS, SEED = float(os.environ.get("LRT_FUZZ_SECONDS", 20)), int(os.environ.get("LRT_FUZZ_SEED", 0))


def flip(file, drawn):
    data = bytearray(file.read_bytes())
    for _ in range(drawn.choice([1, 1, 2, 9])):
        data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
    file.write_bytes(data)


def cut(file, drawn):
    data = file.read_bytes()
    file.write_bytes(data[: drawn.randrange(len(data))])


def grow(file, drawn):
    file.write_bytes(file.read_bytes() + drawn.randbytes(drawn.randrange(1, 40)))


def overwrite(file, drawn):
    file.write_bytes(
        drawn.choice([b"", b"{}", b"[]", b"null", b"{" * 9999, drawn.randbytes(99), b'{"files": {}}', b"\xff\xfe"])
    )


def swap(file, drawn):
    other = drawn.choice([p for p in sorted(file.parent.iterdir()) if p.is_file()])
    data = other.read_bytes()
    other.write_bytes(file.read_bytes())
    file.write_bytes(data)


def copy(file, drawn):
    name = drawn.choice(["a" + file.name, file.name + ".bak", "x.safetensors", "rank_00001.pt"])
    file.with_name(name).write_bytes(file.read_bytes())


def remove(file, drawn):
    file.unlink()


def folder(file, drawn):
    file.unlink()
    file.mkdir()


HARMS = (flip, flip, flip, cut, grow, overwrite, swap, copy, remove, folder)


@pytest.mark.slow
@pytest.mark.timeout(0)  # the budget ends it
def test_damaged_checkpoints(tmp_path):
    drawn, tries, until = random.Random(SEED), 0, time.monotonic() + SECONDS
    saved(tmp_path / "good", [1, 2])
    expected, rest = tensors(2.0), read_rest(tmp_path / "good" / "step_00000002")
    while time.monotonic() < until:
        tries += 1
        at = f"seed {SEED}, try {tries}"
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "run")
        checkpoint, harms = tmp_path / "run" / "step_00000002", []
        for _ in range(drawn.choice([1, 1, 1, 2, 3])):
            files = [p for p in sorted(checkpoint.iterdir()) if p.is_file() and p.stat().st_size]
            harm, file = drawn.choice(HARMS), drawn.choice(files)
            harm(file, drawn)
            harms.append((harm.__name__, file.name))
        problem, said = damage(checkpoint), []
        if problem is not None:
            assert "step_00000002" in problem and len(problem.splitlines()) == 1, (at, harms, problem)
            assert step_of(newest(tmp_path / "run", report=said.append)) == 1 and len(said) == 1, (at, harms, said)
            with pytest.raises(ValueError, match="name another checkpoint"):
                find_checkpoint(checkpoint)
            continue
        read = tensors(0.0)
        read_tensors(checkpoint, read)
        again = read_rest(checkpoint)
        assert all(torch.equal(read[name], expected[name]) for name in read), (at, harms)
        assert again.meta == rest.meta and again.rank_states[0]["loader"] == rest.rank_states[0]["loader"], (at, harms)
    print(f"seed {SEED}: {tries} damaged checkpoints, no finding")
