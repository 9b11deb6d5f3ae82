"""Supervised tuning inside a run: rows of conversations, and problems that the model answers at every evaluation."""

from __future__ import annotations

from collections.abc import Callable

from lrt.config import Recipe
from lrt.data import Tokenizer
from lrt.data.chat import open_chat
from lrt.data.examples import open_examples
from lrt.eval.answers import ExactMatch, exact_match
from lrt.train.run import Run, Tuning
from lrt.train.whole_model import whole_model


def open_tuning(recipe: Recipe, tokenizer: Tokenizer) -> Tuning | None:
    """The template and the problems of a recipe; None where it trains on text.

    Raises:
        ValueError: a template or conversations that cannot be used; the message names the recipe key.
    """
    if recipe.tuning is None:
        return None
    problems = open_examples(recipe.tuning, split="validation")[: recipe.tuning.problems]
    return Tuning(open_chat(tokenizer, recipe.data.tokenizer), problems)


def answer_problems(run: Run, *, progress: Callable[[], None]) -> dict[str, ExactMatch]:
    """Let the model answer the held-out problems; every rank must call this, and all share the problems.

    Args:
        run: with its parts.
        progress: called after every batch.
    """
    tuning = run.tuning
    if tuning is None or not tuning.problems:
        return {}
    assert run.recipe.tuning is not None
    with whole_model(run) as model:
        return exact_match(
            model,
            tuning.problems,
            tuning.chat,
            run.tokenizer,
            max_new_tokens=run.recipe.tuning.answer_tokens,
            processes=run.world,
            progress=progress,
        )
