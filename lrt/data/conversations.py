"""Conversations to tune on: packed whole into rows, and dealt to ranks.

All conversations are tokenized at the start. An epoch is a permutation of them, packed by best fit; a row never holds a
part of a conversation, so it may end with nothing. What is longer than a row is left out and counted.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lrt.config import Recipe
from lrt.data.batch import IGNORED, Batch
from lrt.data.chat import Chat, Conversation, open_chat
from lrt.data.examples import Example, open_examples
from lrt.data.held_out import NOT_SCORED, HeldOut
from lrt.data.tokenizer import Tokenizer
from lrt.tables import Table

BUFFER = 256  # conversations among which the best fit for a row is sought


def pack(sizes: Sequence[int], order: Sequence[int], *, length: int) -> list[list[int]]:
    """Which conversations share a row.

    Args:
        sizes: tokens of each conversation, at most ``length``.
        order: of the conversations.
        length: tokens of a row.

    Returns:
        Numbers of the conversations of each row: the one that waited longest, then the longest that still fits.
    """
    rows: list[list[int]] = []
    coming = iter(order)
    waiting: dict[int, int] = {}  # age -> conversation, oldest first
    by_size: list[tuple[int, int]] = []  # (size, age), rising
    age = 0

    def fill() -> None:
        nonlocal age
        while len(waiting) < BUFFER and (one := next(coming, None)) is not None:
            waiting[age] = one
            by_size.insert(bisect_right(by_size, (sizes[one], age)), (sizes[one], age))
            age += 1

    fill()
    while waiting:
        room, row = length, []
        chosen = next(iter(waiting))
        while True:
            one = waiting.pop(chosen)
            by_size.remove((sizes[one], chosen))
            row.append(one)
            room -= sizes[one]
            fill()
            place = bisect_right(by_size, (room, age)) - 1
            if place < 0:
                break
            chosen = by_size[place][1]
        rows.append(row)
    return rows


def row_of(conversations: Sequence[Conversation], *, length: int, fill: int) -> Conversation:
    """Some conversations one after the other, filled up with a token that nobody learns."""
    tokens, learned = np.full(length, fill, dtype=np.int64), np.zeros(length, dtype=bool)
    begin = 0
    for one in conversations:
        end = begin + len(one.tokens)
        tokens[begin:end], learned[begin:end] = one.tokens, one.learned
        begin = end
    return Conversation(tokens, learned)


def open_rows(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    rows: int,
    rank: int = 0,
    world_size: int = 1,
    split: str = "train",
    limit_tokens: int | None = None,
) -> TuningLoader | HeldOutConversations:
    """Batches of conversations of one process.

    Args:
        recipe: with a section ``tuning``.
        tokenizer: of the run.
        rows: of a batch on this process.
        rank, world_size: this process, and how many share the rows.
        split: "train" or "validation".
        limit_tokens: validation only: so many tokens of rows; None = all.

    Raises:
        ValueError: conversations or a template that cannot be used.
    """
    assert recipe.tuning is not None
    length = recipe.model.sequence_length
    chat = open_chat(tokenizer, recipe.data.tokenizer)
    key = "tuning.validation" if split == "validation" and recipe.tuning.validation != "auto" else "tuning.train"
    packed = Packed(open_examples(recipe.tuning, split=split), chat, tokenizer, length=length + 1, key=key)
    if split == "train":
        seed = recipe.run.seed if recipe.data.shuffle_seed is None else recipe.data.shuffle_seed
        return TuningLoader(packed, rows=rows, rank=rank, world_size=world_size, seed=seed)
    limit = len(packed.kept) if limit_tokens is None else -(-limit_tokens // length)
    return HeldOutConversations(
        packed, tokenizer, ends=chat.stop_ids, rows=rows, rank=rank, world_size=world_size, limit=limit
    )


class Packed:
    """Tokenized conversations that fit into rows.

    Args:
        examples: the conversations.
        chat: makes tokens of them.
        tokenizer: its separator fills rows.
        length: tokens of a row, one more than the model reads.
        key: of the recipe, for messages.

    Raises:
        ValueError: none fits.
    """

    def __init__(self, examples: Sequence[Example], chat: Chat, tokenizer: Tokenizer, *, length: int, key: str) -> None:
        every = [chat.encode(one.messages) for one in examples]
        self.kept = [one for one in every if len(one.tokens) <= length]
        self.left_out, self.length, self.fill = len(every) - len(self.kept), length, tokenizer.bos_id
        if not self.kept:
            shortest = min(len(one.tokens) for one in every)
            raise ValueError(
                f"model.sequence_length = {length - 1}, but every conversation of {key} is longer: "
                f"use {shortest - 1} or more"
            )
        self.sizes = [len(one.tokens) for one in self.kept]
        content = hashlib.sha256()
        for one in self.kept:
            content.update(one.tokens.tobytes() + one.learned.tobytes())
        self.fingerprint = content.hexdigest()

    def row(self, numbers: Sequence[int]) -> Conversation:
        return row_of([self.kept[number] for number in numbers], length=self.length, fill=self.fill)


def _batch(rows: Sequence[Conversation], source: Sequence[str]) -> Batch:
    """Inputs, and targets shifted by one where they are learned."""
    tokens, learned = np.stack([row.tokens for row in rows]), np.stack([row.learned for row in rows])
    targets = np.where(learned[:, 1:], tokens[:, 1:], IGNORED)
    return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), tuple(source))


class TuningLoader:
    """Endless shuffled batches of one rank; its place is an epoch and a row, the same for every number of ranks.

    Args:
        packed: the conversations.
        rows: of a batch on this rank.
        rank, world_size: this process, and how many there are.
        seed: of the order.
    """

    workers = 0

    def __init__(self, packed: Packed, *, rows: int, rank: int, world_size: int, seed: int) -> None:
        self._packed, self._rows, self._rank, self._world_size, self._seed = packed, rows, rank, world_size, seed
        self.fingerprint, self.skipped = packed.fingerprint, packed.left_out
        self._epoch = self._row = 0
        self._plan: tuple[int, list[list[int]]] | None = None

    @property
    def shares(self) -> dict[str, float]:
        """There is one source."""
        return {}

    @property
    def epoch(self) -> int:
        """Passes over the data that have begun, counted from 0."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        mine, source = [], []
        for place in range(self._rows * self._world_size):
            numbers = self._next_row()
            if place // self._rows == self._rank:
                mine.append(self._packed.row(numbers))
                source.append(f"epoch {self._epoch}: conversations {', '.join(map(str, numbers[:8]))}")
        return _batch(mine, source)

    def _next_row(self) -> list[int]:
        if self._plan is None or self._plan[0] != self._epoch:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._packed.kept)).tolist()
            self._plan = self._epoch, pack(self._packed.sizes, order, length=self._packed.length)
        if self._row == len(self._plan[1]):
            self._epoch, self._row = self._epoch + 1, 0
            return self._next_row()
        self._row += 1
        return self._plan[1][self._row - 1]

    def state_dict(self) -> Table:
        return {"epoch": self._epoch, "row": self._row, "conversations": self.fingerprint, "seed": self._seed}

    def load_state_dict(self, state: Table | Sequence[Table]) -> None:
        """Go on from a state, or from those of all ranks, which are the same.

        Raises:
            ValueError: it belongs to other conversations.
        """
        one = state if isinstance(state, dict) else state[0]
        if one.get("conversations") != self.fingerprint:
            raise ValueError(
                "tuning.train is not what the checkpoint was trained on: "
                "resume with the same conversations, or start a new run"
            )
        self._epoch, self._row, self._seed = one["epoch"], one["row"], one["seed"]


class HeldOutConversations:
    """Held-out rows, the same for every number of ranks; global row n goes to rank (n // rows) % world_size.

    Args:
        packed: the conversations.
        tokenizer: says how many bytes a learned token stands for.
        ends: token ids that end an answer, which stand for none.
        rows: of a batch on this rank.
        rank, world_size: this process, and how many there are.
        limit: rows at most.
    """

    def __init__(
        self,
        packed: Packed,
        tokenizer: Tokenizer,
        *,
        ends: Sequence[int],
        rows: int,
        rank: int,
        world_size: int,
        limit: int,
    ) -> None:
        self._packed, self._rows, self._rank, self._world_size = packed, rows, rank, world_size
        self._bytes = tokenizer.token_bytes().copy()
        self._bytes[list(ends)] = 0
        self._plan = pack(packed.sizes, range(len(packed.kept)), length=packed.length)[:limit]
        self.fingerprint, self.skipped = packed.fingerprint, packed.left_out
        self.documents_reached = 1 + max(max(row) for row in self._plan)
        self.first_of_group = np.array([0, len(packed.kept)])

    def files(self) -> dict[str, tuple[int, int]]:
        """One source, whose conversations are numbered through."""
        return {"conversations": (0, len(self._packed.kept))}

    def count_batches(self) -> int:
        """Batches on each rank."""
        return -(-len(self._plan) // (self._rows * self._world_size))

    def __iter__(self) -> Iterator[HeldOut]:
        step = self._rows * self._world_size
        for begin in range(self._rank * self._rows, -(-len(self._plan) // step) * step, step):
            mine = self._plan[begin : begin + self._rows]
            yield self._batch(mine + [[]] * (self._rows - len(mine)))

    def _batch(self, plan: Sequence[list[int]]) -> HeldOut:
        rows = [self._packed.row(numbers) for numbers in plan]
        batch = _batch(rows, [", ".join(map(str, numbers[:8])) for numbers in plan])
        documents = np.full((len(plan), self._packed.length), NOT_SCORED, dtype=np.int64)
        for i, numbers in enumerate(plan):
            begin = 0
            for number in numbers:
                documents[i, begin : begin + self._packed.sizes[number]] = number
                begin += self._packed.sizes[number]
        sizes = self._bytes[np.stack([row.tokens for row in rows])] * np.stack([row.learned for row in rows])
        documents = np.where(np.stack([row.learned for row in rows]), documents, NOT_SCORED)
        return HeldOut(
            *batch, documents=torch.from_numpy(documents[:, 1:].copy()), sizes=torch.from_numpy(sizes[:, 1:].copy())
        )
