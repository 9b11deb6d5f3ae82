"""Conversations as tokens: a tokenizer's chat template, or a plain one, and which tokens a model is to learn.

What people wrote is tokenized as plain text, so that no special token can be written into a message; only the template
makes special tokens. A model learns the answers of the assistant and the token that ends each, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lrt.config.files import read_text
from lrt.data.tokenizer import HUB_CONFIG, FileTokenizer, Tokenizer, read_object, token_name

END = "\x04"  # of a turn, where the tokenizer has no token for it: end of transmission
TEMPLATE = "chat_template.jinja"
ROLES = ("system", "user", "assistant")
PLACE = re.compile("\ue000(\\d+)\ue001")  # stands for a message's content while the template is rendered


class Message(NamedTuple):
    role: str  # of ROLES
    content: str


class Conversation(NamedTuple):
    """Tokens of a conversation, the separator in front, and which of them are learned."""

    tokens: np.ndarray  # (n,) int64
    learned: np.ndarray  # (n,) bool


class Chat(Protocol):
    """How messages become tokens."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""

    def encode(self, messages: Sequence[Message]) -> Conversation:
        """A whole conversation."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation that the assistant is to go on with."""


# ------------------------------------------------------------------ the two kinds


class PlainChat:
    """``user: ...`` and ``assistant: ...``, a line each, for tokenizers without a template.

    Args:
        tokenizer: its eos ends a turn, or the control character that means so.

    Raises:
        ValueError: it has neither.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        end = [tokenizer.eos_id] if tokenizer.eos_id is not None else tokenizer.encode(END)
        if len(end) != 1:
            raise ValueError(
                "data.tokenizer has no eos token and no token for the character 4, "
                "so nothing could end an answer: add an eos token"
            )
        self._end: list[int] = end
        self.stop_ids: tuple[int, ...] = (end[0], tokenizer.bos_id)

    def encode(self, messages: Sequence[Message]) -> Conversation:
        parts = [([self._tokenizer.bos_id], False)]
        for message in messages:
            parts.append((self._tokenizer.encode(f"{message.role}: "), False))
            parts.append(([*self._tokenizer.encode(message.content), *self._end], message.role == "assistant"))
            parts.append((self._tokenizer.encode("\n"), False))
        return _joined(parts[:-1])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        asked: list[int] = self.encode(messages).tokens.tolist()
        return [*asked, *self._tokenizer.encode("\n"), *self._tokenizer.encode("assistant: ")]


class TemplateChat:
    """The Jinja template of a Hugging Face tokenizer.

    Args:
        tokenizer: of the same folder.
        source: the template.
        folder: that holds tokenizer.json.
        names: bos_token and eos_token, as the template may write them.

    Raises:
        ValueError: transformers, which renders templates, is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, *, source: str, folder: Path, names: dict[str, str]) -> None:
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            raise ValueError(
                'a chat template needs transformers: pip install -e ".[hf]" in a checkout of lrt'
            ) from None
        if not isinstance(tokenizer, FileTokenizer):
            raise ValueError(
                f"{folder} holds a chat template beside a tokenizer of bytes, which has no such tokens: "
                "remove one of them"
            )
        self._tokenizer, self.source = tokenizer, source
        self._face = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=source, **names
        )
        usual = [*([] if tokenizer.eos_id is None else [tokenizer.eos_id]), tokenizer.bos_id]
        self._closing = tokenizer.added_ids | set(usual)
        ids = self._special(self._around((Message("user", "a"), Message("assistant", "b")), ask=False)[-1])
        # What ends a turn need not be the tokenizer's eos: a decoder without tuning often has one for texts and one for
        # turns.
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*ids[: self._end(ids)][-1:], *usual]))

    def encode(self, messages: Sequence[Message]) -> Conversation:
        around = self._around(messages, ask=False)
        parts = [([self._tokenizer.bos_id], False), (self._special(around[0], first=True), False)]
        for message, after in zip(messages, around[1:]):
            answer = message.role == "assistant"
            parts.append((self._tokenizer.encode(message.content), answer))
            ids = self._special(after)
            end = self._end(ids) if answer else 0
            parts += [(ids[:end], True), (ids[end:], False)]
        if messages[-1].role == "assistant" and not end:
            raise ValueError(
                "the tokenizer's chat template ends an answer with no token of its own, "
                "so a model could not learn to end: add one"
            )
        return _joined(parts)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        around = self._around(messages, ask=True)
        ids = [self._tokenizer.bos_id, *self._special(around[0], first=True)]
        for message, after in zip(messages, around[1:]):
            ids += [*self._tokenizer.encode(message.content), *self._special(after)]
        return ids

    def _end(self, ids: Sequence[int]) -> int:
        """How many of the tokens behind an answer belong to its end; 0 where nothing ends it."""
        return 1 + next((i for i, token in enumerate(ids) if token in self._closing), -1)

    def _special(self, text: str, *, first: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode_template(text)
        return ids[1:] if first and ids[:1] == [self._tokenizer.bos_id] else ids

    def _around(self, messages: Sequence[Message], *, ask: bool) -> list[str]:
        """What the template writes before, between and behind the contents of the messages."""
        table = [{"role": one.role, "content": f"\ue000{i}\ue001"} for i, one in enumerate(messages)]
        try:
            text = str(self._face.apply_chat_template(table, tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # noqa: BLE001 - a template raises what it likes
            roles = ", ".join(one.role for one in messages)
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of {roles}: {' '.join(str(error).split())}"
            ) from None
        if [int(number) for number in PLACE.findall(text)] != list(range(len(messages))):
            raise ValueError(
                "the tokenizer's chat template leaves out a message, or changes its text: it cannot be used for tuning"
            )
        return PLACE.split(text)[::2]


class Template(NamedTuple):
    """A chat template as a folder holds it."""

    source: str
    folder: Path  # of tokenizer.json
    names: dict[str, str]  # bos_token and eos_token, as the template may write them


def find_template(place: str | Path) -> Template | None:
    """The chat template beside a tokenizer; None where there is none.

    Args:
        place: folder of the tokenizer, its tokenizer.json, or "bytes".

    Raises:
        ValueError: a file that cannot be read.
    """
    folder = Path(place).expanduser()
    folder = folder.parent if folder.is_file() and folder.suffix == ".json" else folder
    table, own = read_object(folder / HUB_CONFIG), folder / TEMPLATE
    source = read_text(own) if own.is_file() else table.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if source is None:
        return None
    names: dict[str, str] = {}
    for key in ("bos_token", "eos_token"):
        name = token_name(table.get(key))
        names |= {} if name is None else {key: name}
    return Template(source, folder, names)


def open_chat(tokenizer: Tokenizer, place: str | Path) -> PlainChat | TemplateChat:
    """The template beside a tokenizer; the plain one where there is none.

    Args:
        tokenizer: that ``load_tokenizer`` read there.
        place: as of ``find_template``.

    Raises:
        ValueError: a template that cannot be used.
    """
    found = find_template(place)
    return PlainChat(tokenizer) if found is None else TemplateChat(tokenizer, **found._asdict())


def save_chat(chat: PlainChat | TemplateChat, folder: Path) -> None:
    """Write a template beside the tokenizer of an export, so that ``open_chat`` gives the same again."""
    if isinstance(chat, TemplateChat):
        (folder / TEMPLATE).write_text(chat.source, encoding="utf-8")


def _joined(parts: Sequence[tuple[list[int], bool]]) -> Conversation:
    tokens = np.array([token for ids, _ in parts for token in ids], dtype=np.int64)
    return Conversation(tokens, np.array([learned for ids, learned in parts for _ in ids], dtype=bool))
