"""A fuzzer of command lines: whatever is written, a command ends with its exit code and short words, in seconds."""

from __future__ import annotations

import importlib
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from conversions import small_model
from fuzzing import ODD, shown, tries

import lrt
from lrt.__main__ import COMMANDS, main
from lrt.data import load_tokenizer
from lrt.eval.core import TASKS

CODES = (0, 1, 2, 130, 141)
NUMBERS = ("0", "1", "2", "-1", "3.5", "nan", "inf", "1e400", "9" * 30, "9" * 5000, "x", "", "٣", "0x10", "1_0")
ALWAYS = {"train": ["--dry-run"], "sweep": ["--show"]}
RIGHT = """
train --recipe {place}/run.toml --set training.steps=3 --gpus 2
prepare inspect --train {place}/texts --tokenizer bytes --sequence-length 16 --buffer-documents 4 --limit-tokens 500
prepare tokenize --train {place}/texts --tokenizer bytes --output {out} --processes 1 --shard-documents 20
prepare train-tokenizer --train {place}/texts --vocab-size 300 --output {out} --limit-mb 0.01
generate {place}/model --prompt The --max-new-tokens 3 --temperature 0.5 --top-k 3 --seed 1 --prefill exact
generate {place}/model --file {place}/file --max-new-tokens 2 --stop e --prefill fixed_point:2:0.1
generate {place}/model --prompt The --max-new-tokens 2 --repetition-penalty 1.1
convert --from lrt --to hf --input {place}/model --output {out} --dtype bf16 --shard-size 5GB --no-verify
inspect {place}/model
evaluate {place}/model --data {place}/texts/a.txt --memory zero --tokens 64 --rows 2 --dtype float32
evaluate {place}/model --data {place}/a.jsonl --memory decode --decode refine:1 --tokens 8 --rows 1 --sequence-length 4
core {place}/model --bundle {place}/bundle --tasks copa --items 2 --memory zero --max-length 16 --rows 2 --json {out}
compare {place}/model {place}/empty --out {out}
diagnose {place}/model --out {out} --data {place}/texts/a.txt --rows 2 --sequence-length 16 --decode-tokens 0 --sweeps 2
sweep {place}/run.toml --out {out}
""".strip().splitlines()


def paths(place: Path) -> list[str]:
    """Things that are there, things that are not, and names that no file system takes; nothing outside of ``place``."""
    there = [
        "model",
        "texts",
        "texts/a.txt",
        "file",
        "empty",
        "locked",
        "run.toml",
        "tokens",
        "binary.parquet",
        "a.csv",
        "a.jsonl",
    ]
    odd = [
        "",
        " ",
        "none",
        "x" * 300,
        "x/" * 3000,
        "~nobody/x",
        "\udcff",
        "a\nb",
        "a\0b",
        "/dev/null/x",
        "*.txt",
        "[",
        "**",
        "-x",
        "hf://",
        "demo",
    ]
    return [str(place / name) for name in there] + odd


def write_place(place: Path) -> None:
    (place / "texts").mkdir(parents=True)
    (place / "texts" / "a.txt").write_text("\n\n".join(f"Some words of document {i}." for i in range(200)))
    (place / "texts" / "b.txt").write_text("\n\n".join(f"Other words of document {i}." for i in range(50)))
    (place / "a.csv").write_text("text,id\na,1\nb,2\n")
    (place / "a.jsonl").write_text('{"text": "a"}\n')
    (place / "file").write_text("a file\n")
    (place / "binary.parquet").write_bytes(random.Random(0).randbytes(999))
    copa = place / "bundle" / TASKS["copa"].file
    copa.parent.mkdir(parents=True)
    copa.write_text('{"query": "It rained, so", "choices": ["wet.", "dry."], "gold": 0}\n' * 3)
    (place / "empty").mkdir()
    (place / "locked").mkdir(mode=0o500)
    (place / "run.toml").write_text("[training]\nsteps = 1\n")
    lrt.save(small_model(), place / "model")
    load_tokenizer("bytes").save(place / "model")


def options_of(name: str, capsys) -> list[str]:
    """The long options that a command's help names."""
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    return sorted({word.strip("[],") for word in capsys.readouterr().out.split() if word.strip("[],").startswith("--")})


def drawn_line(name: str, options: list[str], places: list[str], drawn: random.Random) -> list[str]:
    values = [lambda: drawn.choice(NUMBERS), lambda: drawn.choice(places), lambda: drawn.choice(ODD)]
    right = [line.split()[1:] for line in RIGHT if line.split()[0] == name]
    if right and drawn.random() < 0.7:
        line = [
            word.format(place=Path(places[0]).parent, out=f"out{drawn.randrange(50)}") for word in drawn.choice(right)
        ]
        for _ in range(drawn.choice([0, 1, 1, 2])):
            at = drawn.randrange(max(1, len(line)))
            line[at : at + 1] = drawn.choice([[drawn.choice(values)()], [], line[at : at + 1] * 2])
        return line if name != "train" else [*line, *ALWAYS[name]]
    line = [drawn.choice(values)() for _ in range(drawn.choice([0, 1, 1, 2]))]
    for option in drawn.sample(options, drawn.randint(0, min(4, len(options)))):
        if option in ("--help", "--devices", "--download"):
            continue
        value = drawn.choice(values)()
        if option == "--set":
            value = f"{drawn.choice(['training.steps', 'model.width', 'run.name', 'data.train', 'x', 'a.b.c'])}={value}"
        line += [option] if drawn.random() < 0.1 else [option, value]
    if name == "prepare" and drawn.random() < 0.9:
        line = [drawn.choice(["train-tokenizer", "tokenize", "inspect"]), "--train", drawn.choice(places), *line[1:]]
    return [*line, *ALWAYS.get(name, [])]


@pytest.mark.slow
@pytest.mark.timeout(0)  # the budget ends it
def test_command_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_place(tmp_path / "place")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = [name for name in COMMANDS if name != "bench"]
    options = {name: options_of(name, capsys) for name in names}
    for subcommand in ("train-tokenizer", "tokenize", "inspect"):
        options["prepare"] += options_of(f"prepare {subcommand}", capsys)
    for name in names:
        importlib.import_module(f"lrt.commands.{COMMANDS[name][0]}")
    for at, drawn in tries(limit_s=90):
        sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own; pytest's is strict
        name = drawn.choice(names)
        line = drawn_line(name, options[name], paths(tmp_path / "place"), drawn)
        monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
        about = (at, name, shown(line, 1500))
        try:
            code = main([name, *line])
        except SystemExit as ended:
            code = ended.code
        except Exception as error:
            raise AssertionError(f"{about}: {type(error).__name__}: {error}") from error
        told = capsys.readouterr()
        assert code in CODES and "Traceback" not in told.err, (about, code, told.err[-2000:])
        assert code == 0 or told.err.strip(), (about, "no words")
        torch.set_num_threads(1)
    os.chmod(tmp_path / "place" / "locked", 0o700)
