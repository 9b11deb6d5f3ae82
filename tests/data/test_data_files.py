"""Files as people have them: kinds, encodings, columns, links, damage in a single row, and names in any bytes."""

from __future__ import annotations

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import BYTES, first_batch, texts_of, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from lrt.config import DataConfig
from lrt.data import CorruptShard, build_loader, documents, lines, parquet
from lrt.data.sources import find_files, open_documents

TEXTS = ["one", "two\nlines", 'with, a "quote"', "ünï", "", "last"]


def whole(path, **settings) -> list[str]:
    return texts_of(DataConfig(train=str(path), validation="demo", **settings))


def write_lines(path, rows):
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.Codec("zstd").compress(data, asbytes=True)
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------ kinds


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(lines, "LINES_GROUP", 4)
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS * 3)] + [{"text": None}, {"id": 1}]
    path = write_lines(tmp_path / f"a.{ending}", rows)
    assert whole(path) == [text for text in TEXTS * 3 if text] == whole(tmp_path)
    found = open_documents(DataConfig(train=str(path), validation="demo"), tokenizer=BYTES, split="train")
    assert found.sizes.tolist() == ([4, 4, 4, 4, 4] if ending == "jsonl" else [20])
    with pytest.raises(
        ValueError, match=r".content. is not in .*: the keys of its first line are 'id', 'text'; choose one of 'text'"
    ):
        whole(path, text_column="content")
    with pytest.raises(
        ValueError, match=r"data.text_column = .id. of .* holds a number, not text: choose one of 'text'"
    ):
        whole(path, text_column="id")


def test_json_lines_without_an_end_and_with_empty_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}')
    assert whole(tmp_path) == ["a", "b"]


def test_compressed_lines_that_are_cut_are_named(tmp_path):
    for ending in ("gz", "zst"):
        path = write_lines(tmp_path / f"a.jsonl.{ending}", [{"text": os.urandom(200).hex()} for _ in range(50)])
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(CorruptShard, match=rf"a.jsonl.{ending} cannot be read"):
            whole(path)


def test_csv(tmp_path):
    import csv

    long = "x" * 200_000  # the csv module's own limit is 131,072
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([i, text] for i, text in enumerate([*TEXTS, long]))])
    assert whole(tmp_path) == [*(text for text in TEXTS if text), long]
    with pytest.raises(
        ValueError, match=r'"content" is not in the first line of .*a.csv of data.train: its columns are id, text'
    ):
        whole(tmp_path, text_column="content")
    (tmp_path / "a.csv").write_text("text,id\na,1\nb\nc,3\n")
    with pytest.raises(CorruptShard, match=r"a.csv cannot be read \(row 3 has 1 fields, the first row 2\)"):
        whole(tmp_path)
    assert whole(tmp_path, on_corrupt="skip") == ["a", "c"]
    (tmp_path / "a.csv").write_text('text,id\n"a,1\nb,2\n')
    with pytest.raises(CorruptShard, match=r"a.csv cannot be read \(unexpected end of data\)"):
        whole(tmp_path)


def test_a_folder_of_several_kinds_says_what_it_leaves_out(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "README.txt").write_text("about")
    assert whole(tmp_path) == ["a"]
    assert "its .jsonl files are read, and 1 .txt files left out" in capsys.readouterr().err
    write_parquet(tmp_path / "b.parquet", ["b"])
    assert whole(tmp_path) == ["b"]


# ------------------------------------------------------------------ encodings


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl"])
def test_encodings_are_read_or_named(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    text = {"txt": "é one\n\ntwo", "csv": "text\né one\ntwo\n", "jsonl": '{"text": "é one"}\n{"text": "two"}\n'}[ending]
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert whole(path) == ["é one", "two"]
    path.write_text(text, encoding="utf-16")
    with pytest.raises(CorruptShard, match=rf"a.{ending} .*UTF-16.*iconv -f UTF-16 -t UTF-8"):
        whole(path)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CorruptShard, match=rf"a.{ending} .*0xe9.*latin-1"):
        whole(path)
    assert (
        texts_of(DataConfig(train=str(path), validation="demo", on_corrupt="skip")) == ["two"]
        if ending == "jsonl"
        else True
    )


def test_a_tokenizer_and_a_recipe_with_a_byte_order_mark(tmp_path):
    from lrt.config import load_recipe
    from lrt.data import load_tokenizer

    BYTES.save(tmp_path)
    for name in ("tokenizer.json", "lrt_tokenizer.json"):
        path = tmp_path / name
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_tokenizer(tmp_path).fingerprint == BYTES.fingerprint
    (tmp_path / "r.toml").write_text("[training]\nsteps = 3\n", encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.toml").training.steps == 3
    for encoding, word in (("utf-16", "UTF-16"), ("latin-1", "latin-1")):
        (tmp_path / "r.toml").write_text("# é\n[training]\nsteps = 3\n", encoding=encoding)
        with pytest.raises(ValueError, match=rf"r.toml is not UTF-8 text: .*{word}"):
            load_recipe(tmp_path / "r.toml")
        (tmp_path / "tokenizer.json").write_text('{"é": 1}', encoding=encoding)
        (tmp_path / "lrt_tokenizer.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"tokenizer.json is not UTF-8 text: .*{word}"):
            load_tokenizer(tmp_path)


def test_a_models_folder_with_byte_order_marks(tmp_path):
    import lrt
    from lrt.config import parse_recipe
    from lrt.serialization import save

    model = lrt.build(
        parse_recipe("[model]\nn_layers = 1\nwidth = 8\nn_heads = 1\nvocab_size = 257\nsequence_length = 8\n")
    )
    save(model, tmp_path / "model", shard_size=2000)
    for name in ("config.json", "model.safetensors.index.json"):
        path = tmp_path / "model" / name
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert lrt.load(tmp_path / "model").vocab_size == 257
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"index.json is not UTF-8 text: .*UTF-16"):
        lrt.load(tmp_path / "model")


# ------------------------------------------------------------------ rows that are no text


def broken_column(path, values: list[bytes | None]):
    raw = pa.array(values, pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(values), raw.buffers())
    pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    return path


def test_bytes_that_are_no_utf8_are_one_row_that_is_named_counted_and_left_out(tmp_path, capsys):
    path = broken_column(tmp_path / "a.parquet", [b"one", b"t\xffo", None, b"\xed\xa0\x80", b"five", b"six"])
    with pytest.raises(
        CorruptShard, match=r"a.parquet cannot be read \(a text of row group 0 is not UTF-8: byte 0xff behind b't'\)"
    ):
        whole(path)
    assert whole(path, on_corrupt="skip") == ["one", "five", "six"]
    err = capsys.readouterr().err
    assert "left out: " in err and "byte 0xff" in err and "row group 1" in err and "set data.on_corrupt" not in err
    data = DataConfig(train=str(path), validation="demo", on_corrupt="skip", workers=0)
    loader = build_loader(data, tokenizer=BYTES, sequence_length=5, rows=1)
    while loader.epoch < 1:
        next(loader)
    assert loader.skipped >= 2


def test_half_characters_and_damage_in_json_lines(tmp_path, capsys):
    good = [{"text": f"good {i}"} for i in range(3)]
    path = write_lines(tmp_path / "a.jsonl", good)
    bad = [
        rb'{"text": "\ud800"}',
        b'{"text": ',
        b"[" * 100_000,
        b'{"text": 1' + b"0" * 5000 + b"}",
        b'{"text": ["a"]}',
        b"7",
        b'{"text": "\xe9"}',
    ]
    path.write_bytes(path.read_bytes() + b"".join(line + b"\n" for line in bad) + b'{"text": "end"}\n')
    for number, line in enumerate(bad):
        one = tmp_path / "one.jsonl"
        one.write_bytes(b'{"text": "a"}\n' + line + b"\n")
        with pytest.raises(CorruptShard, match=r"one.jsonl cannot be read \(line 2[: ]"):
            whole(one)
        assert whole(one, on_corrupt="skip") == ["a"], number
    assert whole(path, on_corrupt="skip") == ["good 0", "good 1", "good 2", "end"]
    assert capsys.readouterr().err.count("left out: ") >= len(bad)


def test_a_flood_of_bad_rows_is_named_only_in_part(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "bad\n" * 300)
    assert whole(path, on_corrupt="skip") == ["a"]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == documents.NAMED + 1 and err[-1] == "left out: more like these, which are counted but not named"


@given(
    st.lists(st.one_of(st.none(), st.binary(max_size=6), st.text(max_size=6).map(str.encode)), min_size=1, max_size=12)
)
def test_any_column_of_bytes_is_read_row_by_row(values):
    import tempfile
    from pathlib import Path

    def text(value):
        try:
            return value.decode("utf-8") if value else ""
        except UnicodeDecodeError:
            return ""

    with tempfile.TemporaryDirectory() as folder:
        path = broken_column(Path(folder) / "a.parquet", [b"first", *values])
        assert whole(path, on_corrupt="skip") == ["first", *(t for t in map(text, values) if t)]


# ------------------------------------------------------------------ columns


def test_columns_of_every_shape(tmp_path):
    rows = ["a", "b", None, "a"]
    table = pa.table(
        {
            "a.b": rows, "kinds": pa.array(rows).dictionary_encode(), "large": pa.array(rows, pa.large_string()),
            "view": pa.array(rows, pa.string_view()), "struct": [{"x": "s"}] * 4, "bytes": pa.array([b"x"] * 4),
            "list": [["l"]] * 4, "": rows, "a": [{"b": "inside"}] * 4,
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    for column in ("a.b", "kinds", "large", "view", ""):
        assert whole(tmp_path, text_column=column) == ["a", "b", "a"], column
    texts = "choose one of 'a.b', 'kinds', 'large', 'view', ''"
    for column, what in (("struct", "a struct of x"), ("bytes", "binary"), ("list", "lists")):
        with pytest.raises(
            ValueError, match=rf'data.text_column = "{column}" of .*a.parquet holds {what}, not text: {texts}'
        ):
            whole(tmp_path, text_column=column)


def test_two_columns_of_one_name(tmp_path):
    pq.write_table(
        pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "other"]),
        tmp_path / "a.parquet",
    )
    with pytest.raises(
        ValueError,
        match=r"a.parquet of data.train has 2 columns of that name: give them different names, or choose 'other'",
    ):
        whole(tmp_path)
    assert whole(tmp_path, text_column="other") == ["c"]


# ------------------------------------------------------------------ a small file that unpacks to much


def test_a_row_group_that_unpacks_to_too_much(tmp_path, monkeypatch):
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(30_000, dtype=np.int32)), pa.array(["x" * 100_000]))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": repeated}), path, row_group_size=1 << 20, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2000
    with pytest.raises(
        CorruptShard,
        match=r"row group 0 unpacks to 2.8 GiB of text, more than 2; write it again with smaller row groups",
    ):
        whole(path)
    monkeypatch.setattr(parquet, "LARGEST_ROWS", 1000)
    with pytest.raises(CorruptShard, match=r"row group 0 has 30,000 rows, more than 1,000"):
        whole(path)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_lines_that_unpack_to_too_much(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(lines, "LARGEST_GROUP", 10_000)
    for rows in ([{"text": "x" * 20_000}], [{"text": "x" * 100}] * 200):
        with pytest.raises(CorruptShard, match=r"(a line is longer|it unpacks to more) than"):
            whole(write_lines(tmp_path / f"a.jsonl.{ending}", rows))


# ------------------------------------------------------------------ folders, links and names


def test_hidden_files_are_left_out_and_links_followed(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_parquet(folder / "a.parquet", ["a"])
    write_parquet(elsewhere / "deep" / "b.parquet", ["b"])
    for hidden in (".ipynb_checkpoints/a-checkpoint.parquet", ".cache/x.parquet", "._a.parquet"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no parquet at all")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(folder)  # a circle
    (folder / "gone.parquet").symlink_to(tmp_path / "nowhere")
    assert whole(folder) == ["a", "b"]
    assert [path.name for path in find_files(str(folder / "*.parquet"), key="data.train")] == ["a.parquet"]
    write_parquet(folder / ".cache" / "x.parquet", ["x"])
    assert whole(folder / ".cache") == ["x"]  # named by the user


def test_names_in_any_bytes(tmp_path):
    for number, name in enumerate((b"\xff\xfe.parquet", b"zwei \n Zeilen.jsonl", b"\xe9.txt")):
        folder = os.path.join(os.fsencode(tmp_path), b"\xffolder%d" % number)
        os.mkdir(folder)
        path = os.fsdecode(os.path.join(folder, name))
        if name.endswith(b".parquet"):
            pq.write_table(pa.table({"text": ["x"]}), open(path, "wb"))
        else:
            with open(path, "w") as file:
                file.write('{"text": "x"}' if name.endswith(b".jsonl") else "x")
        assert whole(os.fsdecode(folder)) == ["x"] == whole(path)


def test_empty_paths_and_unknown_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", ["what the present folder holds"])
    for spec in ("", "  "):
        with pytest.raises(ValueError, match=r"data.train = '\s*' is empty, perhaps an unset variable"):
            whole(spec)
    with pytest.raises(ValueError, match=r"data.train = '~nobody_at_all/x': there is no user 'nobody_at_all' here"):
        whole("~nobody_at_all/x")
    with pytest.raises(ValueError, match=r"holds a zero byte"):
        whole("a\0b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert whole("~/a.parquet") == whole(".")


def test_shards_without_rows(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["some text that is long enough"])
    write_parquet(tmp_path / "b.parquet", pa.array([], pa.string()))
    write_parquet(tmp_path / "c.parquet", ["some more text that is long enough"])
    assert len(whole(tmp_path)) == 2
    first_batch(DataConfig(train=str(tmp_path)))
    (tmp_path / "c.parquet").unlink()
    with pytest.raises(
        ValueError,
        match=r'data.train: its last file, .*b.parquet, which data.validation = "auto" holds out, has no documents',
    ):
        first_batch(DataConfig(train=str(tmp_path)), split="validation")
