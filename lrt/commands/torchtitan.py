"""Hand a recipe to torchtitan's own trainer: its stock entry point, with ``lrt.titan`` imported into it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence

from lrt.config import find_recipe

VERSION = "0.2.2"
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}  # without torchrun


def check_torchtitan() -> None:
    """Refuse to go on without the torchtitan that ``lrt.titan`` is written for.

    Raises:
        ImportError: it is missing, of another version, or lacks triton.
    """
    try:
        found = importlib.metadata.version("torchtitan").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f'lrt.titan needs torchtitan {VERSION}, which is not installed: pip install -e ".[titan]"'
        ) from None
    if found != VERSION:
        raise ImportError(
            f"torchtitan {found} is installed, but lrt.titan is written for {VERSION}, "
            "the last release with TOML files and the newest that trains on torch 2.11 and later: "
            f'pip install "torchtitan=={VERSION}"'
        )
    known = ("torchtitan", "torchtitan.models.moe.kernels", "triton")
    if not any(name in sys.modules for name in known) and importlib.util.find_spec("triton") is None:
        raise ImportError(
            f"torchtitan {VERSION} imports triton, which is not installed: use a torch for GPUs, which brings it"
        )


def hand_over(recipe: str, *, overrides: Sequence[str]) -> None:
    """Become ``python -m torchtitan.train`` with this recipe; does not return.

    Args:
        recipe: name in recipes/, or a path.
        overrides: ``section.key=value``, as ``--set`` has them.

    Raises:
        ImportError: torchtitan is missing, or another version.
        ValueError: there is no such recipe, or it is one for our own trainer.
    """
    check_torchtitan()
    command = [sys.executable, "-m", "torchtitan.train", *arguments_of(recipe, overrides=overrides)]
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def arguments_of(recipe: str, *, overrides: Sequence[str]) -> list[str]:
    """What torchtitan's command line gets."""
    path = find_recipe(recipe)
    if not _is_for_torchtitan(path.read_text(encoding="utf-8")):
        raise ValueError(
            f"--engine torchtitan: {path.name} has no [job], so it is a recipe of lrt's own trainer: use "
            "titan_lrt_debug.toml, or one like it"
        )
    command = ["--job.config_file", str(path), "--experimental.custom_import", "lrt.titan"]
    for override in overrides:
        command += _flag(override)
    return command


def refuse_torchtitan(recipe: str) -> None:
    """Raises ValueError for a recipe of torchtitan's, which lrt's own trainer cannot follow."""
    path = find_recipe(recipe)
    if _is_for_torchtitan(path.read_text(encoding="utf-8")):
        raise ValueError(f"{path.name} is a recipe for torchtitan's trainer: add --engine torchtitan")


def _is_for_torchtitan(text: str) -> bool:
    return any(line.split("#")[0].strip() == "[job]" for line in text.splitlines())


def _flag(override: str) -> list[str]:
    """``section.key=value`` as torchtitan's command line wants it."""
    key, equals, raw = override.partition("=")
    section, dot, name = key.strip().rpartition(".")
    if not (equals and dot and section and name):
        raise ValueError(f"--set {override!r}: write section.key=value, such as training.steps=100")
    try:
        value = json.loads(raw)
    except ValueError:
        value = raw.strip()
    if isinstance(value, bool):
        return [f"--{section}.{name}" if value else f"--{section}.no-{name}"]
    if not isinstance(value, list):
        return [f"--{section}.{name}={value}"]
    if any(isinstance(item, (list, dict)) for item in value):
        raise ValueError(f"--set {section}.{name}: torchtitan's command line takes no tables: write them into a file")
    return [f"--{section}.{name}", *map(str, value)]
