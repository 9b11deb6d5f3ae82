"""What a run says before its first step."""

from __future__ import annotations

import pytest
import torch
from corpora import BYTES
from runs import tiny

from lrt.config import parse_recipe
from lrt.train.monitor.notes import opening_notes
from lrt.train.run import run_folder
from lrt.train.trainer import train

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def notes(*sets, device=CPU, steps=5) -> str:
    return "\n".join(opening_notes(parse_recipe("", overrides=sets), BYTES, device, steps=steps))


def test_compilation_and_bfloat16_on_a_cpu_are_announced():
    """The first step of a recipe of one's own took 256 s without a word."""
    assert "parallel.compile = true on a CPU: the first step compiles" in notes()
    assert "parallel.param_dtype = 'bfloat16' on a CPU" in notes("parallel.compile=false")
    assert "compile" not in notes("parallel.compile=false", "parallel.param_dtype=float32")
    assert "compile" not in notes(device=GPU) and "param_dtype" not in notes(device=GPU)
    assert "compile" not in notes(steps=0)


@pytest.mark.parametrize(
    "sets, environment, device, words",
    [
        ((), {}, CPU, "as torch chooses); parallel.host_threads sets another number"),
        ((), {"OMP_NUM_THREADS": "1"}, CPU, r"with 1 thread a process on the host (OMP_NUM_THREADS = 1); parallel"),
        ((), {"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}, CPU, "(OMP_NUM_THREADS = 1, as torchrun sets it)"),
        (("parallel.host_threads=3",), {}, CPU, "with 3 threads a process on the host (parallel.host_threads)"),
        (
            (),
            {},
            GPU,
            "computes on cuda:0 with 1 thread a process on the host (because a process with a GPU only copies",
        ),
    ],
)
def test_threads_and_why(sets, environment, device, words, monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words in notes(*sets, device=device)


def test_a_separator_that_is_not_set_is_named():
    said = "recurrence.separator is not set, so memory goes on from one document into the next"
    assert said in notes() and "set recurrence.separator = 256" in notes()
    assert said not in notes("recurrence.separator=256") and said not in notes(
        "recurrence=false", "schedule.kind=baseline"
    )


def test_a_home_folder_as_output(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder(parse_recipe("", overrides=["run.output=~/runs", "run.name=a"])) == tmp_path / "runs" / "a"
    with pytest.raises(ValueError, match="run.output = '~nobody_at_all': there is no user"):
        run_folder(parse_recipe("", overrides=["run.output=~nobody_at_all"]))


def test_a_run_of_no_steps_says_what_it_does(tmp_path, capsys):
    train(tiny(tmp_path, **{"training.steps": 0, "evaluation.sample_tokens": 0}))
    told = capsys.readouterr().out
    assert (
        "training.steps = 0: nothing is trained; the initial model is evaluated and exported. tools/evaluate.py" in told
    )
    assert "nothing is trained; runs/a is evaluated" in notes("training.steps=0", "training.init_from=runs/a", steps=0)
    assert "nothing is trained" not in notes()
