"""The table of families in docs/adapt.md: made by its command, and of every configuration that the tests know."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hf_decoders import DESCRIBED, FAMILIES, NIGHTLY, make

ROOT = Path(__file__).resolve().parents[2]


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("families_tool", ROOT / "tools" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_lists_every_configuration() -> None:
    made = tool()
    table = made.PAGE.read_text(encoding="utf-8").split(made.BEGIN)[1].split(made.END)[0]
    listed = [
        line.split(" | ")[0].removeprefix("| ")
        for line in table.splitlines()
        if line.startswith("| ") and "configuration" not in line
    ]
    assert listed == list(FAMILIES | DESCRIBED | NIGHTLY)
    assert "refused" not in table and "logits differ" not in table


def test_a_row_says_what_differs() -> None:
    decoder = make("granite")
    assert tool().compared(decoder)[:2] == ("granite", "logits, loss, gradients bit for bit")
    broken = make("llama")
    broken.model.layers[0].register_forward_hook(lambda layer, given, out: out * 1.5)
    assert tool().compared(broken)[1].startswith("refused: this LlamaForCausalLM has the structure of")
