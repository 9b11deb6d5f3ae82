"""Supervised tuning inside a run: rows of conversations, and problems that the model answers at every evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lrt.config import Recipe
from lrt.data import Tokenizer
from lrt.data.chat import PlainChat, TemplateChat, open_chat
from lrt.data.examples import Example, open_examples
from lrt.eval.answers import ExactMatch, exact_match
from lrt.train.checkpoint.weights import export

if TYPE_CHECKING:
    from lrt.train.run import Run


@dataclass(frozen=True)
class Tuning:
    """What a tuning run needs beside its rows.

    Attributes:
        chat: makes tokens of conversations.
        problems: held-out conversations to answer.
    """

    chat: PlainChat | TemplateChat
    problems: Sequence[Example]


def open_tuning(recipe: Recipe, tokenizer: Tokenizer) -> Tuning | None:
    """The template and the problems of a recipe; None where it trains on text.

    Raises:
        ValueError: a template or conversations that cannot be used; the message names the recipe key.
    """
    if recipe.tuning is None:
        return None
    problems = open_examples(recipe.tuning, split="validation")[: recipe.tuning.problems]
    return Tuning(open_chat(tokenizer, recipe.data.tokenizer), problems)


def answer_problems(run: Run, progress: Callable[[], None]) -> dict[str, ExactMatch]:
    """Let the model answer the held-out problems; every rank must call this, and rank 0 gets the scores.

    A model that is sharded over processes answers on the CPU of rank 0, where it takes no memory from the training.

    Args:
        run: with its parts.
        progress: called after every batch.
    """
    tuning: Tuning | None = run.tuning
    if tuning is None or not tuning.problems:
        return {}
    assert run.recipe.tuning is not None
    if run.world.sharded:
        model = export(run.model, run.recipe, None, run.world)
    else:
        model = run.runner.refresh()
    found: dict[str, ExactMatch] = {}
    if model is not None:
        training = model.training
        model.eval()
        eager = torch.compiler.set_stance("force_eager") if run.recipe.parallel.compile else contextlib.nullcontext()
        with eager:  # one position at a time is too little to compile
            found = exact_match(
                model,
                tuning.problems,
                tuning.chat,
                run.tokenizer,
                max_new_tokens=run.recipe.tuning.answer_tokens,
                progress=progress,
            )
        model.train(training)
    run.world.barrier()
    return found
