"""A fuzzer of folders whose JSON has any shape: each opens, or ends with one line that is no traceback, in seconds."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import save_step, small_model
from fuzzing import shown, tries
from hf_decoders import make

import lrt
from lrt.config import dump_recipe, parse_recipe
from lrt.conversion.inspection import describe, inspect_checkpoint
from lrt.conversion.opening import open_model, open_tokenizer
from lrt.data import load_tokenizer

VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 1.5, float("nan"), float("inf"), 10**7, 10**9, 10**30, 10**400, "", "x", "x" * 5000,
    "../../x", "/etc/passwd", "\ud800", "a\nb",
    "float64", "int4", "lrt", "llama", "evil", [], [1], ["x"], [[]], {}, {"a": 1}, {"content": 3}, {"": {}},
)  # fmt: skip
WHOLE = (
    b"", b"{}", b"[]", b"null", b"3", b'"x"',
    b"{" * 9999, b"[" * 99999 + b"]" * 99999, b'{"a": ' * 5000 + b"1" + b"}" * 5000, b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}", b'{"a": ' + b"9" * 5000 + b"}", b"NaN", b"{'a': 1}", b'{"weight_map": {}}',
    b'{"weight_map": {"x": "/etc/passwd"}}', b'{"weight_map": [1]}',
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


def changed(value: Any, drawn: random.Random) -> Any:
    """A JSON value with another one in one place, without one, or with one too many."""
    chosen = [place for place in places(value) if place]
    if not chosen:
        return copy.deepcopy(drawn.choice(VALUES))
    *path, last = drawn.choice(chosen[:200])
    inside = value
    for key in path:
        inside = inside[key]
    if drawn.random() < 0.2:
        del inside[last]
    elif isinstance(inside, dict) and drawn.random() < 0.1:
        inside[drawn.choice(["x", "", "auto_map", "quantization_config", "base_model"])] = copy.deepcopy(
            drawn.choice(VALUES)
        )
    else:
        inside[last] = copy.deepcopy(drawn.choice(VALUES))
    return value


def harm(file: Path, drawn: random.Random) -> str:
    if drawn.random() < 0.25:
        file.write_bytes(drawn.choice(WHOLE))
        return "whole"
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError):
        file.write_bytes(drawn.choice(WHOLE))
        return "whole again"
    for _ in range(drawn.choice([1, 1, 2])):
        value = changed(value, drawn)
    file.write_text(json.dumps(value))
    return "one value"


def write_folders(place: Path) -> list[Path]:
    """A folder of every kind that is opened, tokenizers beside them."""
    native, llama = small_model(), make("llama", dtype=torch.float32, vocab_size=300)
    lrt.save(native, place / "native")
    llama.save_pretrained(place / "decoder")
    llama.save_pretrained(place / "sharded", max_shard_size="5KB")
    adapted = lrt.adapt(llama)
    lrt.save(adapted, place / "adapted")
    lrt.save(adapted, place / "memory", adapter_only=True)
    recipe = parse_recipe(
        "[model]\nn_layers = 2\nwidth = 32\nn_heads = 2\nn_kv_heads = 1\nvocab_size = 300\nsequence_length = 16\n"
        "[training]\nbatch_tokens = 64\nsteps = 2\n"
    )
    save_step(place / "run" / "checkpoints", 2, native, recipe=recipe)
    (place / "run" / "recipe.toml").write_text(dump_recipe(recipe))
    folders = [place / name for name in ("native", "decoder", "sharded", "adapted", "memory", "run")]
    for folder in folders[:4]:
        load_tokenizer("bytes").save(folder)
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": {"content": "<|bos|>"}, "eos_token": None, "model_max_length": 9})
        )
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5}))
    return folders


def use(folder: Path, base: Path | None) -> None:
    """What the tools do with a folder first."""
    opened = open_model(folder, base=None if base is None else str(base))
    tokenizer = open_tokenizer(opened, base=None if base is None else str(base))
    tokenizer.encode("a text")
    with torch.no_grad():
        opened.model(torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.timeout(0)  # the budget ends it
def test_folders(tmp_path):
    folders = write_folders(tmp_path / "good")
    for folder in (folders[0], *folders[3:5]):
        use(folder, tmp_path / "good" / "decoder" if folder.name == "memory" else None)
    for at, drawn in tries(limit_s=60):
        folder = drawn.choice(folders)
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "bad")
        files = sorted(p for p in (tmp_path / "bad").rglob("*.json"))
        chosen = drawn.sample(files, min(len(files), drawn.choice([1, 1, 2])))
        about = (at, folder.name, [(file.name, harm(file, drawn), shown(file.read_bytes())) for file in chosen])
        base = tmp_path / "good" / "decoder" if folder.name == "memory" else None
        for step in (lambda place: use(place, base), lambda place: describe(inspect_checkpoint(place), place)):  # noqa: B023
            try:
                step(tmp_path / "bad")
            except (ValueError, ImportError, OSError) as error:
                assert str(error).strip() and len(str(error)) < 8000, about
            except Exception as error:
                raise AssertionError(f"{about}: {type(error).__name__}: {error}") from error
