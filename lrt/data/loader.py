"""From documents to batches of packed rows, for one rank."""

from __future__ import annotations

import atexit
import os
import signal
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lrt.config import DataConfig
from lrt.data.batch import Batch, make_batch
from lrt.data.documents import Documents
from lrt.data.held_out import ValidationLoader
from lrt.data.mixture import Deal, MixedStream, SeveralDocuments, places
from lrt.data.sources import each_source, open_documents
from lrt.data.stream import Plan, Stream, in_order, read_in_order
from lrt.data.tokenizer import Tokenizer
from lrt.tables import Table

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader

T = TypeVar("T")

PREFETCH = 4  # batches that each worker prepares ahead
GPU_WORKERS = 3  # a rank, where the recipe names none: with them small models waited 0.0 % of a step (docs/data.md)
DOCUMENTS_PER_WORKER = 64  # a smaller corpus has fewer workers


def build_loader(
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    rows: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 1,
    split: str = "train",
    limit_tokens: int | None = None,
) -> TrainLoader | ValidationLoader:
    """Batches of packed rows.

    Args:
        data: section ``data`` of the recipe.
        tokenizer: of the texts.
        sequence_length: T, tokens of a row that the model reads.
        rows: B, rows of a batch on this rank.
        rank: this process, 0..world_size - 1.
        world_size: processes that share the data.
        seed: of the order, unless ``data.shuffle_seed`` is given.
        split: "train" (endless, shuffled) or "validation" (once, in a fixed order that no number of ranks changes).
        limit_tokens: validation only: score the first so many tokens (rounded up to rows); None = all.

    Returns:
        For "train" an endless iterator, for "validation" an iterable that starts anew each time and gives every rank
        the same number of batches (the last ones may be partly or wholly masked).

    Raises:
        ValueError: bad or missing data; the message names the recipe key.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split = {split!r}: use "train" or "validation"')
    for name, value, least in (("workers", data.workers, 0), ("buffer_documents", data.buffer_documents, 1)):
        if value is not None and value < least:
            raise ValueError(f"data.{name} = {value}: use {least} or more")
    documents = open_documents(data, tokenizer=tokenizer, split=split)
    key = ("data.sources" if data.sources else "data.train") if split == "train" else "data.validation"
    # Held-out documents are measured from the start: a tokenizer whose bytes cannot be told is refused now,
    # not at the first evaluation.
    skip = {"on_corrupt": data.on_corrupt}
    if split == "train":
        lengths = (len(piece.tokens) for piece in in_order(documents, **skip))
    else:
        lengths = (len(found.ids) for _, _, found in read_in_order(documents.measure, documents.sizes, **skip))
    _check_length(lengths, sequence_length, key=key)
    if split == "validation":
        limit = None if limit_tokens is None else -(-limit_tokens // sequence_length)
        return ValidationLoader(
            documents,
            data=data,
            bos_id=tokenizer.bos_id,
            length=sequence_length + 1,
            rows=rows,
            rank=rank,
            world_size=world_size,
            limit=limit,
        )
    return TrainLoader(
        documents,
        data=data,
        bos_id=tokenizer.bos_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        length=sequence_length + 1,
        rows=rows,
        rank=rank,
        world_size=world_size,
        seed=seed if data.shuffle_seed is None else data.shuffle_seed,
    )


def _check_length(lengths: Iterable[int], sequence_length: int, *, key: str) -> None:
    """Refuse a corpus shorter than one row, from the tokens of its documents; reads no more than it must."""
    total = 0
    for tokens in lengths:
        total += 1 + tokens if tokens else 0
        if total > sequence_length:
            return
    raise ValueError(
        f"model.sequence_length = {sequence_length}, but {key} has only {total} tokens: "
        f"sequence longer than the corpus; use model.sequence_length = {max(1, total - 1)} or less, or more text"
    )


def usual_workers(*, documents: int) -> int:
    """Workers of a run that names none: with a GPU the training process should have nothing to do but to launch.

    Args:
        documents: of the corpus, a rank.
    """
    return min(GPU_WORKERS, documents // DOCUMENTS_PER_WORKER) if torch.cuda.is_available() else 0


class TrainLoader:
    """Endless shuffled batches of one rank; ``state_dict`` is its place after the last batch that it gave.

    The state of one rank resumes it exactly with the same number of ranks and workers. With another number,
    ``load_state_dict`` wants the states of all ranks, as a list, and deals the unread documents again.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        data: DataConfig,
        bos_id: int,
        tokenizer_fingerprint: str,
        length: int,
        rows: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self._documents, self._data, self._bos, self._length, self._rows = documents, data, bos_id, length, rows
        self._rank, self._world_size = rank, world_size
        total = int(documents.sizes.sum())
        self.workers = data.workers if data.workers is not None else usual_workers(documents=total // world_size)
        self._streams_here = max(1, self.workers)
        self._identity = {"documents": documents.fingerprint, "tokenizer": tokenizer_fingerprint}
        self._sources = each_source(data)
        sizes, weights = [documents.sizes], [1.0]
        if isinstance(documents, SeveralDocuments):
            sizes, weights = documents.sizes_of_parts(), [source.weight for source in data.sources]
        streams = world_size * self._streams_here
        for (key, _), of_source in zip(self._sources, sizes):
            if of_source.sum() < streams:
                raise ValueError(
                    f"{key} has {of_source.sum()} documents for {streams} streams ({world_size} ranks x "
                    f"{self._streams_here} workers): use data.workers = 0, fewer ranks, or more documents"
                )
        plans = tuple(Plan(seed=seed, streams=streams, sizes=tuple(of_source.tolist())) for of_source in sizes)
        self._set(Deal(plans, tuple(weight / sum(weights) for weight in weights)), states=None, turn=0)

    def _set(self, deal: Deal, *, states: Sequence[Table] | None, turn: int) -> None:
        self._deal, self._turn = deal, turn
        self._states = list(states) if states is not None else [deal.fresh() for _ in range(self._streams_here)]
        self._given = [state.get("rows") for state in self._states]  # of each stream here, rows of each source
        self._batches: Iterator[Batch | ValueError] | None = None
        self._engine: StatefulDataLoader | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._start()
        assert self._batches is not None
        batch = next(self._batches)
        if isinstance(batch, ValueError):
            try:
                raise batch
            finally:
                del batch  # else the error, its traceback and this frame keep the workers alive
        given = self._given[self._turn]
        if given is not None:
            number = self._rank * self._streams_here + self._turn
            self._given[self._turn] = self._deal.count(given, number=number, more=self._rows)
        self._turn = (self._turn + 1) % self._streams_here
        return batch

    def _start(self) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        count = self._streams_here
        first = self._turn
        order = [(first + worker) % count for worker in range(count)]  # worker 0 gives the first batch
        streams = [(self._rank * count + number, self._states[number]) for number in order]
        dataset = _Batches(
            self._documents, deal=self._deal, streams=streams, rows=self._rows, length=self._length, bos_id=self._bos,
            data=self._data,
        )  # fmt: skip
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, the library warns in every forked worker
        options: Table = {"prefetch_factor": PREFETCH, "worker_init_fn": _set_up_worker} if self.workers else {}
        with warnings.catch_warnings():
            # torchdata 0.11 calls what torch 2.13 has deprecated
            warnings.filterwarnings("ignore", message=".*set_vital")
            self._engine = StatefulDataLoader(
                dataset,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_as_is,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # its base seed would otherwise come from the process's random numbers
                **options,
            )
        self._order = order
        self._batches = iter(self._engine)
        if self.workers:  # at the end of the process torch would send them SIGTERM, which they survive for a minute
            atexit.register(_end_workers, weakref.ref(self))

    def _current_states(self) -> list[Table]:
        """States of this rank's streams after the last batch given out, without what workers prepared ahead."""
        if self._engine is None:
            return self._states
        states = list(self._states)
        for worker, state in enumerate(_worker_states(self._engine.state_dict(), workers=self.workers)):
            states[self._order[worker]] = state
        return states

    @property
    def fingerprint(self) -> str:
        """sha256 of the documents: the same data, wherever they lie."""
        return self._documents.fingerprint

    @property
    def epoch(self) -> int:
        """Passes over the data that every stream of this rank has begun, counted from 0."""
        return max(0, min(place["epoch"] for state in self._current_states() for place in places(state)))

    @property
    def skipped(self) -> int:
        """Unreadable files and documents left out so far (data.on_corrupt = "skip")."""
        return self._documents.skipped + sum(
            place["skipped"] for state in self._current_states() for place in places(state)
        )

    @property
    def shares(self) -> dict[str, float]:
        """Share of every source of ``data.sources`` in this rank's rows so far;
        on all ranks within a few rows of its weight."""
        given = [sum(rows) for rows in zip(*(rows for rows in self._given if rows is not None))]
        return {source.train: rows / max(1, sum(given)) for (_, source), rows in zip(self._sources, given)}

    def state_dict(self) -> Table:
        """This rank's place: plain numbers, texts and lists, fit for JSON."""
        return {
            "rank": self._rank,
            "world_size": self._world_size,
            "streams": self._current_states(),
            "turn": self._turn,
            "plan": self._deal.to_json(),
            **self._identity,
        }

    def load_state_dict(self, state: Table | Sequence[Table]) -> None:
        """Go on from a state.

        Args:
            state: this rank's state, or the states of all ranks in any order.

        Raises:
            ValueError: the state belongs to other data or another tokenizer, or states of ranks are missing.
        """
        states = [state] if isinstance(state, dict) else sorted(state, key=lambda s: s["rank"])
        same = {"documents": "documents (files, their contents and data.text_column)", "tokenizer": "tokenizer"}
        sources = "data.sources" if len(self._sources) > 1 else "data.train"
        for name, key in (("documents", sources), ("tokenizer", "data.tokenizer")):
            if any(s[name] != self._identity[name] for s in states):
                raise ValueError(
                    f"{key} is not what the checkpoint was trained on: "
                    f"resume with the same {same[name]}, or start a new run"
                )
        world, count = states[0]["world_size"], len(states[0]["streams"])
        deal = self._deal.saved(states[0]["plan"], streams=world * count)
        mine = next((s for s in states if s["rank"] == self._rank), None)
        if (world, count) == (self._world_size, self._streams_here) and mine is not None:
            self._set(deal, states=mine["streams"], turn=mine["turn"])
            return
        present = [s["rank"] for s in states]
        if present != list(range(world)):
            raise ValueError(
                f"the checkpoint's loader ran on {world} ranks x {count} streams, this run has "
                f"{self._world_size} x {self._streams_here}: "
                f"to deal the data again the states of all ranks are needed, got ranks {present}"
            )
        everything = [one for s in states for one in s["streams"]]
        deal, dealt = deal.again(everything, streams=self._world_size * self._streams_here)
        first = self._rank * self._streams_here
        self._set(deal, states=dealt[first : first + self._streams_here], turn=0)


class _Batches(IterableDataset[Batch | ValueError]):
    """What a worker runs: the batches of its stream."""

    def __init__(
        self,
        documents: Documents,
        *,
        deal: Deal,
        streams: Sequence[tuple[int, Table]],
        rows: int,
        length: int,
        bos_id: int,
        data: DataConfig,
    ) -> None:
        self._documents, self._deal, self._streams = documents, deal, streams
        self._rows, self._length, self._bos, self._data = rows, length, bos_id, data

    def __iter__(self) -> _BatchIterator:
        worker = get_worker_info()
        number, state = self._streams[worker.id if worker else 0]
        iterator = _BatchIterator(lambda place: self._stream(number, place), self._documents, self._rows)
        iterator.load_state_dict(state)
        return iterator

    def _stream(self, number: int, state: Table) -> Stream | MixedStream:
        return self._deal.open(
            self._documents,
            number=number,
            state=state,
            length=self._length,
            bos_id=self._bos,
            buffer=self._data.buffer_documents,
            on_corrupt=self._data.on_corrupt,
        )


class _BatchIterator:
    """torchdata asks an iterator that has both state methods for its state, batch by batch.

    Bad data are handed over as a value, since torch would wrap an exception of a worker in its traceback.
    """

    def __init__(self, open_stream: Callable[[Table], Stream | MixedStream], documents: Documents, rows: int) -> None:
        self._open_stream, self._documents, self._rows = open_stream, documents, rows
        self._error: ValueError | None = None

    def __iter__(self) -> _BatchIterator:
        return self

    def __next__(self) -> Batch | ValueError:
        if self._error is None:
            try:
                return make_batch([self._opened.row() for _ in range(self._rows)], self._documents)
            except ValueError as error:
                self._error = error.with_traceback(None)
        return self._error

    def state_dict(self) -> Table:
        return self._opened.state_dict()

    def load_state_dict(self, state: Table) -> None:
        self._opened = self._open_stream(state)


def _worker_states(state: Table, *, workers: int) -> list[Table]:
    """The datasets' states inside a StatefulDataLoader's state, worker by worker."""
    if workers == 0:
        return [state["fetcher_state"]["dataset_iter_state"]]
    snapshots = state["_snapshot"]["_worker_snapshots"]
    return [snapshots[f"worker_{worker}"]["fetcher_state"]["dataset_iter_state"] for worker in range(workers)]


def _end_workers(loader: weakref.ref[TrainLoader]) -> None:
    alive = loader()
    if alive is not None:
        alive._batches = alive._engine = None


def _as_is(batch: T) -> T:
    return batch


def _set_up_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker
    # Ctrl-C, and what a scheduler sends, reach the whole process group: the trainer decides when to end.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # SIGTERM is also how a loader ends workers that do not answer: they live on for a minute only
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))
