"""The command lines of tools/generate.py and tools/bench/decoding.py on tiny models, and what other tools refuse."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from strategies import randomized

import lrt
from lrt.commands.bench import adapted, decoders, decoding
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.data.tokenizer import load_tokenizer
from lrt.decoding.generation import complete
from lrt.decoding.sampling import Sampling
from lrt.decoding.session import stop_at
from lrt.model import build_model

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=257, sequence_length=32)
    model = randomized(build_model(config, RecurrenceConfig(separator=256)), 1, 0.2)
    place = tmp_path_factory.mktemp("tool") / "model"
    lrt.save(model, place)
    load_tokenizer("bytes").save(place)
    return place


def run(*args, given=""):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, input=given, timeout=120)


def test_generate_streams_and_compares(folder):
    out = run(
        TOOLS / "generate.py",
        folder,
        "--prompt",
        "The ",
        "--max-new-tokens",
        12,
        "--compare",
        "zero",
        "--prefill",
        "exact",
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("The ") == 2 and "memory mode zero" in out.stdout
    assert "prefill exact: 0 sweeps" in out.stderr and "tokens/s" in out.stderr
    assert "mean log-probability of the text made in mode zero: decode" in out.stderr


def test_generate_answers_line_by_line_and_takes_an_empty_prompt(folder):
    out = run(TOOLS / "generate.py", folder, "--max-new-tokens", 3, given="ab\ncd\n")
    assert out.returncode == 0, out.stderr
    assert out.stderr.count("memory mode decode") == 2 and "fixed_point(groups=1, tol=default)" in out.stderr
    out = run(TOOLS / "generate.py", folder, "--prompt", "", "--max-new-tokens", 3)
    assert out.returncode == 0 and "prefill none" in out.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "a", "--prefill", "fast"], "--prefill fast: use exact, refine:K"),
        (["--prompt", "a", "--prefill", "refine:0"], "--prefill refine:0"),
        (["--prompt", "a", "--top-k", "300"], "top_k = 300: use 1..257"),
        (["--prompt", "a", "--prefill", "fixed_point:a"], "fixed_point:GROUPS:TOL"),
        (["--prompt", "a", "--device", "abacus"], "--device abacus: not usable here"),
        (["--file", "/nowhere/at/all"], "no such file"),
        (["--file", sys.executable], "cannot be read as UTF-8 text"),
    ],
)
def test_generate_refuses_in_one_line(folder, args, message):
    out = run(TOOLS / "generate.py", folder, *args)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert message in out.stderr


def test_the_benchmark_ends_with_one_json_object():
    out = run(TOOLS / "bench" / "decoding.py", "--tiny")
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout.strip().splitlines()[-1])
    assert {row["variant"] for row in result["decode"]} == {"plain", "shared", "layerwise"}
    assert {row["batch"] for row in result["decode"]} == {1, 2}
    assert [row["method"] for row in result["prefill"]] == ["plain", "refine(1)", "fixed_point(5 sweeps)", "exact"]
    assert all(row["us_per_step"] > 0 and row["share_of_copy"] > 0 for row in result["decode"])


def test_an_adapted_decoder_takes_turns_with_transformers(tmp_path, capsys):
    """Rows of every variant, each also in the file; a model of random weights and the same from a folder."""
    folder, out = str(tmp_path / "adapted"), tmp_path / "rows.jsonl"
    lrt.save(decoders.llama("tiny-llama", ["aligned"], torch.device("cpu"), torch.float32).models["aligned"], folder)
    shared = ["--tiny", "--no-prefill", "--against", "transformers", "--out", str(out)]
    assert decoding.main([*shared, "--sizes", "tiny-llama", "--variants", "plain", "aligned", "--model", folder]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = [(row["variant"], row["batch"]) for row in result["decode"]]
    names = [["plain", "aligned", "transformers"], ["plain", "memory", "transformers"]]
    assert told == [(name, batch) for group in names for batch in (1, 2) for name in group]
    assert all(row["times_transformers"] > 0 and row["times_plain"] > 0 for row in result["decode"])
    assert [json.loads(line)["us_per_step"] for line in out.read_text().splitlines()] == [
        row["us_per_step"] for row in result["decode"]
    ]


def test_bytes_of_a_step_count_a_tied_head_once():
    """Every matrix is read once, the table of tokens only where it is the head, and the caches of all rows."""
    made = decoders.llama("tiny-llama", ["aligned"], torch.device("cpu"), torch.float32)
    plain, memory = made.models["plain"], made.models["aligned"]
    weights = 4 * sum(p.numel() for p in made.original.parameters())
    caches = 3 * 5 * 4 * 2 * 16 * 4  # rows, tokens, blocks, keys and values, numbers, bytes
    assert decoders.bytes_moved(plain, 3, 5) == weights + caches
    more = 4 * sum(p.numel() for p in memory.memory_parameters().values())
    assert decoders.bytes_moved(memory, 3, 5) == weights + caches + more + 3 * 32 * 4


def test_steps_of_an_adapted_decoder_are_timed_beside_transformers(tmp_path, capsys):
    out, rows = tmp_path / "speed.json", ["plain", "transformers", "aligned, a fifth, weights (0, 1)"]
    assert (
        adapted.main(
            [
                "--size",
                "tiny",
                "--rows",
                "2",
                "--length",
                "16",
                "--turns",
                "1",
                "--steps",
                "1",
                "--out",
                str(out),
                "--only",
                *rows,
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert (
        [row["variant"] for row in result["steps"]] == rows
        and result["failed"] == {}
        and result["steps"][0]["ratio"] == 1.0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench/decoding.py", "--tiny", "--model", "nowhere"], "--model: nowhere holds no config.json"),
        (["bench/decoding.py", "--tiny", "--no-prefill", "--no-decode"], "nothing to time"),
        (["bench/prefill_tolerance.py", "--recipe", "nowhere"], "recipe 'nowhere' not found"),
        (["bench/prefill_tolerance.py", "--model", "nowhere"], "nowhere holds no config.json"),
        (
            ["bench/prefill_tolerance.py", "--recipe", "baseline_tiny"],
            "a model without recurrence has nothing to measure",
        ),
        (["bench/prefill_tolerance.py", "--out", "file"], "--out file: a file; name a folder"),
        (["experiments/extract_smollm2.py", "."], ". already exists: choose a new folder"),
    ],
)
def test_tools_refuse_in_one_line(args, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.syspath_prepend((TOOLS / args[0]).parent)
    tool = importlib.import_module((TOOLS / args[0]).stem)
    assert tool.main(args[1:]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and out.err.count("\n") == 1 and message in out.err


def test_stop_strings_end_a_row_at_the_token_that_completes_them(folder):
    model = lrt.load(folder)
    prompt, greedy = torch.tensor([[256, 84]]), Sampling(temperature=0.0)
    free = complete(model, prompt, max_new_tokens=20, sampling=greedy).tokens[0]
    stop = stop_at(lambda ids: "".join(map(chr, ids)), [chr(free[4])])
    out = complete(model, prompt, max_new_tokens=20, sampling=greedy, stop_when=stop).tokens[0]
    assert out == free[: free.index(free[4]) + 1]
    text = stop_at(lambda ids: "".join(map(str, ids)), ["12", "99"])
    assert text([3, 1, 2, 5]) == 3 and text([3, 1]) is None
    with pytest.raises(ValueError, match="none empty"):
        stop_at(str, [""])
