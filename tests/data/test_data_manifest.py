"""A manifest of any shape: refused by name, never a traceback, and never a file outside of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import texts_of, write_parquet

from lrt.config import DataConfig
from lrt.data.prepare import tokenize_corpus


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [],
        lambda m: {**m, "dtype": "float64"},
        lambda m: {**m, "tokenizer": 3},
        lambda m: {**m, "shards": [3]},
        lambda m: {**m, "shards": {}},
        lambda m: {**m, "shards": [{**m["shards"][0], "name": "../shard_00000"}]},
        lambda m: {**m, "shards": [{**m["shards"][0], "tokens": "many"}]},
        lambda m: {**m, "shards": [{**m["shards"][0], "tokens": 10**30}]},
        lambda m: {**m, "shards": [{**m["shards"][0], "documents": -1}]},
        lambda m: {**m, "shards": [{**m["shards"][0], "checksums": []}]},
        lambda m: {**m, "shards": [{"name": "shard_00000"}]},
    ],
)
def test_a_manifest_of_another_shape_is_refused(tmp_path, change):
    write_parquet(tmp_path / "a.parquet", ["some text", "more text"])
    out = tmp_path / "out"
    tokenize_corpus(DataConfig(train=str(tmp_path / "a.parquet"), validation="demo"), output=out, processes=1)
    assert texts_of(DataConfig(train=str(out), validation="demo")) == ["some text", "more text"]
    manifest = Path(out) / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    with pytest.raises(ValueError, match=r"(manifest.json is not a manifest of version 1: write|the manifest says)"):
        texts_of(DataConfig(train=str(out), validation="demo"))
    if isinstance(json.loads(manifest.read_text()), list):
        with pytest.raises(ValueError, match="was begun with another"):
            tokenize_corpus(DataConfig(train=str(tmp_path / "a.parquet"), validation="demo"), output=out, processes=1)
