"""run.json: where a run's numbers come from, one attempt for every start."""

import json
import subprocess

import pytest
import torch
from runs import tiny

import lrt
from lrt.train.monitor.faults import StopSignal
from lrt.train.provenance import PACKAGE, RunFile, commit, provenance
from lrt.train.trainer import train


def test_every_start_of_a_run_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignal, "received", "SIGTERM")
    train(tiny(tmp_path))
    monkeypatch.setattr(StopSignal, "received", None)
    train(tiny(tmp_path))
    content = json.loads((tmp_path / "tiny" / "run.json").read_text())
    first, second = content["attempts"]
    assert (first["state"], first["from_step"], first["step"]) == ("stopped: SIGTERM", 0, 1)
    assert (second["state"], second["from_step"], second["step"]) == ("done", 1, 8)
    assert content["steps"] == 8 and set(content["data"]) == {"train", "validation", "tokenizer"}
    for attempt in content["attempts"]:
        assert attempt["versions"]["torch"] == torch.__version__ and attempt["versions"]["lrt"] == lrt.__version__
        assert (
            attempt["world_size"] == 1
            and attempt["host"]
            and attempt["device"]
            and attempt["command"]
            and attempt["seconds"] > 0
        )


def test_data_are_told_apart(tmp_path):
    found = []
    for name, text in (("a", "one two three " * 300), ("b", "one two three " * 300), ("c", "one two four  " * 300)):
        (tmp_path / name).mkdir()
        sets = {}
        for split in ("train", "validation"):
            (tmp_path / name / f"{split}.txt").write_text("\n\n".join([split + text] * 4))
            sets[f"data.{split}"] = str(tmp_path / name / f"{split}.txt")
        train(tiny(tmp_path / name, **sets))
        found.append(json.loads((tmp_path / name / "tiny" / "run.json").read_text())["data"])
    assert (
        found[0] == found[1]
        and found[0]["train"] != found[2]["train"]
        and found[0]["validation"] != found[2]["validation"]
    )


def test_a_failure_is_told(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("lrt.train.trainer.train_step", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(tiny(tmp_path))
    (attempt,) = json.loads((tmp_path / "tiny" / "run.json").read_text())["attempts"]
    assert (attempt["state"], attempt["step"]) == ("failed: out of luck", 0)


def test_a_damaged_file_is_begun_anew(tmp_path):
    (tmp_path / "run.json").write_text('{"attempts": [{"st')
    RunFile(tmp_path / "run.json", steps=3, start=0, data={}, about={"host": "here"}).end("done", step=3)
    (attempt,) = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert (attempt["host"], attempt["state"], attempt["step"]) == ("here", "done", 3)


def test_the_commit_is_that_of_the_code_alone(tmp_path):
    """A package that is installed inside another project's repository does not have its commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("")
    assert commit(tmp_path / "lib") == {"commit": None, "changed": None}
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit(tmp_path / "lib") == {"commit": head, "changed": False}
    (tmp_path / "lib" / "__init__.py").write_text("1")
    assert commit(tmp_path / "lib") == {"commit": head, "changed": True}
    assert provenance(torch.device("cpu"), world_size=2)["commit"] == commit(PACKAGE)["commit"]
