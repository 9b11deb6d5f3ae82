"""tools/evaluate.py on every kind of folder, against the trainer's own scores, and what it refuses."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_decoders import make, stir
from strategies import randomized

import lrt
from lrt.config import DataConfig, ModelConfig, RecurrenceConfig, load_recipe
from lrt.conversion.opening import find_model, open_model
from lrt.data import build_loader, load_tokenizer
from lrt.data.prepare import train_tokenizer
from lrt.eval.bootstrap import DocumentScores, compare_scores
from lrt.model import build_model
from lrt.train.monitor.metrics import read_records
from lrt.train.trainer import train

TOOLS = Path(__file__).parent.parent.parent / "tools"
SMALL = [
    "model.width=16", "model.n_layers=2", "model.gate_channels=4", "recurrence.gate_channels=4",
    "model.sequence_length=32", "training.steps=2", "training.batch_tokens=128", "training.micro_batch=4",
    "evaluation.tokens=640", "evaluation.batch=4", "evaluation.sample_tokens=0", "metrics.plot=false",
    "checkpoint.every=1",
]  # fmt: skip
TEXT = "\n\n".join(f"Text {n} tells of the fox, the dog and {n * n} other things." for n in range(12))


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Run the command; returns exit code, the last line as JSON or None, and stderr."""
    tool = importlib.import_module("lrt.commands.evaluate")

    def command(*arguments):
        capsys.readouterr()
        code = tool.main(list(map(str, arguments)))
        out = capsys.readouterr()
        return code, json.loads(out.out.splitlines()[-1]) if code == 0 else None, out.err

    return command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    train(load_recipe("lrt_tiny", overrides=[*SMALL, f"run.output={place}"]))
    return place / "lrt_tiny"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def small(recurrence=True, seed=1):
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=257, sequence_length=32)
    return randomized(build_model(config, RecurrenceConfig(separator=256) if recurrence else None), seed, 0.2)


def saved(model, place, **options):
    lrt.save(model, place, **options)
    load_tokenizer("bytes").save(place)
    return place


def test_a_run_is_scored_as_its_trainer_scored_it(run, evaluate, tmp_path):
    code, found, _ = evaluate(run, "--json", tmp_path / "scores.json", "--documents", tmp_path / "documents.npz")
    record = [r for r in read_records(run / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert (
        code == 0
        and json.loads((tmp_path / "scores.json").read_text()) == found
        and found["model"] == str(run / "export")
    )
    assert list(found["bpb"]) == ["zero", "parallel", "decode"] and found["data"] == record["validation"]
    for mode, score in found["bpb"].items():
        assert score["value"] == pytest.approx(record["bpb"][mode], rel=1e-5)
        assert (
            score["ci"] == pytest.approx(record["bpb_interval"][mode], rel=1e-4)
            and score["ci"][0] < score["value"] < score["ci"][1]
        )
        assert score["passes"] == pytest.approx(record["bpb_of_groups"][mode], rel=1e-5)
        assert score["positions"] == pytest.approx(record["bpb_of_buckets"][mode], rel=1e-5)
    assert {"tokens": found["tokens"], "bytes": found["bytes"]} == record["scored"]
    assert len(found["bpb"]["decode"]["sources"]) == 2  # the two files of the demo
    ours, theirs = DocumentScores.load(tmp_path / "documents.npz"), DocumentScores.load(run / "documents.npz")
    assert abs(compare_scores(ours, theirs, mode="decode").value) < 1e-5


def test_the_newest_model_of_a_run_is_meant(run, tmp_path):
    assert (
        find_model(run) == run / "export" and find_model(run / "checkpoints") == run / "checkpoints" / "step_00000002"
    )
    again = ["training.steps=3", "checkpoint.export_at_end=false"]
    train(load_recipe("lrt_tiny", overrides=[*SMALL, f"run.output={tmp_path}"]))
    train(load_recipe("lrt_tiny", overrides=[*SMALL, *again, f"run.output={tmp_path}"]))
    newest = tmp_path / "lrt_tiny" / "checkpoints" / "step_00000003"
    opened = open_model(tmp_path / "lrt_tiny")
    assert opened.folder == newest and opened.kind == "dcp" and opened.recipe.training.steps == 3
    older = open_model(tmp_path / "lrt_tiny" / "export")
    assert (older.kind, older.recipe.training.steps) == ("lrt", 3)  # the recipe beside it is the run's present one
    for name, value in open_model(newest.parent / "step_00000002").model.state_dict().items():
        assert torch.equal(value, older.model.state_dict()[name])


@pytest.mark.parametrize("tool", ["generate", "convert"])
def test_other_tools_find_the_same_model(run, tool, tmp_path):
    arguments = {
        "generate": [run, "--prompt", "a", "--max-new-tokens", "2"],
        "convert": ["--input", run, "--to", "hf", "--output", tmp_path / "out", "--no-verify"],
    }
    out = subprocess.run(
        [sys.executable, TOOLS / f"{tool}.py", *arguments[tool]], capture_output=True, text=True, timeout=200
    )
    assert out.returncode == 0, out.stderr
    if tool == "convert":
        for name, value in lrt.load(run / "export").state_dict().items():
            assert torch.equal(value, lrt.load(tmp_path / "out").state_dict()[name])


def test_scores_of_text_are_those_of_the_model_on_its_rows(evaluate, text, tmp_path):
    model = small()
    place = saved(model, tmp_path / "model")
    documents = TEXT.split("\n\n")
    packed = sum(1 + len(document) for document in documents)
    _, found, _ = evaluate(place, "--data", text, "--sequence-length", packed - 1, "--dtype", "float64")
    _, again, _ = evaluate(place, "--data", text, "--sequence-length", packed - 1, "--dtype", "float64", "--rows", 3)
    assert found["bytes"] == packed - len(documents) and found["documents"] == len(documents)
    loader = build_loader(
        DataConfig(validation=str(text)),
        tokenizer=load_tokenizer("bytes"),
        sequence_length=packed - 1,
        rows=1,
        split="validation",
    )
    (batch,) = loader
    for mode, schedule in {
        "zero": lrt.baseline(),
        "parallel": model.train_schedule,
        "decode": lrt.sequential(),
    }.items():
        nats = model.double().score(batch.input_ids, batch.targets, schedule)[-1][batch.targets != 256].sum()
        assert found["bpb"][mode]["value"] == pytest.approx(float(nats) / found["bytes"] / math.log(2), rel=1e-9)
        assert again["bpb"][mode]["value"] == pytest.approx(found["bpb"][mode]["value"], rel=1e-9)


def test_several_sources_and_a_faster_decode_are_named(evaluate, text, tmp_path):
    place = saved(small(), tmp_path / "model")
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(["Something else entirely."] * 5))
    code, found, err = evaluate(place, "--data", text, other, "--memory", "decode", "--decode", "fixed_point:2:1e-9")
    assert code == 0 and list(found["bpb"]) == ["decode"]
    score = found["bpb"]["decode"]
    assert list(score["sources"]) == [str(text), str(other)]
    assert (
        score["how"].startswith("decode (fixed_point(groups=2, tol=1e-09), 0 of ")
        and "0.00000 bits per byte against exact" in score["how"]
    )
    _, exact, _ = evaluate(place, "--data", text, other, "--memory", "decode")
    assert exact["bpb"]["decode"]["value"] == pytest.approx(score["value"], rel=1e-5)
    assert exact["bpb"]["decode"]["how"] == "true recurrence, exact"
    _, alone, _ = evaluate(place, "--data", other, "--memory", "decode")
    assert score["sources"][str(other)] == pytest.approx(alone["bpb"]["decode"]["value"], rel=1e-5)


def test_a_model_without_memory_has_one_score(evaluate, text, tmp_path):
    place = saved(small(recurrence=False), tmp_path / "model")
    code, found, _ = evaluate(place, "--data", text)
    assert code == 0 and len({score["value"] for score in found["bpb"].values()}) == 1
    assert all("has no memory" in score["how"] for score in found["bpb"].values())
    code, zero, _ = evaluate(place, "--data", text, "--memory", "zero")
    assert code == 0 and zero["bpb"]["zero"]["value"] == found["bpb"]["decode"]["value"]


def test_plain_decoders_adapted_ones_and_the_memory_alone(evaluate, text, tmp_path):
    decoder = make("llama", dtype=torch.float32, vocab_size=257)
    decoder.save_pretrained(tmp_path / "plain")
    load_tokenizer("bytes").save(tmp_path / "plain")
    _, plain, _ = evaluate(tmp_path / "plain", "--data", text, "--sequence-length", 40)
    model = lrt.adapt(decoder)
    saved(model, tmp_path / "fresh")
    _, fresh, _ = evaluate(tmp_path / "fresh", "--data", text, "--sequence-length", 40)
    # identity at the start
    assert fresh["bpb"]["decode"]["value"] == pytest.approx(plain["bpb"]["decode"]["value"], rel=1e-6)
    saved(stir(model), tmp_path / "whole")
    lrt.save(model, tmp_path / "memory", adapter_only=True)
    _, whole, _ = evaluate(tmp_path / "whole", "--data", text, "--sequence-length", 40)
    _, memory, _ = evaluate(tmp_path / "memory", "--base", tmp_path / "plain", "--data", text, "--sequence-length", 40)
    assert {mode: score["value"] for mode, score in memory["bpb"].items()} == {
        mode: score["value"] for mode, score in whole["bpb"].items()
    }
    assert abs(whole["bpb"]["decode"]["value"] - plain["bpb"]["decode"]["value"]) > 1e-3
    code, _, err = evaluate(tmp_path / "memory", "--data", text)
    assert code == 2 and "holds the memory alone: name the decoder that it was trained on with --base" in err
    code, _, err = evaluate(tmp_path / "whole", "--base", tmp_path / "plain", "--data", text)
    assert code == 2 and "holds a whole model: leave --base out" in err


@pytest.mark.dist
def test_processes_share_the_rows(evaluate, text, tmp_path):
    place = saved(small(), tmp_path / "model")
    _, alone, _ = evaluate(place, "--data", text, "--rows", 2)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        TOOLS / "evaluate.py",
    ]
    out = subprocess.run(
        [*map(str, command), place, "--data", text, "--rows", "2"], capture_output=True, text=True, timeout=200
    )
    assert out.returncode == 0, out.stderr
    together = json.loads(out.stdout.splitlines()[-1])
    assert (together["tokens"], together["documents"]) == (alone["tokens"], alone["documents"])
    for mode, score in together["bpb"].items():
        assert score["value"] == pytest.approx(alone["bpb"][mode]["value"], rel=1e-6) and score["ci"] == pytest.approx(
            alone["bpb"][mode]["ci"]
        )


# Started by torchrun: the memory that is free on each GPU lets the second process hold one row more.
UNEQUAL = """
import os, sys
from lrt.commands import evaluate
from lrt.eval import folders
folders.rows_that_fit = lambda model, length: 3 + int(os.environ["RANK"])
sys.exit(evaluate.main(sys.argv[1:]))
"""


@pytest.mark.dist
def test_processes_agree_on_rows_and_count_those_of_all(evaluate, text, tmp_path):
    place = saved(small(), tmp_path / "model")
    given = [place, "--data", text, "--memory", "decode", "--decode", "refine:1"]
    _, alone, _ = evaluate(*given, "--rows", 1)
    (tmp_path / "unequal.py").write_text(UNEQUAL)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "unequal.py",
    ]
    surroundings = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    out = subprocess.run([*map(str, [*command, *given])], capture_output=True, text=True, timeout=200, env=surroundings)
    assert out.returncode == 0, out.stderr
    together = json.loads(out.stdout.splitlines()[-1])
    assert (together["tokens"], together["bytes"], together["documents"]) == (
        alone["tokens"],
        alone["bytes"],
        alone["documents"],
    )
    one, two = (found["bpb"]["decode"] for found in (alone, together))
    assert two["value"] == pytest.approx(one["value"], rel=1e-6)
    rows = -(-(sum(1 + len(document) for document in TEXT.split("\n\n")) - 1) // 32)
    assert rows % 6  # so the last batches are filled
    for how in (one["how"], two["how"]):
        assert how.startswith(f"decode (refine(1), {rows} of {rows} rows not converged)")


# ------------------------------------------------------------------ bad input


def broken(place):
    model = small()
    with torch.no_grad():
        model.blocks[1].block.mlp_out.weight[3, 5] = math.nan
    return saved(model, place)


@pytest.mark.parametrize(
    "folder, options, message",
    [
        ("nowhere", [], "nowhere: there is nothing; name a folder with a model, or a training run"),
        ("empty", [], "empty holds no model: name a folder with config.json"),
        ("", [], "the folder's name is empty"),
        ("model", [], "lies in no training run, so it has no validation rows of its own: name text with --data"),
        ("model", ["--data", "nowhere.txt"], "--data 'nowhere.txt': no such file"),
        ("model", ["--data", "empty.txt"], "--data 'empty.txt' is an empty corpus"),
        ("model", ["--data", "short.txt"], "--sequence-length 32, but --data has only 6 tokens"),
        (
            "model",
            ["--data", "text.txt", "--tokenizer", "tokens"],
            "has 300 ids, but the model in model knows 257: name the tokenizer",
        ),
        ("model", ["--data", "text.txt", "--device", "abacus"], "--device abacus"),
        ("model", ["--data", "text.txt", "--json", "no/such/folder.json"], "cannot be written: there is no folder"),
        ("model", ["--data", "text.txt", "--decode", "guess"], "--decode guess: use exact, refine:K"),
        (
            "model",
            ["--data", "text.txt", "--memory", "zero", "--decode", "fixed_point"],
            "has no effect with --memory zero",
        ),
        (
            "model",
            ["--data", "text.txt", "--memory", "parallel", "--decode", "refine:1"],
            "has no effect with --memory parallel",
        ),
        ("plain", ["--data", "text.txt", "--memory", "decode"], "--memory decode: the model in plain has no memory"),
        ("broken", ["--data", "text.txt"], "holds NaN or infinite weights (1 of "),
        ("bare", ["--data", "text.txt"], "bare holds no tokenizer.json: name one with --tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_no_score(folder, options, message, bad, evaluate, monkeypatch):
    monkeypatch.chdir(bad)
    code, found, err = evaluate(folder, *options)
    assert (code, found) == (2, None) and message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    (place / "empty").mkdir()
    for name, content in {"text.txt": TEXT, "empty.txt": "\n\n \n", "short.txt": "a fox"}.items():
        (place / name).write_text(content)
    saved(small(), place / "model")
    saved(small(recurrence=False), place / "plain")
    lrt.save(small(), place / "bare")
    broken(place / "broken")
    train_tokenizer(DataConfig(), vocab_size=300, output=place / "tokens", limit_bytes=50_000)
    return place
