"""Pages that are made from the code: the keys of a recipe, the API, the command lines.

``python docs/reference.py`` writes reference/recipe.md, which the repository keeps because other pages link to it.
The other two are made when the site is built: ``mkdocs.yml`` names this file as a hook.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import tokenize
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import lrt  # noqa: E402
from lrt.__main__ import BENCHMARKS, COMMANDS, main  # noqa: E402
from lrt.config.data import SourceConfig  # noqa: E402
from lrt.config.ranges import ITEM_RANGES, RANGES, number_types  # noqa: E402
from lrt.config.settings import PhaseConfig, Recipe, ShareConfig  # noqa: E402

WIDTH = 100  # columns of a command's --help
TABLES = {"[[schedule.phases]]": PhaseConfig, "schedule.mix": ShareConfig, "[[data.sources]]": SourceConfig}


class Key(NamedTuple):
    """One key of a recipe, as its page shows it."""

    name: str
    values: str
    default: str
    meaning: str


# ------------------------------------------------------------------ keys of a recipe


def comments(cls: type) -> dict[str, str]:
    """The comment beside or right above each field of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        source = inspect.getsource(part)
        said = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and not token.string.startswith("# type:")
        }
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        end = 0  # of the statement before
        for node in body.body:
            first, last = node.lineno, node.end_lineno or node.lineno
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = [line for line in range(end + 1, last + 1) if line in said]
                text = " ".join(said[line] for line in lines).split("  # type:")[0]
                found[node.target.id] = text or found.get(node.target.id, "")
            end = max(last, first)
    return found


def keys_of(section: str, cls: type) -> list[Key]:
    """The keys of a section of a recipe, or of a table inside it.

    Args:
        section: such as schedule, whose ranges hold.
        cls: its dataclass.
    """
    hints, meanings, keys = get_type_hints(cls), comments(cls), []
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            default = _shown(field.default)
        else:
            default = "needed"
        keys.append(Key(field.name, _values(section, field.name, hints[field.name]), default, meanings[field.name]))
    return keys


def _values(section: str, name: str, hint: Any) -> str:
    options = [hint] if get_origin(hint) in (Literal, tuple, None) else list(get_args(hint))
    words: list[str] = []
    for option in options:
        words += [f"`{_shown(word)}`" for word in get_args(option)] if get_origin(option) is Literal else []
        words += ["`true`", "`false`"] if option is bool else ["text"] if option is str else []
        words += ["list of texts"] if get_origin(option) is tuple and str in get_args(option) else []
        tables = get_origin(option) is tuple and dataclasses.is_dataclass(get_args(option)[0])
        words += ["list of tables"] if tables else []
    kinds = number_types(hint)
    if kinds:
        allowed = RANGES[section].get(name) or ITEM_RANGES[name]
        several = any(get_origin(option) is tuple for option in options)
        text = allowed.says(whole=float not in kinds).removeprefix("use a ")
        words.append(f"list of: {text}" if several else text)
    if type(None) in options:
        words.append('`"none"`')
    return ", ".join(words)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def recipe_page() -> str:
    """Every key of a recipe with its values, default and meaning."""
    page = [
        "# Recipe keys",
        "",
        "A recipe is a TOML file that holds what differs from these defaults; "
        "[Train](../train.md) shows how they inherit.",
        'On the command line the same is `--set SECTION.KEY=VALUE`. `"none"` takes a value back.',
        "This page is made from `lrt/config/` by `python docs/reference.py`.",
        "",
    ]
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        cls = next(part for part in (hints[field.name], *get_args(hints[field.name])) if dataclasses.is_dataclass(part))
        page += _section(f"[{field.name}]", field.name, cls)
        for title, item in TABLES.items():
            if title.strip("[]").startswith(f"{field.name}."):
                page += _section(title, field.name, item)
    return "\n".join(page).rstrip() + "\n"


def _section(title: str, section: str, cls: type) -> list[str]:
    off = [f"`{section} = false` switches it off."] if section == "recurrence" else []
    rows = [[f"`{key.name}`", key.values, f"`{key.default}`", key.meaning] for key in keys_of(section, cls)]
    lines = [f"## {title}", "", " ".join([inspect.cleandoc(cls.__doc__ or "").splitlines()[0], *off])]
    if lines[-1].startswith(f"{cls.__name__}("):  # what a dataclass says of itself
        lines[-1] = ""
    lines += ["", "| key | values | default | meaning |", "|---|---|---|---|"]
    return [*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows), ""]


# ------------------------------------------------------------------ command lines and the API


def commands_page() -> str:
    """What every command says to --help."""
    page = ["# Command lines", "", "`lrt NAME` and `python -m lrt NAME` are the same.", ""]
    for name in COMMANDS:
        for words in [["bench", part] for part in BENCHMARKS] if name == "bench" else [[name]]:
            page += [f"## lrt {' '.join(words)}", "", "```text", help_of(words).rstrip(), "```", ""]
    return "\n".join(page)


def help_of(words: list[str]) -> str:
    """What a command prints with --help."""
    said, before, columns = io.StringIO(), sys.argv[0], os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        sys.argv[0] = before
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return said.getvalue()


def api_page() -> str:
    """One entry a public name, as mkdocstrings reads it."""
    names = "\n\n".join(f"::: lrt.{name}" for name in lrt.__all__ if name != "prefill")
    return f"# API\n\nThe names of `import lrt`.\n\n{names}\n\n::: lrt.decoding.prefill\n"


PAGES = {"reference/api.md": api_page, "reference/commands.md": commands_page}
KEPT = ROOT / "docs" / "reference" / "recipe.md"


# ------------------------------------------------------------------ mkdocs


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages to those of docs/."""
    from mkdocs.structure.files import File

    for uri, make in PAGES.items():
        files.append(File.generated(config, uri, content=make()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link that leaves docs/ becomes the name of the file: the site holds only docs/."""
    return re.sub(r"\[([^\]]*)\]\(\.\./(?!train\.md)([^)]*)\)", r"\1 (`\2`)", markdown)


if __name__ == "__main__":
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(recipe_page(), encoding="utf-8")
    print(f"wrote {KEPT}")
