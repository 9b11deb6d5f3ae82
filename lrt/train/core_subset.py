"""A part of CORE asked during a run: the tasks of ``evaluation.core``, in memory mode decode."""

from __future__ import annotations

from collections.abc import Callable

from lrt.config import Recipe
from lrt.decoding import step as decoding
from lrt.eval.choices import ChoiceScorer
from lrt.eval.core import CoreScores, Questions, ask, find_bundle, find_questions, tasks_named
from lrt.tables import Table
from lrt.train.run import Run
from lrt.train.whole_model import whole_model


def open_core(recipe: Recipe) -> tuple[Questions, ...]:
    """The items of ``evaluation.core``.

    Raises:
        ValueError: there is no such task, its data are missing, or too few items are asked for its examples.
    """
    config = recipe.evaluation
    if not config.core:
        return ()
    tasks = tasks_named(config.core, where="evaluation.core")
    for task in tasks:
        if config.core_items <= task.shots:
            raise ValueError(
                f"evaluation.core_items = {config.core_items}, but {task.name} shows {task.shots} other items as "
                f"examples: use {task.shots + 1} or more"
            )
    found, missing = find_questions(tasks, bundle=find_bundle(config.core_bundle), limit=config.core_items)
    if missing:
        lines = "; ".join(f"{name}: {what}" for name, what in missing.items())
        lines = lines.replace("--bundle PATH", "evaluation.core_bundle")
        raise ValueError(f"evaluation.core: there are no data of {len(missing)} tasks ({lines})")
    return tuple(found)


def ask_core(run: Run, *, progress: Callable[[], None]) -> Table:
    """Ask the run's tasks; every rank must call this, and all share the items.

    Returns:
        What the evaluation's record holds of it; empty where no tasks are asked.
    """
    if not run.core:
        return {}
    recipe, longest = run.recipe, run.recipe.model.sequence_length
    runner = decoding.graphed if recipe.parallel.cuda_graphs else decoding.eager
    with whole_model(run) as model:
        mode = "zero" if model.recurrence is None else "decode"
        rows = recipe.evaluation.batch
        scorers = {mode: ChoiceScorer(model, memory=mode, max_length=longest, rows=rows, runner=runner)}
        scores = [
            ask(
                scorers,
                one,
                tokenizer=run.tokenizer,
                longest=longest,
                processes=run.world,
                progress=lambda items: progress(),
            )
            for one in run.core
        ]
    found = CoreScores(tuple(scores), {})
    return {
        "memory": mode,
        "value": found.value(mode),
        "se": found.error(mode),
        "accuracy": {one.task.name: one.accuracy(mode) for one in found.tasks},
        "items": {one.task.name: one.items for one in found.tasks},
    }
