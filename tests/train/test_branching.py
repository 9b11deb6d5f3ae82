"""Runs that go on from another run's checkpoint under a new name."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from phase_runs import is_of_memory, steps_of, tensors_at, tiny

import lrt
from lrt.train.checkpoint import latest, read_rest
from lrt.train.trainer import train

PLAIN = ("recurrence=false", "schedule.kind=baseline")
EVERY = ("checkpoint.every=2", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A plain run of constant rates that stopped at 4 of 8 steps, with memory off."""
    return train(tiny(tmp_path_factory.mktemp("trunk"), *PLAIN, *EVERY, "training.lr_schedule=wsd"))


def branch(trunk, folder, *sets, step=4, name="branch"):
    begin = trunk.folder / "checkpoints" / f"step_{step:08d}"
    wsd = () if any("lr_schedule" in one for one in sets) else ("training.lr_schedule=wsd",)
    return train(tiny(folder, f"training.branch_from={begin}", *wsd, *sets, *EVERY, name=name))


def test_a_branch_that_changes_nothing_is_the_run_itself(trunk, tmp_path):
    """Weights, optimizer, loader, random numbers and step are the other run's; only the name is new."""
    result = branch(trunk, tmp_path, *PLAIN)
    for step in (6, 8):
        ours, theirs = tensors_at(result.folder, step), tensors_at(trunk.folder, step)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps_of(result) == steps_of(trunk)[4:] and result.folder.name == "branch"
    mine, other = (read_rest(latest(run.folder / "checkpoints")).meta for run in (result, trunk))
    assert mine == {**other, "began": 4}
    assert not (result.folder / "checkpoints" / "step_00000004").exists()


def test_memory_that_a_branch_switches_on_begins_afresh_and_unnoticed(trunk, tmp_path):
    result = branch(trunk, tmp_path, "recurrence.init=identity", "schedule.kind=refine", "training.steps=7")
    rows, plain = steps_of(result), steps_of(trunk)
    assert [r["step"] for r in rows] == [5, 6, 7] and rows[0]["groups"][0] == plain[4]["groups"][0]
    assert rows[0]["groups"][1] == pytest.approx(plain[4]["loss"], rel=1e-6)
    assert rows[0]["flops"] > plain[4]["flops"] and rows[0]["tokens"] == plain[4]["tokens"]
    tensors = tensors_at(result.folder, 7)
    steps = {name: int(tensor) for name, tensor in tensors.items() if name.endswith(".step")}
    assert {steps[name] for name in steps if is_of_memory(name)} == {3}
    assert {steps[name] for name in steps if not is_of_memory(name)} == {7}


@pytest.mark.parametrize(
    "sets", [("schedule.kind=refine", "schedule.ramp=2"), ("schedule.kind=refine", "recurrence.init=identity")]
)
def test_a_branch_resumes_bit_for_bit(trunk, tmp_path, sets):
    whole = branch(trunk, tmp_path / "whole", *sets)
    for step in (6,):
        folder = tmp_path / "again" / "branch"
        name = f"step_{step:08d}"
        shutil.copytree(whole.folder / "checkpoints" / name, folder / "checkpoints" / name)
        shutil.copy(whole.folder / "metrics.jsonl", folder)
        again = branch(trunk, folder.parent, *sets)
        ours, theirs = tensors_at(again.folder, 8), tensors_at(whole.folder, 8)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert steps_of(again) == steps_of(whole)


def test_a_ramp_of_a_branch_begins_where_the_branch_does(trunk, tmp_path):
    still = ("optimizer.kind=adamw", "optimizer.adamw_lr=0.001", "optimizer.adamw_memory_lr=0")
    plain = ("schedule.kind=baseline", "training.lr_schedule=wsd")
    resting = train(tiny(tmp_path, *plain, *still, *EVERY, name="resting"))  # memory of the paper's initial values
    sets = ("schedule.kind=refine", "schedule.ramp=4", *still)
    result = branch(resting, tmp_path, *sets)
    initial = {f"model.{name}": p.detach() for name, p in lrt.build(tiny("unused")).memory_parameters().items()}
    for step, share in {6: 0.5, 8: 1.0}.items():
        for name, whole in initial.items():
            torch.testing.assert_close(tensors_at(result.folder, step)[name], share * whole, rtol=1e-6, atol=1e-9)
    first = steps_of(result)[0]["groups"]
    assert first[1] == pytest.approx(first[0], rel=1e-6)
    with pytest.raises(ValueError, match=r"ramp = 5, but the phase with memory has 4 steps from step 4 on"):
        branch(resting, tmp_path, "schedule.kind=refine", "schedule.ramp=5", *still, name="long")
    with pytest.raises(ValueError, match=r"has trained its memory: leave ramp out"):
        branch(result, tmp_path, "schedule.kind=refine", "schedule.ramp=1", *still, step=6, name="late")


def test_rates_schedule_and_horizon_may_differ(trunk, tmp_path):
    rates = (
        "optimizer.matrix_lr=0.01",
        "optimizer.rate_scale=0.5",
        "training.lr_schedule=warmdown",
        "training.warmdown_fraction=0.2",
    )
    result = branch(trunk, tmp_path, *PLAIN, *rates, "training.steps=6", "training.micro_batch=2", "evaluation.batch=1")
    assert result.step == 6 and steps_of(result)[0]["lr"]["matrices"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ((*PLAIN, "model.n_layers=3"), "model.n_layers = 2 there, 3 here"),
        ((*PLAIN, "run.seed=2"), "run.seed = 1 there, 2 here"),
        ((*PLAIN, "training.batch_tokens=128"), "training.batch_tokens = 256 there, 128 here"),
        ((*PLAIN, "training.clip_norm=1.0"), "training.clip_norm = 0.5 there, 1.0 here"),
        (
            (*PLAIN, "optimizer.momentum=0.9", "model.mlp_ratio=2.0"),
            "model.mlp_ratio = 4.0 there, 2.0 here; optimizer.momentum = 0.95 there, 0.9 here",
        ),
        ((*PLAIN, "data.workers=2"), "data.workers = 'none' there, 2 here"),
        ((*PLAIN, "parallel.param_dtype=bfloat16"), "parallel.param_dtype = 'float32' there, 'bfloat16' here"),
        (
            ("schedule.kind=refine",),
            'recurrence = off there, and recurrence.init = "paper" here would disturb the model: use "identity", '
            "or a ramp",
        ),
        (
            (*PLAIN, "training.steps=4"),
            "has done 4 steps, and the horizon is 4: use a longer one, which counts them too",
        ),
    ],
)
def test_what_else_differs_is_refused_by_name(trunk, tmp_path, sets, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        branch(trunk, tmp_path, *sets)
    assert "training.branch_from = " in str(caught.value) and not (tmp_path / "branch" / "checkpoints").exists()


def test_other_data_and_missing_checkpoints_are_refused(trunk, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text(
        "\n\n".join(f"document {n} of another corpus, long enough for a row of the model" * 3 for n in range(99))
    )
    with pytest.raises(ValueError, match="data.train is not what the checkpoint was trained on"):
        branch(trunk, tmp_path, *PLAIN, f"data.train={text}", "data.validation=demo")
    with pytest.raises(ValueError, match=r'training.branch_from = "/nowhere": /nowhere holds no checkpoint'):
        train(tiny(tmp_path, "training.branch_from=/nowhere", name="none"))
    on = train(tiny(tmp_path, "training.steps=2", name="on"))
    with pytest.raises(ValueError, match=r"recurrence.*there, False here"):
        train(tiny(tmp_path, f"training.branch_from={on.folder}", *PLAIN, name="off"))
    with pytest.raises(ValueError, match="training.init_from and training.branch_from are both given"):
        tiny(tmp_path, "training.branch_from=x", "training.init_from=y")
