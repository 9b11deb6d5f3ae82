"""Whole runs of a tiny model on one process: what they write, resume, signals, bad numbers, bad input."""

import json
import os
import re
import shutil
import signal
import time
import traceback

import pytest
import torch
from runs import ONE, ROOT, TINY, files_equal, poison, tiny, train_records
from torch.utils._python_dispatch import TorchDispatchMode

import lrt
from lrt.config import load_recipe, parse_recipe
from lrt.data import Batch
from lrt.train import plan, trainer
from lrt.train.checkpoint import latest, read_rest, step_of, weights
from lrt.train.distributed.parallel import named_parameters, parallelize
from lrt.train.monitor.faults import FiniteGuard, Heartbeat, NonFiniteError, StopSignal
from lrt.train.monitor.metrics import read_records
from lrt.train.optim.groups import MuonAdamW, parameter_groups
from lrt.train.step import train_step
from lrt.train.trainer import train

FINISHED = {"metrics.plot": "true", "metrics.tensorboard": "true", "evaluation.every": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return train(tiny(folder, **FINISHED))


def test_a_run_writes_everything(finished):
    assert finished.stopped is None and finished.step == 8
    assert set(finished.bpb) == {"zero", "parallel", "decode"} and all(1 < v < 10 for v in finished.bpb.values())
    assert finished.sample.startswith("The ")
    written = {p.name for p in finished.folder.iterdir()}
    assert {"recipe.toml", "metrics.jsonl", "curves.png", "checkpoints", "export", "tensorboard"} <= written
    assert load_recipe(finished.folder / "recipe.toml") == tiny(finished.folder.parent, **FINISHED)
    assert (finished.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert step_of(latest(finished.folder / "checkpoints")) == 8


def test_metrics_hold_every_step_and_what_the_issue_asks_for(finished):
    records = read_records(finished.folder / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, 9))
    for record in steps:
        assert len(record["groups"]) == 2 and record["loss"] == pytest.approx(
            (record["groups"][0] + 2 * record["groups"][1]) / 3, rel=1e-5
        )
        assert record["tokens"] == 256 * record["step"] and record["flops"] > 0 and "mfu" not in record
        assert 0 <= record["data_wait"] <= 1 and record["peak_memory_gib"] > 0 and record["skipped"] == 0
        assert record["lr"]["matrices"] == pytest.approx(0.02 * (256 / 524288) ** 0.5 * record["lr_scale"])
    scores = [r for r in records if r["kind"] == "evaluation"]
    assert [r["step"] for r in scores] == [4, 8] and scores[-1]["bpb"] == finished.bpb
    assert len(scores[-1]["recurrence"]["gains"]) == 2 and len(scores[-1]["recurrence"]["gate_rms"]) == 2
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_export_is_the_trained_model(finished):
    model = lrt.load(finished.folder / "export")
    assert model.recurrence.separator == 256
    from lrt.data import load_tokenizer

    assert load_tokenizer(str(finished.folder / "export")).bos_id == 256
    trained = weights.gather(model, ONE)
    from lrt.train.checkpoint import read_tensors

    read = {f"model.{n}": torch.zeros_like(t) for n, t in trained.items()}
    read_tensors(latest(finished.folder / "checkpoints"), read)
    assert all(torch.equal(read[f"model.{n}"], t) for n, t in trained.items())


def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path):
    copy = tmp_path / "tiny"
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copytree(finished.folder / "checkpoints" / "step_00000004", copy / "checkpoints" / "step_00000004")
    # holds steps behind the checkpoint, as after a kill
    shutil.copy(finished.folder / "metrics.jsonl", copy / "metrics.jsonl")
    result = train(tiny(tmp_path, **{"evaluation.every": 4}))
    files_equal(copy / "checkpoints" / "step_00000008", finished.folder / "checkpoints" / "step_00000008")
    assert train_records(copy) == train_records(finished.folder)
    assert result.bpb == finished.bpb


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path, monkeypatch):
    """The checkpoint comes first; the run that goes on from it begins with the evaluation,
    so that records are those of a whole run."""
    sets = {"evaluation.every": 4, "evaluation.sample_tokens": 0, "checkpoint.asynchronous": "false"}
    whole = train(tiny(tmp_path / "whole", **sets))

    def cut(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "evaluate_run", cut)
        train(tiny(tmp_path / "cut", **sets))
    assert step_of(latest(tmp_path / "cut" / "tiny" / "checkpoints")) == 4
    again = train(tiny(tmp_path / "cut", **sets))
    rows = [
        [(r["kind"], r["step"], r.get("loss"), r.get("bpb")) for r in read_records(result.folder / "metrics.jsonl")]
        for result in (whole, again)
    ]
    assert rows[0] == rows[1] and [r[1] for r in rows[0] if r[0] == "evaluation"] == [4, 8]


@pytest.mark.parametrize("start, count", [(2, 2), (7, 5)])
def test_a_profile_has_the_steps_asked_for(tmp_path, start, count):
    result = train(
        tiny(
            tmp_path, **{"metrics.profile_start": start, "metrics.profile_steps": count, "evaluation.sample_tokens": 0}
        )
    )
    (trace,) = (result.folder / "profile").iterdir()
    assert trace.name == f"rank0_step{start}.json"
    events = json.loads(trace.read_text())["traceEvents"]
    updates = [e for e in events if e.get("name") == "aten::_fused_adamw_"]
    groups = [e for e in updates if e.get("ph") == "X"]
    steps = min(count, 8 - start + 1)  # a run that ends inside the window keeps what it has
    assert groups and len(groups) % steps == 0
    for wrong in (0, 9):
        with pytest.raises(ValueError, match="metrics.profile_start"):
            train(tiny(tmp_path / "wrong", **{"metrics.profile_start": wrong}))


def test_a_finished_run_is_only_evaluated_again(finished, tmp_path, capsys):
    shutil.copytree(finished.folder, tmp_path / "tiny")
    again = train(tiny(tmp_path))
    assert re.search(r"waiting for data +\d+\.\d % of the time", capsys.readouterr().out)
    assert again.bpb == finished.bpb and train_records(again.folder) == train_records(finished.folder)


def test_warm_start_takes_the_weights_alone(finished, tmp_path):
    (weights_file,) = (finished.folder / "export").glob("*.safetensors")
    for number, source in enumerate((finished.folder, finished.folder / "export", weights_file)):
        recipe = tiny(tmp_path, **{"run.name": f"warm{number}", "training.init_from": str(source), "training.steps": 0})
        result = train(recipe)
        assert result.step == 0 and result.bpb == pytest.approx(finished.bpb)
    (tmp_path / "cut.safetensors").write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"training.init_from = .*cut.safetensors: not a whole safetensors file"):
        train(tiny(tmp_path, **{"run.name": "cut", "training.init_from": str(tmp_path / "cut.safetensors")}))


def test_only_memory_parameters_train_in_stage_memory(finished, tmp_path):
    recipe = tiny(
        tmp_path, **{"training.stage": "memory", "training.init_from": str(finished.folder), "training.steps": 2}
    )
    model, before = lrt.load(train(recipe).folder / "export"), lrt.load(finished.folder / "export")
    moved = {n for (n, p), q in zip(model.named_parameters(), before.parameters()) if not torch.equal(p, q)}
    assert moved and moved <= set(model.memory_parameters())


def test_accumulation_equals_a_large_batch(tmp_path):
    losses = []
    for rows in (8, 2):
        result = train(
            tiny(
                tmp_path,
                **{
                    "run.name": f"rows{rows}",
                    "training.micro_batch": rows,
                    "training.steps": 3,
                    "training.clip_norm": 0.5,
                },
            )
        )
        losses.append([(r["loss"], r["grad_norm"]) for r in train_records(result.folder)])
    for (a, x), (b, y) in zip(*losses):
        assert a == pytest.approx(b, rel=1e-5) and x == pytest.approx(y, rel=1e-3)


SCHEDULES = [
    lrt.baseline(),
    lrt.interleaved(3),
    lrt.interleaved(2, kv_refresh=True),
    lrt.refine(2),
    lrt.chunked(5),
    lrt.sequential(),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", ["block", "selective"])
def test_activation_checkpointing_changes_no_gradient(schedule, kind):
    recipe = tiny("unused", **{"model.sequence_length": 9, "training.batch_tokens": 9})
    plain = lrt.build(recipe, dtype=torch.float64)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    other = lrt.build(recipe, dtype=torch.float64)
    other.load_state_dict(plain.state_dict())
    parallelize(
        other,
        parse_recipe("", overrides=[f"parallel.activation_checkpointing={kind}", "parallel.compile=false"]).parallel,
        ONE,
    )
    ids = torch.randint(0, 257, (2, 10), generator=torch.Generator().manual_seed(0))
    for model in (plain, other):
        model.train()(ids[:, :-1], targets=ids[:, 1:], schedule=schedule).loss.backward()
    names = dict(named_parameters(other))
    assert names.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        a, b = parameter.grad, names[name].grad
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name


def test_a_step_with_a_bad_batch_is_skipped_and_named(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, bad={3, 5})
    result = train(tiny(tmp_path))
    records = train_records(result.folder)
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert records[2]["grad_norm"] is None and result.step == 8
    named = [json.loads(line) for line in (result.folder / "not_finite_rank0.jsonl").read_text().splitlines()]
    assert (
        [n["step"] for n in named] == [3, 5]
        and len(named[0]["rows"]) == 8
        and all("train" in row for row in named[0]["rows"])
    )
    assert all(torch.isfinite(p).all() for p in lrt.load(result.folder / "export").parameters())
    assert "2 skipped" in capsys.readouterr().out
    assert read_rest(latest(result.folder / "checkpoints")).meta["skipped"] == 2


def test_too_many_bad_steps_stop_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, bad={2, 4, 5, 6})
    with pytest.raises(
        NonFiniteError, match=r"step 6: .*3 steps in a row were not finite.*max_skipped = 3.*not_finite_rank0.jsonl"
    ):
        train(tiny(tmp_path, **{"training.max_skipped": 3}))
    assert step_of(latest(tmp_path / "tiny" / "checkpoints")) == 4


class Reads(TorchDispatchMode):
    """Notes which functions read a tensor's value; on a device each such read would wait for all queued work."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.places.append([frame.name for frame in traceback.extract_stack()])
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device():
    recipe = tiny("unused")
    model, runner = plan.build(recipe, ONE)
    optimizer = MuonAdamW(parameter_groups(model.named_parameters(), recipe))
    ids = torch.zeros(2, 32, dtype=torch.long)
    with Reads() as reads:
        numbers = train_step(
            runner, optimizer, [Batch(ids, ids, ())] * 2, schedule=lrt.interleaved(2), seed=0, clip_norm=1.0, world=ONE
        )
        checks = len(reads.places)
        numbers.sum().item()
    assert len(reads.places) == checks + 1
    assert all("check_ids" in stack for stack in reads.places[:checks])  # token ids are looked at on the CPU only


# ------------------------------------------------------------------ bad input

BAD = {
    "training.stepz=1": "unknown key 'training.stepz'; did you mean 'training.steps'",
    "training.batch_tokens=100": "not a multiple of model.sequence_length",
    "model.vocab_size=64": "vocab",
    "model.sequence_length=1000000 training.batch_tokens=1000000": "longer than the corpus",
    "data.train=/nowhere/*.parquet": "data.train",
    "recurrence.separator=3": "recurrence.separator = 3, but the tokenizer's separator is 256: "
    "set recurrence.separator = 256",
    "training.init_from=/nowhere": "holds no checkpoint",
    "training.warmup_steps=9": "training.warmup_steps = 9, but the run has 8 steps, so the rates would never be "
    "reached: use at most 8",
    "training.steps=none": "training has no horizon: give exactly one of training.steps, training.tokens, "
    "training.tokens_per_parameter",
}


@pytest.mark.parametrize("sets", BAD)
def test_bad_input_is_one_line(tmp_path, sets):
    with pytest.raises(ValueError, match=re.escape(BAD[sets])) as caught:
        train(parse_recipe(TINY, overrides=[f"run.output={tmp_path}", *sets.split()]))
    assert len(str(caught.value).splitlines()) <= 2


def test_a_foreign_run_folder_is_refused(finished):
    with pytest.raises(
        ValueError, match=r"belongs to another model: model.n_layers = 2 there, 3 here.*Choose another run.name"
    ):
        train(tiny(finished.folder.parent, **{"model.n_layers": 3}))
    with pytest.raises(ValueError, match=r"checkpoint.resume = false, but .* reached step 8: choose another run.name"):
        train(tiny(finished.folder.parent, **{"checkpoint.resume": "false"}))


def test_another_schedule_for_a_finished_run_is_refused(finished):
    """A finished run was exported again under the name of a schedule that had never trained it."""
    with pytest.raises(
        ValueError, match=r"has reached its end with another schedule: schedule.kind = .*Choose another run.name"
    ):
        train(tiny(finished.folder.parent, **{"schedule.kind": "refine"}))


def test_batches_that_ranks_cannot_share_are_refused():
    from lrt.accounting import count_parameters
    from lrt.train.horizon import plan_horizon

    recipe = tiny("unused", **{"training.batch_tokens": 32 * 12, "training.micro_batch": 5})
    parameters = count_parameters(lrt.build(recipe, device="meta"))
    assert plan_horizon(recipe, parameters, world_size=1)[1:3] == (4, 3)
    assert plan_horizon(recipe, parameters, world_size=4)[1:3] == (3, 1)
    with pytest.raises(
        ValueError, match=r"is 12 rows of 32 tokens, which 5 processes cannot share evenly: choose a multiple of 160"
    ):
        plan_horizon(recipe, parameters, world_size=5)
    by_ratio = tiny("unused", **{"training.steps": "none", "training.tokens_per_parameter": 2.0})
    assert plan_horizon(by_ratio, parameters, world_size=1).steps == round(2 * parameters.scaling / 256)


# ------------------------------------------------------------------ faults


def test_a_signal_during_the_last_steps_leaves_the_last_evaluation_to_the_same_command(tmp_path, monkeypatch):
    steps, calls = 4, []

    def step(*args, **kwargs):
        calls.append(kwargs["stop"])
        if len(calls) == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", step)
    recipe = tiny(tmp_path, **{"training.steps": steps, "evaluation.sample_tokens": 0})
    stopped = train(recipe)
    assert (stopped.stopped, stopped.step, stopped.bpb) == ("SIGTERM", steps, {}) and calls[-1]
    finished = train(recipe)
    assert (finished.stopped, finished.step, len(calls)) == (None, steps, steps) and finished.bpb


def test_a_hang_names_the_step(capsys):
    import io

    said = io.StringIO()
    with Heartbeat(timeout_s=0.4, rank=3, stream=said) as heart:
        heart.beat("step 17")
        time.sleep(0.8)
    assert (
        "rank 3: step 17: no progress for about" in said.getvalue()
        and "restart with the same command" in said.getvalue()
    )
    assert said.getvalue().count("no progress") == 1
    quiet = io.StringIO()
    with Heartbeat(timeout_s=0.05, stream=quiet):  # data may be fetched for long before the first step
        time.sleep(0.2)
    assert quiet.getvalue() == ""
    with Heartbeat(timeout_s=5.0, stream=quiet) as heart:
        heart.beat("step 1")
    assert quiet.getvalue() == ""


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        assert stop.received == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_guard_counts_only_steps_in_a_row(tmp_path):
    guard = FiniteGuard(limit=2, path=tmp_path / "bad.jsonl")
    for step, bad in enumerate([True, False, True, False], 1):
        guard.see(step, skipped=bad, loss=float("nan"), norm=1.0, sources=["a"])
    assert guard.total == 2
    guard.see(5, skipped=True, loss=1.0, norm=float("inf"), sources=["b"])
    with pytest.raises(NonFiniteError, match="step 6: loss 1.0, gradient norm inf: 2 steps in a row"):
        guard.see(6, skipped=True, loss=1.0, norm=float("inf"), sources=["c"])


# ------------------------------------------------------------------ the recipes that ship

# torchtitan's
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml") if not path.stem.startswith("titan_"))


def test_every_recipe_loads_and_says_what_it_is():
    assert {f"{kind}_{size}" for kind in ("lrt", "baseline") for size in ("tiny", "12l", "20l", "24l")} <= set(RECIPES)
    for name in RECIPES:
        assert load_recipe(name).run.name == name
        assert (ROOT / "recipes" / f"{name}.toml").read_text().startswith("# ")


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("baseline_")])
def test_twins_differ_in_the_recurrence_alone_and_see_the_same_tokens(name):
    import dataclasses

    from lrt.accounting import count_parameters
    from lrt.train.horizon import plan_horizon

    twin, recipe = load_recipe(name), load_recipe(name.replace("baseline", "lrt"))
    assert twin.recurrence is None and recipe.recurrence is not None
    same = {"run", "recurrence", "schedule"}
    assert all(getattr(twin, f.name) == getattr(recipe, f.name) for f in dataclasses.fields(twin) if f.name not in same)
    counts = [count_parameters(lrt.build(r, device="meta")) for r in (twin, recipe)]
    assert counts[0].total + counts[1].memory == counts[1].total
    horizons = [plan_horizon(r, c, world_size=1) for r, c in zip((twin, recipe), counts)]
    assert horizons[0] == horizons[1]
    if recipe.model.n_layers >= 20:  # spec: at most 0.3 % over the twin
        assert counts[1].memory <= 0.003 * counts[0].total
