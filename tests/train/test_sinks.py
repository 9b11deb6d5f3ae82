"""Where records of a run go: CSV, services with their real libraries, samples; and that no sink can end a run."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import tiny, train_records

from lrt.config import RecipeError, load_recipe
from lrt.eval.runs import read_records
from lrt.train.monitor.sinks import Csv, Guarded, open_sinks, scalars
from lrt.train.trainer import train

ROOT = Path(__file__).resolve().parents[2]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def step(number, **more):
    return {
        "kind": "train",
        "step": number,
        "loss": 1.0 / number,
        "groups": [2.0, 1.0],
        "note": "words",
        "fine": True,
        **more,
    }


def test_numbers_of_a_record_have_names():
    assert dict(scalars(step(4))) == {"loss": 0.25, "groups/0": 2.0, "groups/1": 1.0}
    assert dict(scalars({"bpb": {"decode": 1.5}, "bpb_of_buckets": {"decode": [1, None]}})) == {
        "bpb/decode": 1.5,
        "bpb_of_buckets/decode/0": 1,
    }


def test_csv_goes_on_grows_and_drops_what_is_repeated(tmp_path):
    sink = Csv(tmp_path, resume_step=0)
    for number in (1, 2, 3, 4):
        sink.write(step(number))
    sink.write({"kind": "evaluation", "step": 4, "bpb": {"decode": 1.5}})
    sink.write({"kind": "sample", "step": 4, "text": "no number"})
    sink.close()
    with open(tmp_path / "train.csv", "a") as file:
        file.write("5,0.2")  # a kill
    sink = Csv(tmp_path, resume_step=2)
    sink.write(step(3, groups=[9.0]))  # fewer numbers
    sink.write(step(4, groups=[3.0, 2.0, 1.0]))  # more: a schedule's next phase
    sink.write({"kind": "evaluation", "step": 4, "bpb": {"decode": 1.25}})
    sink.close()
    found = rows(tmp_path / "train.csv")
    assert [(r["step"], r["groups/0"], r["groups/1"], r["groups/2"]) for r in found] == [
        ("1", "2.0", "1.0", ""), ("2", "2.0", "1.0", ""), ("3", "9.0", "", ""), ("4", "3.0", "2.0", "1.0")
    ]  # fmt: skip
    assert [(r["step"], r["bpb/decode"]) for r in rows(tmp_path / "evaluation.csv")] == [("4", "1.25")]
    assert not (tmp_path / "sample.csv").exists()
    Csv(tmp_path, resume_step=0).write(step(1))
    assert len(rows(tmp_path / "train.csv")) == 1  # a new run begins a new table


def test_a_sink_that_fails_is_left_out_and_said_once():
    class Broken:
        calls = 0

        def write(self, record):
            self.calls += 1
            raise ConnectionError("the server is gone\nmore")

        close = None

    broken, said = Broken(), []
    sink = Guarded(broken, report=said.append)
    sink.write(step(1))
    sink.write(step(2))
    sink.close()
    assert broken.calls == 1 and said == [
        "Broken records nothing more (the server is gone); metrics.jsonl holds everything"
    ]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_the_run(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf'metrics.{package} = true needs the package {package}: pip install -e "\.\[{package}\]"'
    ):
        train(tiny(tmp_path, **{f"metrics.{package}": "true"}))


def test_a_service_that_does_not_start_says_what_to_do(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    sys.modules["wandb"].init = init
    recipe = tiny(tmp_path, **{"metrics.wandb": "true"})
    with pytest.raises(ValueError, match="api_key not configured.*run  wandb login , set WANDB_MODE=offline"):
        open_sinks(recipe, tmp_path, resume_step=0, report=print)


def test_a_project_without_a_service_is_refused():
    with pytest.raises(
        RecipeError, match="metrics.project = 'x' has no effect without metrics.wandb or metrics.trackio"
    ):
        load_recipe("lrt_tiny", overrides=["metrics.project=x"])


@pytest.mark.parametrize("sharded", [False, True])
def test_every_evaluation_comes_with_a_sample_and_changes_nothing(tmp_path, sharded, capsys):
    sets = {"evaluation.every": 3, "metrics.csv": "true", "metrics.tensorboard": "true"}
    sets |= {"parallel.param_dtype": "bfloat16"} if sharded else {}
    train(tiny(tmp_path / "a", **sets))
    train(tiny(tmp_path / "b", **sets, **{"evaluation.sample_tokens": 0}))
    records = read_records(tmp_path / "a" / "tiny" / "metrics.jsonl")
    samples = [r for r in records if r["kind"] == "sample"]
    assert [(r["step"], r["prompt"]) for r in samples] == [(3, "The "), (6, "The "), (8, "The ")]
    assert all(r["text"].startswith("The ") for r in samples)
    assert not [r for r in read_records(tmp_path / "b" / "tiny" / "metrics.jsonl") if r["kind"] == "sample"]
    assert train_records(tmp_path / "a" / "tiny") == train_records(tmp_path / "b" / "tiny")
    assert [int(r["step"]) for r in rows(tmp_path / "a" / "tiny" / "train.csv")] == list(range(1, 9))
    assert [int(r["step"]) for r in rows(tmp_path / "a" / "tiny" / "evaluation.csv")] == [3, 6, 8]
    assert capsys.readouterr().out.count(" | The ") == 2  # on the way; the last is in the final report


def test_a_sink_of_ones_own_gets_every_record(tmp_path):
    class Mine:
        def __init__(self):
            self.records, self.closed = [], 0

        def write(self, record):
            self.records.append((record["kind"], record["step"]))

        def close(self):
            self.closed += 1

    mine = Mine()
    train(tiny(tmp_path, **{"evaluation.every": 4}), sinks=[mine])
    written = [(r["kind"], r["step"]) for r in read_records(tmp_path / "tiny" / "metrics.jsonl")]
    assert mine.records == written and len(written) == 8 + 2 + 2 and mine.closed == 1


SERVICE = """
import sys
from runs import TINY
from lrt.config import parse_recipe
from lrt.train.monitor.faults import StopSignal
from lrt.train.trainer import train
if sys.argv[1] == "stop":
    StopSignal.received = "SIGTERM"
train(parse_recipe(TINY, overrides=sys.argv[2:]))
"""


def run_twice(tmp_path, *sets, **environment):
    """A run that is stopped after its first step, and goes on in another process."""
    given = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'train'}:{ROOT / 'tests' / 'lib'}",
        "HOME": str(tmp_path),
        **environment,
    }
    for when in ("stop", "end"):
        line = [
            sys.executable,
            "-c",
            SERVICE,
            when,
            f"run.output={tmp_path}",
            "run.name=tiny",
            "evaluation.every=4",
            *sets,
        ]
        done = subprocess.run(line, env=given, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "records nothing more" not in done.stdout, done.stdout
    return tmp_path / "tiny"


def wandb_records(path):
    """Records of an offline file: a LevelDB log of blocks of 32 KiB behind a header of seven bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for another record's header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_records_offline_and_goes_on(tmp_path):
    """The real library (extra wandb), without network or account."""
    from wandb.proto import wandb_internal_pb2

    folder = run_twice(tmp_path, "metrics.wandb=true", WANDB_MODE="offline", WANDB_SILENT="true")
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    identity = (folder / "wandb_id").read_text()
    assert len(files) == 2 and all(identity in file.name for file in files)  # two starts of one run
    history, samples, project = {}, 0, set()
    for file in files:
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.project:
                project.add((record.run.project, record.run.display_name))
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            if "train/loss" in items:
                history[items["_step"]] = items["train/loss"]
            samples += any(key.split("/")[0] == "sample" for key in items)
    losses = {r["step"]: r["loss"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "train"}
    assert history == losses and set(losses) == set(range(1, 9)) and samples == 2 and project == {("lrt", "tiny")}


@pytest.mark.slow
def test_trackio_records_on_this_machine_and_goes_on(tmp_path):
    """The real library (extra trackio), without network."""
    folder = run_twice(tmp_path, "metrics.trackio=true", "metrics.project=mine", TRACKIO_DIR=str(tmp_path / "trackio"))
    code = (
        "from trackio.sqlite_storage import SQLiteStorage as s; import json; "
        "print(json.dumps([s.get_runs('mine'), s.get_logs('mine', 'tiny')]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, logs = json.loads(done.stdout.splitlines()[-1])
    losses = {r["step"]: r["loss"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "train"}
    assert names == ["tiny"]
    assert {log["step"]: log["train/loss"] for log in logs if "train/loss" in log} == pytest.approx(losses)
    assert [log["step"] for log in logs if "sample" in log] == [4, 8]
