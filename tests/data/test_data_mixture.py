"""Several sources with weights: shares, exact resume, other numbers of ranks, and what is refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from corpora import BYTES, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import tiny

from lrt.config import DataConfig, SourceConfig, parse_recipe
from lrt.data import build_loader
from lrt.data.mixture import choose
from lrt.data.sources import open_documents, split_files
from lrt.eval.runs import read_records
from lrt.train.trainer import train

SIZES = {"a": 20, "b": 9, "c": 6}  # documents of a file
WEIGHTS = {"a": 6.0, "b": 3.0, "c": 1.0}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three sources of different sizes, each of one letter; the last has its text in another column."""
    folder = tmp_path_factory.mktemp("sources")
    for letter, count in SIZES.items():
        for part in range(2):
            texts = [letter * length_of(i) for i in range(count)]
            write_parquet(folder / letter / f"{part}.parquet", texts, column="content" if letter == "c" else "text")
    return folder


def mixed(corpora, *, validation="demo", workers=0, weights=WEIGHTS) -> DataConfig:
    sources = tuple(
        SourceConfig(path=str(corpora / name), weight=weight, text_column="content" if name == "c" else None)
        for name, weight in weights.items()
    )
    return DataConfig(sources=sources, validation=validation, workers=workers, buffer_documents=4)


def loader(corpora, *, rank=0, world_size=1, rows=2, length=24, seed=5, split="train", **more):
    return build_loader(
        mixed(corpora, **more),
        tokenizer=BYTES,
        sequence_length=length,
        rows=rows,
        rank=rank,
        world_size=world_size,
        seed=seed,
        split=split,
    )


def length_of(document: int) -> int:
    return 5 + (7 * document) % 30


def letters_in(batch) -> list[str]:
    return [chr(i) for i in batch.input_ids.flatten().tolist() if i != BYTES.bos_id]


def letters_of(batch) -> list[str]:
    """The letter of every row; no row has two."""
    found = []
    for row in batch.input_ids:
        kinds = {chr(i) for i in row.tolist() if i != BYTES.bos_id}
        assert len(kinds) == 1
        found += kinds
    return found


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.floats(0, 1, exclude_max=True), st.integers(0, 10**6))
def test_after_any_number_of_rows_every_source_has_its_share(weights, phase, first):
    shares = [weight / sum(weights) for weight in weights]
    found: Counter = Counter()
    for n in range(1, 400):
        found[choose(first + n - 1, shares=shares, phase=phase)] += 1
        for source, share in enumerate(shares):
            assert abs(found[source] - n * share) < 4


@pytest.mark.parametrize("world_size", [1, 3])
def test_shares_are_the_weights_on_every_rank_and_are_counted(corpora, world_size):
    for rank in range(world_size):
        one = loader(corpora, rank=rank, world_size=world_size)
        found = Counter(letter for _ in range(150) for letter in letters_of(next(one)))
        for name, weight in WEIGHTS.items():
            assert abs(found[name] - 300 * weight / 10) < 4
        assert one.shares == {str(corpora / name): found[name] / 300 for name in WEIGHTS}


def test_streams_do_not_draw_from_one_source_at_the_same_time(corpora):
    drawn = [letters_of(next(loader(corpora, rank=rank, world_size=6, rows=20))) for rank in range(6)]
    assert len(set(map(tuple, drawn))) == 6


@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(0, 20))
def test_a_state_resumes_every_rank_exactly(corpora, world_size, cut):
    for rank in range(world_size):
        whole = loader(corpora, rank=rank, world_size=world_size)
        for _ in range(cut):
            next(whole)
        state = json.loads(json.dumps(whole.state_dict()))
        resumed = loader(corpora, rank=rank, world_size=world_size, seed=99)
        resumed.load_state_dict(state)
        assert resumed.shares == whole.shares
        for _ in range(8):
            one, other = next(whole), next(resumed)
            assert torch.equal(one.input_ids, other.input_ids) and one.source == other.source
        assert resumed.shares == whole.shares and resumed.state_dict() == whole.state_dict()


def test_a_state_resumes_between_two_workers(corpora):
    whole = loader(corpora, workers=2)
    for _ in range(3):
        next(whole)
    resumed = loader(corpora, workers=2)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(6):
        assert torch.equal(next(whole).input_ids, next(resumed).input_ids)
    assert resumed.shares == whole.shares
    rows = [sum(rows) for rows in zip(*(state["rows"] for state in whole.state_dict()["streams"]))]
    assert list(whole.shares.values()) == [count / sum(rows) for count in rows]


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 10))
def test_another_number_of_ranks_reads_what_is_left_of_every_source(corpora, before, after, cut):
    stopped = [loader(corpora, rank=rank, world_size=before) for rank in range(before)]
    used = Counter(letter for one in stopped for _ in range(cut) for letter in letters_in(next(one)))
    states = [one.state_dict() for one in stopped]
    epoch = max(place["epoch"] for state in states for stream in state["streams"] for place in stream["sources"])
    resumed = [loader(corpora, rank=rank, world_size=after) for rank in range(after)]
    for one in resumed:
        one.load_state_dict(states)
    rows = sum(sum(stream["rows"]) for one in resumed for stream in one.state_dict()["streams"])
    assert rows == 2 * cut * before  # what was drawn is still counted
    for one in resumed:
        while one.epoch <= epoch:
            for _ in range(10):
                used.update(letters_in(next(one)))
    documents = open_documents(mixed(corpora), tokenizer=BYTES, split="train")
    places = [place for one in resumed for stream in one.state_dict()["streams"] for place in stream["sources"]]
    waiting = [
        bytes(documents.read(group, [document])[0][offset:]).decode()
        for place in places
        for group, document, offset in place["pieces"]
    ]
    used.update("".join(waiting))
    for letter, count in SIZES.items():
        assert used[letter] >= 2 * sum(length_of(i) for i in range(count))  # nothing of what was begun is lost


def test_held_out_is_the_last_file_of_every_source(corpora):
    data = mixed(corpora, validation="auto")
    assert [path.parent.name + path.stem for path in split_files(data, split="validation")] == ["a1", "b1", "c1"]
    assert [path.parent.name + path.stem for path in split_files(data, split="train")] == ["a0", "b0", "c0"]
    held = loader(corpora, validation="auto", split="validation")
    seen = Counter(chr(i) for batch in held for i in batch.input_ids.flatten().tolist() if i != BYTES.bos_id)
    assert set(seen) == {"a", "b", "c"} and len(held.files()) == 3


def test_what_is_refused(corpora, tmp_path):
    with pytest.raises(ValueError, match=r"data.sources\[1\].path = '.*none': no such file"):
        loader(corpora, weights={"a": 1.0, "none": 1.0})
    with pytest.raises(ValueError, match=r"data.sources\[2\].path has 12 documents for 15 streams"):
        loader(corpora, world_size=15)
    state = loader(corpora).state_dict()
    with pytest.raises(ValueError, match=r"data.sources is not what the checkpoint was trained on"):
        loader(corpora, weights={"b": 3.0, "a": 6.0, "c": 1.0}).load_state_dict(state)
    one_source = build_loader(
        DataConfig(train=str(corpora / "a"), validation="demo"), tokenizer=BYTES, sequence_length=24, rows=2
    )
    with pytest.raises(ValueError, match=r"data.train is not what the checkpoint was trained on"):
        one_source.load_state_dict(state)
    for text, message in (
        ('train = "x"\nsources = [{path = "y"}]', r"data.train = 'x' has no effect beside data.sources"),
        ('sources = [{path = "y"}, {path = "y"}]', r"data.sources names 'y' twice"),
        ('sources = [{path = ""}]', r"data.sources\[0\].path = '' is empty"),
        ('sources = [{path = "y", weight = 0}]', r"data.sources\[0\].weight = 0.0: use a number above 0"),
        ("sources = [{weight = 1}]", r"data.sources\[0\] has no path"),
        ('sources = ["y"]', r"data.sources\[0\] = 'y': expected a table, such as \{path = ..., weight = ...\}"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_recipe(f"[data]\n{text}\n[training]\nsteps = 1")


def sources(corpora, *weights: float) -> str:
    tables = [f'{{path = "{corpora / name}", weight = {weight}}}' for name, weight in zip("ab", weights)]
    return f"[{', '.join(tables)}]"


@pytest.mark.slow
def test_a_run_logs_its_shares_and_goes_on_with_the_same_weights(corpora, tmp_path):
    given = {
        "data.validation": "demo",
        "data.sources": sources(corpora, 3, 1),
        "training.steps": 4,
        "checkpoint.every": 2,
    }
    train(tiny(tmp_path, **given))
    records = [r for r in read_records(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "train"]
    last = records[-1]["data_shares"]
    assert list(last) == [str(corpora / name) for name in "ab"] and last[str(corpora / "a")] == pytest.approx(
        0.75, abs=0.1
    )
    with pytest.raises(ValueError, match=r"data.sources\[0\].weight = 3.0 there, 1.0 here"):
        train(tiny(tmp_path, **{**given, "data.sources": sources(corpora, 1, 1)}))
    moved = corpora.parent / "moved"
    moved.exists() or moved.symlink_to(corpora)
    train(tiny(tmp_path, **{**given, "data.sources": sources(moved, 3, 1), "training.steps": 6}))
    (tmp_path / "other").mkdir()
    train(tiny(tmp_path / "other", **{**given, "training.steps": 6}))
    one, other = (
        [
            (r["loss"], list(r["data_shares"].values()))
            for r in read_records(folder / "tiny" / "metrics.jsonl")
            if r["kind"] == "train"
        ]
        for folder in (tmp_path, tmp_path / "other")
    )
    assert [shares for _, shares in one] == [shares for _, shares in other]
    assert one[0] == other[0]
