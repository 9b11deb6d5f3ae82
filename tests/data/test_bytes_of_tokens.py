"""Bytes of a text are those of the text, whatever its tokenizer does to it:
19 were counted as 25 where a vocabulary marks no spaces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lrt.config import DataConfig
from lrt.data import build_loader, load_tokenizer
from lrt.data.held_out import NOT_SCORED
from lrt.data.prepare import inspect_corpus, tokenize_corpus

TEXTS = ["naïve CAFÉ cafe\u0301 ½ of  it. ", "Hello World\n\n foo ﬁ", " x", "世界 🙂🙂", "the fox"]
CORPUS = ["the quick brown fox jumps over the lazy dog naïve café ½ of it hello world"] * 20
BYTES = pre_tokenizers.ByteLevel.alphabet()
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)


def bpe(pre, *, normalizer=None, decoder=None):
    return (
        models.BPE(),
        pre,
        normalizer,
        decoder,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=BYTES, show_progress=False),
    )


def unigram(pre, *, decoder=None):
    return (
        models.Unigram(),
        pre,
        None,
        decoder,
        trainers.UnigramTrainer(vocab_size=99, unk_token="?", special_tokens=["?"], show_progress=False),
    )


KINDS = {
    "spaces not marked": unigram(pre_tokenizers.WhitespaceSplit()),
    "a space put in front": unigram(pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "word pieces": (
        models.WordPiece(unk_token="?"), pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(),
        decoders.WordPiece(), trainers.WordPieceTrainer(vocab_size=99, special_tokens=["?"], show_progress=False),
    ),
    "NFC": bpe(PLAIN, normalizer=normalizers.NFC(), decoder=decoders.ByteLevel()),
    "NFKC": bpe(PLAIN, normalizer=normalizers.NFKC(), decoder=decoders.ByteLevel()),
    "no decoder": bpe(PLAIN),
    "prefix space": bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), decoder=decoders.ByteLevel()),
    "prepend": bpe(PLAIN, normalizer=normalizers.Prepend("▁"), decoder=decoders.ByteLevel()),
}  # fmt: skip
TABLE_IS_RIGHT = ("NFC", "no decoder")  # of texts as people write them; the other texts' bytes are counted one by one


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, (model, pre, normalizer, decoder, trainer) in KINDS.items():
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre
        for part, value in (("normalizer", normalizer), ("decoder", decoder)):
            if value is not None:
                setattr(tokenizer, part, value)
        tokenizer.train_from_iterator(CORPUS, trainer)
        tokenizer.add_special_tokens(["<s>"])
        made[name] = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save(str(made[name] / "tokenizer.json"))
    return made


@pytest.mark.parametrize("name", KINDS)
@given(st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=30)), max_size=3))
def test_sizes_sum_to_the_text(folders, name, texts):
    tokenizer = load_tokenizer(folders[name])
    for text, ids, (numbers, sizes) in zip(
        texts, tokenizer.encode_documents(texts), tokenizer.measure(texts), strict=True
    ):
        assert numbers.tolist() == ids and sizes.shape == numbers.shape and (sizes >= 0).all()
        assert sizes.sum() == len(text.encode()) or not ids


@pytest.mark.parametrize("name", KINDS)
def test_a_table_that_would_count_wrong_is_refused(folders, name, tmp_path):
    tokenizer = load_tokenizer(folders[name])
    (tmp_path / "text.txt").write_text("\n\n".join(["The fox isn't lazy"] * 40), encoding="utf-8")
    data = DataConfig(train=str(tmp_path / "text.txt"), tokenizer=str(folders[name]))
    tokenize_corpus(data, output=tmp_path / "ids", processes=0)
    tokenized = DataConfig(train="demo", validation=str(tmp_path / "ids"), tokenizer=str(folders[name]))
    assert inspect_corpus(data, sequence_length=8).bytes == 40 * 18
    if name in TABLE_IS_RIGHT:
        assert tokenizer.token_bytes()[tokenizer.encode("The fox isn't lazy")].sum() == 18
        held_out = build_loader(tokenized, tokenizer=tokenizer, sequence_length=16, rows=4, split="validation")
        assert sum(int(batch.sizes.sum()) for batch in held_out) == 40 * 18
    else:
        with pytest.raises(
            ValueError,
            match=r"the bytes of a text do not follow from its token ids \(\d+ would be counted for the \d+ of",
        ):
            build_loader(tokenized, tokenizer=tokenizer, sequence_length=16, rows=4, split="validation")


@pytest.mark.parametrize("name", ["NFC", "word pieces"])
@pytest.mark.parametrize("world", [1, 3])
def test_rows_say_of_every_target_its_document_and_its_bytes(folders, name, world, tmp_path):
    texts = [f"{text} {n}" for n in range(7) for text in ("naïve ½ of it", "the lazy dog jumps over the fox", "x")]
    (tmp_path / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    data = DataConfig(
        train="demo", validation=str(tmp_path / "text.txt"), tokenizer=str(folders[name]), buffer_documents=3
    )
    tokenizer = load_tokenizer(folders[name])
    tokens, size = np.zeros(len(texts), dtype=int), np.zeros(len(texts), dtype=int)
    for rank in range(world):
        loader = build_loader(
            data, tokenizer=tokenizer, sequence_length=9, rows=2, split="validation", rank=rank, world_size=world
        )
        for _ in range(2):  # a second round gives the same rows
            held_out = list(loader)
        assert loader.documents_reached == len(texts) == loader.first_of_group[-1]
        for batch in held_out:
            scored = batch.documents != NOT_SCORED
            assert (batch.targets[scored] != tokenizer.bos_id).all() and (batch.sizes[~scored] == 0).all()
            assert set(batch.targets[~scored].tolist()) <= {tokenizer.bos_id, -100}
            np.add.at(tokens, batch.documents[scored].numpy(), 1)
            np.add.at(size, batch.documents[scored].numpy(), batch.sizes[scored].numpy())
    assert tokens.tolist() == [len(ids) for ids in tokenizer.encode_documents(texts)]
    assert size.tolist() == [len(text.encode()) for text in texts]
