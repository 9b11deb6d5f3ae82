"""Word problems of several steps whose answers can be checked, made from a seed;
in the manner of GSM8K with equations as steps.

    question   Ann has 7 apples. Ann gets 5 more. Then Ann has 2 times as many. How many apples does Ann have?
    completion <<7+5=12>> <<12*2=24>> #### 24

A problem is as hard as the number of its steps. Values stay within 1..largest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

MARK = "####"  # before the answer
NAMES = (
    "Ann",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Ola",
    "Pia",
)
THINGS = ("apples", "books", "cards", "coins", "eggs", "figs", "keys", "pens", "rings", "shells", "stamps", "toys")
SAYS = {
    "+": "{name} gets {number} more.",
    "-": "{name} gives away {number}.",
    "*": "Then {name} has {number} times as many.",
    "/": "{name} keeps one of {number} equal parts.",
}
FACTORS = (2, 3, 4, 5)
ATTEMPTS = 50  # draws without a new problem after which there are no more


class Problem(NamedTuple):
    """A question, and how its answer is found.

    Attributes:
        question: in words.
        steps: equations in order, such as "7+5=12".
        answer: the last result.
    """

    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def reasoning(self) -> str:
        """The steps and the answer, as a model should write them."""
        return f"{' '.join(f'<<{step}>>' for step in self.steps)} {MARK} {self.answer}"

    def record(self, *, direct: bool = False) -> dict[str, str | int]:
        """A line of a JSONL file for supervised tuning.

        Args:
            direct: the completion is the answer alone, without the steps.
        """
        completion = f"{MARK} {self.answer}" if direct else self.reasoning
        return {"prompt": self.question, "completion": completion, "answer": str(self.answer), "steps": len(self.steps)}


def make_problem(draw: random.Random, *, steps: int, largest: int) -> Problem:
    """Draw one problem.

    Args:
        draw: the random numbers.
        steps: operations, 1 or more.
        largest: of all values, 4 or more.
    """
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    value = draw.randint(2, largest - 1)
    said, equations = [f"{name} has {value} {things}."], []
    for _ in range(steps):
        sign = draw.choice([sign for sign in SAYS if _numbers(sign, value, largest)])
        number = draw.choice(_numbers(sign, value, largest))
        result = {"+": value + number, "-": value - number, "*": value * number, "/": value // number}[sign]
        said.append(SAYS[sign].format(name=name, number=number))
        equations.append(f"{value}{sign}{number}={result}")
        value = result
    return Problem(" ".join([*said, f"How many {things} does {name} have?"]), tuple(equations), value)


def _numbers(sign: str, value: int, largest: int) -> Sequence[int]:
    """What may stand on the right of an operation, so that its result is whole and in range."""
    if sign == "+":
        return range(1, largest - value + 1)
    if sign == "-":
        return range(1, value)
    return [k for k in FACTORS if (value * k <= largest if sign == "*" else value % k == 0)]


def problems(*, count: int, seed: int = 1, steps: Sequence[int] = (1, 2, 3), largest: int = 10) -> list[Problem]:
    """Different problems, the numbers of steps taking turns; the first so many of a longer list with the same seed.

    Args:
        count: how many.
        seed: the same seed makes the same problems on every machine.
        steps: numbers of steps.
        largest: of all values.

    Raises:
        ValueError: values out of range, or fewer different problems than asked for.
    """
    if count < 1 or not steps or min(steps) < 1:
        raise ValueError(f"{count} problems of {list(steps)} steps: ask for 1 or more problems of 1 or more steps")
    if largest < 4:
        raise ValueError(f"values up to {largest} leave nothing to multiply: use 4 or more")
    draw, found, known = random.Random(seed), list[Problem](), set[str]()
    while len(found) < count:
        size = steps[len(found) % len(steps)]
        for _ in range(ATTEMPTS):
            one = make_problem(draw, steps=size, largest=largest)
            if one.question not in known:
                break
        else:
            raise ValueError(
                f"only {len(found)} different problems of {size} steps up to {largest}: "
                "ask for fewer, more steps or larger values"
            )
        known.add(one.question)
        found.append(one)
    return found


def answer_of(text: str) -> str:
    """What a completion answers: what stands behind the last mark, or all of it where there is none."""
    return text.rpartition(MARK)[2].strip()
