"""Tokenized folders, what makes data the same, and tools/prepare_data.py."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import BYTES, first_batch, texts_of, write_parquet, write_shards

from lrt.config import DataConfig
from lrt.data import CorruptShard, build_loader, load_tokenizer
from lrt.data.prepare import inspect_corpus, tokenize_corpus
from lrt.data.sources import open_documents


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


def tokenized(shards, output, **more) -> dict:
    return tokenize_corpus(
        DataConfig(train=str(shards), validation="demo", tokenizer="bytes"),
        output=output,
        processes=1,
        shard_documents=8,
        **more,
    )


def test_a_tokenized_folder_gives_the_same_documents(shards, tmp_path):
    out = tmp_path / "tokens"
    manifest = tokenized(shards, out)
    assert (
        len(manifest["shards"]) == 4
        and manifest["documents"] == 30
        and manifest["dtype"] == "uint16"
        and manifest["skipped"] == 0
    )
    assert sorted(p.suffix for p in out.iterdir()) == sorted([".bin", ".idx"] * 4 + [".json"] * 4)
    data = DataConfig(train=str(out), validation="demo")
    assert texts_of(data) == texts_of(DataConfig(train=str(shards), validation="demo"))
    held_out = texts_of(DataConfig(train=str(out)), "validation")
    assert held_out == texts_of(data)[-len(held_out) :] and 0 < len(held_out) < 30
    assert first_batch(data).source[0].startswith(str(out / "shard_0000"))
    assert load_tokenizer(out).fingerprint == BYTES.fingerprint


def test_tokenizing_goes_on_where_it_stopped(shards, tmp_path, monkeypatch):
    out, whole = tmp_path / "tokens", tmp_path / "whole"
    tokenized(shards, whole)
    import lrt.data.prepare as prepare

    written = []
    real = prepare.write_shard

    def stopping(folder, name, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        return real(folder, name, **options)

    monkeypatch.setattr(prepare, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        tokenized(shards, out)
    assert not (out / "manifest.json").exists()
    with pytest.raises(
        ValueError,
        match=r"data.train = .* was not finished; run the same tools/prepare_data.py tokenize command again, it",
    ):
        first_batch(DataConfig(train=str(out)))
    written.clear()
    tokenized(shards, out)
    assert written == ["shard_00002", "shard_00003"]
    written.clear()
    tokenized(shards, out)  # finished already
    assert written == []
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(
        ValueError, match=r"--output .* was begun with another text \(files, .*\): choose an empty folder"
    ):
        tokenized(shards / "part_0.parquet", out)
    with pytest.raises(ValueError, match=r"--output .* was begun with another shard size: choose an empty folder"):
        tokenize_corpus(DataConfig(train=str(shards), validation="demo"), output=out, processes=1, shard_documents=12)


def test_changed_text_is_not_taken_for_what_was_tokenized(shards, tmp_path):
    out = tmp_path / "tokens"
    tokenized(shards, out)
    held = (out / "shard_00000.bin").read_bytes()
    # same name, rows and lengths
    write_parquet(shards / "part_1.parquet", [f"SHARD 1 document {j} " * 3 for j in range(10)])
    with pytest.raises(
        ValueError, match=r"--output .* was begun with another text \(files, their contents or the text column\)"
    ):
        tokenized(shards, out)
    assert (out / "shard_00000.bin").read_bytes() == held


def test_several_processes_write_the_same(shards, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    tokenized(shards, one)
    tokenize_corpus(DataConfig(train=str(shards), validation="demo"), output=two, processes=2, shard_documents=8)
    assert all((two / file.name).read_bytes() == file.read_bytes() for file in one.iterdir())


def test_another_tokenizer_is_refused(shards, tmp_path):
    out = tmp_path / "tokens"
    tokenized(shards, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "0123456789abcdef"}))
    message = (
        r"data.train = .* was tokenized with another tokenizer \(hash 0123456789ab, data.tokenizer has [0-9a-f]{12}\): "
        "set data.tokenizer"
    )
    with pytest.raises(ValueError, match=message):
        first_batch(DataConfig(train=str(out)))
    (out / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest of version 1: write the folder again"):
        first_batch(DataConfig(train=str(out)))


def test_damaged_token_files_are_named_or_skipped(shards, tmp_path):
    out = tmp_path / "tokens"
    kept = 30 - tokenized(shards, out)["shards"][1]["documents"]
    data = DataConfig(train=str(out), validation="demo")
    skipping = DataConfig(train=str(out), validation="demo", on_corrupt="skip")
    content = np.fromfile(out / "shard_00001.bin", dtype="<u2")
    content[5] += 1
    content.tofile(out / "shard_00001.bin")
    with pytest.raises(
        CorruptShard, match=r"shard_00001.bin does not have the checksum of its manifest in documents 0\.\."
    ):
        texts_of(data)
    assert len(texts_of(skipping)) == kept
    content[:-1].tofile(out / "shard_00001.bin")
    with pytest.raises(
        CorruptShard, match=r"shard_00001.bin has \d+ bytes, the manifest says \d+: copy or tokenize it again"
    ):
        texts_of(data)
    assert len(texts_of(skipping)) == kept
    with pytest.raises(ValueError, match=r"is tokenized already: give text or parquet files"):
        tokenize_corpus(data, output=tmp_path / "again", processes=1)


# ------------------------------------------------------------------ what makes data the same


def fingerprint(data: DataConfig | str | Path) -> str:
    data = data if isinstance(data, DataConfig) else DataConfig(train=str(data), validation="demo")
    return open_documents(data, tokenizer=BYTES, split="train").fingerprint


def write_kind(folder: Path, kind: str, texts: list[list[str]]) -> Path:
    """The same files, in names and counts, whatever the texts."""
    source = folder if kind != "tokens" else folder.parent / f"{folder.name}_text"
    for i, documents in enumerate(texts):
        write_parquet(source / f"{i}.parquet", documents)
        if kind == "txt":
            (source / f"{i}.parquet").unlink()
            (source / f"{i}.txt").write_text("\n\n".join(documents), encoding="utf-8")
    if kind == "tokens":
        tokenized(source, folder)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "txt", "tokens"])
def test_data_are_known_by_their_content_and_not_by_their_place(kind, tmp_path, monkeypatch):
    texts = [[f"file {i} document {j}" for j in range(9)] for i in range(3)]
    here = write_kind(tmp_path / "here", kind, texts)
    changed = [documents[:] for documents in texts]
    changed[1][4] = "FILE 1 document 4"  # as long as before
    others = [write_kind(tmp_path / "changed", kind, changed), write_kind(tmp_path / "order", kind, texts[::-1])]
    assert len({fingerprint(folder) for folder in (here, *others)}) == 3

    there = tmp_path / "elsewhere" / "there"
    there.mkdir(parents=True)
    for file in sorted(here.iterdir(), reverse=True):
        (there / file.name).write_bytes(file.read_bytes())
        os.utime(there / file.name, (1, 1))
    assert fingerprint(there) == fingerprint(here)
    if kind != "tokens":
        assert fingerprint(f"{there}/*.{kind}") == fingerprint(here)
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *arguments: reversed(list(listed(*arguments))))
    assert fingerprint(there) == fingerprint(here)


def test_the_text_column_is_part_of_parquet_data_alone(tmp_path):
    pq.write_table(pa.table({"text": ["one", "two"], "other": ["six", "ten"]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    for name, same in (("a.parquet", False), ("a.txt", True)):
        data = DataConfig(train=str(tmp_path / name), validation="demo")
        assert (fingerprint(data) == fingerprint(dataclasses.replace(data, text_column="other"))) is same


@pytest.mark.parametrize("kind", ["parquet", "txt", "tokens"])
def test_a_run_does_not_go_on_with_other_data_of_the_same_names_and_counts(kind, tmp_path):
    here = write_kind(tmp_path / "here", kind, [["x" * 20] * 9] * 2)
    there = write_kind(tmp_path / "there", kind, [["y" * 20] * 9] * 2)

    def loader(folder):
        return build_loader(
            DataConfig(train=str(folder), validation="demo", workers=0), tokenizer=BYTES, sequence_length=16, rows=2
        )

    state = loader(here).state_dict()
    loader(here).load_state_dict(state)
    message = (
        r"data.train is not what the checkpoint was trained on: resume with the same documents \(files, "
        "their contents and data.text_c"
    )
    with pytest.raises(ValueError, match=message):
        loader(there).load_state_dict(state)


# ------------------------------------------------------------------ the tool


@pytest.fixture(scope="module")
def tool():
    return importlib.import_module("lrt.commands.prepare")


def test_the_tool_trains_tokenizes_and_inspects(tool, shards, tmp_path, capsys):
    tok, out = str(tmp_path / "tok"), str(tmp_path / "tokens")
    assert tool.main(["train-tokenizer", "--train", str(shards), "--vocab-size", "262", "--output", tok]) == 0
    assert "262 tokens, separator 0" in capsys.readouterr().out
    assert np.load(tmp_path / "tok" / "token_bytes.npy").sum() > 256
    assert tool.main(["tokenize", "--train", str(shards), "--tokenizer", tok, "--output", out, "--processes", "1"]) == 0
    assert "30 documents" in capsys.readouterr().out
    assert tool.main(["inspect", "--train", out, "--tokenizer", tok, "--sequence-length", "32"]) == 0
    shown = capsys.readouterr().out
    assert "documents        30\n" in shown and "bytes            1,710" in shown
    assert tool.main(["inspect", "--train", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --train ") and error.count("\n") == 1
    assert tool.main(["train-tokenizer", "--train", str(shards), "--vocab-size", "100", "--output", tok]) == 2
    assert "--vocab-size 100 is too small: 256 bytes and the separator need 257 or more" in capsys.readouterr().err


def test_the_tool_names_its_own_options(tool, shards, tmp_path, capsys):
    def said(*arguments, code=2):
        assert tool.main(list(arguments)) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    out = ("--tokenizer", "bytes", "--processes", "1", "--output", str(tmp_path / "out"))
    assert f"error: --train '{tmp_path}/data.train': no such file" in said(
        "tokenize", "--train", f"{tmp_path}/data.train", *out
    )
    assert "error: --train 'data.train': no such file" in said("tokenize", "--train", "data.train", *out)
    assert 'error: --text-column "words" is not in ' in said(
        "tokenize", "--train", str(shards), "--text-column", "words", *out
    )
    missing = said("inspect", "--train", str(shards), "--tokenizer", "none")
    assert (
        missing.startswith('error: --tokenizer "none": no file none; use ')
        and "(DATA as in --train, N = model.vocab_size)" in missing
    )
    (shards / "part_1.parquet").write_text("no parquet")
    assert said("tokenize", "--train", str(shards), *out).endswith("replace the file, or give --on-corrupt skip\n")
    for command in (["train-tokenizer"], ["tokenize", "--tokenizer", "bytes"]):
        file = str(shards / "part_0.parquet")
        for place, why in ((file, "is a file"), (f"{file}/in", "cannot be made (Not a directory)")):
            message = f"error: --output {place} {why}: give a folder, new or one that the same command began\n"
            assert said(*command, "--train", str(shards), "--output", place) == message


def test_a_full_disk_is_one_line(tool, shards, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lrt.data.prepare.write_shard", full)
    out = str(tmp_path / "out")
    assert (
        tool.main(["tokenize", "--train", str(shards), "--tokenizer", "bytes", "--processes", "1", "--output", out])
        == 1
    )
    assert (
        capsys.readouterr().err == f"error: {out}: No space left on device; mend that and give the same command again\n"
    )


@pytest.mark.parametrize(
    "option",
    [
        ("--sequence-length", "0"),
        ("--limit-tokens", "-1"),
        ("--buffer-documents", "many"),
        ("--sequence-length", "1.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tool, option, capsys):
    with pytest.raises(SystemExit) as end:
        tool.main(["inspect", "--train", "demo", *option])
    assert (
        end.value.code == 2
        and f"argument {option[0]}: {option[1]!r}: use a whole number of 1 or more" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["train-tokenizer", "tokenize", "inspect"])
def test_help_explains_every_option_and_shows_an_example(tool, command, capsys):
    with pytest.raises(SystemExit) as end:
        tool.main([command, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and f"example: python tools/prepare_data.py {command} --train " in shown
    choices = next(action.choices for action in tool._parser()._actions if action.choices)
    for action in choices[command]._actions:
        assert action.help and action.option_strings[-1] in shown


@pytest.mark.dist
@pytest.mark.parametrize("group", [True, False], ids=["as Ctrl-C", "to one process"])
def test_an_interruption_is_one_line_and_the_same_command_goes_on(group, tmp_path):
    rows = 1500
    write_parquet(tmp_path / "a.parquet", [f"document {i}" for i in range(rows)], row_group_size=1)
    root, out = Path(__file__).parent.parent.parent, tmp_path / "out"
    command = [
        sys.executable,
        str(root / "tools" / "prepare_data.py"),
        "tokenize",
        "--train",
        str(tmp_path / "a.parquet"),
        "--output",
        str(out),
    ]
    command += ["--tokenizer", "bytes", "--processes", "2", "--shard-documents", "1"]
    run = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while not list(out.glob("shard_*.json")) and time.monotonic() < end:
        time.sleep(0.02)
    (os.killpg if group else os.kill)(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=20)
    assert (run.returncode, error) == (130, "interrupted: the same command goes on with the shards that are missing\n")
    assert 0 < len(list(out.glob("shard_*.json"))) < rows and not (out / "manifest.json").exists()


def test_inspect_counts_what_packing_costs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(["a" * 9] * 4 + ["b" * 29]))
    report = inspect_corpus(DataConfig(train=str(path)), sequence_length=19)
    # Rows of 20: two documents of 10 with separator, twice; then 30 alone: 19 letters, and 10 behind a cut.
    assert (report.documents, report.tokens, report.bytes) == (5, 65, 65)
    assert report.rows == 3 and report.cut_documents == 1 / 5 and report.cut_tokens == 10 / 65
    assert report.separator_share == 6 / 71


def test_a_vocabulary_that_no_memory_holds_is_refused(tool, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    arguments = ["train-tokenizer", "--train", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]
    assert tool.main([*arguments, "--vocab-size", "9999999999"]) == 2
    assert "--vocab-size 9999999999 is too large: use at most 4194304" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["tokenize", "train-tokenizer"])
def test_two_in_one_folder_are_refused_and_the_first_goes_on(tool, tmp_path, capsys, command):
    (tmp_path / "a.txt").write_text("some text")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from lrt.data.locks import locked\n"
    code += f"with locked({str(tmp_path / 'out')!r}, advice=''):\n    print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    tokenizer = ["--tokenizer", "bytes"] if command == "tokenize" else []
    arguments = [command, "--train", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), *tokenizer]
    assert tool.main(arguments) == 2
    assert f"out is in use by another process (process {holder.pid} on " in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert tool.main(arguments) == 0 and not list((tmp_path / "out").glob(".*"))
