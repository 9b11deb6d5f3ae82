"""Confidence intervals of bits per byte by resampling documents, for one model and for the difference of two.

Documents are the units that are drawn: tokens of one document depend on each other, documents do not.
Two models that scored the same documents are compared in pairs, so that what makes a document hard for both does not
widen the interval.

Legend: N documents, C columns of numbers per document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lrt.tables import ReadTable, Table

LEVEL = 0.95
DRAWS = 2000
BLOCKS = 10_000  # more documents are merged into so many blocks: the interval stays the same, the time bounded


class Interval(NamedTuple):
    """A value and its confidence interval; both ends are NaN where fewer than two documents were scored."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DocumentScores:
    """What one model scored, document by document.

    Attributes:
        data: fingerprint of the documents; two models compare only where it is the same.
        index: int64 (N,) number of each document in the data.
        bytes: int64 (N,) bytes that were scored.
        nats: by memory mode, float64 (N,) nats of those bytes.
    """

    data: str
    index: np.ndarray
    bytes: np.ndarray
    nats: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, scores: ReadTable, *, data: str) -> DocumentScores:
        """Those of ``evaluate_bpb``'s results, which are of the same rows in every mode."""
        first = next(iter(scores.values()))
        return cls(
            data, first.documents, first.document_bytes, {mode: score.document_nats for mode, score in scores.items()}
        )

    def save(self, path: str | Path) -> Path:
        """Write one ``.npz`` file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays: Table = {f"nats.{mode}": nats for mode, nats in self.nats.items()}
        with open(target, "wb") as file:
            np.savez_compressed(file, data=np.array(self.data), index=self.index, bytes=self.bytes, **arrays)
        return target

    @classmethod
    def load(cls, path: str | Path) -> DocumentScores:
        """Read what ``save`` wrote.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                nats = {name.removeprefix("nats."): file[name] for name in file.files if name.startswith("nats.")}
                return cls(str(file["data"]), file["index"], file["bytes"], nats)
        except Exception as error:  # noqa: BLE001 - numpy, zipfile and zlib each fail in their own way
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{path} holds no scores of documents ({reason}): write them with tools/evaluate.py --documents"
            ) from None


def interval(
    nats: np.ndarray, sizes: np.ndarray, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Bits per byte over documents, with a percentile bootstrap interval.

    Args:
        nats: (N,) nats of each document.
        sizes: (N,) bytes of each document.
        level: share of repetitions whose interval holds the true value.
        draws: resamplings.
        seed: of the draws.
    """
    columns = np.stack([nats, sizes], axis=1)
    return _interval(columns, level=level, draws=draws, seed=seed)


def paired_interval(
    first: np.ndarray, second: np.ndarray, sizes: np.ndarray, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Bits per byte of ``second`` minus those of ``first``, with a paired bootstrap interval.

    Args:
        first, second: (N,) nats of the same documents under two models.
        sizes: (N,) bytes of each document.
        level, draws, seed: as in ``interval``.
    """
    columns = np.stack([second - first, sizes], axis=1)
    return _interval(columns, level=level, draws=draws, seed=seed)


def compare_scores(
    first: DocumentScores, second: DocumentScores, *, mode: str, level: float = LEVEL, draws: int = DRAWS
) -> Interval:
    """Bits per byte of ``second`` minus those of ``first`` in one memory mode, over the documents that both scored
    whole.

    Args:
        first, second: scores of two models on the same data.
        mode: memory mode, scored by both.
        level, draws: as in ``interval``.

    Raises:
        ValueError: other data, a mode that one of them lacks, or no document that both scored alike.
    """
    if first.data != second.data:
        raise ValueError(
            f"the scores are of different data ({first.data[:12]} and {second.data[:12]}): "
            "evaluate both models on the same --data"
        )
    for scores in (first, second):
        if mode not in scores.nats:
            raise ValueError(
                f"memory mode {mode} was not scored in both: there are {', '.join(scores.nats)}; "
                "evaluate with --memory all"
            )
    _, here, there = np.intersect1d(first.index, second.index, assume_unique=True, return_indices=True)
    # the last document of a limited evaluation may be cut in one of them
    same = first.bytes[here] == second.bytes[there]
    here, there = here[same], there[same]
    if not len(here):
        raise ValueError(
            "the two models scored no document alike: evaluate both with the same --tokens and --sequence-length"
        )
    return paired_interval(
        first.nats[mode][here], second.nats[mode][there], first.bytes[here], level=level, draws=draws
    )


# ------------------------------------------------------------------ resampling


def _interval(columns: np.ndarray, *, level: float, draws: int, seed: int) -> Interval:
    """Of bits per byte: ``columns`` (N, 2) are nats and bytes."""
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: use a share between 0 and 1, such as 0.95")
    if draws < 1:
        raise ValueError(f"draws = {draws}: use 1 or more")
    columns = columns[columns[:, -1] > 0].astype(np.float64)
    value = float(_bits(columns.sum(0)))
    if len(columns) < 2:
        return Interval(value, math.nan, math.nan)
    drawn = _bits(_resampled_sums(columns, draws=draws, seed=seed))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _resampled_sums(columns: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """Sums (draws, C) over documents drawn with replacement, as many as there are."""
    generator = np.random.default_rng(seed)
    count = len(columns)
    if count > BLOCKS:
        shuffled = columns[generator.permutation(count)]
        columns = np.add.reduceat(shuffled, np.linspace(0, count, BLOCKS, endpoint=False).astype(np.int64))
        count = BLOCKS
    sums = np.empty((draws, columns.shape[1]))
    for draw in range(draws):
        sums[draw] = np.bincount(generator.integers(count, size=count), minlength=count) @ columns
    return sums


def _bits(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / (math.log(2) * sums[..., 1])
