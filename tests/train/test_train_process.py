"""A run as a process: signals, kills at any instant, the command line."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, TINY, files_equal, tiny, train_records

from lrt.train.checkpoint import latest, step_of
from lrt.train.trainer import train


def command(folder, *sets):
    recipe = folder / "recipe_in.toml"
    recipe.write_text(TINY)
    pairs = [f"run.output={folder}", "run.name=tiny", *sets]
    return [
        sys.executable,
        str(ROOT / "recipes" / "run.py"),
        "--recipe",
        str(recipe),
        *(x for pair in pairs for x in ("--set", pair)),
    ]


def run_py(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "run.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


def test_signals_save_and_exit_0_and_the_same_command_goes_on(tmp_path):
    line = command(tmp_path, "training.steps=100000", "checkpoint.every=0", "evaluation.sample_tokens=0")
    reached = 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        rows = 0
        while rows < 3:  # past the header and into the steps
            text = process.stdout.readline()
            assert text, process.stderr.read()
            rows += bool(re.match(r" +\d+ ", text))
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert f"stopped by {signal.Signals(number).name} at step" in output and "the same command goes on" in output
        step = step_of(latest(tmp_path / "tiny" / "checkpoints"))
        assert step > reached
        reached = step
    assert [r["step"] for r in train_records(tmp_path / "tiny")] == list(range(1, reached + 1))


def test_a_signal_to_the_whole_process_group_saves_and_exits_0(tmp_path):
    """As schedulers send it: the loader's workers hear it too, and must go on until the trainer has stopped."""
    line = command(
        tmp_path, "training.steps=100000", "checkpoint.every=0", "evaluation.sample_tokens=0", "data.workers=2"
    )
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    rows = 0
    while rows < 3:
        text = process.stdout.readline()
        assert text, process.stderr.read()
        rows += bool(re.match(r" +\d+ ", text))
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM at step" in output


@pytest.mark.slow  # compilers take minutes where they share two cores
def test_a_signal_to_the_whole_group_while_compiling_saves_and_exits_0(tmp_path):
    """The C++ compiler is in the group too: it must not end, and the first step with it."""
    small = ("recurrence=false", "schedule.kind=baseline", "model.n_layers=1", "model.value_embeddings=none")
    line = command(tmp_path, "training.steps=100000", "checkpoint.every=0", "parallel.compile=true", *small)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(line, **pipes, env=environment)
    until = time.monotonic() + 300
    while not any("cc1plus" in name for name in commands_of_group(process.pid)):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=550)
    assert process.returncode == 0, errors
    # the step after hears it
    assert re.search(r"stopped by SIGTERM at step [12] of 100000", output) and "Traceback" not in errors
    assert step_of(latest(tmp_path / "tiny" / "checkpoints")) in (1, 2)


def commands_of_group(group):
    """Names of all processes of a group."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().rpartition(")")
            if int(rest.split()[2]) == group:
                yield name
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_the_compilers_workers_do_not_hear_the_signals():
    code = """
import os, signal, time
from lrt.train.monitor.faults import StopSignal, start_compile_workers
from torch._inductor.async_compile import AsyncCompile
with StopSignal() as signals:
    with signals.unheard():
        start_compile_workers()
        os.kill(os.getpid(), signal.SIGUSR1)
    until = time.monotonic() + 10  # another thread may take it, and tells this one
    while signals.received is None and time.monotonic() < until:
        time.sleep(0.01)
    assert signals.received == "SIGUSR1"  # late, not lost
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.5)
    assert signals.received == "SIGUSR1"  # the first one stays; the second ended nothing
    print("alive" if AsyncCompile.process_pool().submit(os.getpid).result(timeout=60) != os.getpid() else "here")
"""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    options = {"start_new_session": True, "timeout": 120, "cwd": ROOT, "env": environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.stdout.strip() == "alive", done.stderr


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants_the_end_is_the_same_bit_for_bit(tmp_path, kills):
    sets = {
        "training.steps": 15 * kills,
        "checkpoint.every": 3,
        "checkpoint.keep_last": 1,
        "evaluation.sample_tokens": 0,
    }
    reference = train(tiny(tmp_path / "whole", **sets))
    line = command(tmp_path, *(f"{k}={v}" for k, v in sets.items()))
    drawn, killed = random.Random(kills), 0
    while killed < kills:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not re.match(r" +\d+ ", process.stdout.readline() or pytest.fail("the run ended by itself")):
            pass
        time.sleep(drawn.uniform(0.0, 0.4))
        process.kill()
        process.communicate()
        killed += 1
    finished = subprocess.run(line, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    newest = latest(tmp_path / "tiny" / "checkpoints")
    files_equal(newest, latest(reference.folder / "checkpoints"))
    assert train_records(tmp_path / "tiny") == train_records(reference.folder)


def test_the_command_line_says_it_in_one_line_with_exit_code_2(tmp_path):
    (tmp_path / "r.toml").write_text(TINY)
    result = run_py("--recipe", "r.toml", "--set", "training.batch_tokens=100", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")
    (tmp_path / "file").touch()
    result = run_py("--recipe", "r.toml", "--set", "run.output=file", cwd=tmp_path)
    assert (
        result.returncode == 2
        and "choose a folder that can be written" in result.stderr
        and "Traceback" not in result.stderr
    )
    listed = run_py("--list", cwd=tmp_path)
    assert listed.returncode == 0 and "lrt_tiny" in listed.stdout and "lrt_24l" in listed.stdout


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from runs import tiny, train_records
from lrt.train import report, trainer
from lrt.train.monitor.faults import NotSavedError
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (1, unlimited[1]))  # no file takes more than a byte
def room(): resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
step_of, evaluate = trainer.train_step, report.evaluate_run
calls = []
def step(*args, **settings):
    calls.append(1)
    if len(calls) in when: when[len(calls)]()
    return step_of(*args, **settings)
trainer.train_step = step
recipe = tiny({folder!r}, **{{"training.steps": 10, "checkpoint.every": 2}})
when = {{3: full, 6: room, 10: full}}
try:
    trainer.train(recipe)
except NotSavedError as error:
    print("SAID", error)
room()
report.evaluate_run = lambda *args: (evaluate(*args), full())[0]
try:
    trainer.train(recipe)
except NotSavedError as error:
    print("SAID", error)
room()
report.evaluate_run = evaluate
assert trainer.train(recipe).bpb
folder = Path({folder!r}) / "tiny"
assert [r["step"] for r in train_records(folder)] == list(range(1, 11))
assert (folder / "export" / "config.json").is_file() and not list(folder.glob(".*"))
print("STEPS", len(calls))
"""


def test_a_full_disk_ends_no_run_before_its_end_and_loses_nothing(tmp_path):
    code = FULL_DISK.format(tests=str(ROOT / "tests" / "lib"), root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "checkpoint of step 4 was not written" in said and "its records wait in memory until there is room" in said
    assert re.search(
        r"SAID the checkpoint at the end \(step 10\) could not be written: make room and give the same command", said
    )
    assert re.search(
        r"SAID .*export could not be written \(.*\): make room .*exports from the checkpoint of step 10", said
    )
    assert "STEPS 12" in said  # the second run did the two after the checkpoint of step 8 again
