"""Folders of models: the user's permissions, a card that no name can break, and configs that keep no machine busy."""

import json
import os
import time

import pytest
from runs import tiny

import lrt
from lrt.serialization.adapted import model_card
from lrt.serialization.tensors import open_file


@pytest.mark.parametrize(
    "umask, folder_mode, file_mode", [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)]
)
def test_saved_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, folder_mode, file_mode):
    before = os.umask(umask)
    try:
        lrt.save(lrt.build(tiny("unused")), tmp_path / "model", shard_size=20000)
    finally:
        os.umask(before)
    files = list((tmp_path / "model").iterdir())
    assert len(files) > 4 and {p.stat().st_mode & 0o777 for p in files} == {file_mode}
    assert (tmp_path / "model").stat().st_mode & 0o777 == folder_mode


@pytest.mark.parametrize(
    "name",
    [
        "a/b\n---\n# Ours\n",
        "x\nlicense: mit",
        "<img src=x>/y",
        "../../secret folder",
        "a/b/c",
        "`rm`",
        "y: {z",
        "a" * 5000,
    ],
)
def test_a_name_cannot_write_into_the_model_card(name):
    clean = model_card({"adapted": {"architecture": "LlamaForCausalLM"}, "recurrence": None})
    assert model_card({"adapted": {"architecture": "LlamaForCausalLM", "name": name}, "recurrence": None}) == clean
    harmed = model_card({"adapted": {"architecture": name, "name": "owner/model"}, "recurrence": None})
    good = model_card({"adapted": {"architecture": "decoder", "name": "owner/model"}, "recurrence": None})
    assert harmed == good and good.split("---")[1].count("\n") == 7


@pytest.mark.parametrize("name", ["owner/model", "Qwen/Qwen2.5-0.5B"])
def test_a_hub_name_is_in_the_model_card(name):
    card = model_card({"adapted": {"architecture": "LlamaForCausalLM", "name": name}, "recurrence": None})
    assert f"\nbase_model: {name}\n---\n" in card and f"around: LlamaForCausalLM ({name})." in card


def test_a_config_that_names_layers_without_end_is_refused_at_once(tmp_path):
    lrt.save(lrt.build(tiny("unused")), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["n_layers"] = 10**7
    path.write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(ValueError, match="model.n_layers = 10000000: use a whole number of 1 or more, at most 10000"):
        lrt.load(tmp_path / "model")
    assert time.process_time() - began < 5


def test_a_decoders_config_that_names_layers_without_end_is_refused_at_once(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    lrt.save(lrt.adapt(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["adapted"]["config"]["num_hidden_layers"] = 10**7
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json names 10000000 layers .num_hidden_layers., but at most 10000"):
        lrt.load(tmp_path / "model")


def test_hundred_thousands_of_empty_tensors_are_refused_in_seconds(tmp_path):
    lrt.save(lrt.build(tiny("unused")), tmp_path / "model")
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": entry for i in range(300_000)}).encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"model: 300\d\d\d tensors do not fit its config: .*and 300\d\d\d more"):
        lrt.load(tmp_path / "model")
    assert time.process_time() - began < 20


def test_an_unknown_dtype_is_one_line_that_names_the_file(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match=r"x.safetensors: ") as caught:
        open_file(tmp_path / "x.safetensors")
    assert len(str(caught.value).splitlines()) == 1
