"""Blocks of Python in the pages of docs/, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = next(place for place in Path(__file__).parents if (place / "pyproject.toml").is_file())


def blocks(page: str, *, holding: str) -> list[str]:
    """The blocks of a page in which ``holding`` stands, in order."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    chosen = [block for block in found if holding in block]
    assert chosen, f"docs/{page} has no block with {holding!r}"
    return chosen
