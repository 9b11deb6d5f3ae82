"""A part of generate.py and evaluate.py, no command: the chat template of a folder that was opened."""

from __future__ import annotations

from lrt.conversion.opening import Opened
from lrt.data.chat import Chat, find_template, open_chat
from lrt.data.tokenizer import Tokenizer


def template(opened: Opened, tokenizer: Tokenizer, *, name: str | None) -> Chat:
    """The chat template beside the tokenizer of an opened model, or that of its run's own tokenizer.

    Args:
        opened: the model's folder.
        tokenizer: of the model.
        name: of the tokenizer, where one was asked for.

    Raises:
        ValueError: a template that cannot be used.
    """
    places = [name, opened.folder, None if opened.recipe is None else opened.recipe.data.tokenizer]
    found = next(
        (place for place in places if place is not None and find_template(place) is not None), name or opened.folder
    )
    return open_chat(tokenizer, found)
