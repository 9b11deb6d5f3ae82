"""Where output goes: terminals of other encodings, readers that leave, disks that are full."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lrt.commands import prepare
from lrt.commands.frame import BROKEN_PIPE, framed
from lrt.commands.options import MOST_ROWS, at_least, path
from lrt.data import load_tokenizer

ROOT = Path(__file__).parent.parent.parent
SMALL = """
model.n_layers=2 model.width=16 model.n_heads=2 model.sequence_length=32
model.gate_channels=8 recurrence.gate_channels=8
training.steps=4 training.batch_tokens=64 training.warmup_steps=0 evaluation.tokens=64 evaluation.sample_tokens=4
parallel.compile=false metrics.plot=false metrics.every=1 checkpoint.every=100
"""
TINY = [f"--set={pair}" for pair in SMALL.split()]


def lrt(*words, encoding="utf-8", **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "lrt", *words], env=environment, stderr=subprocess.PIPE, **more)


@pytest.mark.slow
def test_a_run_prints_its_sample_to_a_stdout_of_another_encoding(tmp_path):
    """A finished run ended with exit code 2, because it could not print what it had decoded."""
    sample = "evaluation.sample_prompt=Ünï 世界"
    run = lrt("train", *TINY, f"--set=run.output={tmp_path}", "--set", sample, encoding="ascii", stdout=subprocess.PIPE)
    out, err = run.communicate()
    assert run.returncode == 0, err.decode()
    assert rb"\xdcn\xef \u4e16\u754c" in out and (tmp_path / "lrt_tiny" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_whose_reader_leaves_goes_on_to_its_end(tmp_path):
    run = lrt("train", *TINY, f"--set=run.output={tmp_path}", stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.close()
    _, err = run.communicate()
    assert run.returncode == 0 and b"Traceback" not in err and b"Broken" not in err, err.decode()
    assert (tmp_path / "lrt_tiny" / "export" / "model.safetensors").is_file()


HALF = """
import signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "numpy.linalg":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


def test_an_interrupt_among_the_first_imports_ends_the_command_and_leaves_none_in_half(tmp_path):
    """torch swallowed Ctrl-C in its import of numpy, and the run failed later, at half of a numpy."""
    (tmp_path / "sitecustomize.py").write_text(HALF)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "run.py"), "--list"]
    ended = subprocess.run(command, env=environment, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")


@pytest.mark.slow
@pytest.mark.parametrize("words", ["train --list", "convert --list", "arithmetic problems --count 3"])
def test_a_command_whose_reader_leaves_ends_without_words(words, tmp_path):
    command = lrt(*words.split(), stdout=subprocess.PIPE, cwd=tmp_path)
    assert command.stdout is not None
    command.stdout.close()
    _, err = command.communicate()
    assert command.returncode == BROKEN_PIPE and err == b""


@pytest.mark.parametrize("error, code, words", [
    (ValueError("a bad word"), 2, "error: a bad word"), (OSError(28, "No space"), 2, "error: [Errno 28] No space"),
    (ImportError("no torch"), 2, "error: no torch"), (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
])  # fmt: skip
def test_whatever_happens_in_a_command_is_one_line(error, code, words, capsys):
    def work():
        raise error

    assert framed(work, interrupted="nothing was written") == code
    assert capsys.readouterr().err == words + "\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("0", "'0': use a whole number of 1 or more"),
        ("x", "'x': use a whole number of 1 or more"),
        ("9" * 401, "'999999999999999999999999999999'...: use a whole number of 1 or more, at most 65536"),
        ("65537", "'65537': use a whole number of 1 or more, at most 65536"),
        ("", "'': use a whole number of 1 or more"),
    ],
)
def test_a_number_of_an_option_is_one_that_a_machine_can_hold(text, words):
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        at_least(1, most=MOST_ROWS)(text)
    assert str(refused.value) == words and at_least(1, most=MOST_ROWS)("65536") == 65536


def test_an_unset_variable_is_no_path():
    for text in ("", " ", "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError, match="is empty, perhaps an unset variable"):
            path(text)
    with pytest.raises(SystemExit):
        prepare.main(["inspect", "--train", ""])


def test_a_full_disk_leaves_the_tokenizer_that_was_there(tmp_path, capsys):
    """A cut tokenizer.json stood where the disk had ended."""
    data = tmp_path / "a.txt"
    data.write_text("\n\n".join(f"words {i} and more of them" for i in range(200)))
    command = ["train-tokenizer", "--train", str(data), "--output", str(tmp_path / "out"), "--vocab-size"]
    assert prepare.main([*command, "300"]) == 0
    whole = load_tokenizer(tmp_path / "out").fingerprint
    capsys.readouterr()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        assert prepare.main([*command, "400"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path / 'out' / 'tokenizer.json'}: File too large; mend that"
    )
    assert load_tokenizer(tmp_path / "out").fingerprint == whole and not list((tmp_path / "out").glob("*.tmp"))
