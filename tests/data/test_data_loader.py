"""The loader of each rank: shares, resume with any number of ranks and workers, validation, errors."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lrt.config import DataConfig
from lrt.data import CorruptShard, build_loader, load_tokenizer
from lrt.data.batch import IGNORED, make_batch
from lrt.data.loader import usual_workers
from lrt.data.packing import Row

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """90 documents of 10 to 40 letters; document i is made of the number i."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(f"<{i}>" * (4 + i % 7) for i in range(90)), encoding="utf-8")
    return path


def train(corpus, *, rank=0, world_size=1, workers=0, rows=2, length=24, seed=5, **more):
    data = DataConfig(train=str(corpus), validation="demo", workers=workers, buffer_documents=8, **more)
    return build_loader(
        data, tokenizer=BYTES, sequence_length=length, rows=rows, rank=rank, world_size=world_size, seed=seed
    )


def take(loader, count):
    return [next(loader).input_ids for _ in range(count)]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def pieces_seen(batches) -> Counter:
    """How often each (document, offset) was put into a row."""
    found: Counter = Counter()
    for batch in batches:
        for row in batch.source:
            group, _, documents = row.rpartition("[")[2].partition("]: ")
            for part in row.split("; "):
                group, _, documents = part.rpartition("[")[2].partition("]: ")
                found.update((int(group), d.strip()) for d in documents.split(","))
    return found


class Operators(TorchDispatchMode):
    """Notes which operators of torch are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


def test_a_batch_is_made_without_torchs_thread_pool():
    """A copy shared out over two threads of a busy host took 400 times as long, and small models waited for it."""
    rows = [Row(np.arange(n, n + 1025), 1025 - n, [(0, n, 0)], [(0, 1025 - n)]) for n in range(64)]
    with Operators() as operators:
        batch = make_batch(rows, SimpleNamespace(name=str))
    assert operators.seen <= {torch.ops.aten.lift_fresh.default}  # what takes up an array, no copy
    assert batch.input_ids.is_contiguous() and batch.targets.is_contiguous()
    for n in (0, 63):
        assert torch.equal(batch.input_ids[n], torch.arange(n, n + 1024))
        assert torch.equal(
            batch.targets[n], torch.arange(n + 1, n + 1025).where(torch.arange(1024) < 1024 - n, IGNORED)
        )


def test_a_run_that_names_no_workers_has_some_beside_a_gpu(corpus, monkeypatch):
    assert train(corpus, workers=None).workers == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [usual_workers(documents=n) for n in (1000, 192, 191, 64, 63, 0)] == [3, 3, 2, 1, 0, 0]
    loaders = [train(corpus, workers=workers) for workers in (None, 0, 2)]  # 90 documents
    assert [loader.workers for loader in loaders] == [1, 0, 2]
    assert train(corpus, workers=None, world_size=2, rank=1).workers == 0


def test_batches_are_small_plain_data(corpus):
    batch = next(train(corpus, rows=3))
    assert (
        batch.input_ids.shape == batch.targets.shape == (3, 24)
        and batch.input_ids.dtype == batch.targets.dtype == torch.int64
    )
    assert (batch.input_ids[:, 0] == BYTES.bos_id).all() and torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
    assert (batch.targets != IGNORED).all()
    assert pickle.loads(pickle.dumps(batch)).source == batch.source and len(batch.source) == 3


@given(st.integers(1, 3), st.integers(0, 20))
def test_a_state_resumes_every_rank_exactly(corpus, world_size, cut):
    for rank in range(world_size):
        loader = train(corpus, rank=rank, world_size=world_size)
        take(loader, cut)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = train(corpus, rank=rank, world_size=world_size, seed=99)  # the state's seed wins
        resumed.load_state_dict(state)
        assert same(take(loader, 8), take(resumed, 8))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 12))
def test_another_number_of_ranks_goes_on_without_loss(corpus, before, after, cut):
    stopped = [train(corpus, rank=rank, world_size=before) for rank in range(before)]
    seen = [next(loader) for loader in stopped for _ in range(cut)]
    states = [loader.state_dict() for loader in stopped]
    resumed = [train(corpus, rank=rank, world_size=after) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(list(reversed(states)))
    target = 1 + max(stream["epoch"] for state in states for stream in state["streams"])
    found = pieces_seen(seen)
    for loader in resumed:
        while loader.state_dict()["streams"][0]["epoch"] <= target:
            found.update(pieces_seen([next(loader)]))
    beginnings = Counter({key: count for key, count in found.items() if "+" not in key[1]})
    assert len(beginnings) == 90  # every document, and no document much more often than another
    assert max(beginnings.values()) - min(beginnings.values()) <= 2


def test_ranks_share_an_epoch_without_overlap(corpus):
    shares = []
    for rank in range(3):
        loader = train(corpus, rank=rank, world_size=3, rows=1)
        seen: Counter = Counter()
        while loader.state_dict()["streams"][0]["epoch"] == 0:
            seen.update(pieces_seen([next(loader)]))
        shares.append({key for key in seen if "+" not in key[1]})
    firsts = [len(share) for share in shares]
    assert sum(firsts) >= 90 - 3 * 8 and len(set.union(*shares)) >= sum(firsts) - 3 * 8


def test_workers_give_what_their_state_says_and_resume_into_another_number(corpus):
    alone = take(train(corpus), 10)
    one, two = train(corpus, workers=1), train(corpus, workers=2)
    assert same(alone, take(one, 10))  # one stream, whoever reads it
    take(two, 5)  # an odd number: worker 1 has the next turn
    state = json.loads(json.dumps(two.state_dict()))
    expected = take(two, 6)
    again = train(corpus, workers=2)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert same(expected, take(again, 6))
    fewer = train(corpus, workers=0)
    fewer.load_state_dict([state])
    unread = sum(len(stream["pieces"]) for stream in state["streams"])
    assert len(fewer.state_dict()["plan"]["owed"]) > unread and fewer.epoch == 0
    take(fewer, 3)


def test_workers_end_with_a_process_that_still_holds_its_loader(corpus):
    """Torch ends them with SIGTERM, which they outlive for a minute, since it may be meant for the trainer."""
    code = f"""
from lrt.config import DataConfig
from lrt.data import build_loader, load_tokenizer
data = DataConfig(train={str(corpus)!r}, validation="demo", workers=2, buffer_documents=8)
loader = build_loader(data, tokenizer=load_tokenizer("bytes"), sequence_length=24, rows=2)
next(loader)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert done.returncode == 0 and not done.stderr


def test_a_worker_that_fails_names_the_file(corpus, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(corpus.read_text())
    loader = train(path, workers=1)
    path.write_bytes(path.read_bytes()[:-3] + b"\xff\xff\xff")
    for _ in range(2):  # it stays an error, of one line
        with pytest.raises(CorruptShard, match=r"^[^\n]*text.txt cannot be read .*data.on_corrupt[^\n]*$"):
            take(loader, 50)


def test_states_of_other_data_or_missing_ranks_are_refused(corpus, tmp_path):
    state = train(corpus, world_size=2).state_dict()
    with pytest.raises(
        ValueError,
        match=r"ran on 2 ranks x 1 streams, this run has 1 x 1: to deal the data again the states of all ranks are "
        r"needed, got ranks",
    ):
        train(corpus).load_state_dict(state)
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text())
    with pytest.raises(ValueError, match=r"data.train is not what the checkpoint was trained on"):
        train(other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data.tokenizer is not what the checkpoint was trained on"):
        train(corpus).load_state_dict(train(corpus).state_dict() | {"tokenizer": "x"})


def test_the_epoch_counts_up_and_the_order_follows_the_seed(corpus):
    loader = train(corpus)
    assert loader.epoch == 0
    take(loader, 150)
    assert loader.epoch >= 1
    assert same(take(train(corpus, seed=5), 5), take(train(corpus, seed=6, shuffle_seed=5), 5))
    assert not same(take(train(corpus, seed=5), 5), take(train(corpus, seed=6), 5))


# ------------------------------------------------------------------ validation


def validation(corpus, *, rank=0, world_size=1, rows=2, limit_tokens=None):
    data = DataConfig(train="demo", validation=str(corpus), buffer_documents=8)
    return build_loader(
        data,
        tokenizer=BYTES,
        sequence_length=24,
        rows=rows,
        rank=rank,
        world_size=world_size,
        split="validation",
        limit_tokens=limit_tokens,
    )


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([None, 1, 24, 200]))
def test_validation_scores_the_same_rows_for_every_number_of_ranks(corpus, world_size, rows, limit):
    reference = [
        row
        for batch in validation(corpus, rows=1, limit_tokens=limit)
        for row in zip(batch.input_ids.tolist(), batch.targets.tolist())
    ]
    loaders = [
        list(validation(corpus, rank=r, world_size=world_size, rows=rows, limit_tokens=limit))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in loaders}) == 1
    found = [
        row for step in zip(*loaders) for batch in step for row in zip(batch.input_ids.tolist(), batch.targets.tolist())
    ]
    assert found[: len(reference)] == reference
    assert all(set(targets) == {IGNORED} for _, targets in found[len(reference) :])
    if limit is not None:
        assert len(reference) == -(-limit // 24)


def test_validation_goes_once_reads_everything_and_starts_anew(corpus):
    loader = validation(corpus)
    first, second = list(loader), list(loader)
    assert same([b.input_ids for b in first], [b.input_ids for b in second])
    targets = torch.cat([b.targets for b in first])
    scored = targets[(targets != IGNORED) & (targets != BYTES.bos_id)]
    texts = corpus.read_text().split("\n\n")
    assert Counter(scored.tolist()) == Counter("".join(texts).encode())


def test_validation_resumes_behind_the_batches_given(corpus):
    loader = validation(corpus)
    batches = iter(loader)
    next(batches), next(batches)
    resumed = validation(corpus)
    resumed.load_state_dict(loader.state_dict())
    assert same([b.input_ids for b in resumed], [b.input_ids for b in batches])


def test_the_demo_trains_and_holds_out_different_text():
    loaders = [
        build_loader(DataConfig(), tokenizer=BYTES, sequence_length=256, rows=4, split=split)
        for split in ("train", "validation")
    ]
    files = [
        {row.rpartition("/")[2].partition("[")[0] for _ in range(20) for row in next(it).source}
        for it in map(iter, loaders)
    ]
    assert all("_train.txt" in name for name in files[0]) and all("_validation.txt" in name for name in files[1])
    scored = sum(int((batch.targets != IGNORED).sum()) for batch in loaders[1])
    assert 95_000 < scored < 110_000


# ------------------------------------------------------------------ bad input


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("only a few words\n\nand a few more")
    message = (
        "length = 64, but data.train has only 32 tokens: sequence longer than the corpus; "
        "use model.sequence_length = 31 or less"
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "short.txt", length=64)
    assert next(train(tmp_path / "short.txt", length=31, rows=1)).input_ids.shape == (1, 31)


def test_more_streams_than_documents_are_refused(tmp_path):
    (tmp_path / "two.txt").write_text("a" * 100 + "\n\n" + "b" * 100)
    with pytest.raises(
        ValueError,
        match=r"data.train has 2 documents for 3 streams \(3 ranks x 1 workers\): use data.workers = 0, fewer ranks",
    ):
        train(tmp_path / "two.txt", world_size=3)


def test_numbers_that_make_no_sense_are_refused(corpus):
    with pytest.raises(ValueError, match=r"data.workers = -1: use 0 or more"):
        train(corpus, workers=-1)
    with pytest.raises(ValueError, match=r"data.buffer_documents = 0: use 1 or more"):
        build_loader(DataConfig(buffer_documents=0), tokenizer=BYTES, sequence_length=8, rows=1)


def test_a_wrong_split_is_refused(corpus):
    with pytest.raises(ValueError, match=r'split = \'test\': use "train" or "validation"'):
        build_loader(DataConfig(train=str(corpus)), tokenizer=BYTES, sequence_length=8, rows=1, split="test")
