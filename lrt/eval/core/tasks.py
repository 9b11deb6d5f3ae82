"""The 22 tasks of CORE: kinds, shots, delimiters, baselines and files, and how an item of each kind reads.

The table is nanochat's (core.yaml and eval_meta_data.csv of its bundle), which is that of DCLM's mmlu_and_lowvar.yaml.
It keeps DCLM's first baselines, 62 % for boolq among them, because scores compare only where baselines are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lrt.tables import ReadTable

Kind = Literal["multiple choice", "schema", "language modeling"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as nanochat labels it.
        kind: what the options of an item share: the beginning, the end, or there is only one.
        shots: solved examples before the question.
        delimiter: between a context and its continuation.
        baseline: accuracy of chance, in percent.
        items: in the bundle.
        file: in the bundle, behind eval_data/.
    """

    name: str
    kind: Kind
    shots: int
    delimiter: str
    baseline: float
    items: int
    file: str


@dataclass(frozen=True)
class Item:
    """A question: contexts with their continuations. Number ``gold`` is right. A text to continue has one."""

    options: tuple[tuple[str, str], ...]
    gold: int


KEYS: dict[Kind, tuple[str, ...]] = {
    "multiple choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language modeling": ("context", "continuation"),
}
ANSWER = "\nAnswer: "
WORLD, COMMON, SYMBOLS = "world_knowledge", "commonsense_reasoning", "symbolic_problem_solving"
LANGUAGE, READING = "language_understanding", "reading_comprehension"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("hellaswag_zeroshot", "multiple choice", 0, " ", 25, 10042, f"{LANGUAGE}/hellaswag.jsonl"),
        Task("jeopardy", "language modeling", 10, ANSWER, 0, 2117, f"{WORLD}/jeopardy_all.jsonl"),
        Task("bigbench_qa_wikidata", "language modeling", 10, " ", 0, 20321, f"{WORLD}/bigbench_qa_wikidata.jsonl"),
        Task("arc_easy", "multiple choice", 10, ANSWER, 25, 2376, f"{WORLD}/arc_easy.jsonl"),
        Task("arc_challenge", "multiple choice", 10, ANSWER, 25, 1172, f"{WORLD}/arc_challenge.jsonl"),
        Task("copa", "multiple choice", 0, " ", 50, 100, f"{COMMON}/copa.jsonl"),
        Task("commonsense_qa", "multiple choice", 10, " ", 20, 1221, f"{COMMON}/commonsense_qa.jsonl"),
        Task("piqa", "multiple choice", 10, ANSWER, 50, 1838, f"{COMMON}/piqa.jsonl"),
        Task("openbook_qa", "multiple choice", 0, " ", 25, 500, f"{COMMON}/openbook_qa.jsonl"),
        Task("lambada_openai", "language modeling", 0, " ", 0, 5153, f"{LANGUAGE}/lambada_openai.jsonl"),
        Task("hellaswag", "multiple choice", 10, " ", 25, 10042, f"{LANGUAGE}/hellaswag.jsonl"),
        Task("winograd", "schema", 0, " ", 50, 273, f"{LANGUAGE}/winograd_wsc.jsonl"),
        Task("winogrande", "schema", 0, " ", 50, 1267, f"{LANGUAGE}/winogrande.jsonl"),
        Task(
            "bigbench_dyck_languages", "language modeling", 10, " ", 0, 1000, f"{SYMBOLS}/bigbench_dyck_languages.jsonl"
        ),
        Task("agi_eval_lsat_ar", "multiple choice", 3, " ", 20, 230, f"{SYMBOLS}/agi_eval_lsat_ar.jsonl"),
        Task(
            "bigbench_cs_algorithms", "language modeling", 10, " ", 0, 1320, f"{SYMBOLS}/bigbench_cs_algorithms.jsonl"
        ),
        Task("bigbench_operators", "language modeling", 10, " ", 0, 210, f"{SYMBOLS}/bigbench_operators.jsonl"),
        Task(
            "bigbench_repeat_copy_logic",
            "language modeling",
            10,
            " ",
            0,
            32,
            f"{SYMBOLS}/bigbench_repeat_copy_logic.jsonl",
        ),
        Task("squad", "language modeling", 10, " ", 0, 10570, f"{READING}/squad.jsonl"),
        Task("coqa", "language modeling", 0, " ", 0, 7983, f"{READING}/coqa.jsonl"),
        Task("boolq", "multiple choice", 10, ANSWER, 62, 3270, f"{READING}/boolq.jsonl"),
        Task(
            "bigbench_language_identification",
            "multiple choice",
            10,
            " ",
            9.1,
            10000,
            f"{LANGUAGE}/bigbench_language_identification.jsonl",
        ),
    )
}


def tasks_named(names: Sequence[str], *, where: str) -> tuple[Task, ...]:
    """Tasks by name, all where none is given.

    Args:
        names: of tasks.
        where: option or recipe key, for the message.

    Raises:
        ValueError: there is no such task.
    """
    wrong = [name for name in names if name not in TASKS]
    if wrong:
        raise ValueError(f"{where} = {', '.join(wrong)}: CORE has no such task; use {', '.join(TASKS)}")
    return tuple(TASKS[name] for name in dict.fromkeys(names)) if names else tuple(TASKS.values())


def read_item(task: Task, record: ReadTable) -> Item:
    """An item of the bundle.

    Args:
        task: it belongs to.
        record: its line: query, choices, gold; context_options, continuation, gold; or context, continuation.

    Raises:
        ValueError: a key is missing, the right option is none of the options, or there is nothing to score.
    """
    missing = [key for key in KEYS[task.kind] if not isinstance(record, Mapping) or key not in record]
    if missing:
        raise ValueError(f"{task.name}: an item of kind {task.kind} lacks {', '.join(missing)}")
    if task.kind == "multiple choice":
        item = Item(tuple((record["query"], choice) for choice in record["choices"]), int(record["gold"]))
    elif task.kind == "schema":
        item = Item(
            tuple((context, record["continuation"]) for context in record["context_options"]), int(record["gold"])
        )
    else:
        item = Item(((record["context"], record["continuation"]),), 0)
    if not 0 <= item.gold < len(item.options):
        raise ValueError(
            f"{task.name}: an item names option {item.gold} as right, but has {len(item.options)} options, "
            "numbered from 0"
        )
    if not all(continuation.strip() for _, continuation in item.options):
        raise ValueError(f"{task.name}: an item has an empty option: {item.options}")
    return item
