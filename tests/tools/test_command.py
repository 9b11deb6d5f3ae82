"""The console command: every name runs the same function as its file, from a checkout and from a wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrt.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent.parent
SAME_NAME = ("generate", "arithmetic", "convert", "evaluate", "core", "compare", "sweep", "diagnose")
FILES = {
    "train": "recipes/run.py",
    "prepare": "tools/prepare_data.py",
    "inspect": "tools/inspect_checkpoint.py",
    **{name: f"tools/{name}.py" for name in SAME_NAME},
}


def options_of(text):
    """The options of a help text, without the name of the command and the width it was wrapped to."""
    return sorted({word.strip("[],") for word in text.split() if word.strip("[],").startswith("--")})


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_name_and_its_file_are_one_command(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    ours = capsys.readouterr().out
    assert ended.value.code == 0 and ours.startswith(f"usage: lrt {name}")
    file = subprocess.run([sys.executable, ROOT / FILES[name], "--help"], capture_output=True, text=True, cwd="/")
    assert file.returncode == 0 and options_of(file.stdout) == options_of(ours)


def test_every_command_is_listed(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS) and set(COMMANDS) == {*FILES, "bench"}
    assert main([]) == 2 and main(["trian"]) == 2
    assert "lrt trian: no such command" in capsys.readouterr().err
    assert main(["bench"]) == 2 and main(["bench", "speed"]) == 2
    assert "use one of training, adapted, decoding, prefill" in capsys.readouterr().err


def test_the_recipes_are_listed(capsys):
    assert main(["train", "--list"]) == 0
    assert {"lrt_tiny", "lrt_24l"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}


@pytest.mark.parametrize("module", ["lrt", "lrt.eval.core"])
def test_without_torch_the_command_says_what_to_install(module):
    """In one line; a program that imports lrt gets an ImportError, which it can catch."""
    bare = [sys.executable, "-S"]  # no site-packages
    run = {"capture_output": True, "text": True, "cwd": ROOT, "env": {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([*bare, "-m", module, "--help"], **run)
    assert done.returncode == 1 and done.stderr.startswith("error: lrt needs torch, ") and "pip install" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = subprocess.run([*bare, "-c", "import lrt"], **run)
    assert "ImportError: lrt needs torch, " in done.stderr


@pytest.mark.slow
def test_a_wheel_trains_in_an_empty_folder(tmp_path):
    """Built, installed apart from the checkout, and run beside a clone that is named lrt."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheel", ROOT], check=True)
    site, place = tmp_path / "site", tmp_path / "place"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *(tmp_path / "wheel").glob("*.whl")], check=True)
    assert (site / "lrt" / "py.typed").is_file()
    (place / "lrt" / "lrt").mkdir(parents=True)  # a clone in the present folder
    (place / "lrt" / "lrt" / "__init__.py").write_text("raise RuntimeError('the clone was imported')")
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    small = [
        f"--set={pair}" for pair in ("training.steps=2", "model.n_layers=2", "evaluation.tokens=512", "run.name=small")
    ]
    for command in ([sys.executable, "-m", "lrt"], [site / "bin" / "lrt"]):
        done = subprocess.run(
            [*command, "train", "--recipe", "lrt_tiny", *small],
            capture_output=True,
            text=True,
            cwd=place,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
    assert "already finished, nothing trained" in done.stdout
    assert (place / "runs" / "small" / "export" / "model.safetensors").is_file()
