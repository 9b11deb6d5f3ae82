"""What a run must never do: export ruined weights, lose a checkpoint, mix two runs in one,
or end well with files lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from runs import ROOT, files_equal, poison, tiny, train_records
from safetensors.torch import load_file, save_file

from lrt.data.locks import LOCK, locked
from lrt.train import report, trainer
from lrt.train.checkpoint import latest, step_of, whole
from lrt.train.distributed.parallel import named_parameters
from lrt.train.monitor.faults import NonFiniteError, NotSavedError
from lrt.train.monitor.metrics import read_records
from lrt.train.trainer import train

QUICK = {"evaluation.sample_tokens": 0, "checkpoint.asynchronous": "false"}


def before_step(monkeypatch, number, change):
    """Have ``change(model, optimizer)`` run before the step of this number."""
    step, calls = trainer.train_step, []

    def changed(runner, optimizer, *args, **settings):
        calls.append(1)
        if len(calls) == number:
            change(runner.model, optimizer)
        return step(runner, optimizer, *args, **settings)

    monkeypatch.setattr(trainer, "train_step", changed)


def stop_at(monkeypatch, number):
    """The rank hears the signal before the last step, and tells the others in it."""
    before_step(monkeypatch, number - 1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def evaluations(folder):
    return [r["step"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "evaluation"]


# ------------------------------------------------------------------ numbers that are none


def ruin(tensors):
    with torch.no_grad():
        next(t for t in tensors if t.is_floating_point() and t.numel() > 1).flatten()[0] = float("nan")


RUINED = {
    "a weight": lambda model, optimizer: ruin(p for _, p in named_parameters(model)),
    "a momentum": lambda model, optimizer: ruin(optimizer.named_state().values()),
}


@pytest.mark.parametrize("what", RUINED)
def test_ruined_numbers_end_the_run_before_they_reach_a_checkpoint_or_an_export(tmp_path, monkeypatch, what):
    before_step(monkeypatch, 6, RUINED[what])
    with pytest.raises(
        NonFiniteError, match=r"step 6: \S+.* not finite, so no checkpoint .*checkpoints before are whole"
    ):
        train(tiny(tmp_path, **QUICK, **{"checkpoint.every": 2, "checkpoint.keep_last": 2}))
    assert [step_of(p) for p in whole(tmp_path / "tiny" / "checkpoints")] == [2, 4]
    assert not (tmp_path / "tiny" / "export").exists()


def test_while_steps_are_skipped_no_checkpoint_goes(tmp_path, monkeypatch):
    poison(monkeypatch, bad={4, 5, 6})
    stop_at(monkeypatch, 6)
    sets = {"checkpoint.every": 2, "checkpoint.keep_last": 1}
    assert train(tiny(tmp_path, **QUICK, **sets)).stopped == "SIGTERM"
    assert [step_of(p) for p in whole(tmp_path / "tiny" / "checkpoints")][:2] == [2, 4]
    assert train(tiny(tmp_path, **QUICK, **sets)).stopped is None  # from here on the batches are good
    assert [step_of(p) for p in whole(tmp_path / "tiny" / "checkpoints")] == [8]


def test_a_run_whose_last_steps_were_skipped_is_no_success(tmp_path, monkeypatch):
    poison(monkeypatch, bad={7, 8})
    with pytest.raises(
        NonFiniteError,
        match=r"ended at step 8 while its steps were not finite .*\(the last 2\), so nothing is exported",
    ):
        train(tiny(tmp_path, **QUICK))
    assert not (tmp_path / "tiny" / "export").exists()
    assert train(tiny(tmp_path, **QUICK)).bpb and (tmp_path / "tiny" / "export" / "config.json").is_file()


def test_a_model_without_a_score_is_not_exported(tmp_path, monkeypatch):
    evaluate = report.evaluate_run
    monkeypatch.setattr(
        report, "evaluate_run", lambda *args: evaluate(*args) | {"bpb": {"zero": 1.0, "decode": float("nan")}}
    )
    with pytest.raises(NonFiniteError, match="not finite .in mode decode., so nothing is exported"):
        train(tiny(tmp_path, **QUICK))
    assert not (tmp_path / "tiny" / "export").exists()


def test_weights_that_are_not_finite_start_no_run(tmp_path):
    first = train(tiny(tmp_path, **QUICK))
    (file,) = (first.folder / "export").glob("*.safetensors")
    tensors = load_file(file)
    ruin(tensors.values())
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"training.init_from = .*bad.safetensors: \S+ is not finite"):
        train(tiny(tmp_path, **{"run.name": "warm", "training.init_from": str(tmp_path / "bad.safetensors")}))


# ------------------------------------------------------------------ checkpoints that cannot be used


def test_a_damaged_checkpoint_is_said_and_the_one_before_leads_to_the_same_end(tmp_path, recwarn):
    first = train(tiny(tmp_path, **QUICK))
    end = first.folder / "checkpoints" / "step_00000008"
    shutil.copytree(end, tmp_path / "end")
    (shard,) = end.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(data)
    train(tiny(tmp_path, **QUICK))
    said = [str(w.message) for w in recwarn if "left out" in str(w.message)]
    assert said and shard.name in said[0] and "step_00000004 is used" in said[0]
    (tmp_path / "end").rename(tmp_path / "step_00000008")
    files_equal(end, tmp_path / "step_00000008")
    assert (end.parent / "unusable_step_00000008" / shard.name).read_bytes() == data


def test_where_no_checkpoint_can_be_used_the_run_does_not_begin_anew(tmp_path):
    first = train(tiny(tmp_path, **QUICK))
    for folder in (first.folder / "checkpoints").iterdir():
        (folder / "complete.json").write_text(
            (folder / "complete.json").read_text().replace("checkpoint 2", "checkpoint 7")
        )
    before = {p: p.read_bytes() for p in first.folder.rglob("*") if p.is_file()}
    for more in ({}, {"checkpoint.resume": "false"}):
        with pytest.raises(ValueError, match="none can be used, and nothing in it was changed: .*checkpoint 7"):
            train(tiny(tmp_path, **QUICK, **more))
    assert {p: p.read_bytes() for p in first.folder.rglob("*") if p.is_file()} == before


# ------------------------------------------------------------------ other settings

OTHERS = {
    "optimizer.matrix_lr=0.01": "optimizer.matrix_lr = 0.02 there, 0.01 here",
    "optimizer.betas=[0.9,0.95]": r"optimizer.betas = \[0.8, 0.95\] there, \[0.9, 0.95\] here",
    "training.final_lr_fraction=0.1": "training.final_lr_fraction = 0.0 there, 0.1 here",
    "training.clip_norm=1.0": "training.clip_norm = 'none' there, 1.0 here",
    "run.seed=2": "run.seed = 1 there, 2 here",
    "data.buffer_documents=9": "data.buffer_documents = 256 there, 9 here",
    "schedule.subsets=3": "schedule.subsets = 2 there, 3 here",
    "schedule.kind=baseline": "schedule.kind = 'interleaved' there, 'baseline' here",
    "training.steps=6": "training.steps = 8 there, 6 here",
    "training.steps=none training.tokens=1536": "training.steps = 8 there, 'none' here; "
    "training.tokens = 'none' there, 1536 here",
    "training.init_from=elsewhere": "training.init_from = 'none' there, 'elsewhere' here",
    "parallel.param_dtype=bfloat16": "parallel.param_dtype = 'float32' there, 'bfloat16' here",
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 8 steps that was stopped after 4."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        assert train(tiny(folder, **QUICK)).step == 4
    return folder


@pytest.mark.parametrize("sets", OTHERS)
def test_settings_that_would_mix_two_runs_are_refused_by_name(stopped, sets):
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    more = dict(pair.split("=", 1) for pair in sets.split())
    with pytest.raises(
        ValueError, match=f"step_00000004 was trained with other settings: {OTHERS[sets]}.*training.branch_from = "
    ) as caught:
        train(tiny(stopped, **QUICK, **more))
    assert len(str(caught.value).splitlines()) == 1
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before


def test_a_longer_horizon_and_what_touches_no_number_may_change_and_are_kept_on_record(stopped, tmp_path, capsys):
    shutil.copytree(stopped / "tiny", tmp_path / "tiny")
    sets = {"training.steps": 12, "training.micro_batch": 2, "checkpoint.every": 2, "evaluation.batch": 8}
    assert train(tiny(tmp_path, **QUICK, **sets)).step == 12
    assert "from step 4 on: training.steps = 8 there, 12 here" in capsys.readouterr().out
    assert train(tiny(tmp_path, **QUICK, **sets)).step == 12
    first, second = [json.loads(line) for line in (tmp_path / "tiny" / "settings.jsonl").read_text().splitlines()]
    assert first["step"] == 0 and first["settings"]["training.steps"] == 8 and first["settings"]["run.seed"] == 1
    changed = {"run.output": [str(stopped), str(tmp_path)], "training.steps": [8, 12], "training.micro_batch": [4, 2]}
    assert second == {"step": 4, "changed": changed | {"checkpoint.every": [4, 2], "evaluation.batch": [4, 8]}}


def test_a_finished_run_says_that_nothing_is_trained_and_records_its_evaluation_once(tmp_path, capsys):
    sets = {**QUICK, "evaluation.every": 4}
    first = train(tiny(tmp_path, **sets))
    assert "already finished" not in capsys.readouterr().out
    again = train(tiny(tmp_path, **sets))
    assert "already finished, nothing trained" in capsys.readouterr().out
    assert again.bpb == first.bpb and evaluations(first.folder) == [4, 8]
    assert [r["step"] for r in train_records(first.folder)] == list(range(1, 9))


def test_tokens_are_those_really_trained_after_a_change_of_batch_and_the_horizon_is_kept(tmp_path, monkeypatch):
    sets = {**QUICK, "training.steps": "none", "training.tokens": 256 * 12}
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert train(tiny(tmp_path, **sets)).step == 4
    result = train(tiny(tmp_path, **sets, **{"training.batch_tokens": 768}))  # 2048 tokens are left: two batches of 768
    tokens = [r["tokens"] for r in train_records(result.folder)]
    assert tokens == [256, 512, 768, 1024, 1024 + 768, 1024 + 2 * 768]
    flops = [r["flops"] for r in train_records(result.folder)]
    assert flops == pytest.approx([flops[0] * n / 256 for n in tokens])


# ------------------------------------------------------------------ one run a folder

HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from lrt.data.locks import locked
with locked({folder!r}, advice="none"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_and_a_kill_lets_go_of_it(tmp_path):
    folder = tmp_path / "tiny"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=str(ROOT), folder=str(folder))], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        ValueError,
        match=rf"tiny is in use by another process \(process {holder.pid} on .*\): .* or choose another run.name",
    ):
        train(tiny(tmp_path, **QUICK))
    assert [p.name for p in folder.iterdir()] == [LOCK]
    holder.kill()
    holder.wait()
    assert train(tiny(tmp_path, **QUICK)).step == 8
    assert not (folder / LOCK).exists()


def test_who_waits_for_a_folder_gets_it_when_its_holder_ends(tmp_path):
    code = HOLD.format(root=str(ROOT), folder=str(tmp_path / "a")).replace("600", "1")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with locked(tmp_path / "a", advice="none", patience_s=60):
        assert (tmp_path / "a" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    holder.wait()
    assert not (tmp_path / "a" / LOCK).exists()


# ------------------------------------------------------------------ the export


def test_an_export_that_fails_leaves_the_old_one_whole_and_nothing_beside_it(tmp_path, monkeypatch):
    folder = train(tiny(tmp_path, **QUICK)).folder
    before = {p.name: p.read_bytes() for p in (folder / "export").iterdir()}

    def full(self, place):
        raise OSError(28, "No space left on device", str(place))

    with (
        monkeypatch.context() as patch,
        pytest.raises(NotSavedError, match="export could not be written .*No space left"),
    ):
        patch.setattr("lrt.data.tokenizer.ByteTokenizer.save", full)
        train(tiny(tmp_path, **QUICK))
    assert {p.name: p.read_bytes() for p in (folder / "export").iterdir()} == before
    train(tiny(tmp_path, **QUICK))
    assert {p.name: p.read_bytes() for p in (folder / "export").iterdir()} == before
    assert not list(folder.glob(".*")) and evaluations(folder) == [8]


# ------------------------------------------------------------------ files that vanish


def test_a_run_whose_folder_is_deleted_says_so_and_ends_in_failure(tmp_path, monkeypatch, capsys):
    before_step(monkeypatch, 3, lambda *_: shutil.rmtree(tmp_path / "tiny"))
    with pytest.raises(NotSavedError, match="could not be written"):
        train(tiny(tmp_path, **QUICK, **{"training.steps": 1000}))
    said = capsys.readouterr().out
    assert (
        "metrics.jsonl was deleted or replaced under the run" in said
        and "checkpoints was deleted under the run" in said
    )
    assert not (tmp_path / "tiny").exists()


def test_records_that_are_deleted_end_the_run_in_failure_with_its_steps_saved(tmp_path, monkeypatch):
    before_step(monkeypatch, 3, lambda *_: (tmp_path / "tiny" / "metrics.jsonl").unlink())
    with pytest.raises(
        NotSavedError, match="metrics.jsonl was deleted or replaced under the run: .*same command goes on"
    ):
        train(tiny(tmp_path, **QUICK, **{"training.steps": 1000}))
    assert 3 <= step_of(latest(tmp_path / "tiny" / "checkpoints")) < 10


# ------------------------------------------------------------------ permissions


def test_every_file_of_a_run_has_the_permissions_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        folder = train(tiny(tmp_path, **QUICK)).folder
    finally:
        os.umask(before)
    modes = {p.relative_to(folder).as_posix(): oct(p.stat().st_mode & 0o777) for p in folder.rglob("*")}
    assert modes == {name: "0o750" if (folder / name).is_dir() else "0o640" for name in modes}
