"""A part of training.py, no command: shapes, variants, options, and what is refused before anything is built."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import lrt
from lrt.commands.options import at_least
from lrt.config import ModelConfig, ParallelConfig, RecurrenceConfig
from lrt.types import Schedule

SEPARATOR = 7  # any token: tokens are random


class Suite(NamedTuple):
    """One shape: a model, rows a GPU, and the attention windows."""

    layers: int
    rows: int
    length: int = 2048
    vocabulary: int = 32768
    pattern: str = "L"
    separator: int | None = None
    width: int | None = None

    def model(self) -> ModelConfig:
        return ModelConfig(
            n_layers=self.layers,
            width=self.width,
            vocab_size=self.vocabulary,
            sequence_length=self.length,
            window_pattern=self.pattern,
        )


SUITES = {
    "d12": Suite(12, 16),
    "d12-sssl": Suite(12, 16, pattern="SSSL", separator=SEPARATOR),
    "d20": Suite(20, 8),
    "d20-sssl": Suite(20, 8, pattern="SSSL", separator=SEPARATOR),
    "tiny": Suite(4, 2, length=64, vocabulary=320, pattern="SL", separator=SEPARATOR, width=64),
}


class Variant(NamedTuple):
    """What is trained: how memory projections are shared (None: the plain twin), which blocks receive memory,
    and the passes."""

    sharing: str | None
    schedule: Schedule
    graphs: tuple[int, int]  # compiled graphs that it adds to those before it on a CPU: a window, and in all
    upper_half: bool = False  # memory enters the upper half of the blocks alone: 7 to 12 of 12, source 8

    def recurrence(self, suite: Suite) -> RecurrenceConfig | None:
        if self.sharing is None:
            return None
        blocks = tuple(range(suite.layers // 2 + 1, suite.layers + 1)) if self.upper_half else None
        return RecurrenceConfig(sharing=self.sharing, separator=suite.separator, blocks=blocks)


VARIANTS = {
    "baseline": Variant(None, lrt.baseline(), (1, 0)),
    "refine(1)": Variant("shared", lrt.refine(1), (2, 0)),
    "refine(1), source 8/12, weights (0, 1)": Variant("shared", lrt.refine(1, weights=(0.0, 1.0)), (0, 0)),
    "interleaved(2)": Variant("shared", lrt.interleaved(2), (1, 2)),
    "upper half refine(1)": Variant("shared", lrt.refine(1), (0, 0), upper_half=True),
    "upper half refine(1), weights (0, 1)": Variant(
        "shared", lrt.refine(1, weights=(0.0, 1.0)), (0, 0), upper_half=True
    ),
    "upper half interleaved(2)": Variant("shared", lrt.interleaved(2), (0, 0), upper_half=True),
    "interleaved(4)": Variant("shared", lrt.interleaved(4), (0, 4)),
    "layerwise interleaved(2)": Variant("layerwise", lrt.interleaved(2), (0, 2)),
}
OFFICIAL, OFFICIAL_LRT = "official baseline, compiled", "official LRT S=2, as shipped"


# ------------------------------------------------------------------ options


def parser(text: str) -> argparse.ArgumentParser:
    """The command line; ``text``: a line of description, then examples."""
    description, _, epilog = text.partition("\n\n")
    made = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, plain = made.add_argument, ParallelConfig()
    variants = [name for name, variant in VARIANTS.items() if name != "interleaved(4)" and not variant.upper_half]
    add(
        "--suites",
        nargs="+",
        default=["d12"],
        choices=sorted(SUITES),
        metavar="SUITE",
        help=f"shapes: {', '.join(SUITES)} (default: d12)",
    )
    add("--variants", nargs="*", default=variants, choices=list(VARIANTS), metavar="VARIANT",
        help=f"what is trained: {', '.join(map(repr, VARIANTS))} (default: "
            "all but interleaved(4) and the upper half)")  # fmt: skip
    add("--turns", type=at_least(1), default=4, help="rounds in which every variant is timed (default: 4)")
    add("--steps", type=at_least(1), default=4, help="timed steps of a variant in a round (default: 4)")
    add("--rows", type=at_least(1), help="rows a GPU, instead of the suite's")
    add("--accumulation", type=at_least(1), default=1, help="micro-batches a timed step (default: 1)")
    add(
        "--plan",
        choices=["single", "fsdp", "fsdp-graph"],
        help="default: single on one process, fsdp-graph on several GPUs, fsdp on several CPUs",
    )
    add("--reshard", default=plain.reshard, choices=["after_step", "after_forward"],
        help=f"when FSDP frees gathered parameters (default: {plain.reshard})")  # fmt: skip
    add("--checkpointing", default="none", choices=["none", "block", "selective"],
        help="activation checkpointing, as the recipe's parallel.activation_checkpointing (default: none)")  # fmt: skip
    add("--loss-chunk", type=at_least(0), default=plain.loss_chunk,
        help=f"tokens whose logits are held at once, 0 = all (default: {plain.loss_chunk})")  # fmt: skip
    add("--backend", help="of torch.compile, instead of the trainer's; on a CPU: aot_eager")
    add("--reference", metavar="PATH", help="checkout of the official code, timed too")
    add("--reference-lrt", action="store_true", help="also its recurrent step; needs --reference")
    add("--whole-step", nargs="*", default=[], choices=list(VARIANTS), metavar="VARIANT",
        help="time whole steps of these too: data, clipping, optimizer; each is one of --variants")  # fmt: skip
    add("--profile", nargs="*", default=[], metavar="VARIANT",
        help="list the kernels of these, each one of --variants or of the official rows; GPU only")  # fmt: skip
    add(
        "--against",
        metavar="JSON",
        help="what --out wrote for the same suites and variants on one GPU: prints the scaling",
    )
    add(
        "--out", metavar="JSON", help="write the JSON there too, after every suite: what is cut keeps the suites before"
    )
    return made


def timed(options: argparse.Namespace) -> list[str]:
    """Names of the rows that the options ask for, in order."""
    official = [OFFICIAL] * bool(options.reference) + [OFFICIAL_LRT] * (
        bool(options.reference) and options.reference_lrt
    )
    return [v for v in VARIANTS if v in options.variants] + official


def check(options: argparse.Namespace, *, cuda: bool) -> dict[tuple[str, str], float]:
    """Refuse what cannot be measured or kept, before anything is built.

    Returns:
        Tokens per second by suite and row of the file --against; empty without it.

    Raises:
        ValueError: one line on what was got and what is possible.
    """
    rows = timed(options)
    if not rows:
        raise ValueError(
            f"--variants names none, and there is no --reference: nothing to time; use any of {_names(VARIANTS)}"
        )
    if options.reference_lrt and not options.reference:
        raise ValueError("--reference-lrt times a part of the official code: name your checkout with --reference PATH")
    if options.reference and not (Path(options.reference) / "nanochat" / "gpt.py").is_file():
        raise ValueError(
            f"--reference {options.reference}: no checkout of the official code, there is no nanochat/gpt.py in it"
        )
    for option, names, possible in (
        ("--whole-step", options.whole_step, options.variants),
        ("--profile", options.profile, rows),
    ):
        unknown = [name for name in names if name not in possible]
        if unknown:
            raise ValueError(
                f"{option} {_names(unknown)}: not timed here; use any of {_names(possible)}, or add it to --variants"
            )
    if options.plan == "fsdp-graph" and not cuda:
        raise ValueError("--plan fsdp-graph captures CUDA graphs, and there is no GPU here: use single or fsdp")
    if options.backend and options.backend not in torch.compiler.list_backends(()):
        raise ValueError(
            f"--backend {options.backend}: torch.compile has no such backend here; use eager, aot_eager or inductor"
        )
    if options.out:
        out = Path(options.out)
        if (
            out.is_dir()
            or not out.absolute().parent.is_dir()
            or not os.access(out if out.exists() else out.absolute().parent, os.W_OK)
        ):
            raise ValueError(f"--out {out}: cannot be written; name a file in a folder that exists")
    return read_speeds(options.against, suites=options.suites, rows=rows) if options.against else {}


def read_speeds(path: str, *, suites: Sequence[str], rows: Sequence[str]) -> dict[tuple[str, str], float]:
    """Tokens per second by suite and row of a file that --out wrote; see ``check``."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {(s["suite"], r["variant"]): float(r["tokens_per_second"]) for s in result["suites"] for r in s["rows"]}
    except OSError as error:
        raise ValueError(
            f"--against {path}: cannot be read ({error.strerror}); name a file that --out wrote on one GPU"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--against {path}: not a result of this tool; name a file that --out wrote on one GPU"
        ) from None
    missing = [f"{suite}: {row}" for suite in suites for row in rows if not found.get((suite, row), 0) > 0]
    if missing:
        has = _names(f"{suite}: {row}" for suite, row in found)
        raise ValueError(
            f"--against {path} has no speed of {_names(missing)}; it has {has}: "
            "choose those with --suites and --variants"
        )
    return found


def _names(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "nothing"
