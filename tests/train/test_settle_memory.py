"""The repair: a model whose decode score is worse than its parallel one is trained on settled memory for a while."""

from __future__ import annotations

import pytest

from lrt.config import load_recipe
from lrt.eval.runs import read_records
from lrt.train.trainer import train

SMALL = [
    "model.width=32", "model.n_layers=2", "model.n_heads=1", "model.gate_channels=8", "recurrence.gate_channels=8",
    "model.sequence_length=32", "training.batch_tokens=1024", "training.micro_batch=32", "checkpoint.every=0",
    "optimizer.reference_batch_tokens=1024", "evaluation.tokens=4096", "evaluation.every=0", "metrics.plot=false",
    "evaluation.sample_tokens=0",
]  # fmt: skip


def scores(folder, recipe, name, *sets):
    train(load_recipe(recipe, overrides=[*SMALL, f"run.output={folder}", f"run.name={name}", *sets]))
    (record,) = [r for r in read_records(folder / name / "metrics.jsonl") if r["kind"] == "evaluation"]
    return record["bpb"]


@pytest.mark.slow
def test_steps_on_settled_memory_repair_decoding(tmp_path):
    """Only the last pass was scored: decoding meets a memory that training did not; more of the same does not help."""
    before = scores(
        tmp_path, "lrt_tiny", "faulty", "training.steps=150", "schedule.passes=1", "schedule.weights=[0, 1]"
    )
    assert before["decode"] - before["parallel"] > 0.1
    sets = [f"training.init_from={tmp_path / 'faulty'}", "training.steps=60"]
    settled = scores(tmp_path, "settle_memory", "settled", *sets)
    assert abs(settled["decode"] - settled["parallel"]) < 0.01 and settled["decode"] < before["decode"] - 0.1
    longer = scores(tmp_path, "settle_memory", "longer", *sets, "schedule.settle=0", "schedule.weights=[0, 1]")
    assert longer["decode"] - longer["parallel"] > 0.1 and longer["decode"] > settled["decode"] + 0.1
