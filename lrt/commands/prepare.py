"""Prepare training data: train a tokenizer, tokenize a corpus once, or look at one.

python tools/prepare_data.py train-tokenizer --train 'data/*.parquet' --vocab-size 32768 --output tokenizer
python tools/prepare_data.py tokenize --train 'data/*.parquet' --tokenizer tokenizer --output tokens
python tools/prepare_data.py inspect --train tokens --tokenizer tokenizer --sequence-length 2048
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable

from lrt.commands.frame import framed
from lrt.commands.options import at_least, path
from lrt.config import DataConfig
from lrt.data.prepare import inspect_corpus, tokenize_corpus, train_tokenizer
from lrt.tables import Table


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code (2 for bad input)."""
    options = _parser().parse_args(arguments)
    return framed(lambda: _named_failures(options), interrupted=options.after_interrupt)


def _named_failures(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except BrokenPipeError:
        raise
    except ValueError as error:
        raise ValueError(_in_options(str(error))) from None
    except OSError as error:  # a full disk, a folder that may not be written
        place = error.filename or getattr(options, "output", options.train)
        print(f"error: {place}: {error.strerror or error}; mend that and give the same command again", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    data = DataConfig(
        train=options.train,
        text_column=options.text_column,
        tokenizer=getattr(options, "tokenizer", "bytes"),
        on_corrupt=options.on_corrupt,
        buffer_documents=getattr(options, "buffer_documents", 256),
        validation="auto" if options.hold_out else "demo",  # "demo" holds none of these files out
    )
    options.run(data, options)
    return 0


def _in_options(text: str) -> str:
    """A message with the names of this tool's options in place of the recipe's keys."""
    text = text.replace('set data.on_corrupt = "skip"', "give --on-corrupt skip")
    keys = "|".join(("train", "text_column", "tokenizer", "on_corrupt", "buffer_documents"))
    return re.sub(
        rf"(?<![\w./'\"-])data\.({keys})\b(?![./-]\w)(?: =)?", lambda found: f"--{found[1].replace('_', '-')}", text
    )


def _train_tokenizer(data: DataConfig, options: argparse.Namespace) -> None:
    limit = None if options.limit_mb is None else int(options.limit_mb * 1e6)
    tokenizer = train_tokenizer(data, vocab_size=options.vocab_size, output=options.output, limit_bytes=limit)
    print(f"{tokenizer.vocab_size} tokens, separator {tokenizer.bos_id}, written to {options.output}")


def _tokenize(data: DataConfig, options: argparse.Namespace) -> None:
    manifest = tokenize_corpus(
        data, output=options.output, processes=options.processes, shard_documents=options.shard_documents
    )
    print(
        f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens in {len(manifest['shards'])} "
        f"shards ({manifest['dtype']}), {manifest['skipped']} skipped, written to {options.output}"
    )


def _inspect(data: DataConfig, options: argparse.Namespace) -> None:
    report = inspect_corpus(data, sequence_length=options.sequence_length, limit_tokens=options.limit_tokens)
    lines = (
        ("documents", f"{report.documents:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("bytes", f"{report.bytes:,}"),
        ("bytes per token", f"{report.bytes / report.tokens:.3f}"),
        ("files skipped", f"{report.skipped}"),
        ("document length", "tokens at 5, 25, 50, 75, 95, 100 %: " + ", ".join(f"{q:,}" for q in report.quantiles)),
        ("full rows", f"{report.rows:,} of {options.sequence_length} + 1 tokens"),
        ("separators", f"{report.separator_share:.2%} of the tokens in rows"),
        (
            "cut",
            f"{report.cut_documents:.1%} of the documents, {report.cut_tokens:.1%} of the tokens stand behind a cut",
        ),
    )
    for name, value in lines:
        print(f"{name:16s} {value}")


def _parser() -> argparse.ArgumentParser:
    shown: Table = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **shown)
    commands = parser.add_subparsers(required=True, metavar="command")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--train",
        type=path,
        required=True,
        help='"demo", a .parquet, .jsonl, .csv or .txt file, a folder or glob of them, or hf://datasets/OWNER/NAME',
    )
    source.add_argument(
        "--text-column",
        default="text",
        help="column of parquet, CSV and JSON lines that holds the text (default: text)",
    )
    source.add_argument(
        "--on-corrupt",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with files that cannot be read (default: stop)",
    )
    source.add_argument(
        "--hold-out", action="store_true", help='leave out the last file, which data.validation = "auto" uses'
    )
    tokenizer = '"bytes", tokenizer.json, a folder that holds one, or a .tiktoken file'

    def add(
        name: str, run: Callable[[DataConfig, argparse.Namespace], None], about: str, *, after_interrupt: str
    ) -> argparse.ArgumentParser:
        example = next(line for line in (__doc__ or "").splitlines() if f"prepare_data.py {name} " in line)
        command = commands.add_parser(
            name, parents=[source], help=about, description=f"{about}\n\nexample: {example}", **shown
        )
        command.set_defaults(run=run, after_interrupt=after_interrupt)
        return command

    command = add(
        "train-tokenizer",
        _train_tokenizer,
        "train a byte-level BPE tokenizer",
        after_interrupt="nothing was written; the same command begins anew (--limit-mb reads less)",
    )
    command.add_argument(
        "--vocab-size",
        type=at_least(1, most=1 << 62),
        default=32768,
        help="ids, the separator included (default: 32768)",
    )
    command.add_argument("--output", type=path, required=True, help="folder for tokenizer.json and token_bytes.npy")
    command.add_argument("--limit-mb", type=_amount, default=None, help="read only so many MB of text (default: all)")

    command = add(
        "tokenize",
        _tokenize,
        "write memory-mapped token shards; run again to go on after an interruption",
        after_interrupt="the same command goes on with the shards that are missing",
    )
    command.add_argument("--tokenizer", type=path, required=True, help=tokenizer)
    command.add_argument("--output", type=path, required=True, help="folder for the shards and manifest.json")
    command.add_argument(
        "--processes",
        type=at_least(1),
        default=os.cpu_count() or 1,
        help="processes that tokenize (default: all cores)",
    )
    command.add_argument(
        "--shard-documents", type=at_least(1), default=65536, help="documents of a shard, at least (default: 65536)"
    )

    command = add(
        "inspect",
        _inspect,
        "count documents, tokens and bytes, and what packing costs; --train may be a tokenized folder",
        after_interrupt="nothing was changed; --limit-tokens looks at less",
    )
    command.add_argument("--tokenizer", type=path, default="bytes", help=f"{tokenizer} (default: bytes)")
    command.add_argument("--sequence-length", type=at_least(1), default=2048, help="T of the rows (default: 2048)")
    command.add_argument(
        "--buffer-documents",
        type=at_least(1),
        default=256,
        help="documents among which the best fit is sought (default: 256)",
    )
    command.add_argument(
        "--limit-tokens", type=at_least(1), default=None, help="stop after so many tokens (default: all)"
    )
    return parser


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value
