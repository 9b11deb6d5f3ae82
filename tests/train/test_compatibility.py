"""What earlier versions wrote is read: a checkpoint resumes, and an export loads.

tests/golden/run_0_1 was written before files moved into folders: a run of two blocks, its checkpoint of step 2, the
losses of its steps 3 and 4, its export of step 4 and that export's logits.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

import lrt
from lrt.config import load_recipe
from lrt.train.monitor.metrics import read_records
from lrt.train.trainer import train

GOLDEN = Path(__file__).parent.parent / "golden" / "run_0_1"


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "before", tmp_path / "runs" / "before")
    train(load_recipe(tmp_path / "runs" / "before" / "recipe.toml"))
    told = json.loads((GOLDEN / "losses.json").read_text())
    trained = {
        r["step"]: r["groups"]
        for r in read_records(tmp_path / "runs" / "before" / "metrics.jsonl")
        if r["kind"] == "train"
    }
    assert sorted(trained) == [1, 2, 3, 4]
    for step in (3, 4):  # another processor may add in another order
        torch.testing.assert_close(trained[step], told[str(step)], rtol=1e-5, atol=0)


def test_an_export_of_an_earlier_version_loads():
    model, expected = lrt.load(GOLDEN / "before" / "export"), load_file(GOLDEN / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"])
