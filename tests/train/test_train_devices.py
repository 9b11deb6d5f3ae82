"""Runs of one process on a CPU, and on a GPU with compiled blocks in half precision inside a CUDA graph:
resume, bad numbers, signals."""

import os
import signal

import pytest
import torch
from runs import tiny, train_records

from lrt.train import trainer
from lrt.train.checkpoint.saving import tensors_of
from lrt.train.trainer import train

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ON_GPU = {"parallel.compile": "true", "parallel.param_dtype": "bfloat16", "model.width": 64}


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=GPU)])
def device(request, monkeypatch):
    """Settings of the device, and how near two equal runs are: sums of atomics come in any order on a GPU."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return {}, 0.0
    return ON_GPU, 5e-2


def before_step(monkeypatch, action):
    """Call ``action(number, model)`` before every step; what it returns is called after it."""
    real, calls = trainer.train_step, []

    def step(runner, *args, **settings):
        calls.append(1)
        after = action(len(calls), runner.model)
        result = real(runner, *args, **settings)
        if after is not None:
            after()
        return result

    monkeypatch.setattr(trainer, "train_step", step)


def test_a_stopped_run_goes_on_from_what_it_was(tmp_path, monkeypatch, device):
    sets, near = device
    sets = {**sets, "evaluation.sample_tokens": 0, "checkpoint.every": 0}
    whole = train(tiny(tmp_path / "whole", **sets))
    kept = []
    real_save, real_loop = trainer.save_last, trainer.go_through

    def tensors(run):
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(run.model, run.optimizer).items()}

    def save(run):
        kept.append(tensors(run))
        real_save(run)

    def loop(run):
        if kept:
            found = tensors(run)
            assert found.keys() == kept[0].keys() and all(torch.equal(found[name], kept[0][name]) for name in found)
            kept.append("compared")
        return real_loop(run)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_last", save)
        patch.setattr(trainer, "go_through", loop)
        with monkeypatch.context() as stopping:
            before_step(stopping, lambda number, model: os.kill(os.getpid(), signal.SIGTERM) if number == 4 else None)
            stopped = train(tiny(tmp_path / "parts", **sets))
        assert stopped.stopped == "SIGTERM" and stopped.step < 8 and not stopped.bpb
        again = train(tiny(tmp_path / "parts", **sets))
    assert "compared" in kept and again.stopped is None
    a, b = (train_records(result.folder) for result in (whole, again))
    assert [r["step"] for r in b] == list(range(1, 9))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in b] == pytest.approx([r[key] for r in a], rel=near or 1e-12)
    assert again.bpb == pytest.approx(whole.bpb, rel=near or 1e-12)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, device):
    sets, _ = device
    seen = {}

    def poison(number, model):
        if number != 3:
            return None
        gains = model.injection.gains.data
        right = gains.clone()
        seen["before"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        gains.fill_(float("nan"))

        def heal():
            gains.copy_(right)
            seen["after"] = {name: p.detach().clone() for name, p in model.named_parameters()}

        return heal

    before_step(monkeypatch, poison)
    result = train(tiny(tmp_path, **sets, **{"evaluation.sample_tokens": 0}))
    records = train_records(result.folder)
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 1, 1, 1] and records[2]["loss"] is None
    assert all(torch.equal(seen["before"][name], value) for name, value in seen["after"].items())
    assert all(r["loss"] is not None for r in records[3:]) and result.bpb
    assert (result.folder / "not_finite_rank0.jsonl").read_text().count("\n") == 1
