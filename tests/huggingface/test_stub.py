"""Folders of ours opened by transformers alone, and what the repository tells people to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_decoders import make, stir

import lrt
from lrt.config import parse_recipe
from lrt.conversion import convert

ROOT = next(place for place in Path(__file__).parents if (place / "pyproject.toml").is_file())
TINY = "[model]\nn_layers = 2\nwidth = 32\nn_heads = 2\nn_kv_heads = 1\nvocab_size = 300\nsequence_length = 16\n"
PROGRAM = """
import sys
folder, *without = sys.argv[1:]
if without:
    sys.modules["lrt"] = None  # as where it is not installed
import torch
from transformers import AutoModelForCausalLM
try:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
with torch.no_grad():
    torch.save(model(torch.arange(9)[None]).logits, folder + "/logits.pt")
"""


def run(folder: Path, *more: str) -> Any:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *more],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize("kind", ["adapted", "native", "converted"])
def test_a_folder_opens_without_import_lrt(kind: str, tmp_path: Path) -> None:
    model = stir(lrt.adapt(make("llama", dtype=torch.float32))) if kind == "adapted" else lrt.build(parse_recipe(TINY))
    lrt.save(model, tmp_path / "saved")
    folder = tmp_path / "saved"
    if kind == "converted":
        folder = convert(folder, tmp_path / "folder", source="lrt", target="hf", report=lambda _: None).output
    done = run(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        assert torch.equal(
            torch.load(folder / "logits.pt", weights_only=True), model.eval()(torch.arange(9)[None]).logits
        )


def test_the_error_without_lrt_names_it(tmp_path: Path) -> None:
    lrt.save(lrt.build(parse_recipe(TINY)), tmp_path / "folder")
    done = run(tmp_path / "folder", "without")
    assert done.returncode == 1 and "needs the library lrt, which is not installed here" in done.stderr
    assert 'get a checkout of its git repository and run  pip install -e ".[hf]"' in done.stderr
    assert not re.search(r"pip install [\"'`]?lrt", done.stderr)


def test_a_folder_of_memory_alone_names_no_code(tmp_path: Path) -> None:
    """It cannot be opened without its decoder, so it does not say that it could."""
    lrt.save(lrt.adapt(make("llama", dtype=torch.float32)), tmp_path / "memory", adapter_only=True)
    assert "auto_map" not in json.loads((tmp_path / "memory" / "config.json").read_text()) and not list(
        (tmp_path / "memory").glob("*.py")
    )


def test_nobody_is_told_to_install_a_name_that_is_not_ours() -> None:
    """Whoever registers "lrt" on the package index would run code at our users."""
    kinds = ("*.py", "*.md", "*.toml", "*.yml", "*.yaml", "*.ipynb", "*.sh")
    files = [
        file for kind in kinds for file in ROOT.rglob(kind) if not {".git", ".venv"} & set(file.relative_to(ROOT).parts)
    ]
    assert len(files) > 100
    told = re.compile(
        r"(pip3? install|uv add|uv pip install|uv tool install|pipx install)[^\n`]*?(?<!of)[ "
        r"\"'`](lrt)(\\?\[|[\"'`\s=<>~]|$)"
    )
    ours = Path(__file__).resolve()
    found = [
        f"{file}: {match[0]}"
        for file in files
        if file.resolve() != ours
        for match in told.finditer(file.read_text(encoding="utf-8"))
    ]
    assert not found, found
