"""The table of decoder families in docs/adapt.md: adapts a tiny random decoder of each and says what was compared.

python tools/families.py            # prints the table
python tools/families.py --write    # puts it into docs/adapt.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import lrt

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adapt.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->\n"
LENGTH = 13  # tokens, more than any window of the tiny decoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/adapt.md")
    write = parser.parse_args().write
    table = families_table()
    if not write:
        print(table)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


def families_table() -> str:
    """Rows of Markdown, one a family that the installed version of transformers has."""
    sys.path.insert(0, str(ROOT / "tests" / "lib"))
    import hf_decoders
    import transformers

    transformers.logging.set_verbosity_error()
    known = hf_decoders.FAMILIES | hf_decoders.DESCRIBED | hf_decoders.NIGHTLY
    rows = [
        f"Made by `python tools/families.py --write` with transformers {transformers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}.",
        "",
    ]
    rows += [
        "| configuration | class | description | baseline against the original | other schedules against it |",
        "|---|---|---|---|---|",
    ]
    for name in hf_decoders.known(known):
        decoder = hf_decoders.make(name)
        rows.append(f"| {name} | {type(decoder).__name__} | " + " | ".join(compared(decoder)) + " |")
    return "\n".join(rows) + "\n"


def compared(decoder: Any) -> tuple[str, str, str]:
    """Description that fits, verdict on logits, loss and gradients of the baseline, largest error of the other
    schedules."""
    ids = torch.randint(1, 58, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    theirs = decoder(ids, labels=ids, use_cache=False)
    theirs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    try:
        model = lrt.adapt(decoder)
    except ValueError as error:
        return "none", f"refused: {str(error).split('. ')[0]}", ""
    ours = model(ids, labels=ids, schedule=lrt.baseline(), return_logits=True)
    ours.loss.backward()
    found = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    same = (
        torch.equal(ours.logits, theirs.logits)
        and torch.equal(ours.loss, theirs.loss)
        and found.keys() == gradients.keys()
    )
    same = same and all(torch.equal(grad, gradients[name]) for name, grad in found.items())
    verdict = (
        "logits, loss, gradients bit for bit"
        if same
        else f"logits differ by {float((ours.logits - theirs.logits).abs().max()):.0e}"
    )
    with torch.no_grad():
        others = [
            model(ids, schedule=schedule).logits
            for schedule in (lrt.sequential(), lrt.interleaved(3), lrt.refine(2), lrt.chunked(5))
        ]
    worst = max(float((logits - theirs.logits.detach()).abs().max()) for logits in others)
    return model.backbone.family.name, verdict, f"within {worst:.0e}" if worst else "bit for bit"


if __name__ == "__main__":
    main()
