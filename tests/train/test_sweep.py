"""Sweeps: what a spec stands for, what is refused, rates by twin, and interruptions of every kind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY

from lrt.config import load_recipe
from lrt.train.sweep.pool import Slot, locked, run_sweep, visible_devices
from lrt.train.sweep.results import Results, choose, table
from lrt.train.sweep.spec import SpecError, read_spec, toml_value

ROOT = Path(__file__).resolve().parents[2]

# In place of recipes/run.py: a run whose score is a function of its overrides, which saves and resumes its step.
FAKE = """
import json, os, signal, sys, time
sets = dict(s.split("=", 1) for s in (sys.argv[i + 1] for i, a in enumerate(sys.argv) if a == "--set"))
folder = os.path.join(sets["run.output"], sets["run.name"]); os.makedirs(folder, exist_ok=True)
path = os.path.join(folder, "metrics.jsonl")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
step = len(open(path).read().splitlines()) if os.path.exists(path) else 0
total, pause = int(sets["training.steps"]), float(os.environ.get("PAUSE", 0))
rate = float(sets.get("optimizer.matrix_lr", 1))
def state(word):
    attempt = {"state": word, "device": os.environ.get("CUDA_VISIBLE_DEVICES", "cpu")}
    json.dump({"attempts": [attempt], "data": {"train": "abc"}}, open(os.path.join(folder, "run.json"), "w"))
print("started", flush=True)
if "training.max_skipped" in sets and not os.path.exists("repaired"):
    print("Traceback\\nstopped: 3 steps in a row are not finite"); state("failed"); sys.exit(1)
while step < total and not stop:
    step += 1
    record = {"kind": "train", "step": step, "tokens": 100 * step, "flops": 5e6 * step, "tokens_per_second": 200.0}
    open(path, "a").write(json.dumps(record) + "\\n")
    time.sleep(pause)
if stop and step < total:
    state("stopped: SIGTERM"); sys.exit(0)
score = (rate - 0.02) ** 2 * 1e4 + int(sets["run.seed"]) / 100
bpb = {"zero": 9.0, "parallel": 0.0, "decode": score + 1}
if sets.get("recurrence") == "false":
    bpb = {"zero": score, "parallel": score, "decode": score}
open(path, "a").write(json.dumps({"kind": "evaluation", "step": step, "tokens": 100 * step, "bpb": bpb}) + "\\n")
state("done")
"""
SPEC = """
recipe = "lrt_tiny"
set = ["training.steps=4"]
seeds = [1, 2]
side_by_side = 2
[twins.plain]
set = ["recurrence=false", "schedule.kind=baseline"]
[twins.lrt]
[tune]
seeds = [1]
set = ["training.steps=2"]
[tune.grid]
"optimizer.matrix_lr" = [0.01, 0.02, 0.04]
[[runs]]
name = "plain"
twin = "plain"
[[runs]]
name = "refine"
twin = "lrt"
set = ["schedule.kind=refine"]
grid = {"schedule.passes" = [1, 2], "schedule.weights" = ["paper"]}
[[runs]]
name = "as it comes"
seeds = [3]
"""
SHORT = """
set = ["training.steps=30"]
seeds = [1, 2]
[twins.lrt]
[tune]
seeds = [1]
grid = {"optimizer.matrix_lr" = [0.01, 0.02]}
[[runs]]
name = "lrt"
twin = "lrt"
"""


@pytest.fixture
def launch(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    return [sys.executable, str(tmp_path / "fake.py")]


def spec(folder, text=SPEC, **options):
    (folder / "spec.toml").write_text(text)
    return read_spec(folder / "spec.toml", **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------ specs


def test_a_spec_is_its_runs(tmp_path):
    sweep = spec(tmp_path)
    assert [(r.twin, r.point, r.plain) for r in sweep.tuning] == [
        (twin, (f"optimizer.matrix_lr={rate}",), twin == "plain")
        for twin in ("plain", "lrt")
        for rate in (0.01, 0.02, 0.04)
    ]
    assert [(r.label, r.seed) for r in sweep.compared({})] == [("as it comes", 3)]  # the others wait for their rates
    runs = sweep.compared({"plain": ("optimizer.matrix_lr=0.01",), "lrt": ("optimizer.matrix_lr=0.04",)})
    assert [(r.label, r.seed) for r in runs] == [  # first seeds first
        ("plain", 1), ("refine passes=1 weights=paper", 1), ("refine passes=2 weights=paper", 1), ("as it comes", 3),
        ("plain", 2), ("refine passes=1 weights=paper", 2), ("refine passes=2 weights=paper", 2),
    ]  # fmt: skip
    recipe = load_recipe(runs[1].recipe, overrides=runs[1].overrides)
    assert (recipe.schedule.passes, recipe.optimizer.matrix_lr, recipe.run.seed, recipe.training.steps) == (
        1,
        0.04,
        1,
        4,
    )
    assert load_recipe(runs[0].recipe, overrides=runs[0].overrides).recurrence is None
    assert len({r.name for r in (*sweep.tuning, *runs)}) == 6 + 7


def test_a_run_has_another_name_when_something_that_matters_changes(tmp_path):
    before = {r.label: r.name for r in spec(tmp_path).tuning}
    assert {
        r.label: r.name for r in spec(tmp_path, SPEC.replace("side_by_side = 2", "side_by_side = 1")).tuning
    } == before
    other = {r.label: r.name for r in spec(tmp_path, overrides=["optimizer.momentum=0.9"]).tuning}
    assert not set(other.values()) & set(before.values())


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("side_by_side = 2", "side_by_sid = 2", "unknown key side_by_sid; did you mean side_by_side?"),
        ("side_by_side = 2", "side_by_side = 0", "side_by_side = 0: use a whole number of 1 or more"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds = [1, 1]: use a list of different whole numbers"),
        ("seeds = [1, 2]", "seeds = []", "seeds = []: use a list"),
        ('name = "plain"\n', "", "runs[0].name is missing"),
        (
            'name = "plain"\ntwin = "plain"',
            'name = "plain"\ntwin = "plan"',
            "there is no [twins.plan]; there are: plain, lrt",
        ),
        ('recipe = "lrt_tiny"', 'recipe = "lrt_tinny"', "did you mean lrt_tiny.toml?"),
        ("training.steps=4", "training.stepps=4", "unknown key 'training.stepps'; did you mean 'training.steps'?"),
        ("training.steps=2", "training.steps=many", "training.steps = 'many'"),
        (
            "[0.01, 0.02, 0.04]",
            "[]",
            "tune.grid = {'optimizer.matrix_lr': []}: use a table of lists of different values",
        ),
        ("[0.01, 0.02, 0.04]", "[0.01, 0.01]", "use a table of lists of different values"),
        (
            '["schedule.kind=refine"]',
            '["schedule.kind=refine", "optimizer.matrix_lr=0.1"]',
            "optimizer.matrix_lr is tuned for its twin",
        ),
        (
            '["schedule.kind=refine"]',
            '["schedule.kind=refine", "run.seed=7"]',
            "run.seed is the sweep's to set: use seeds",
        ),
        ('name = "as it comes"\nseeds = [3]', 'name = "plain"', "'plain' stands for two settings"),
        ('name = "as it comes"\nseeds = [3]', 'name = "again"\ntwin = "plain"', "again is the same run as plain"),
        (
            "[twins.lrt]",
            '[twins.lrt]\nset = ["evaluation.modes=[\\"parallel\\"]"]',
            'lacks "decode", by which rates are chosen',
        ),
        ("[[runs]]", "[[runs]", "not valid TOML"),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_starts(tmp_path, old, new, message):
    assert old in SPEC
    with pytest.raises(SpecError) as error:
        spec(tmp_path, SPEC.replace(old, new))
    assert message in str(error.value)


def test_a_spec_without_runs_and_one_that_is_not_there(tmp_path):
    with pytest.raises(SpecError, match="no runs"):
        spec(tmp_path, 'recipe = "lrt_tiny"')
    with pytest.raises(SpecError, match="not found"):
        read_spec(tmp_path / "none.toml")
    with pytest.raises(SpecError, match="section.key=value"):
        spec(tmp_path, overrides=["training.steps"])


PHASES = [{"until": 0.7, "kind": "baseline"}, {"until": 1.0, "mix": [{"share": 1.0, "kind": "baseline"}]}]


@pytest.mark.parametrize("value", [3, 0.5, True, 'a "b" é', [1, 2], ["a"], PHASES])
def test_values_of_a_grid_reach_the_command_line_as_they_are(value):
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    assert tomllib.loads(f"value = {toml_value(value)}")["value"] == value


SPECS = [p for p in (ROOT / "tools" / "experiments").glob("*/*.toml") if "[[runs]]" in p.read_text()]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_projects_own_sweeps_can_start(path):
    assert read_spec(path).settings


# ------------------------------------------------------------------ running


def test_rates_are_found_by_twin_and_the_compared_runs_start_with_them(tmp_path, launch):
    sweep, said = spec(tmp_path), []
    summary = run_sweep(sweep, tmp_path / "out", launch=launch, devices=["0", "5"], say=said.append)
    assert summary == (13, 0, 0, None)
    found = lines(tmp_path / "out")
    assert all(
        r["state"] == "done" and r["data"] == {"train": "abc"} and r["seconds"] == pytest.approx(r["steps"] / 2)
        for r in found
    )
    compared = [r for r in found if r["stage"] == "compare" and r["twin"]]
    assert len(compared) == 6 and all("optimizer.matrix_lr=0.02" in r["overrides"] for r in compared)
    assert {r["device"] for r in found} == {"0", "5"}
    one = next(r for r in found if r["label"] == "plain" and r["seed"] == 2)
    assert (one["steps"], one["tokens"], one["flops"], one["bpb"]["decode"]) == (4, 400, 2e7, 0.02)
    text = table(sweep, Results(tmp_path / "out" / "results.jsonl"), folder=tmp_path / "out")
    assert "rates of lrt: optimizer.matrix_lr=0.02 (1.0100)\n" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("plain ")]
    assert row == ["plain", "2/2", "4", "400", "2e+07", "-", "-", "0.0150", "±0.0071", "2"]
    assert run_sweep(sweep, tmp_path / "out", launch=["false"], devices=[None], say=said.append) == (
        13,
        0,
        0,
        None,
    )  # nothing is done twice
    assert len(lines(tmp_path / "out")) == 13


def test_a_tuning_run_with_the_very_settings_of_a_compared_one_is_not_repeated(tmp_path, launch):
    sweep, said = spec(tmp_path, SHORT.replace("[1, 2]", "[1]")), []
    assert run_sweep(sweep, tmp_path / "out", launch=launch, devices=[None], say=said.append) == (3, 0, 0, None)
    tuned, compared = (
        next(r for r in reversed(lines(tmp_path / "out")) if r["stage"] == s) for s in ("tune", "compare")
    )
    assert compared == {**tuned, "run": compared["run"], "label": "lrt", "stage": "compare"}
    assert sum("start" in line for line in said) == 2 and any(
        "by a run with the same settings" in line for line in said
    )


def test_a_best_rate_at_the_edge_of_the_grid_is_said(tmp_path, launch):
    sweep = spec(tmp_path, SPEC.replace("[0.01, 0.02, 0.04]", "[0.03, 0.04, 0.02]"))
    said = []
    run_sweep(sweep, tmp_path / "out", launch=launch, devices=[None], say=said.append)
    assert (
        "rates of plain: optimizer.matrix_lr=0.02 (0.0100); at the edge of the grid: optimizer.matrix_lr: widen it"
        in said
    )
    assert choose(sweep, Results(tmp_path / "out" / "results.jsonl"))["lrt"].at_edge == ["optimizer.matrix_lr"]


def test_a_failed_run_ends_no_sweep_and_is_tried_again(tmp_path, launch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (
        'recipe = "lrt_tiny"\nset = ["training.steps=2"]\n'
        '[[runs]]\nname = "bad"\nset = ["training.max_skipped=3"]\n[[runs]]\nname = "good"'
    )
    sweep, said = spec(tmp_path, text), []
    assert run_sweep(sweep, tmp_path / "out", launch=launch, devices=[None], say=said.append) == (1, 1, 0, None)
    bad, good = lines(tmp_path / "out")
    assert (bad["state"], bad["error"], good["state"]) == ("failed", "stopped: 3 steps in a row are not finite", "done")
    assert "seed 1 failed: stopped: 3 steps" in table(
        sweep, Results(tmp_path / "out" / "results.jsonl"), folder=tmp_path / "out"
    )
    (tmp_path / "repaired").touch()
    assert run_sweep(sweep, tmp_path / "out", launch=launch, devices=[None], say=said.append) == (2, 0, 0, None)
    assert [r["state"] for r in lines(tmp_path / "out")] == ["failed", "done", "done"]


def test_a_failed_point_of_the_grid_leaves_the_choice_to_the_others(tmp_path, launch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = 'grid = {"training.max_skipped" = [20, 21]}'
    text = (
        f'recipe = "lrt_tiny"\nset = ["training.steps=2"]\n[twins.a]\n[tune]\n{grid}\n[[runs]]\nname = "x"\ntwin = "a"'
    )
    said = []
    summary = run_sweep(spec(tmp_path, text), tmp_path / "out", launch=launch, devices=[None], say=said.append)
    assert summary == (0, 2, 0, None) and "rates of a: no point of the grid worked" in said


def test_nothing_new_starts_once_the_time_is_over(tmp_path, launch):
    sweep = spec(tmp_path)
    summary = run_sweep(sweep, tmp_path / "out", launch=launch, devices=[None], minutes=1e-9, say=lambda text: None)
    assert summary == (0, 0, 7, "the time is over") and not (tmp_path / "out" / "results.jsonl").exists()


def command(folder):
    code = (
        "import sys; from pathlib import Path; from lrt.train.sweep import pool, spec; folder = Path(sys.argv[1])\n"
        "pool.run_sweep(spec.read_spec(folder / 'spec.toml'), folder / 'out', "
        "launch=[sys.executable, str(folder / 'fake.py')], devices=[None], say=lambda text: print(text, flush=True))"
    )
    return [sys.executable, "-c", code, str(folder)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_continued_gives_the_same_table(tmp_path, launch, number):
    sweep, whole, cut = spec(tmp_path, SHORT), tmp_path / "whole", tmp_path / "out"
    run_sweep(sweep, whole, launch=launch, devices=[None], say=lambda text: None)
    process = subprocess.Popen(
        command(tmp_path), stdout=subprocess.PIPE, text=True, env={**os.environ, "PAUSE": "0.03"}
    )
    while "start  lrt" not in process.stdout.readline():  # rates are found, the compared runs begin
        pass
    time.sleep(0.4)
    process.send_signal(number)
    process.wait(timeout=30)
    assert 1 <= len(lines(cut)) < 4
    for _ in range(100):  # runs of a killed sweep hold the folder until they have saved
        try:
            with locked(cut):
                break
        except ValueError:
            time.sleep(0.1)
    half = [
        p
        for p in (cut / "runs").iterdir()
        if json.loads((p / "run.json").read_text())["attempts"][0]["state"] == "stopped: SIGTERM"
    ]
    assert half  # saved, at a step in between
    assert run_sweep(sweep, cut, launch=launch, devices=[None], say=lambda text: None) == (4, 0, 0, None)
    steps = [[json.loads(line)["step"] for line in (p / "metrics.jsonl").read_text().splitlines()][:-1] for p in half]
    assert all(one == list(range(1, len(one) + 1)) for one in steps)  # they went on where they were
    tables = [table(sweep, Results(folder / "results.jsonl"), folder=folder) for folder in (whole, cut)]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_real_runs_interrupted_and_continued_have_the_same_scores(tmp_path):
    """The trainer itself: killed in the middle, the same command goes on from the checkpoints to the same bits."""
    (tmp_path / "tiny.toml").write_text(TINY)
    text = (
        'recipe = "tiny.toml"\nset = ["training.steps=200", "checkpoint.every=10", "evaluation.sample_tokens=0"]\n'
        "side_by_side = 2\n[[runs]]\n"
        'name = "plain"\nset = ["recurrence=false", "schedule.kind=baseline"]\n[[runs]]\nname = "lrt"\n'
    )
    (tmp_path / "spec.toml").write_text(text)
    line = [sys.executable, str(ROOT / "tools" / "sweep.py"), str(tmp_path / "spec.toml"), "--out"]
    whole = subprocess.run([*line, str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    process = subprocess.Popen([*line, str(tmp_path / "cut")], stdout=subprocess.PIPE, text=True)
    while len(list((tmp_path / "cut" / "runs").glob("*/checkpoints/step_*"))) < 3:
        time.sleep(0.05)
    process.kill()  # its runs hear it, save and end
    process.wait()
    while True:
        cut = subprocess.run([*line, str(tmp_path / "cut")], capture_output=True, text=True)
        if "in use by another sweep" not in cut.stderr:
            break
        time.sleep(0.5)
    assert cut.returncode == 0 and "2 done, 0 failed, 0 left" in cut.stdout, cut.stdout + cut.stderr
    first, second = ({r["label"]: r for r in lines(tmp_path / name)} for name in ("whole", "cut"))
    for label in ("plain", "lrt"):
        assert all(first[label][key] == second[label][key] for key in ("bpb", "steps", "tokens", "flops", "data"))
    attempts = [json.loads(p.read_text())["attempts"] for p in (tmp_path / "cut" / "runs").glob("*/run.json")]
    assert any(len(one) == 2 and one[1]["from_step"] > 0 for one in attempts)


def test_a_run_that_ended_unseen_is_written_down_not_run_again(tmp_path, launch):
    sweep = spec(tmp_path)
    run_sweep(sweep, tmp_path / "out", launch=launch, devices=[None], say=lambda text: None)
    path = tmp_path / "out" / "results.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:-2]) + kept[-2][:40])  # killed while writing
    assert run_sweep(sweep, tmp_path / "out", launch=["false"], devices=[None], say=lambda text: None) == (
        13,
        0,
        0,
        None,
    )


def test_two_sweeps_in_one_folder_are_refused(tmp_path, launch):
    with locked(tmp_path / "out"):
        with pytest.raises(
            ValueError, match=f"in use by another sweep .process {os.getpid()} on .* choose another --out"
        ):
            run_sweep(spec(tmp_path), tmp_path / "out", launch=launch, devices=[None])


def test_places_are_dealt_over_devices_first():
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "3, 1"}) == ["3", "1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == [None]
    assert (str(Slot("3", 0)), str(Slot(None, 1))) == ("GPU 3", "CPU")


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "tools" / "experiments").glob("*/*.toml")),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_the_shipped_sweeps_can_be_run(path):
    if "[[runs]]" in path.read_text(encoding="utf-8"):
        assert read_spec(path).settings
    else:
        assert load_recipe(path).run.name
