"""Files, folders and globs: what is read, and how each failure reads."""

from __future__ import annotations

import pytest
from corpora import BYTES, first_batch, texts_of, write_parquet, write_shards

from lrt.config import DataConfig
from lrt.data import CorruptShard, build_loader
from lrt.data.sources import split_files


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


def test_a_folder_a_glob_and_a_file_give_their_documents(shards):
    everything = texts_of(DataConfig(train=str(shards), validation="demo"))
    assert len(everything) == 30 and everything[0].startswith("shard 0 document 0")
    assert texts_of(DataConfig(train=str(shards / "part_*.parquet"), validation="demo")) == everything
    assert texts_of(DataConfig(train=str(shards / "part_1.parquet"))) == everything[10:20]


def test_the_last_shard_is_held_out(shards):
    data = DataConfig(train=str(shards))
    assert all(text.startswith("shard 2") for text in texts_of(data, "validation"))
    assert {text[:7] for text in texts_of(data)} == {"shard 0", "shard 1"}


def test_a_validation_file_inside_the_folder_is_not_trained_on(shards):
    data = DataConfig(train=str(shards), validation=str(shards / "part_0.parquet"))
    assert {text[:7] for text in texts_of(data)} == {"shard 1", "shard 2"}
    with pytest.raises(ValueError, match=r"data.validation = .* holds every file of data.train: give other files"):
        split_files(DataConfig(train=str(shards), validation=str(shards)), split="train")


def test_text_files_are_split_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\n \n\nthree\n  four\n\n\n", encoding="utf-8")
    assert texts_of(DataConfig(train=str(path))) == ["one\ntwo", "three\n  four"]


def test_empty_and_missing_texts_are_left_out(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["first text", None, "", "second text"])
    assert texts_of(DataConfig(train=str(tmp_path / "a.parquet"))) == ["first text", "second text"]


# ------------------------------------------------------------------ errors


def test_missing_files_and_foreign_endings(tmp_path):
    for split, key, data in (
        ("train", "data.train", DataConfig(train=str(tmp_path / "none"))),
        ("validation", "data.validation", DataConfig(validation=str(tmp_path / "no*.parquet"))),
        ("train", "data.train", DataConfig(train=str(tmp_path))),
    ):
        with pytest.raises(
            ValueError,
            match=(
                f'{key} = .*no such file, or no .parquet, .jsonl, .csv or .txt file in it; use "demo", a .parquet, '
                ".jsonl"
            ),
        ):
            first_batch(data, split=split)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"data.train = .*a.pdf is neither .parquet, .jsonl, .csv nor .txt"):
        first_batch(DataConfig(train=str(tmp_path / "a.pdf")))


def test_an_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n \n")
    with pytest.raises(
        ValueError, match=r"data.train = .* is an empty corpus \(1 files, no documents\): give files with text"
    ):
        first_batch(DataConfig(train=str(tmp_path / "a.txt")))
    write_parquet(tmp_path / "b.parquet", ["", ""])
    with pytest.raises(ValueError, match=r"data.train has only 0 tokens: sequence longer than the corpus"):
        first_batch(DataConfig(train=str(tmp_path / "b.parquet")))


def test_a_missing_text_column_names_the_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"], column="content")
    with pytest.raises(
        ValueError,
        match=r"data.text_column = .text. is not in .*a.parquet of data.train: its columns are id, content; "
        r"choose one of 'content'",
    ):
        first_batch(DataConfig(train=str(path)))
    with pytest.raises(
        ValueError, match=r"data.text_column = .id. of .*a.parquet holds int64, not text: choose one of 'content'"
    ):
        first_batch(DataConfig(train=str(path), text_column="id"))


def test_one_file_cannot_be_split_by_itself(shards):
    data = DataConfig(train=str(shards / "part_0.parquet"))
    with pytest.raises(
        ValueError,
        match=(
            'data.validation = "auto" holds out the last shard of data.train, but .* has only one: give data.validation'
        ),
    ):
        first_batch(data, split="validation")


def test_a_truncated_shard_is_named_or_skipped_and_counted(shards):
    broken = shards / "part_1.parquet"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(
        CorruptShard, match=r'part_1.parquet cannot be read \(.*\): replace the file, or set data.on_corrupt = "skip"'
    ):
        first_batch(DataConfig(train=str(shards), validation="demo"))
    skipping = DataConfig(train=str(shards), validation="demo", on_corrupt="skip")
    assert {text[:7] for text in texts_of(skipping)} == {"shard 0", "shard 2"}
    assert build_loader(skipping, tokenizer=BYTES, sequence_length=16, rows=2).skipped == 1


def test_damage_inside_a_shard_is_found_when_it_is_read(shards):
    broken = shards / "part_0.parquet"
    content = bytearray(broken.read_bytes())
    content[4:300] = bytes(296)  # the footer stays whole
    broken.write_bytes(content)
    with pytest.raises(CorruptShard, match=r"part_0.parquet cannot be read"):
        texts_of(DataConfig(train=str(shards), validation="demo"))
    kept = texts_of(DataConfig(train=str(shards), validation="demo", on_corrupt="skip"))
    assert 20 <= len(kept) < 30
