"""What the memory does inside a model, as one page of figures and JSON.

    python tools/diagnose.py runs/lrt_tiny --out diagnosis
    python tools/diagnose.py FOLDER --data my_text.txt --out diagnosis --decode-tokens 0

Loss with the memory zeroed, frozen, or taken from elsewhere, by block and part; gates and gains; how the memory settles
over sweeps; decode minus parallel by position and residue class; the memory's drift over drawn text; gain by position.
Writes OUT/diagnosis.png and OUT/diagnosis.json; the last line of stdout is {"findings": [...], "report": OUT}.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from lrt.commands.frame import framed
from lrt.commands.options import MOST_ROWS, at_least, path, seed, whole_number
from lrt.conversion.opening import check_finite, open_model, open_tokenizer
from lrt.eval.diagnosis import diagnose
from lrt.eval.diagnosis_figures import draw
from lrt.eval.folders import Settings, held_out_rows, row_length
from lrt.eval.processes import own_device


def main(arguments: list[str] | None = None) -> int:
    """Diagnose one folder; returns the exit code (2: bad input, nothing was written)."""
    args = _parser().parse_args(arguments)
    return framed(lambda: run(args), interrupted="nothing was written")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file; name a folder")
    device = own_device(args.device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    opened = open_model(
        args.folder, base=args.base, dtype=getattr(torch, args.dtype) if args.dtype else default, device=device
    )
    check_finite(opened.model, where=opened.folder)
    tokenizer = open_tokenizer(opened, name=args.tokenizer, base=args.base)
    settings = Settings(data=tuple(args.data), sequence_length=args.sequence_length, text_column=args.text_column)
    batch = next(iter(held_out_rows(opened, settings, tokenizer, length=row_length(opened, settings), rows=args.rows)))
    report = diagnose(
        opened.model, batch, separator=tokenizer.bos_id, sweeps=args.sweeps, decode_tokens=args.decode_tokens,
        seed=args.seed, progress=lambda part: print(f"{part} ...", file=sys.stderr, flush=True),
    )  # fmt: skip
    report = {"model": str(opened.folder), **report}
    out.mkdir(parents=True, exist_ok=True)
    (out / "diagnosis.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw(report, out / "diagnosis.png", title=f"{opened.folder}: what the memory does")
    for finding in report["findings"]:
        print(finding)
    print(json.dumps({"findings": report["findings"], "report": str(out)}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "folder",
        help="an export, a training run or one of its checkpoints, a Hugging Face folder, "
        "or the memory alone (with --base)",
    )
    add("--out", type=path, required=True, metavar="REPORT", help="folder for diagnosis.png and diagnosis.json")
    add(
        "--data",
        nargs="+",
        type=path,
        default=[],
        metavar="DATA",
        help="as data.train names texts and tokenized folders (default: the run's own)",
    )
    add(
        "--rows",
        type=at_least(2, most=MOST_ROWS),
        default=16,
        metavar="B",
        help="rows of text that are looked at (default: 16)",
    )
    add("--sequence-length", type=at_least(2), metavar="T", help="tokens of a row (default: as trained)")
    add(
        "--sweeps",
        type=at_least(2),
        default=8,
        metavar="N",
        help="refinements over which the memory is watched (default: 8)",
    )
    add(
        "--decode-tokens",
        type=whole_number,
        default=5000,
        metavar="N",
        help="drawn tokens over which drift is watched; 0 = none (default: 5000)",
    )
    add("--seed", type=seed, default=0, help="of the draws (default: 0)")
    add("--text-column", default="text", help="column of parquet, CSV and JSON lines (default: text)")
    add("--tokenizer", type=path, help='"bytes", a tokenizer.json, or its folder (default: the model\'s)')
    add("--base", type=path, help="the decoder of a folder that holds the memory alone")
    add("--device", help="such as cpu or cuda:0 (default: a GPU, else the CPU)")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float64"],
        help="of the model (default: bfloat16 on CUDA, float32 elsewhere)",
    )
    return parser
