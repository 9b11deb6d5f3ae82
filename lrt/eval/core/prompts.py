"""From items to tokens, in nanochat's way: which examples come first, and where what is scored begins.

Legend: N items of a task.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lrt.eval.core.tasks import Item, Task

ORDER_SEED = 1337  # of the items
EXAMPLE_SEED = 1234  # plus the item's number


@dataclass(frozen=True)
class Span:
    """A prompt and where in it the scored tokens begin.

    Attributes:
        tokens: with the separator (BOS) in front, unless it was cut off.
        start: first scored token, 1 or later.
        lost: tokens that were cut off on the left.
        whole: every token that should be scored still is.
    """

    tokens: tuple[int, ...]
    start: int
    lost: int = 0
    whole: bool = True


def in_order(items: Sequence[Item], *, limit: int | None = None) -> list[Item]:
    """The items in their order, which decides what a limit leaves and whose examples are whose.

    Args:
        items: (N,) as they stand in their file.
        limit: so many of them; None = all.
    """
    shuffled = list(items)
    random.Random(ORDER_SEED).shuffle(shuffled)
    return shuffled[:limit]


def examples_of(index: int, items: Sequence[Item], *, shots: int) -> list[Item]:
    """The solved examples that stand before item ``index``: drawn from the others with a seed of its own.

    Raises:
        ValueError: there are too few other items.
    """
    if shots >= len(items):
        raise ValueError(
            f"{len(items)} items, but every one is shown with {shots} others as examples: use {shots + 1} items or more"
        )
    drawn = random.Random(EXAMPLE_SEED + index).sample(range(len(items) - 1), shots)
    return [items[number + (number >= index)] for number in drawn]


def texts_of(task: Task, item: Item, examples: Sequence[Item]) -> list[str]:
    """The prompt of every option; of language modeling the prompt without its continuation, then with it."""
    plain = task.kind != "language modeling"

    def joined(context: str, continuation: str) -> str:
        return (context if plain else context.strip()) + task.delimiter + continuation

    shown = "".join(joined(*example.options[example.gold]) + "\n\n" for example in examples)
    texts = [shown + joined(*option) for option in item.options]
    if plain:
        return texts
    # Stripped, because a space at the end belongs to the next token: the tokens would be no beginning of the others.
    return [(shown + joined(item.options[0][0], "")).strip(), *texts]


def spans_of(task: Task, encoded: Sequence[Sequence[int]], *, bos: int, longest: int) -> list[Span]:
    """What is read and what is scored of every option.

    Multiple choice is scored from where the options differ first, a schema over what all of them end with, and language
    modeling behind the prompt without its continuation.

    Args:
        task: of the item.
        encoded: ids of its ``texts_of``, without separator.
        bos: id of the separator.
        longest: tokens of a prompt at most; longer ones lose tokens on the left.

    Departs: where nanochat stops because a continuation changes the tokens before it, or is longer than the model
    reads, the scored tokens begin where the prompts differ, and are cut on the left too.
    """
    rows = [(bos, *ids) for ids in encoded]
    if task.kind == "schema":
        shared = _common(rows, step=-1)
        starts = [len(row) - shared for row in rows]
    else:
        starts = [_common(rows, step=1)] * len(rows)
    if task.kind == "language modeling":
        rows, starts = rows[1:], starts[1:]
    return [_cut(row, max(1, start), longest) for row, start in zip(rows, starts)]


def _common(rows: Sequence[Sequence[int]], *, step: int) -> int:
    """How many tokens all rows begin with (step 1) or end with (step -1)."""
    for count, column in enumerate(zip(*(row[::step] for row in rows))):
        if len(set(column)) > 1:
            return count
    return min(map(len, rows))


def _cut(tokens: tuple[int, ...], start: int, longest: int) -> Span:
    extra = max(0, len(tokens) - longest)
    return Span(tokens[extra:], max(1, start - extra), lost=extra, whole=start - extra >= 1)
