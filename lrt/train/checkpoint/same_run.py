"""Whether a run may go on with these settings, and the history of the settings that it had."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from lrt.config import Recipe, parse_recipe, recipe_to_table
from lrt.config.ranges import HORIZON
from lrt.tables import Table

HISTORY = "settings.jsonl"

# What a run that goes on may change: where and how it computes, what it keeps and reports, how far it goes.
# The loader compares the contents of the data and the tokenizer, so their paths may change too.
FREE_SECTIONS = ("checkpoint", "metrics", "evaluation")
FREE = {
    *(
        "run.name",
        "run.output",
        "data.train",
        "data.sources.path",
        "data.sources.text_column",
        "data.validation",
        "data.tokenizer",
        "data.text_column",
        "data.workers",
        "data.on_corrupt",
    ),
    *("training.batch_tokens", "training.micro_batch", "training.max_skipped", *(f"training.{key}" for key in HORIZON)),
    *(
        f"parallel.{key}"
        for key in (
            "replicate",
            "shard",
            "activation_checkpointing",
            "compile",
            "cuda_graphs",
            "reshard",
            "timeout_minutes",
            "loss_chunk",
            "host_threads",
        )
    ),
}
MODEL = (
    ("model", None),
    ("recurrence", None),
    ("run", ("backbone",)),
    ("optimizer", ("kind",)),
    ("training", ("stage",)),
)


class Change(NamedTuple):
    """A setting that differs."""

    key: str
    there: object
    here: object

    def __str__(self) -> str:
        return f"{self.key} = {self.there!r} there, {self.here!r} here"


def stored_recipe(folder: Path) -> Recipe:
    """The recipe in a checkpoint.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    path = folder / "recipe.toml"
    try:
        return parse_recipe(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({(str(error).splitlines() or ['empty'])[0]}): "
            "it is damaged, or of another version of lrt"
        ) from None


def changes(there: Recipe, here: Recipe) -> list[Change]:
    """Every setting that differs between two recipes."""
    a, b = _flat(there), _flat(here)
    return [Change(key, a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def _flat(recipe: Recipe) -> Table:
    """A recipe's settings by their full keys, as JSON has them."""
    flat: Table = {}
    for section, values in recipe_to_table(recipe).items():
        flat |= (
            {f"{section}.{key}": value for key, value in values.items()}
            if isinstance(values, dict)
            else {section: values}
        )
    for index, source in enumerate(flat.pop("data.sources")):
        flat |= {f"data.sources[{index}].{key}": value for key, value in source.items()}
    plain: Table = json.loads(json.dumps(flat))
    return plain


def plain_key(key: str) -> str:
    """A setting's key without the number of its table in a list, as ``FREE`` has it."""
    return re.sub(r"\[\d+\]", "", key)


# ------------------------------------------------------------------ may it go on


def check_same_model(folder: Path, recipe: Recipe) -> None:
    """Refuse a checkpoint whose tensors belong to another model.

    Raises:
        ValueError: the recipe stored there builds another model; the differing keys are named.
    """
    stored, here = recipe_to_table(stored_recipe(folder)), recipe_to_table(recipe)
    different = []
    for section, keys in MODEL:
        a, b = stored[section], here[section]
        if not isinstance(a, dict) or not isinstance(b, dict):
            different += (
                [f"{section} = {'on' if a else 'off'} there, {'on' if b else 'off'} here"] if bool(a) != bool(b) else []
            )
            continue
        different += [
            str(Change(f"{section}.{k}", a.get(k), b[k])) for k in keys or b if _plain(a.get(k)) != _plain(b[k])
        ]
    if different:
        raise ValueError(
            f"{folder} belongs to another model: {'; '.join(different)}. Choose another run.name, "
            "or set checkpoint.resume = false and training.init_from for a warm start"
        )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def check_same_run(
    folder: Path, recipe: Recipe, *, step: int, steps: int, planned: int | None, finished: bool, same_past: bool
) -> None:
    """Refuse settings that would make one run of two.

    Args:
        folder: the checkpoint to go on from.
        recipe: to go on with.
        step: steps done.
        steps: of the whole run, by this recipe.
        planned: steps of the whole run, as planned when the checkpoint was written; None = not recorded.
        finished: the checkpoint has reached the end of this recipe's run.
        same_past: this recipe has the same schedule at every step that is done.

    Raises:
        ValueError: the keys that may not differ are named.
    """
    there = stored_recipe(folder)
    every = changes(there, recipe)
    free = (*FREE_SECTIONS, "schedule") if same_past else FREE_SECTIONS
    refused = [c for c in every if plain_key(c.key) not in FREE and c.key.split(".")[0] not in free]
    on = f'training.branch_from = "{folder}" goes on from there with other rates, another schedule or another horizon'
    if finished and refused and all(c.key.startswith("schedule.") for c in refused):
        raise ValueError(
            f"{folder} has reached its end with another schedule: {'; '.join(map(str, refused))}. "
            f"Choose another run.name: {on}"
        )
    if _is_shorter(there, recipe, step=step, steps=steps, planned=planned):
        by_cost = "schedule" if recipe.training.compute is not None else None  # dearer phases bring the end nearer
        of_length = [c for c in every if c.key.removeprefix("training.") in HORIZON or c.key.split(".")[0] == by_cost]
        refused += [c for c in of_length if c not in refused]
    if refused:
        raise ValueError(
            f"{folder} was trained with other settings: {'; '.join(map(str, refused))}. Going on would record a "
            f"mixture of both as one run: give the settings that it had, or choose another run.name, where {on}"
        )


def _is_shorter(there: Recipe, here: Recipe, *, step: int, steps: int, planned: int | None) -> bool:
    """Whether the horizon has come nearer: rates so far would have been others."""
    for key in HORIZON:
        a, b = getattr(there.training, key), getattr(here.training, key)
        if a is not None and b is not None and (b < a or key != "compute"):
            return bool(b < a)
    if there.training.compute is None or here.training.compute is None:
        return planned is not None and steps < planned
    if planned is None:
        return False
    # What the phases cost decides on the steps too. Of larger batches fewer make as long a run,
    # give or take the rounding.
    before, now = there.training.batch_tokens, here.training.batch_tokens
    rounding = 0 if now == before else 2 * max(now, before)
    return (steps - step) * now + rounding < (planned - step) * before


# ------------------------------------------------------------------ what it had


def write_history(folder: Path, recipe: Recipe, *, step: int, there: Recipe | None) -> list[Change]:
    """Note what a run is trained with from a step on, in ``settings.jsonl``: all settings first, then what has changed.

    Args:
        folder: of the run.
        recipe: from now on.
        step: optimizer steps done.
        there: until now; None = the run begins.

    Returns:
        What has changed.
    """
    path = folder / HISTORY
    if there is None or not path.is_file():
        path.write_text(
            json.dumps({"step": 0, "settings": _flat(recipe if there is None else there)}) + "\n", encoding="utf-8"
        )
    changed = [] if there is None else changes(there, recipe)
    line = json.dumps({"step": step, "changed": {c.key: [c.there, c.here] for c in changed}})
    if (
        changed and line not in path.read_text(encoding="utf-8").splitlines()
    ):  # a run that is killed before its next checkpoint begins so again
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    return changed
