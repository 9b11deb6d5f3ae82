"""Tokenizers: text comes back, bytes are counted, files are recognised or refused."""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt.config import DataConfig
from lrt.data import check_vocabulary, load_tokenizer
from lrt.data.prepare import train_tokenizer

SAMPLE = "The counsel of Yahweh stands fast forever, 1234 times; naïve café — don't."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(DataConfig(), vocab_size=600, output=folder, limit_bytes=200_000), folder


@pytest.fixture(params=["bytes", "trained"])
def tokenizer(request, trained):
    return load_tokenizer("bytes") if request.param == "bytes" else trained[0]


@given(st.text(max_size=60), st.text(max_size=60))
def test_text_comes_back_and_bytes_are_counted(trained, one, two):
    for tokenizer in (load_tokenizer("bytes"), trained[0]):
        ids = tokenizer.encode(one)
        assert tokenizer.decode(ids) == one and tokenizer.decode([tokenizer.bos_id, *ids]) == one
        assert tokenizer.encode_documents([one, two]) == [ids, tokenizer.encode(two)]
        assert tokenizer.token_bytes()[ids].sum() == len(one.encode())


def test_the_separator_is_never_made_from_text(tokenizer):
    ids = tokenizer.encode("a <|bos|> b <|endoftext|> c")
    assert tokenizer.bos_id not in ids and tokenizer.decode(ids) == "a <|bos|> b <|endoftext|> c"
    assert tokenizer.token_bytes()[tokenizer.bos_id] == 0
    widths = tokenizer.token_bytes()
    assert widths.shape == (tokenizer.vocab_size,) and widths.dtype == np.int64


def test_saving_and_pickling_keep_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for copy in (
        load_tokenizer(tmp_path),
        load_tokenizer(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert copy.fingerprint == tokenizer.fingerprint and re.fullmatch("[0-9a-f]{64}", copy.fingerprint)
        assert (copy.bos_id, copy.eos_id, copy.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)
        assert copy.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_the_saved_bytes_are_also_a_tokenizer_of_the_library(tmp_path):
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path)
    twin = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert twin.encode(SAMPLE).ids == tokenizer.encode(SAMPLE) and twin.token_to_id("<|bos|>") == tokenizer.bos_id


def test_the_trained_folder_holds_the_bytes_per_token(trained):
    tokenizer, folder = trained
    assert tokenizer.vocab_size == 600 and len(tokenizer.encode(SAMPLE)) < len(SAMPLE.encode())
    assert (np.load(folder / "token_bytes.npy") == tokenizer.token_bytes()).all()


def merge_by_rank(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """What a rank file means: join the two neighbours with the lowest joint rank until there are none."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        joint = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joint:
            return [ranks[part] for part in parts]
        _, i = min(joint)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_a_rank_file_merges_by_rank(tmp_path):
    pairs = [b"ab", b"ca", b"aa", b"abc", b"bca", b"aab", b"caab", b" a", b" ab", b"aaaa"]
    ranks = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + pairs)}
    path = tmp_path / "small.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (267, 266)
    rng = np.random.default_rng(0)
    for _ in range(200):
        word = "".join(rng.choice(list("abc"), size=rng.integers(1, 12)))
        assert tokenizer.encode(word) == merge_by_rank(word.encode(), ranks)
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert tokenizer.token_bytes()[tokenizer.encode(SAMPLE)].sum() == len(SAMPLE.encode())


def test_a_foreign_folder_says_its_separator_in_its_configuration(trained, tmp_path):
    from tokenizers import Tokenizer

    foreign = Tokenizer.from_str((trained[1] / "tokenizer.json").read_text())
    foreign.add_special_tokens(["<start>", "<stop>"])
    foreign.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).bos_id == foreign.token_to_id("<|bos|>")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<start>"}, "eos_token": "<stop>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (foreign.token_to_id("<start>"), foreign.token_to_id("<stop>"))


def test_transformers_reads_the_separator_of_a_saved_tokenizer(trained, tmp_path):
    """lm-evaluation-harness asks for both tokens; a text ends where the separator of the next one stands."""
    transformers = pytest.importorskip("transformers")
    for name, tokenizer in (("bytes", load_tokenizer("bytes")), ("trained", load_tokenizer(trained[1]))):
        tokenizer.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert (theirs.bos_token, theirs.eos_token, theirs.bos_token_id) == ("<|bos|>", "<|bos|>", tokenizer.bos_id)
        assert theirs(SAMPLE, add_special_tokens=False).input_ids == tokenizer.encode(SAMPLE)
        again = load_tokenizer(tmp_path / name)
        assert (again.bos_id, again.eos_id, again.fingerprint) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.fingerprint,
        )


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r'data.tokenizer = ".*nowhere": no file .*nowhere; use "bytes", a tokenizer.json'
    ):
        load_tokenizer(tmp_path / "nowhere")
    for name in ("my words", "my words/tokenizer.json"):
        command = (
            "or train one: python tools/prepare_data.py train-tokenizer --train DATA --vocab-size N .*--output "
            f"'{tmp_path}/my words' "
        )
        with pytest.raises(ValueError, match=command + r"\(DATA as in data.train, N = model.vocab_size\)"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"data.tokenizer: .*tokenizer.json is not a tokenizer.json of the tokenizers library"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.tiktoken").write_text("YQ== 0\nnonsense\n")
    with pytest.raises(ValueError, match=r'bad.tiktoken": line 2 is not "base64 rank"'):
        load_tokenizer(tmp_path / "bad.tiktoken")


def test_a_tokenizer_without_separator_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"has no separator token \(looked for <\|bos\|>, .*\): add <\|bos\|> to its special tokens"
    ):
        load_tokenizer(tmp_path)


def test_a_vocabulary_larger_than_the_models_is_refused():
    check_vocabulary(load_tokenizer("bytes"), 257)
    with pytest.raises(
        ValueError,
        match=r"model.vocab_size = 256, but the tokenizer of data.tokenizer has 257 ids: "
        r"use model.vocab_size = 257 or more",
    ):
        check_vocabulary(load_tokenizer("bytes"), 256)
