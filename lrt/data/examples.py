"""Conversations to tune on: read from JSONL, or made from a seed.

A line of JSONL has ``messages`` (a list of objects with ``role`` and ``content``) or ``prompt`` and ``completion``.
It may have ``answer``, which a model's answer is compared with, and ``steps``, by which the scores are told apart.
"""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lrt.config import TuningConfig
from lrt.data.arithmetic import answer_of, problems
from lrt.data.chat import ROLES, Message
from lrt.tables import Table

TRAINED, HELD_OUT = 20000, 300  # problems of the source "arithmetic"
PART = 20  # "auto" holds out one conversation in so many ...
MOST = 1000  # ... and at most so many


class Example(NamedTuple):
    """A conversation, and what its last answer is compared with."""

    messages: tuple[Message, ...]
    answer: str
    steps: int | None  # None: the scores are not told apart


def open_examples(tuning: TuningConfig, *, split: str) -> list[Example]:
    """The conversations to train on, or those held out.

    Args:
        tuning: section ``tuning`` of the recipe.
        split: "train" or "validation".

    Raises:
        ValueError: no such file, or a line that is no conversation; the message names the file and the line.
    """
    if split == "validation" and tuning.validation != "auto":
        return read_examples(tuning.validation, key="tuning.validation")
    if tuning.train == "arithmetic":
        made = [_example(one.record(), "arithmetic") for one in problems(count=HELD_OUT + TRAINED)]
        return made[:HELD_OUT] if split == "validation" else made[HELD_OUT:]
    every = read_examples(tuning.train, key="tuning.train")
    if tuning.validation != "auto":
        return every
    if len(every) < 2:
        raise ValueError(
            f'tuning.validation = "auto" holds a part of tuning.train out, but {tuning.train!r} has one conversation: '
            "give a file"
        )
    held = max(1, min(MOST, len(every) // PART))
    apart = set(np.linspace(0, len(every) - 1, held).astype(int).tolist())
    return [one for i, one in enumerate(every) if (i in apart) == (split == "validation")]


def read_examples(spec: str, *, key: str) -> list[Example]:
    """Conversations of JSONL files.

    Args:
        spec: a file, a folder or a glob.
        key: of the recipe, for messages.

    Raises:
        ValueError: as ``open_examples``.
    """
    place = Path(spec).expanduser()
    found = place.rglob("*.jsonl") if place.is_dir() else map(Path, glob.glob(str(place)))
    files = [place] if place.is_file() else sorted(found)
    examples = []
    for file in files:
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            if line.strip():
                examples.append(_read_line(line, f"{file}, line {number}"))
    if not examples:
        what = "holds no conversation" if files else "is no .jsonl file, and no folder or glob of them"
        raise ValueError(
            f'{key} = "{spec}" {what}: use "arithmetic", or lines with messages, or with prompt and completion'
        )
    return examples


def _read_line(line: bytes, where: str) -> Example:
    try:
        table = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON in UTF-8: {str(error).splitlines()[0]}") from None
    return _example(table, where)


def _example(table: object, where: str) -> Example:
    """A conversation of a line's object.

    Raises:
        ValueError: it is none.
    """
    # What a table of several kinds of lines lacks in one of them is often written as null.
    given: Table = {k: v for k, v in table.items() if v is not None} if isinstance(table, dict) else {}
    listed = given.get("messages")
    if "messages" not in given and {"prompt", "completion"} <= given.keys():
        listed = [{"role": "user", "content": given["prompt"]}, {"role": "assistant", "content": given["completion"]}]
    if not isinstance(listed, list) or not listed:
        keys = f"has {', '.join(given) or 'no keys'}" if isinstance(table, dict) else "is no object"
        raise ValueError(f"{where} {keys}: a conversation has messages, or prompt and completion")
    messages = []
    for one in listed:
        role, content = (one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            what = f"role {role!r} and a content of type {type(content).__name__}"
            raise ValueError(f"{where} has a message with {what}: use text, of {', '.join(ROLES)}")
        messages.append(Message(role, content))
    if messages[-1].role != "assistant":
        raise ValueError(
            f"{where} ends with a message of {messages[-1].role}: the last one is the assistant's, which is learned"
        )
    if len(messages) == 1:
        raise ValueError(
            f"{where} is an answer with nothing before it: put a message of the user or the system there, "
            "or train on text (data.train)"
        )
    steps = given.get("steps")
    answer = given.get("answer", answer_of(messages[-1].content))
    return Example(tuple(messages), str(answer), steps if isinstance(steps, int) else None)
