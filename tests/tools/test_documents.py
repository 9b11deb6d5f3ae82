"""The documents: pages made from the code are whole, and every link of every page leads somewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import re
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from pages import ROOT, blocks

import lrt
from lrt.__main__ import COMMANDS
from lrt.config.settings import Recipe


@pytest.fixture(scope="module")
def reference():
    """docs/reference.py, which is no package."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("reference_of_docs", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "lrt" / "py.typed").read_bytes() == b""


# ------------------------------------------------------------------ pages made from the code


def sections():
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        options = (hints[field.name], *get_args(hints[field.name]))
        yield field.name, next(option for option in options if dataclasses.is_dataclass(option))


def test_every_key_of_a_recipe_has_values_and_a_meaning(reference):
    tables = [(title.strip("[]").split(".")[0], cls) for title, cls in reference.TABLES.items()]
    for section, cls in [*sections(), *tables]:
        keys = reference.keys_of(section, cls)
        assert [key.name for key in keys] == [field.name for field in dataclasses.fields(cls)]
        for key in keys:
            assert key.values and key.meaning, f"{section}.{key.name}: say its meaning in a comment beside the field"


def test_the_page_of_keys_says_range_default_and_meaning(reference):
    page = reference.recipe_page()
    row = "| `warmdown_fraction` | number of 0 or more, at most 1 | `0.5` | share of the steps in which the rates fall |"
    assert row in page.splitlines()
    assert '| `sharing` | `"shared"`, `"layerwise"` | `"shared"` | one pair of memory projections, or one a block |' in page
    for title in [f"## [{section}]" for section, _ in sections()] + [f"## {title}" for title in reference.TABLES]:
        assert title in page.splitlines()


def test_every_command_is_shown_as_its_help(reference):
    page = reference.commands_page()
    for name in COMMANDS:
        assert f"usage: lrt {name}" in page
    assert "--recipe RECIPE" in page


def test_every_public_name_is_in_the_api(reference):
    page = reference.api_page()
    assert [name for name in lrt.__all__ if f"::: lrt.{name}\n" not in page] == ["prefill"]
    assert "::: lrt.decoding.prefill\n" in page  # a module: shown with its functions


# ------------------------------------------------------------------ blocks of Python


def run_page(page: str, scope: dict | None = None) -> list[str]:
    """Run every block of a page, one after the other, as a reader would; what each of them prints."""
    scope, printed = {} if scope is None else scope, []
    for block in blocks(page, holding=""):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(block, scope)  # noqa: S102
        printed.append(said.getvalue())
    return printed


def results(page: str) -> list[str]:
    """The blocks of text of a page: what it says that its code prints."""
    return re.findall(r"```text\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_worked_example_prints_what_the_page_says():
    """Eight tokens in plain torch; the second block compares lrt with it pass by pass."""
    try:
        assert run_page("method.md") == results("method.md")
    finally:
        torch.set_default_dtype(torch.float32)
    first = blocks("method.md", holding="")[0]
    assert "lrt" not in first and len([line for line in first.splitlines() if line]) <= 40


def test_examples_of_extending_print_what_the_page_says(tmp_path, monkeypatch):
    """A block, a decoder, states and the trainer as a library; a run says more before its last line."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    for printed, says in zip(run_page("extend.md", scope), results("extend.md"), strict=True):
        assert printed.endswith(says)
    assert scope["losses"].of_steps[-1] < scope["losses"].of_steps[0]
    block, hidden, width = scope["block"], scope["hidden"], scope["width"]
    message = r"memory is a tensor \(2, 8, 32\): give lrt.MemoryInput"
    with pytest.raises(ValueError, match=message):
        block(hidden, hidden, None, None)
    with pytest.raises(ValueError, match="Linear has no enter, project, attend: a block that receives memory needs"):
        lrt.RecurrentBlock(torch.nn.Linear(width, width))
