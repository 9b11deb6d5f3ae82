"""Datasets of the Hugging Face hub: what is fetched, what is said before, and how each failure reads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from corpora import first_batch, texts_of, write_shards
from huggingface_hub.utils import HfHubHTTPError

from lrt.config import DataConfig
from lrt.data.hub import download


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, and a dataset of three files of which one lies in another folder; 5 GiB altogether."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)
    sizes = {
        "README.md": 1,
        "shards/part_0.parquet": 1 << 30,
        "shards/part_2.parquet": 3 << 29,
        "more/b.parquet": 5 << 29,
    }
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]

    def info(_, name, *, revision, files_metadata):
        assert files_metadata
        return SimpleNamespace(sha="5ha", siblings=siblings)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    return tmp_path / "cache"


def test_what_will_be_fetched_is_said_before_it_begins(hub, shards, monkeypatch, capsys):
    said = []

    def fetch(*_, **__):
        said.append(capsys.readouterr().err)
        return str(shards.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    files = "hf://datasets/owner/name/shards"
    download(files, key="data.train")
    assert (
        f"{files}: fetching 2 of 2 files, 2.50 GiB, before anything is read, into {hub} (" in said[-1]
        and said[-1].count("\n") == 1
    )
    assert (
        "to need less, name a folder or a glob of files behind the dataset, as in hf://datasets/HuggingFaceFW"
        in said[-1]
    )
    (hub / "datasets--owner--name" / "snapshots" / "5ha" / "shards").mkdir(parents=True)
    for name, words in (("part_0", "fetching 1 of 2 files, 1.50 GiB"), ("part_2", "")):
        (hub / "datasets--owner--name" / "snapshots" / "5ha" / "shards" / f"{name}.parquet").write_text("x")
        download(files, key="data.train")
        assert words in said[-1] and bool(words) == bool(said[-1])
    monkeypatch.setenv("RANK", "1")
    download("hf://datasets/owner/name", key="data.train")
    assert said[-1] == ""


def test_a_place_without_parquet_files_is_refused_before_fetching(hub):
    message = (
        "data.train = .*: no parquet files there, they lie in more, shards; "
        r"name a folder or a glob .* \(a glob of files ends in .parquet\)"
    )
    for inside in ("Shards", "shards/part_*", "README.md"):
        with pytest.raises(ValueError, match=message):
            download(f"hf://datasets/owner/name/{inside}", key="data.train")


def test_one_process_fetches_and_the_others_wait(hub, shards, monkeypatch):
    inside, most = 0, 0

    def fetch(*_, **__):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return str(shards.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: download("hf://datasets/owner/name/shards", key="data.train"), range(4)))
    assert most == 1 and set(folders) == {str(shards)}


def test_a_dataset_of_the_hub_is_fetched_and_split(hub, shards, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(shards.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    data = DataConfig(train="hf://datasets/owner/name@v2/shards")
    assert {text[:7] for text in texts_of(data)} == {"shard 0", "shard 1"}
    assert asked == {
        "name": "owner/name",
        "repo_type": "dataset",
        "revision": "v2",
        "allow_patterns": ["shards/*.parquet"],
    }
    assert len(texts_of(DataConfig(train="hf://datasets/owner/name/shards/part_2.parquet"))) == 10
    assert asked["allow_patterns"] == ["shards/part_2.parquet"] and asked["revision"] is None
    assert len(texts_of(DataConfig(train="hf://datasets/owner/name/shards/*_0.parquet"))) == 10


def test_what_cannot_be_fetched_says_why(monkeypatch):
    def offline(*_, **__):
        # of the library that the hub connects with, whichever it is
        raise HfHubHTTPError.__bases__[0]("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ValueError,
        match=r"data.train = 'hf://datasets/a/b' could not be fetched \(no route\): check the name and the connection",
    ):
        first_batch(DataConfig(train="hf://datasets/a/b"))
    with pytest.raises(ValueError, match=r"data.train = 'hf://datasets/a': write hf://datasets/OWNER/NAME"):
        first_batch(DataConfig(train="hf://datasets/a"))
