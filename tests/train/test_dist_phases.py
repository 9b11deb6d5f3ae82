"""Two ranks whose schedule changes with the step: the same draws on both, resume across a border,
the sum of one rank."""

import shutil

import pytest
import torch
from launching import launch
from phase_runs import MIX, TINY, is_of_memory
from safetensors.torch import load_file

from lrt.config import parse_recipe
from lrt.schedules import describe
from lrt.train.checkpoint import latest
from lrt.train.monitor.metrics import read_records
from lrt.train.timetable import plan_timetable

pytestmark = pytest.mark.dist
PHASES = (
    f'schedule.phases=[{{until=0.375, kind="baseline"}}, {{until=0.75, kind="mixture", ramp=2, mix={MIX}}}, '
    '{until=1.0, kind="refine", passes=2}]'
)
SETS = (
    PHASES,
    "checkpoint.every=2",
    "checkpoint.keep_last=9",
    "training.micro_batch=2",
    "optimizer.reference_batch_tokens=256",
)


def run(folder):
    folder.mkdir(parents=True, exist_ok=True)
    process = launch(folder, *SETS)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    records = read_records(folder / "tiny" / "metrics.jsonl")
    return [r for r in records if r["kind"] == "train"], latest(folder / "tiny" / "checkpoints")


def shards(folder):
    return {
        (file.name, name): tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def test_two_ranks_draw_alike_and_resume_across_borders_bit_for_bit(tmp_path):
    whole, end = run(tmp_path / "whole")
    table = plan_timetable(parse_recipe(TINY, overrides=[PHASES]), steps=8)
    assert [r["schedule"] for r in whole] == [describe(table.schedule(step)) for step in range(8)]
    early, late = (shards(end.with_name(f"step_{step:08d}")) for step in (2, 8))
    of_memory = [key for key in late if is_of_memory(key[1])]
    assert len(of_memory) > 10 and not any(early[key].any() for key in of_memory)  # zero, as their optimizer state
    assert all(late[key].any() for key in of_memory)
    for step in (2, 4):  # before the border into memory, and inside the ramp
        folder = tmp_path / f"from{step}" / "tiny"
        name = f"step_{step:08d}"
        shutil.copytree(end.parent / name, folder / "checkpoints" / name)
        shutil.copy(tmp_path / "whole" / "tiny" / "metrics.jsonl", folder)
        records, again = run(folder.parent)
        assert [(r["loss"], r["schedule"], r["flops"]) for r in records] == [
            (r["loss"], r["schedule"], r["flops"]) for r in whole
        ]
        ours, theirs = shards(again), shards(end)
        assert ours.keys() == theirs.keys() and len({file for file, _ in ours}) == 2
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), key
