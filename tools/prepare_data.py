"""Prepare training data: train a tokenizer, tokenize a corpus once, or look at one.

python tools/prepare_data.py train-tokenizer --train 'data/*.parquet' --vocab-size 32768 --output tokenizer
python tools/prepare_data.py tokenize --train 'data/*.parquet' --tokenizer tokenizer --output tokens
python tools/prepare_data.py inspect --train tokens --tokenizer tokenizer --sequence-length 2048
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed works from any folder
from lrt.config import DataConfig  # noqa: E402
from lrt.data.prepare import inspect_corpus, tokenize_corpus, train_tokenizer  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code (2 for bad input)."""
    options = _parser().parse_args(arguments)
    data = DataConfig(
        train=options.train,
        text_column=options.text_column,
        tokenizer=getattr(options, "tokenizer", "bytes"),
        on_corrupt=options.on_corrupt,
        buffer_documents=getattr(options, "buffer_documents", 256),
        validation="auto" if options.hold_out else "demo",  # "demo" holds none of these files out
    )
    try:
        options.run(data, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _train_tokenizer(data: DataConfig, options: argparse.Namespace) -> None:
    limit = None if options.limit_mb is None else int(options.limit_mb * 1e6)
    tokenizer = train_tokenizer(data, vocab_size=options.vocab_size, output=options.output, limit_bytes=limit)
    print(f"{tokenizer.vocab_size} tokens, separator {tokenizer.bos_id}, written to {options.output}")


def _tokenize(data: DataConfig, options: argparse.Namespace) -> None:
    manifest = tokenize_corpus(data, output=options.output, processes=options.processes, shard_documents=options.shard_documents)
    print(
        f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens in {len(manifest['shards'])} shards ({manifest['dtype']}), "
        f"{manifest['skipped']} skipped, written to {options.output}"
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
        ("cut", f"{report.cut_documents:.1%} of the documents, {report.cut_tokens:.1%} of the tokens stand behind a cut"),
    )
    for name, value in lines:
        print(f"{name:16s} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--train", required=True, help='"demo", a .parquet or .txt file, a folder or glob of them, or hf://datasets/OWNER/NAME'
    )
    source.add_argument("--text-column", default="text", help="column of the parquet files that holds the text (default: text)")
    source.add_argument("--on-corrupt", choices=("stop", "skip"), default="stop", help="what to do with files that cannot be read")
    source.add_argument("--hold-out", action="store_true", help='leave out the last file, which data.validation = "auto" uses')

    command = commands.add_parser("train-tokenizer", parents=[source], help="train a byte-level BPE tokenizer")
    command.add_argument("--vocab-size", type=int, default=32768, help="ids, the separator included (default: 32768)")
    command.add_argument("--output", required=True, help="folder for tokenizer.json and token_bytes.npy")
    command.add_argument("--limit-mb", type=float, default=None, help="read only so many MB of text (default: all)")
    command.set_defaults(run=_train_tokenizer)

    command = commands.add_parser(
        "tokenize", parents=[source], help="write memory-mapped token shards; run again to go on after an interruption"
    )
    command.add_argument("--tokenizer", required=True, help='"bytes", tokenizer.json, a folder that holds one, or a .tiktoken file')
    command.add_argument("--output", required=True, help="folder for the shards and manifest.json")
    command.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that tokenize (default: all cores)")
    command.add_argument("--shard-documents", type=int, default=65536, help="documents of a shard, at least (default: 65536)")
    command.set_defaults(run=_tokenize)

    command = commands.add_parser("inspect", parents=[source], help="count documents, tokens and bytes, and what packing costs")
    command.add_argument("--tokenizer", default="bytes", help='"bytes", tokenizer.json, a folder that holds one, or a .tiktoken file')
    command.add_argument("--sequence-length", type=int, default=2048, help="T of the rows (default: 2048)")
    command.add_argument("--buffer-documents", type=int, default=256, help="documents among which the best fit is sought (default: 256)")
    command.add_argument("--limit-tokens", type=int, default=None, help="stop after so many tokens (default: all)")
    command.set_defaults(run=_inspect)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
