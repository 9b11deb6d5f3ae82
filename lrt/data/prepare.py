"""Work done once before training: train a tokenizer, tokenize a corpus, look at one."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lrt.config import DataConfig
from lrt.config.files import read_text, write_whole
from lrt.data.documents import Documents, Reader
from lrt.data.locks import locked
from lrt.data.packing import Packer, Piece
from lrt.data.sources import open_documents, split_files
from lrt.data.stream import read_in_order
from lrt.data.texts import TextDocuments
from lrt.data.tokenized import MANIFEST, UNFINISHED, VERSION, write_shard
from lrt.data.tokenizer import BOS, SPLIT, FileTokenizer, Tokenizer, load_tokenizer
from lrt.tables import Table

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

LARGEST = 1 << 22  # ids of a tokenizer; its trainer makes room for all of them before it begins


class CorpusReport(NamedTuple):
    """What ``inspect_corpus`` found."""

    documents: int
    tokens: int  # without separators
    bytes: int
    skipped: int  # files left out
    quantiles: tuple[int, ...]  # document lengths in tokens: 5, 25, 50, 75, 95 %, longest
    rows: int  # full rows of sequence_length + 1 tokens
    separator_share: float  # of the tokens in rows
    cut_documents: float  # share of documents that lie in more than one row
    cut_tokens: float  # share of document tokens that stand behind a cut, without the document's beginning


def train_tokenizer(
    data: DataConfig, *, vocab_size: int, output: str | Path, limit_bytes: int | None = None
) -> Tokenizer:
    """Train a byte-level BPE tokenizer on ``data.train`` and write it.

    Args:
        data: where the text is; ``data.tokenizer`` is not used.
        vocab_size: ids, the 256 bytes and the separator among them.
        output: folder for ``tokenizer.json`` and ``token_bytes.npy``.
        limit_bytes: stop reading after so many bytes of text; None = all.

    Raises:
        ValueError: the vocabulary is too small or too large, the data are bad, or the folder cannot be made or is in
            use.
    """
    if not 257 <= vocab_size <= LARGEST:
        size = (
            "small: 256 bytes and the separator need 257 or more"
            if vocab_size < 257
            else f"large: use at most {LARGEST}"
        )
        raise ValueError(f"--vocab-size {vocab_size} is too {size}")
    with _output_folder(output) as folder:
        return _train_tokenizer(data, vocab_size=vocab_size, folder=folder, limit_bytes=limit_bytes)


def _train_tokenizer(data: DataConfig, *, vocab_size: int, folder: Path, limit_bytes: int | None) -> Tokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    documents = _text_documents(data)
    tokenizer = HFTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        _texts(documents, limit_bytes=limit_bytes, on_corrupt=data.on_corrupt), trainer=trainer
    )
    trained = FileTokenizer(tokenizer.to_str(), bos=BOS)
    trained.save(folder)
    table = io.BytesIO()
    np.save(table, trained.token_bytes())
    write_whole(folder / "token_bytes.npy", table.getvalue())
    return trained


def tokenize_corpus(data: DataConfig, *, output: str | Path, processes: int, shard_documents: int = 65536) -> Table:
    """Write ``data.train`` as a tokenized folder; run again after an interruption, it goes on where it stopped.

    Args:
        data: where the text is, and the tokenizer.
        output: folder to fill.
        processes: how many tokenize at once.
        shard_documents: a shard ends with the group that reaches so many documents.

    Returns:
        The manifest.

    Raises:
        ValueError: bad data, or the folder holds something else or is in use.
    """
    with _output_folder(output) as folder:
        return _tokenize_corpus(data, folder=folder, processes=processes, shard_documents=shard_documents)


def _tokenize_corpus(data: DataConfig, *, folder: Path, processes: int, shard_documents: int) -> Table:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    tokenizer = load_tokenizer(data.tokenizer)
    documents = _text_documents(data)
    shards = _shard_groups(documents, shard_documents)
    job = {
        "documents": documents.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "shards": [len(groups) for _, groups in shards],
    }
    finished = _finished(folder, job)
    if finished is not None:
        return finished
    _write_json(folder / UNFINISHED, job)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    entries = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, _ in shards
        if (path := folder / f"{name}.json").is_file()
    }
    todo = [(name, groups) for name, groups in shards if name not in entries]
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards  {task.fields[tokens]:.0f} M tokens"),
    )
    work = closing(_in_processes(data, folder=folder, dtype=dtype, todo=todo, processes=processes))
    with Progress(*columns, TimeRemainingColumn()) as progress, work as written:
        tokens = sum(entry["tokens"] for entry in entries.values())
        task = progress.add_task("", total=len(shards), completed=len(entries), tokens=tokens / 1e6)
        for entry in written:
            entries[entry["name"]] = entry
            tokens += entry["tokens"]
            progress.update(task, advance=1, tokens=tokens / 1e6)
    manifest = {
        "version": VERSION,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "documents": sum(entry["documents"] for entry in entries.values()),
        "tokens": tokens,
        "skipped": documents.skipped + sum(entry["skipped"] for entry in entries.values()),
        "job": job,
        "shards": [entries[name] for name, _ in shards],
    }
    tokenizer.save(folder)
    _write_json(folder / MANIFEST, manifest)
    for name, _ in shards:
        (folder / f"{name}.json").unlink(missing_ok=True)
    (folder / UNFINISHED).unlink()
    return manifest


def inspect_corpus(data: DataConfig, *, sequence_length: int, limit_tokens: int | None = None) -> CorpusReport:
    """Count a corpus and pack it in the order of its files; reading tokenized folders verifies their checksums.

    Args:
        data: where it is, the tokenizer, and the packing buffer.
        sequence_length: T of the rows.
        limit_tokens: stop after so many; None = all.

    Raises:
        ValueError: bad data.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    documents = open_documents(data, tokenizer=tokenizer, split="train")
    lengths: list[int] = []
    total_bytes = 0

    def pieces() -> Iterator[Piece]:
        nonlocal total_bytes
        tokens = 0
        for group, document, (ids, sizes) in read_in_order(
            documents.measure, documents.sizes, on_corrupt=data.on_corrupt
        ):
            if limit_tokens is not None and tokens >= limit_tokens:
                return
            if len(ids):
                lengths.append(len(ids))
                tokens += len(ids)
                total_bytes += int(sizes.sum())
                yield Piece(group, document, 0, ids)

    source = pieces()
    packer = Packer(
        lambda: next(source, None), length=sequence_length + 1, bos_id=tokenizer.bos_id, buffer=data.buffer_documents
    )
    rows, cut, separators, behind = 0, set(), 0, 0
    while (row := packer.row()) is not None:
        rows += row.filled == len(row.tokens)
        separators += int((row.tokens[: row.filled] == tokenizer.bos_id).sum())
        starts = np.flatnonzero(row.tokens[: row.filled] == tokenizer.bos_id).tolist() + [row.filled]
        for i, (group, document, offset) in enumerate(row.origin):
            if offset:
                cut.add((group, document))
                behind += starts[i + 1] - starts[i] - 1
    tokens = sum(lengths)
    if not tokens:
        raise ValueError(f"data.train = {data.train!r} is an empty corpus (no tokens): give files with text")
    quantiles = tuple(int(q) for q in np.quantile(lengths, (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)))
    return CorpusReport(
        len(lengths),
        tokens,
        total_bytes,
        documents.skipped,
        quantiles,
        rows,
        separators / (tokens + separators),
        len(cut) / len(lengths),
        behind / tokens,
    )


# ------------------------------------------------------------------ pieces of the above


@contextmanager
def _output_folder(output: str | Path) -> Iterator[Path]:
    """The folder to fill, which no other process fills meanwhile."""
    folder = Path(output)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder, advice="give another --output"))
        except OSError as error:
            why = "is a file" if folder.is_file() else f"cannot be made ({error.strerror})"
            raise ValueError(
                f"--output {folder} {why}: give a folder, new or one that the same command began"
            ) from None
        yield folder


def _text_documents(data: DataConfig) -> TextDocuments:
    if split_files(data, split="train")[0].suffix == ".bin":
        raise ValueError(f"data.train = {data.train!r} is tokenized already: give text or parquet files")
    documents = open_documents(data, tokenizer=load_tokenizer(data.tokenizer), split="train")
    assert isinstance(documents, TextDocuments)
    return documents


def _texts(documents: TextDocuments, *, limit_bytes: int | None, on_corrupt: str) -> Iterator[str]:
    seen = 0
    for _, _, text in read_in_order(documents.texts, documents.sizes, on_corrupt=on_corrupt):
        if limit_bytes is not None and seen >= limit_bytes:
            return
        seen += len(text.encode("utf-8", "replace"))
        yield text


def _shard_groups(documents: Documents, shard_documents: int) -> list[tuple[str, list[int]]]:
    """Runs of groups that become one shard each."""
    runs: list[list[int]] = [[]]
    count = 0
    for group, size in enumerate(documents.sizes.tolist()):
        if count >= shard_documents:
            runs.append([])
            count = 0
        runs[-1].append(group)
        count += size
    return [(f"shard_{number:05d}", run) for number, run in enumerate(runs)]


def _finished(folder: Path, job: Table) -> Table | None:
    """The manifest, if the folder already holds all of this job; refuses a folder that holds another one."""
    for name in (MANIFEST, UNFINISHED):
        if (folder / name).is_file():
            content: object = None
            with suppress(ValueError, RecursionError):  # then it is none of ours, and another job
                content = json.loads(read_text(folder / name))
            content = content if isinstance(content, dict) else {}
            held = content.get("job", {}) if name == MANIFEST else content
            held = held if isinstance(held, dict) else {}
            words = {
                "documents": "text (files, their contents or the text column)",
                "tokenizer": "tokenizer",
                "shards": "shard size",
            }
            for key, word in words.items():
                if held.get(key) != job[key]:
                    raise ValueError(
                        f"--output {folder} was begun with another {word}: choose an empty folder, or delete this one"
                    )
            return content if name == MANIFEST else None
    return None


def _write_json(path: Path, content: Table) -> None:
    write_whole(path, json.dumps(content))


def _in_processes(
    data: DataConfig, *, folder: Path, dtype: str, todo: list[tuple[str, list[int]]], processes: int
) -> Generator[Table, None, None]:
    if processes <= 1:
        _open_in_process(data)
        for name, groups in todo:
            yield _write_one(folder, name, groups, dtype, data.on_corrupt)
        return
    context = get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_open_in_process, initargs=(data, stop))
    try:
        with _interrupts_ignored():  # which the processes that submit starts inherit: Ctrl-C reaches them too
            futures = [pool.submit(_write_one, folder, name, groups, dtype, data.on_corrupt) for name, groups in todo]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise ValueError(
            f"--processes {processes}: one of them did not start, ran out of memory or was ended from outside; "
            "give fewer, the same command goes on"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # others may not set it
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


_opened: Table = {}  # of this worker process


def _open_in_process(data: DataConfig, stop: Event | None = None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _opened["documents"] = open_documents(data, tokenizer=load_tokenizer(data.tokenizer), split="train")
    _opened["stop"] = stop


def _write_one(folder: Path, name: str, groups: list[int], dtype: str, on_corrupt: str) -> Table:
    documents, stop = _opened["documents"], _opened["stop"]
    read = Reader(documents.read, on_corrupt=on_corrupt)
    skipped = 0

    def tokens() -> Iterator[np.ndarray]:
        nonlocal skipped
        for group in groups:
            size = int(documents.sizes[group])
            for begin in range(0, size, 256):
                if stop is not None and stop.is_set():
                    raise InterruptedError(f"{name} is not needed any more")
                found = read(group, range(begin, min(size, begin + 256)))
                skipped += sum(tokens is None for tokens in found)
                yield from (tokens for tokens in found if tokens is not None)

    entry = write_shard(folder, name, documents=tokens(), dtype=dtype) | {"skipped": skipped}
    _write_json(folder / f"{name}.json", entry)
    return entry
