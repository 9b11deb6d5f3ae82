"""CORE: 22 tasks of three kinds by nanochat's rules, in the memory mode asked for.

python -m lrt.eval.core FOLDER --memory decode
"""

from lrt.eval.core.bundle import Bundle, download, find_bundle
from lrt.eval.core.prompts import Span, examples_of, in_order, spans_of, texts_of
from lrt.eval.core.scoring import SEED_NOISE, CoreScores, Questions, TaskScore, ask, find_questions
from lrt.eval.core.tasks import TASKS, Item, Task, read_item, tasks_named

__all__ = [
    "SEED_NOISE", "TASKS", "Bundle", "CoreScores", "Item", "Questions", "Span", "Task", "TaskScore", "ask", "download",
    "examples_of",
    "find_bundle", "find_questions", "in_order", "read_item", "spans_of", "tasks_named", "texts_of",
]  # fmt: skip
