"""Whatever goes wrong: a clear error, the source untouched, nothing at the output."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conversions import NANOCHAT, SMALL, leave_nanochat, quiet, save_step, small_model
from titan_parts import leave_checkpoint

import lrt
from lrt.commands import convert as tool
from lrt.commands import inspect as inspect_tool
from lrt.config import parse_recipe
from lrt.conversion import convert, inspect_checkpoint, pipeline
from lrt.conversion import official as layout
from lrt.serialization import native_config

ROOT = Path(__file__).parent.parent.parent


class Payload:
    """What a foreign pickle may do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def place(tmp_path):
    """A source of ours and one of the official code; afterwards both are as they were and nothing else is there."""
    lrt.save(small_model(), tmp_path / "ours", shard_size=20000)
    shutil.copytree(NANOCHAT / "base_checkpoints" / "d2_lrt", tmp_path / "official")
    return tmp_path


def fingerprint(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def refused(place, match, *, source="ours", kind="lrt", target="hf", error=ValueError, **more):
    before = fingerprint(place)
    with pytest.raises(error, match=match):
        convert(place / source, place / "out", source=kind, target=target, report=quiet, **more)
    assert fingerprint(place) == before
    assert not [p for p in place.iterdir() if p.name.startswith((".out", "out"))]


# ------------------------------------------------------------------ the input


def truncate(path):
    path.write_bytes(path.read_bytes()[:-64])


def test_a_truncated_shard(place):
    truncate(sorted((place / "ours").glob("*.safetensors"))[-1])
    refused(place, "not a whole safetensors file")
    found = inspect_checkpoint(place / "ours")
    assert not found.whole and "not a whole" in found.problem


def test_a_missing_shard(place):
    sorted((place / "ours").glob("*.safetensors"))[0].unlink()
    refused(place, "00001-of-.* is missing: the folder is not whole")


def test_an_index_that_leads_elsewhere(place):
    index = place / "ours" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] = {name: "../" + file for name, file in table["weight_map"].items()}
    index.write_text(json.dumps(table))
    refused(place, "shards lie beside their index")


def test_a_truncated_official_file(place):
    truncate(place / "official" / "model_000100.pt")
    refused(place, "refused, not a whole file of tensors alone", source="official", kind="official")


def test_a_foreign_pickle_is_not_run(place):
    torch.save({"transformer.wte.weight": Payload(place / "owned")}, place / "official" / "model_000100.pt")
    refused(place, "refused, not a whole file of tensors alone", source="official", kind="official")
    assert not (place / "owned").exists()


def test_a_foreign_tokenizer_is_not_run(place):
    (place / "official" / "tokenizer").mkdir()
    (place / "official" / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(Payload(place / "owned")))
    refused(place, r"tokenizer.pkl: refused.*posix.mkdir.*--tokenizer", source="official", kind="official")
    assert not (place / "owned").exists()


def test_a_state_dict_of_something_else(place):
    torch.save({"transformer.wte.weight": torch.zeros(3), "more": 1}, place / "official" / "model_000100.pt")
    refused(place, "not a state dict", source="official", kind="official")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_layer": 3}, r"tensors do not fit its config: .*h\.2\..* is missing"),
        ({"n_embd": 128}, "has shape .*, expected"),
        ({"n_head": 5}, "n_heads"),
        ({"n_embd": None}, "model_config lacks n_embd"),
    ],
)
def test_a_config_of_another_model(place, change, match):
    path = place / "official" / "meta_000100.json"
    meta = json.loads(path.read_text())
    meta["model_config"] = {k: v for k, v in (meta["model_config"] | change).items() if v is not None}
    path.write_text(json.dumps(meta))
    refused(place, match, source="official", kind="official")


def test_an_unexpected_tensor(place):
    """A nanochat of another time has other tensors: guessing what they do would be gibberish."""
    path = place / "official" / "model_000100.pt"
    torch.save(torch.load(path, weights_only=True) | {"smear_gate.weight": torch.zeros(1)}, path)
    refused(place, "smear_gate.weight is unexpected", source="official", kind="official")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("[" * 200_000, "config.json is not valid JSON"),
        ("3", "config.json is not a JSON object"),
        ('{"model_type": "llama"}', "no lrt_format"),
        ('{"lrt_format": 99}', "update lrt"),
        ('{"lrt_format": "1"}', "config.json: lrt_format = '1', but a model that lrt wrote has a whole number there"),
        ('{"lrt_format": null}', "config.json: lrt_format = None, but"),
        ('{"lrt_format": true}', "config.json: lrt_format = True, but"),
    ],
)
def test_a_config_that_cannot_be_read(place, text, match):
    (place / "ours" / "config.json").write_text(text)
    refused(place, match)


def test_weights_that_are_not_finite(place):
    model = small_model()
    with torch.no_grad():
        model.blocks[1].block.key.weight[3, 3] = float("nan")
    shutil.rmtree(place / "ours")
    lrt.save(model, place / "ours")
    refused(place, "blocks.1.block.key.weight has values that are NaN or infinite")


def test_a_dtype_that_cannot_hold_the_weights(place):
    model = small_model()
    with torch.no_grad():
        model.backbone.head.weight[0, 0] = 1e6
    shutil.rmtree(place / "ours")
    lrt.save(model, place / "ours")
    refused(place, "backbone.head.weight does not fit into torch.float16", dtype=torch.float16)


def test_arguments_that_mean_nothing(place):
    refused(place, "unknown kind; use one of", kind="gguf")
    refused(place, "is only read", target="dcp")
    refused(place, "there is nothing", source="nowhere")
    refused(place, "leave it out", step=3)
    refused(place, "holds no step 7; it has 100", source="official", kind="official", step=7)
    refused(place, "--base names the decoder of an adapter", base=place / "ours")
    refused(place, "no tokenizer.json", tokenizer=place / "official")


# ------------------------------------------------------------------ the converter itself at fault


def test_a_wrong_name_table_is_caught_by_the_logits(place, monkeypatch):
    """U_k and U_v swapped: the tensors come back equal, because the table is used in both directions;
    the answers do not."""
    right = layout.name_table

    def swapped(config, *, recurrent):
        table = right(config, recurrent=recurrent)
        a, b = "interleaved_projections.0.W_v.weight", "interleaved_key_projections.0.W_v.weight"
        return table | {a: table[b], b: table[a]}

    monkeypatch.setattr(layout, "name_table", swapped)
    refused(place, "decode, float64: largest logit difference", source="official", kind="official", target="lrt")


@pytest.mark.parametrize(
    "change", [{"rope_base": 500.0}, {"qk_norm": False}, {"softcap": None}, {"window_pattern": "L"}]
)
def test_a_wrong_config_is_caught_by_the_logits(place, monkeypatch, change):
    write = pipeline.KINDS["lrt"].write

    def wrong(folder, source, **more):
        notes = write(folder, source, **more)
        config = json.loads((folder / "config.json").read_text())
        config["model"] |= change
        (folder / "config.json").write_text(json.dumps(config))
        return notes

    monkeypatch.setitem(pipeline.KINDS, "lrt", pipeline.KINDS["lrt"]._replace(write=wrong))
    refused(place, "answers differently", source="official", kind="official", target="lrt")


def test_a_disk_that_changes_bytes_is_caught(place, monkeypatch):
    write = pipeline.KINDS["hf"].write

    def wrong(folder, source, **more):
        notes = write(folder, source, **more)
        file = sorted(folder.glob("*.safetensors"))[-1]
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        return notes

    monkeypatch.setitem(pipeline.KINDS, "hf", pipeline.KINDS["hf"]._replace(write=wrong))
    refused(place, "differs from its source after writing")


# ------------------------------------------------------------------ the output


def test_an_output_that_exists_is_left_alone(place):
    (place / "taken").mkdir()
    (place / "taken" / "mine.txt").write_text("precious")
    before = fingerprint(place)
    with pytest.raises(ValueError, match="already exists: choose a new folder"):
        convert(place / "ours", place / "taken", source="lrt", target="hf", report=quiet)
    assert fingerprint(place) == before


def test_too_little_space_is_said_before_the_first_byte(place, monkeypatch):
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    refused(place, r"[1-9][\d.]* kB are needed, 1\.0 kB are free there: choose another place")


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
from lrt.conversion import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    convert({source!r}, {output!r}, source="lrt", target={target!r}, report=lambda line: None)
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("target", ["hf", "official"])
def test_space_that_runs_out_in_the_middle(place, target):
    """A limit on the size of files stands for a full disk; it comes after the check of free space."""
    shutil.rmtree(place / "ours")
    recurrence = 'sharing = "layerwise"\nsource_layer = 2\n'
    text = (
        "[model]\nn_layers = 2\nwidth = 32\nn_heads = 2\nvocab_size = 300\nsequence_length = 16\n"
        'rope_dtype = "bfloat16"\n'
    )
    lrt.save(small_model(f"{text}[recurrence]\n{recurrence}[training]\nbatch_tokens = 64\n"), place / "ours")
    before = fingerprint(place)
    code = FULL.format(root=str(ROOT), source=str(place / "ours"), output=str(place / "out"), target=target)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "refused:" in done.stdout and "nothing is left there" in done.stdout, done.stdout + done.stderr
    assert fingerprint(place) == before and sorted(p.name for p in place.iterdir()) == ["official", "ours"]


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from lrt.commands import convert
convert._Bar.__call__ = lambda self, done, total: (print("writing", flush=True), time.sleep(60))
sys.exit(convert.main(["--from", "lrt", "--to", "hf", "--input", {source!r}, "--output", {output!r}]))
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_in_the_middle(place, sent):
    before = fingerprint(place)
    code = SLOW.format(root=str(ROOT), source=str(place / "ours"), output=str(place / "out"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "writing"
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert not (place / "out").exists()
    assert fingerprint(place / "ours") == {p.relative_to("ours"): h for p, h in before.items() if p.parts[0] == "ours"}
    if sent != signal.SIGKILL:  # which nobody can answer: a hidden folder stays beside the output
        assert process.returncode == 130 and "interrupted: nothing was written" in said
        assert fingerprint(place) == before


# ------------------------------------------------------------------ the tool


def test_the_tool_converts_and_says_what_it_compared(place, capsys):
    arguments = [
        "--from",
        "official",
        "--to",
        "lrt",
        "--input",
        str(place / "official"),
        "--output",
        str(place / "out"),
        "--dtype",
        "bf16",
    ]
    assert tool.main(arguments) == 0
    said = capsys.readouterr().out
    assert "zero, float32: largest logit difference" in said and "decode, float32: largest logit difference" in said
    assert "rounding to bfloat16 moves logits" in said and "note: no tokenizer found" in said
    assert native_config(lrt.load(place / "out"))["torch_dtype"] == "bfloat16"
    assert tool.main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "already exists" in said and len(said.splitlines()) == 1


def test_the_tool_lists_kinds_and_refuses_bad_arguments(capsys):
    assert tool.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(kind in said for kind in pipeline.KINDS) and "lossless" in said
    for arguments in (["--from", "lrt"], ["--list", "--shard-size", "many"], ["--from", "gguf"]):
        with pytest.raises(SystemExit) as stopped:
            tool.main(arguments)
        assert stopped.value.code == 2


@pytest.mark.parametrize(("text", "size"), [("5GB", 5_000_000_000), ("500mb", 500_000_000), ("1.5K", 1500), ("12", 12)])
def test_sizes(text, size):
    assert tool._bytes(text) == size


def test_without_verification_it_is_said(place, capsys):
    arguments = [
        "--from",
        "lrt",
        "--to",
        "lrt",
        "--input",
        str(place / "ours"),
        "--output",
        str(place / "out"),
        "--no-verify",
    ]
    assert tool.main(arguments) == 0 and "not verified" in capsys.readouterr().out


def test_a_step_of_a_folder_that_holds_one_model_is_a_wrong_question_not_a_damaged_model(place, capsys):
    (place / "ours" / "model.safetensors.index.json").unlink()
    assert inspect_tool.main([str(place / "ours"), "--step", "1"]) == 2
    assert "--step 1 chooses among the checkpoints of a run" in capsys.readouterr().err


def test_nothing_known_to_inspect(tmp_path, capsys):
    with pytest.raises(ValueError, match="no checkpoint of a known kind"):
        inspect_checkpoint(tmp_path)
    assert inspect_tool.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "no checkpoint of a known kind" in said and len(said.splitlines()) == 1


def test_a_known_checkpoint_that_is_not_whole_is_an_answer(place, capsys):
    weights = next((place / "ours").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-64])
    assert inspect_tool.main([str(place / "ours")]) == 1


def test_every_command_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    save_step(tmp_path / "runs" / "tiny" / "checkpoints", 20, small_model(), recipe=parse_recipe(SMALL))
    leave_checkpoint(tmp_path / "runs" / "titan_lrt_debug")
    text = (ROOT / "docs" / "convert.md").read_text().split("## Each direction")[1].split("\n## ")[0]
    commands = [line.split() for line in text.splitlines() if line.startswith("    python tools/")]
    if hasattr(transformers, "NanoChatConfig"):
        leave_nanochat(tmp_path / "nanochat-hf")
    else:
        commands = [words for words in commands if "nanochat-hf" not in words]
    assert {("--from", kind) for kind in pipeline.KINDS} <= {
        pair for words in commands for pair in zip(words, words[1:])
    }
    for words in commands:
        main = {"tools/convert.py": tool.main, "tools/inspect_checkpoint.py": inspect_tool.main}[words[1]]
        assert main(words[2:]) == 0, (words, capsys.readouterr())
