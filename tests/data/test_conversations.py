"""Conversations: templates, what is learned, packing without parts, and what a line may hold."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.config import TuningConfig
from lrt.data import load_tokenizer
from lrt.data.chat import Message, PlainChat, TemplateChat, open_chat, save_chat
from lrt.data.conversations import HeldOutConversations, Packed, TuningLoader, pack
from lrt.data.examples import Example, open_examples, read_examples
from lrt.data.tokenizer import FileTokenizer, tokenizer_json

TALK = (
    Message("user", "2+2?"),
    Message("assistant", "4"),
    Message("user", "so <|end|>?"),
    Message("assistant", "yes\n"),
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level tokenizer with special tokens and a chat template, as Hugging Face saves one."""
    place = tmp_path_factory.mktemp("chat")
    text = tokenizer_json({bytes([i]): i for i in range(256)}, pattern=r"\S+|\s+", special=SPECIAL)
    (place / "tokenizer.json").write_text(text)
    (place / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": "<|end|>", "chat_template": TEMPLATE})
    )
    return place


def learned_text(chat, tokenizer, messages):
    one = chat.encode(messages)
    return bytes(int(t) for t in one.tokens[one.learned] if t < 256).decode(), [
        int(t) for t in one.tokens[one.learned] if t >= 256
    ]


def test_the_plain_template_marks_answers_and_their_ends():
    tokenizer = load_tokenizer("bytes")
    chat = open_chat(tokenizer, "bytes")
    assert isinstance(chat, PlainChat) and chat.stop_ids == (4, 256)
    one = chat.encode(TALK)
    assert one.tokens[0] == 256 and not one.learned[0]
    assert (
        bytes(one.tokens[1:].astype(np.uint8)).decode()
        == "user: 2+2?\x04\nassistant: 4\x04\nuser: so <|end|>?\x04\nassistant: yes\n\x04"
    )
    assert learned_text(chat, tokenizer, TALK) == ("4\x04yes\n\x04", [])


def test_the_template_of_a_tokenizer_marks_the_same(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    chat = open_chat(tokenizer, folder)
    assert isinstance(chat, TemplateChat) and chat.stop_ids == (257, 256)
    one = chat.encode(TALK)
    # What a user wrote stays text, even where it looks like a special token; the template's own are special.
    assert list(one.tokens).count(257) == 4 and list(one.tokens).count(256) == 1
    assert learned_text(chat, tokenizer, TALK) == ("4yes\n", [257, 257])
    tokenizer.save(tmp_path)
    save_chat(chat, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text().replace("chat_template", "other")
    )
    assert np.array_equal(open_chat(load_tokenizer(tmp_path), tmp_path).encode(TALK).tokens, one.tokens)


def test_what_ends_a_turn_is_learned_where_it_is_not_the_eos(folder, tmp_path):
    """A decoder without tuning often ends texts with one token, and its template ends turns with another."""
    text = tokenizer_json({bytes([i]): i for i in range(256)}, pattern=r"\S+|\s+", special=(*SPECIAL, "<|endoftext|>"))
    (tmp_path / "tokenizer.json").write_text(text)
    names = {"bos_token": "<|bos|>", "eos_token": "<|endoftext|>"}
    for last in ("", "<|endoftext|>"):  # some templates write the eos too, behind the last turn
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TEMPLATE + last}))
        tokenizer = load_tokenizer(tmp_path)
        chat = open_chat(tokenizer, tmp_path)
        assert chat.stop_ids == (257, 261, 256)
        assert learned_text(chat, tokenizer, TALK) == ("4yes\n", [257, 257])
    bare = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": bare}))
    with pytest.raises(ValueError, match="ends an answer with no token of its own, so a model could not learn to end"):
        open_chat(tokenizer, tmp_path).encode(TALK)


@pytest.mark.parametrize("kind", ["plain", "template"])
def test_a_prompt_is_the_beginning_of_what_was_learned(kind, folder):
    place = folder if kind == "template" else "bytes"
    chat = open_chat(load_tokenizer(place), place)
    one = chat.encode(TALK)
    for end in (1, 3):
        prompt = chat.prompt(TALK[:end])
        assert (
            one.tokens[: len(prompt)].tolist() == prompt
            and one.learned[len(prompt)]
            and not one.learned[len(prompt) - 1]
        )


def test_templates_that_cannot_be_used_are_refused(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match="a chat template beside a tokenizer of bytes"):
        TemplateChat(load_tokenizer("bytes"), source="{{ 1 }}", folder=folder, names={})

    def chat(source):
        return TemplateChat(tokenizer, source=source, folder=folder, names={})

    with pytest.raises(ValueError, match="leaves out a message, or changes its text"):
        chat("{{ messages[0]['content'] }}").encode(TALK)
    with pytest.raises(ValueError, match="the tokenizer's chat template refuses a conversation of user, assistant: no"):
        chat("{{ raise_exception('no') }}").encode(TALK[:2])
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["vocab"] = {"a": 0, "b": 1}
    words["model"]["merges"] = []
    words["added_tokens"] = [{**words["added_tokens"][0], "id": 2}]
    with pytest.raises(ValueError, match="no eos token and no token for the character 4"):
        PlainChat(FileTokenizer(json.dumps(words)))


# ------------------------------------------------------------------ rows


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60), length=st.integers(20, 40), seed=st.integers(0, 5))
def test_rows_hold_every_conversation_whole_and_once(sizes, length, seed):
    order = np.random.default_rng(seed).permutation(len(sizes)).tolist()
    rows = pack(sizes, order, length=length)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[number] for number in row) <= length for row in rows)
    assert rows[0][0] == order[0]
    assert sum(sum(sizes[n] for n in row) <= length // 2 for row in rows) <= 1  # two such rows would be one


def examples(count=40):
    return [
        Example((Message("user", "u" * (i % 7 + 1)), Message("assistant", "a" * (i % 5 + 1))), "a", i % 3)
        for i in range(count)
    ]


def packed(length=81):
    tokenizer = load_tokenizer("bytes")
    chat = open_chat(tokenizer, "bytes")
    return Packed(examples(), chat, tokenizer, length=length, key="tuning.train"), tokenizer, chat


def test_targets_are_the_answers_and_nothing_else():
    whole, _, chat = packed()
    loader = TuningLoader(whole, rows=2, rank=0, world_size=1, seed=1)
    for _ in range(6):
        batch = next(loader)
        for inputs, targets in zip(batch.input_ids.tolist(), batch.targets.tolist()):
            text = bytes(t if t < 256 else 0 for t in inputs).decode()
            starts = [match.end() for match in re.finditer("assistant: ", text)]
            expected = [-100] * len(inputs)
            for start in starts:
                end = text.find("\x04", start)
                end = len(inputs) if end < 0 else end  # the last token of a full row is a target alone
                expected[start - 1 : end] = [*inputs[start:end], 4]
            assert targets == expected


def test_a_loader_goes_on_where_it_was_and_ranks_share_its_rows():
    whole, *_ = packed()
    options = {"world_size": 1, "rank": 0, "seed": 1, "rows": 4}
    loader = TuningLoader(whole, **options)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    following = [next(loader) for _ in range(4)]
    assert loader.epoch > 0
    again = TuningLoader(whole, **options)
    again.load_state_dict([state])
    halves = [TuningLoader(whole, **{**options, "rows": 2, "world_size": 2, "rank": rank}) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict([state, state])
    for batch in following:
        same, parts = next(again), [next(half) for half in halves]
        assert (
            batch.input_ids.equal(same.input_ids) and batch.targets.equal(same.targets) and batch.source == same.source
        )
        assert batch.input_ids.tolist() == [row for part in parts for row in part.input_ids.tolist()]
    with pytest.raises(ValueError, match="tuning.train is not what the checkpoint was trained on"):
        again.load_state_dict({**state, "conversations": "other"})


def test_held_out_rows_count_the_bytes_of_answers():
    whole, tokenizer, chat = packed()
    rows = HeldOutConversations(whole, tokenizer, ends=chat.stop_ids, rows=3, rank=0, world_size=1, limit=100)
    batches = list(rows)
    sizes, documents = (
        np.concatenate([getattr(b, name).numpy().ravel() for b in batches]) for name in ("sizes", "documents")
    )
    answers = [len(one.messages[1].content) for one in examples()]
    assert sizes.sum() == sum(answers) and rows.documents_reached == 40
    for number, size in enumerate(answers):
        assert sizes[documents == number].sum() == size
    ranks = [
        list(HeldOutConversations(whole, tokenizer, ends=chat.stop_ids, rows=3, rank=r, world_size=2, limit=100))
        for r in (0, 1)
    ]
    assert len(ranks[0]) == len(ranks[1])
    assert sum(int(b.sizes.sum()) for part in ranks for b in part) == sizes.sum()


def test_what_is_longer_than_a_row_is_left_out_and_counted():
    whole, *_ = packed(length=28)
    assert 0 < whole.left_out < 40 and len(whole.kept) == 40 - whole.left_out and max(whole.sizes) <= 28
    with pytest.raises(
        ValueError, match="model.sequence_length = 9, but every conversation of tuning.train is longer: use 22 or more"
    ):
        packed(length=10)


# ------------------------------------------------------------------ files


def test_lines_of_both_kinds_are_read(tmp_path):
    path = tmp_path / "talks.jsonl"
    lines = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"prompt": "p", "completion": "<<1+1=2>> #### 2", "steps": 1},
        {"prompt": "p", "completion": "c", "answer": 7},
        {"messages": None, "prompt": "p", "completion": "#### 3", "answer": None, "steps": None},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = read_examples(str(tmp_path), key="tuning.train")
    assert [one.answer for one in found] == ["a", "2", "7", "3"] and [one.steps for one in found] == [
        None,
        1,
        None,
        None,
    ]
    assert [[m.role for m in one.messages] for one in found] == [
        ["system", "user", "assistant"],
        *[["user", "assistant"]] * 3,
    ]
    both = [open_examples(TuningConfig(train=str(path)), split=split) for split in ("train", "validation")]
    assert [len(part) for part in both] == [3, 1]
    given = TuningConfig(train=str(path), validation=str(path))
    assert open_examples(given, split="validation") == found == open_examples(given, split="train")


def test_the_built_in_problems_are_held_out_too():
    train, held_out = (open_examples(TuningConfig(), split=split) for split in ("train", "validation"))
    assert (
        len(train) == 20000
        and len(held_out) == 300
        and not {one.messages for one in train} & {one.messages for one in held_out}
    )
    assert {one.steps for one in held_out} == {1, 2, 3}


BAD = {
    "{": "line 1 is not JSON in UTF-8",
    "3": "line 1 is no object: a conversation has messages, or prompt and completion",
    '{"text": "x"}': "line 1 has text: a conversation has messages",
    '{"messages": [{"role": "robot", "content": "x"}]}': "line 1 has a message with role 'robot'",
    '{"prompt": "x", "completion": 3}': "line 1 has a message with role 'assistant' and a content of type int",
    '{"messages": [{"role": "user", "content": "x"}]}': "line 1 ends with a message of user: "
    "the last one is the assistant's",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "line 1 is an answer with nothing before it",
    "": "holds no conversation",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named(line, tmp_path):
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(ValueError, match=re.escape(BAD[line])):
        read_examples(str(tmp_path / "bad.jsonl"), key="tuning.train")
    with pytest.raises(ValueError, match=r'tuning.train = ".*" is no .jsonl file, and no folder or glob'):
        read_examples(str(tmp_path / "nothing.jsonl"), key="tuning.train")
