"""Word problems of several steps: right, different, the same for a seed, and written as JSONL."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.commands.arithmetic import main
from lrt.data.arithmetic import answer_of, problems


def solve(question):
    """The answer, from the words alone."""
    value = Fraction(re.search(r"has (\d+) ", question)[1])
    for sentence in question.split(". ")[1:]:
        number = Fraction((re.search(r"\d+", sentence) or ["0"])[0])
        if "gets" in sentence:
            value += number
        elif "gives away" in sentence:
            value -= number
        elif "times as many" in sentence:
            value *= number
        elif "one of" in sentence:
            value /= number
    return value


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000), largest=st.integers(4, 200), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3)
)
def test_every_answer_is_right_and_every_step_in_range(seed, largest, sizes):
    made = problems(count=12, seed=seed, steps=sizes, largest=largest)
    assert len({one.question for one in made}) == 12
    for number, one in enumerate(made):
        assert len(one.steps) == sizes[number % len(sizes)]
        value = int(re.search(r"has (\d+) ", one.question)[1])
        for step in one.steps:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            assert int(left) == value and eval(f"{left} {sign} {right}") == int(result) and 1 <= int(result) <= largest
            value = int(result)
        assert one.answer == value == solve(one.question)
        assert answer_of(one.reasoning) == str(value) == answer_of(one.record(direct=True)["completion"])


def test_a_seed_makes_the_same_problems_and_a_shorter_list_their_beginning():
    assert problems(count=20, seed=3) == problems(count=50, seed=3)[:20] != problems(count=20, seed=4)
    first = problems(count=1)[0]
    assert (first.question, first.reasoning) == (
        "Eva has 3 shells. Then Eva has 2 times as many. How many shells does Eva have?", "<<3*2=6>> #### 6"
    )  # fmt: skip


def test_what_cannot_be_made_is_refused():
    with pytest.raises(
        ValueError, match="different problems of 1 steps up to 4: ask for fewer, more steps or larger values"
    ):
        problems(count=100_000, steps=(1,), largest=4)
    with pytest.raises(ValueError, match="values up to 3 leave nothing to multiply: use 4 or more"):
        problems(count=1, largest=3)
    with pytest.raises(ValueError, match=r"1 problems of \[0\] steps: ask for 1 or more"):
        problems(count=1, steps=(0,))


def test_the_command_writes_files_that_share_no_question(tmp_path, capsys):
    out = tmp_path / "problems"
    assert main([str(out), "--count", "30", "--held-out", "9", "--steps", "2", "4", "--direct"]) == 0
    lines = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    }
    assert [len(part) for part in lines.values()] == [30, 9]
    assert not {one["prompt"] for one in lines["train"]} & {one["prompt"] for one in lines["validation"]}
    assert {one["steps"] for one in lines["train"]} == {2, 4} and all(
        one["completion"] == f"#### {one['answer']}" for one in lines["train"]
    )
    assert main([str(out)]) == 2 and "already exists: choose a new folder" in capsys.readouterr().err
