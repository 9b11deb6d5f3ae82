"""Runs of two ranks that lose one: killed and restarted by torchrun, hung, and resumed on another number of ranks."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import gpus, launch
from runs import ROOT, TINY

from lrt.config import parse_recipe
from lrt.train.checkpoint import latest, read_rest, step_of
from lrt.train.distributed.world import open_world, register_graph
from lrt.train.monitor.faults import HangError
from lrt.train.monitor.metrics import read_records

pytestmark = pytest.mark.dist


def wait_for_step(process, step):
    while True:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        if re.match(rf" +{step} ", line):
            return


def workers(process):
    """Process ids of the ranks, in order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(item[5:]) for item in environment if item.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = int(child)
    return [found[rank] for rank in sorted(found)]


ON_GPUS = ("parallel.compile=true", "parallel.param_dtype=bfloat16", "model.width=64")  # with CUDA graphs, by default


@pytest.mark.parametrize(
    ("gpu", "ranks"),
    [
        pytest.param(False, 2, id="cpu"),
        pytest.param(True, 2, id="gpu", marks=gpus(2)),
        pytest.param(False, 4, id="four on a cpu", marks=pytest.mark.slow),
        pytest.param(True, 4, id="four gpus", marks=gpus(4)),
    ],
)
def test_a_killed_rank_restarts_and_another_number_of_ranks_goes_on(tmp_path, gpu, ranks):
    sets, options = ("checkpoint.every=4", *(ON_GPUS if gpu else ())), {"gpu": gpu}
    first = launch(tmp_path, "training.steps=24", *sets, options=("--max-restarts=1",), ranks=ranks, **options)
    wait_for_step(first, 9)
    os.kill(workers(first)[-1], signal.SIGKILL)
    output, errors = first.communicate(timeout=300 if gpu else 120)
    assert first.returncode == 0, errors
    assert re.search(r"resumed from .*step_\d+", output)
    folder = tmp_path / "tiny"
    assert [r["step"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "train"] == list(range(1, 25))
    assert step_of(latest(folder / "checkpoints")) == 24

    second = launch(tmp_path, "training.steps=30", *sets, ranks=1, **options)
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert "resumed from" in output and [
        r.meta["world_size"] for r in map(read_rest, [latest(folder / "checkpoints")])
    ] == [1]
    assert [r["step"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "train"] == list(range(1, 31))


def alive(process):
    """A process that runs: one whose parent is gone may wait as a zombie for somebody to ask how it ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_ranks_whose_torchrun_has_ended_save_and_end(tmp_path):
    """As schedulers do with SIGUSR1, which torchrun does not know: it ends at once, and nobody would watch its
    ranks."""
    first = launch(tmp_path, "training.steps=100000", "checkpoint.every=0")
    wait_for_step(first, 5)
    ranks = workers(first)
    first.send_signal(signal.SIGUSR1)
    output, _ = first.communicate(timeout=60)  # until the ranks, too, have let go of the pipe
    assert first.returncode == -signal.SIGUSR1 and not any(map(alive, ranks))
    assert re.search(r"stopped by (the end of torchrun|a signal on another rank) at step \d+ of 100000", output)
    step = step_of(latest(tmp_path / "tiny" / "checkpoints"))
    second = launch(tmp_path, "training.steps=100000", "checkpoint.every=0")
    wait_for_step(second, step + 2)
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=120)
    assert step_of(latest(tmp_path / "tiny" / "checkpoints")) >= step + 2


def test_ranks_with_different_settings_are_refused_on_all(tmp_path):
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT / "recipes")!r}, {str(ROOT)!r}]
import run
settings = ["--set", "run.output={tmp_path}", "--set", "run.seed=" + os.environ["RANK"]]
sys.argv = ["run.py", "--recipe", {str(tmp_path / "r.toml")!r}, *settings]
sys.exit(run.main())
"""
    (tmp_path / "r.toml").write_text(TINY)
    (tmp_path / "ranks.py").write_text(code)
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(tmp_path / "ranks.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    words = (
        "error: the ranks have different settings: run.seed = 0 on rank 0, 1 on rank 1: start all with the same recipe"
    )
    assert done.returncode != 0 and done.stderr.count(words) == 2, done.stderr
    assert not (tmp_path / "lrt").exists()


def test_a_second_run_in_the_same_folder_is_refused_on_every_rank(tmp_path):
    first = launch(tmp_path, "training.steps=100000", "checkpoint.every=0")
    wait_for_step(first, 3)
    second = launch(tmp_path, "training.steps=100000", "checkpoint.every=0")
    _, errors = second.communicate(timeout=120)
    assert second.returncode != 0 and errors.count("is in use by another process (process ") == 2, errors
    assert "choose another run.name" in errors
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert re.search(r"stopped by .* at step \d+ of 100000", output)
    steps = [r["step"] for r in read_records(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and step_of(latest(tmp_path / "tiny" / "checkpoints")) == len(steps)


def test_ctrl_c_in_a_terminal_saves_though_torchrun_hands_it_on_once_more(tmp_path):
    """Every rank hears it twice: from the terminal, and from torchrun."""
    process = launch(tmp_path, "training.steps=100000", "checkpoint.every=0", own_group=True)
    wait_for_step(process, 3)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert re.search(r"stopped by SIGINT at step \d+ of 100000; the same command goes on", output), errors
    assert "KeyboardInterrupt" not in errors and step_of(latest(tmp_path / "tiny" / "checkpoints")) >= 3


def test_a_killed_rank_is_called_lost_and_not_silent_for_minutes(tmp_path):
    process = launch(tmp_path, "training.steps=100000")
    wait_for_step(process, 3)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "no progress for about" not in errors
    assert re.search(
        r"stopped: step \d+: another rank has ended or was killed, \S+ seconds after the last progress; restart", errors
    ), errors


@pytest.mark.slow
def test_checkpointing_and_compilation_and_fsdp_end_together_on_two_processes(tmp_path):
    sets = ("parallel.compile=true", "parallel.activation_checkpointing=selective", "parallel.reshard=after_forward")
    process = launch(tmp_path, "training.steps=4", "checkpoint.every=2", *sets)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert [r["step"] for r in read_records(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "train"] == [
        1,
        2,
        3,
        4,
    ]
    assert (tmp_path / "tiny" / "export" / "config.json").is_file()


def test_a_hung_rank_is_bounded_by_the_timeout_and_the_step_is_named(tmp_path):
    process = launch(tmp_path, "training.steps=100000", "parallel.timeout_minutes=0.1")
    wait_for_step(process, 5)
    stopped = workers(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith("stopped: step"):  # how the waiting rank ends
            break
    os.kill(stopped, signal.SIGKILL)
    _, rest = process.communicate(timeout=60)
    assert process.returncode != 0
    named = r"step \d+: no progress for about 0.1 minutes \(parallel.timeout_minutes\): a rank has died or hangs"
    assert re.search(f"rank 0: {named}", seen), seen + rest  # said before the process group gives up
    assert re.search(f"stopped: {named}", seen), seen + rest


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, HangError])
def test_graphs_are_let_go_of_before_the_process_group_is_left(monkeypatch, error):
    """NCCL would wait for them for ever: a run on GPUs would end, and its processes would not.
    After a hang nothing is left in order."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # one process is sharded on a CPU alone
    seen = []

    class Graph:
        def reset(self):
            seen.append(torch.distributed.is_initialized())

    graph = Graph()
    expected = contextlib.nullcontext() if error is None else pytest.raises(error)
    with expected, open_world(parse_recipe("", overrides=["parallel.param_dtype=bfloat16"])) as world:
        assert world.sharded
        register_graph(graph)
        if error is not None:
            raise error
    if error is HangError:
        assert seen == [] and torch.distributed.is_initialized()
        torch.distributed.destroy_process_group()
    else:
        assert seen == [True] and not torch.distributed.is_initialized()
