"""What a reader of the library may count on: short files, and few values without a type; ruff holds the width."""

from __future__ import annotations

import ast
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = 400
ANY = 160  # uses of the word in code, imports included; docs/design.md says where they are


def files():
    return sorted((ROOT / "lrt").rglob("*.py"))


def test_no_file_of_the_library_is_longer_than_400_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    assert not {path: length for path, length in lengths.items() if length > LINES}


def test_values_of_any_type_stay_few():
    found = {}
    for path in files():
        with path.open("rb") as file:
            tokens = tokenize.tokenize(file.readline)
            found[str(path.relative_to(ROOT))] = sum(t.type == tokenize.NAME and t.string == "Any" for t in tokens)
    assert sum(found.values()) <= ANY, sorted(found.items(), key=lambda item: -item[1])[:20]


def test_no_docstring_is_broken_as_a_message_would_be():
    """Six had quotes in the middle, of strings side by side."""
    broken = [
        (path.name, node.lineno)
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if re.search(r"""["']\n\s*f?["']""", node.value.value)
    ]
    assert broken == []
