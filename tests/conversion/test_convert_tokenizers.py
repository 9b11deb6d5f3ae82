"""The tokenizer arrives with its model: the same ids on every side, special tokens, separator, bytes a token."""

import json
import pickle

import pytest
import torch
from conversions import NANOCHAT, quiet
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.conversion import convert
from lrt.conversion.tokenizers import (
    hub_files,
    read_encoding,
    read_files,
    read_nanochat,
    without_hub_files,
    write_files,
    write_nanochat,
)
from lrt.data.tokenizer import ByteTokenizer, load_tokenizer

tiktoken = pytest.importorskip("tiktoken")

FOLDER = NANOCHAT / "tokenizer"
SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]
SPECIAL += ["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
WORDS = st.sampled_from(
    [*"the, the,thing,ing, in, and,on,re, s,it's,I'LL,123456,née,☃".split(","), "\r\n", "  ", "<|bos|>"]
)
TEXTS = st.lists(st.one_of(WORDS, st.text(max_size=6)), max_size=12).map("".join)


@pytest.fixture(scope="module")
def theirs():
    """The official tokenizer itself; this file is our own, so it may be unpickled."""
    return pickle.loads((FOLDER / "tokenizer.pkl").read_bytes())


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    write_files(place, read_nanochat(FOLDER))
    return load_tokenizer(place)


@settings(max_examples=300)
@given(text=TEXTS)
def test_the_same_ids_as_nanochat(theirs, ours, text):
    text = text.encode("utf-8", "replace").decode()
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_special_tokens_and_separator(theirs, ours):
    assert ours.vocab_size == theirs.n_vocab == 280 and ours.bos_id == theirs.encode_single_token("<|bos|>") == 271
    table = json.loads(read_nanochat(FOLDER)["tokenizer.json"])
    assert {t["content"]: t["id"] for t in table["added_tokens"]} == {name: 271 + i for i, name in enumerate(SPECIAL)}
    assert ours.eos_id is None


def test_the_way_back_to_nanochat(tmp_path, theirs):
    assert write_nanochat(tmp_path, read_nanochat(FOLDER), vocab_size=280) == []
    back = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert isinstance(back, tiktoken.Encoding) and sorted(p.name for p in tmp_path.iterdir()) == [
        "token_bytes.pt",
        "tokenizer.pkl",
    ]
    assert (back._mergeable_ranks, back._special_tokens, back._pat_str) == (
        theirs._mergeable_ranks,
        theirs._special_tokens,
        theirs._pat_str,
    )
    tables = [torch.load(p / "token_bytes.pt", weights_only=True) for p in (tmp_path, FOLDER)]
    assert torch.equal(*tables) and tables[0].dtype == torch.int32


def test_bytes_per_token_travel_as_they_were_and_ours_are_right(ours):
    """The official table counts a lone byte above 127 as 3 (U+FFFD); it is kept for comparison, ours counts 1."""
    recorded = json.loads(read_nanochat(FOLDER)["token_bytes.json"])
    assert recorded[200] == 3 and ours.token_bytes()[200] == 1
    assert recorded[:128] == ours.token_bytes()[:128].tolist() and recorded[256:] == ours.token_bytes()[256:].tolist()


def test_a_table_is_made_where_none_is_recorded(tmp_path):
    files = {name: content for name, content in read_nanochat(FOLDER).items() if name != "token_bytes.json"}
    notes = write_nanochat(tmp_path, files, vocab_size=300)
    table = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert table[200] == 1 and table[271:].sum() == 0 and "280 ids and the model 300" in notes[0]


def test_a_tokenizer_that_tiktoken_cannot_say_is_copied_and_said(tmp_path):
    ByteTokenizer().save(tmp_path / "bytes")
    notes = write_nanochat(tmp_path / "out", read_files(tmp_path / "bytes"), vocab_size=257)
    assert "tokenizer.json was copied" in notes[0] and load_tokenizer(tmp_path / "out").bos_id == 256


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (pickle.dumps({"name": "x"}), "not the pickle of a plain tiktoken encoding"),
        (pickle.dumps([1, 2]), "not the pickle of a plain tiktoken encoding"),
        (b"not a pickle", "not the pickle of a plain tiktoken encoding"),
        (pickle.dumps(print), "refers to builtins.print"),
    ],
)
def test_other_pickles_are_refused_with_the_way_out(tmp_path, content, match):
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=match + ".*--tokenizer"):
        read_nanochat(tmp_path)


def test_a_public_encoding_is_named(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(
        b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + pickle.dumps("gpt2", protocol=3)[2:-1] + b"b."
    )
    with pytest.raises(ValueError, match="public tiktoken encoding 'gpt2'"):
        read_encoding(tmp_path / "tokenizer.pkl")


def test_hugging_face_and_back():
    files = read_nanochat(FOLDER)
    there = hub_files(files, context=64)
    assert (
        json.loads(there["tokenizer_config.json"])["bos_token"] == "<|bos|>"
        and there["tokenizer.json"] != files["tokenizer.json"]
    )
    back = without_hub_files(there)
    assert back.keys() == files.keys() and all(json.loads(back[name]) == json.loads(files[name]) for name in files)


def test_a_hugging_face_tokenizer_travels_as_it_is(tmp_path):
    """What a Hugging Face folder says about its tokenizer is not ours to rewrite."""
    foreign = {
        "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b'{"bos_token": "<s>"}',
        "chat_template.jinja": b"{{ messages }}",
    }
    assert hub_files(foreign, context=64) == foreign and without_hub_files(foreign) == foreign


def test_a_given_tokenizer_wins(tmp_path):
    ByteTokenizer().save(tmp_path / "bytes")
    source = NANOCHAT / "base_checkpoints" / "d2_lrt"
    convert(source, tmp_path / "out", source="official", target="hf", tokenizer=tmp_path / "bytes", report=quiet)
    assert load_tokenizer(tmp_path / "out").bos_id == 256
    convert(source, tmp_path / "other", source="official", target="hf", report=quiet)
    assert load_tokenizer(tmp_path / "other").bos_id == 271


def test_transformers_reads_it(tmp_path, theirs):
    transformers = pytest.importorskip("transformers")
    convert(NANOCHAT / "base_checkpoints" / "d2_lrt", tmp_path / "hf", source="official", target="hf", report=quiet)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "The thing and the other in there, née ☃"
    assert tokenizer(text).input_ids == [271, *theirs.encode_ordinary(text)]
    assert tokenizer.convert_tokens_to_ids("<|user_start|>") == 272
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
