"""A folder with a model, scored on held-out text: what ``tools/evaluate.py`` does, as functions.

Legend: N documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lrt.config import DataConfig, Recipe
from lrt.conversion.opening import Opened, check_finite, open_model, open_tokenizer
from lrt.data import Tokenizer, ValidationLoader, build_loader
from lrt.data.conversations import open_rows
from lrt.data.held_out import HeldOut
from lrt.decoding.prefill import Exact, Prefill
from lrt.eval.bootstrap import DocumentScores
from lrt.eval.bpb import MODES, BitsPerByte, Decode, evaluate_bpb
from lrt.eval.exact import ByPrefill, fastest_exact
from lrt.eval.processes import Processes
from lrt.families.decoder import FamilyDecoder
from lrt.model import LatentRecurrentModel
from lrt.tables import Table

FILES = 16  # one source with at most so many files is reported file by file
SAMPLED_ROWS = 8  # on which an approximate decode is compared with the exact one
ROWS_ON_CPU = 16
MOST_ROWS = 256
SHARE_OF_MEMORY = 0.3  # of what the device has free, for the keys and values of a batch
LONGEST_ROW = 2048  # where neither a recipe nor the model names a length


@dataclass(frozen=True)
class Settings:
    """What to evaluate, as the options of ``tools/evaluate.py``.

    Attributes:
        data: files, folders or hf:// addresses; empty = the run's own validation rows.
        memory: zero, parallel, decode or all.
        tokens: score the first so many tokens of each source; None = all, or what the run's recipe says.
        sequence_length: tokens of a row; None = the recipe's or the model's.
        rows: of a batch on one process; None = as many as fit.
        tokenizer: as ``lrt.data.load_tokenizer`` takes it; None = the model's own.
        base: the decoder of a folder that holds the memory alone.
        text_column: of parquet, CSV and JSON lines.
        decode: how mode decode is scored; exact() unless asked otherwise.
        dtype: of the model; None = bfloat16 on CUDA, float32 elsewhere.
    """

    data: tuple[str, ...] = ()
    memory: str = "all"
    tokens: int | None = None
    sequence_length: int | None = None
    rows: int | None = None
    tokenizer: str | None = None
    base: str | None = None
    text_column: str = "text"
    decode: Prefill = Exact()
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a folder.

    Attributes:
        folder: the export or checkpoint that was read.
        scores: by memory mode.
        how: by memory mode, what its number is.
        sources: by name, first document and one more than the last.
        data: fingerprint of the documents.
        seconds: of scoring, loading left out.
    """

    folder: Path
    scores: dict[str, BitsPerByte]
    how: dict[str, str]
    sources: dict[str, tuple[int, int]]
    data: str
    seconds: float

    def documents(self) -> DocumentScores:
        """What each document cost, for comparing two models in pairs."""
        first = next(iter(self.scores.values()))
        return DocumentScores(
            self.data, first.documents, first.document_bytes, {m: s.document_nats for m, s in self.scores.items()}
        )

    def to_json(self) -> Table:
        """Plain values; a number that there is none of is None."""
        first = next(iter(self.scores.values()))
        return {
            "bpb": {mode: self._mode(mode, score) for mode, score in self.scores.items()},
            "tokens": first.tokens,
            "bytes": first.bytes,
            "documents": len(first.documents),
            "data": self.data,
            "model": str(self.folder),
            "seconds": round(self.seconds, 3),
        }

    def _mode(self, mode: str, score: BitsPerByte) -> Table:
        found = score.interval()
        return {
            "value": score.value,
            "ci": None if math.isnan(found.low) else [found.low, found.high],
            "how": self.how[mode],
            "passes": list(score.groups),
            "positions": [_number(value) for value in score.buckets],
            "sources": {name: _number(score.part(*span)) for name, span in self.sources.items()},
        }

    def table(self) -> str:
        """The scores for people: one row a memory mode, then one a source."""
        lines = [f"{self.folder}: bits per byte"]
        rows: list[tuple[str, ...]] = [("memory", "bpb", "95 % interval", "by pass", "by position in the row")]
        for mode, score in self.scores.items():
            found = score.interval()
            between = "one document" if math.isnan(found.low) else f"{found.low:.4f} .. {found.high:.4f}"
            rows.append((mode, f"{score.value:.4f}", between, _few(score.groups), _few(score.buckets)))
        lines += _aligned(rows)
        if len(self.sources) > 1:
            rows = [("source", *self.scores)]
            rows += [
                (name, *(f"{score.part(*span):.4f}" for score in self.scores.values()))
                for name, span in self.sources.items()
            ]
            lines += ["", *_aligned(rows)]
        first = next(iter(self.scores.values()))
        lines += ["", *(f"{mode}: {how}" for mode, how in self.how.items())]
        lines += [
            f"{first.tokens:,} tokens, {first.bytes:,} bytes, {len(first.documents):,} documents, {self.seconds:.1f} s"
        ]
        return "\n".join(lines)


def evaluate_folder(
    path: str | Path,
    settings: Settings,
    *,
    device: torch.device,
    processes: Processes = Processes(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Score a folder's model on held-out text in the memory modes asked for, on the same tokens.

    Args:
        path: a folder with a model of any kind, or a training run.
        settings: what to score and how.
        device: of this process.
        processes: those that share the rows.
        progress: called with (steps done, steps in all).
        say: receives lines for the user.

    Raises:
        ValueError: no such model, weights that are not numbers, a tokenizer or data that do not fit, or a memory mode
            that the model lacks.
    """
    if settings.memory in ("zero", "parallel") and not isinstance(settings.decode, Exact):
        raise ValueError(
            f"--decode {settings.decode} has no effect with --memory {settings.memory}, "
            f"because nothing is scored in mode decode: leave one out, or use --memory decode or all"
        )
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    opened = open_model(path, base=settings.base, dtype=settings.dtype or default, device=device)
    model = opened.model
    modes = memory_modes(model, settings.memory, path)
    check_finite(model, where=opened.folder)
    tokenizer = open_tokenizer(opened, name=settings.tokenizer, base=settings.base)
    length = row_length(opened, settings)
    rows = settings.rows or processes.least(rows_that_fit(model, length))  # rows are dealt by this number
    sources = held_out_rows(opened, settings, tokenizer, length=length, rows=rows, processes=processes)
    exact = fastest_exact(model) if "decode" in modes and model.recurrence is not None else None
    way: Decode | None = exact
    how = {
        "zero": "the initialization forward alone, without memory",
        "parallel": f"the schedule of training, {model.train_schedule}",
    }
    if model.recurrence is None:
        how = {mode: "the model has no memory: one score in every mode" for mode in MODES}
    elif "decode" in modes and not isinstance(settings.decode, Exact):
        way = ByPrefill(model, settings.decode)
    done, total = 0, sum(loader.count_batches() for loader in sources.loaders) * len(modes)

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    began = time.perf_counter()
    scores = evaluate_bpb(model, sources, modes=modes, reduce=processes.total, progress=advance, decode=way)
    seconds = time.perf_counter() - began
    for mode, score in scores.items():
        if not math.isfinite(score.value):
            raise ValueError(
                f"{path}: memory mode {mode} gave nats that are not finite numbers: no score is printed; "
                "try --dtype float32"
            )
    how.setdefault("decode", "true recurrence, exact")
    if isinstance(way, ByPrefill):
        named = way.describe(total=processes.total)  # before the sample, whose rows are scored a second time
        effect = sampled_effect(model, sources, exact=exact, approximate=way)
        how["decode"] = f"decode ({named}); {effect:+.5f} bits per byte against exact decode on {SAMPLED_ROWS} rows"
        say(
            f"decode by {settings.decode}: {effect:+.5f} bits per byte against exact decode on a sample of "
            f"{SAMPLED_ROWS} rows"
        )
    return Evaluation(
        opened.folder, scores, {mode: how[mode] for mode in scores}, sources.named(), sources.fingerprint, seconds
    )


def sampled_effect(
    model: LatentRecurrentModel, batches: Iterable[HeldOut], *, exact: Decode | None, approximate: Decode
) -> float:
    """Bits per byte that approximate decoding adds to exact decoding, on the first rows."""
    batch = next(iter(batches))
    sample = [HeldOut._make(part[:SAMPLED_ROWS] for part in batch)]
    scores = [
        evaluate_bpb(model, sample, modes=("decode",), decode=way)["decode"].value for way in (approximate, exact)
    ]
    return scores[0] - scores[1]


def row_length(opened: Opened, settings: Settings) -> int:
    """Tokens of a row: as asked for, as the run was trained, or as the model was made."""
    if settings.sequence_length is not None:
        return settings.sequence_length
    if opened.recipe is not None:
        return opened.recipe.model.sequence_length
    return min(row_length_of(opened.model), LONGEST_ROW)


def row_length_of(model: LatentRecurrentModel) -> int:
    """Tokens that a model was made to read."""
    config = model.backbone.config if model.original is None else getattr(model.original[0], "config", None)
    return getattr(config, "sequence_length", None) or getattr(config, "max_position_embeddings", None) or LONGEST_ROW


def rows_that_fit(model: LatentRecurrentModel, length: int) -> int:
    """Rows of a batch: few on a CPU, on a GPU as many as fit keys and values into its free GPU memory."""
    parameter = next(model.parameters())
    if parameter.device.type != "cuda":
        return ROWS_ON_CPU
    width = 2 * model.backbone.kv_heads * model.backbone.head_dim * len(model.blocks) + 16 * model.backbone.width
    free, _ = torch.cuda.mem_get_info(parameter.device)
    return max(1, min(MOST_ROWS, int(SHARE_OF_MEMORY * free / (width * length * parameter.element_size()))))


def memory_modes(model: LatentRecurrentModel, memory: str, path: str | Path) -> tuple[str, ...]:
    """The memory modes that an option names.

    Raises:
        ValueError: an unknown one, or one that the model of ``path`` lacks.
    """
    if memory == "all":
        return MODES
    if memory not in MODES:
        raise ValueError(f"--memory {memory}: unknown; use {', '.join(MODES)} or all")
    if model.recurrence is None and memory != "zero":
        raise ValueError(
            f"--memory {memory}: the model in {path} has no memory; "
            "use --memory zero, or all, which says that they are the same"
        )
    return (memory,)


# ------------------------------------------------------------------ where the rows come from


class Sources:
    """Held-out rows of several sources, one after the other; documents are numbered through."""

    def __init__(self, loaders: dict[str, ValidationLoader]) -> None:
        self._by_name, self.loaders = loaders, list(loaders.values())
        self._first = list(itertools.accumulate((int(loader.first_of_group[-1]) for loader in self.loaders), initial=0))
        prints = [loader.fingerprint for loader in self.loaders]
        self.fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256("\n".join(prints).encode()).hexdigest()

    def __iter__(self) -> Iterator[HeldOut]:
        for first, loader in zip(self._first, self.loaders):
            for batch in loader:
                yield batch._replace(
                    documents=torch.where(batch.documents < 0, batch.documents, batch.documents + first)
                )

    @property
    def documents_reached(self) -> int:
        return self._first[-2] + self.loaders[-1].documents_reached

    def named(self) -> dict[str, tuple[int, int]]:
        """Documents of each source; of the files, where there is one source of few files."""
        if len(self.loaders) == 1:
            files = self.loaders[0].files()
            if len(files) <= FILES:
                return files
        return {name: (first, stop) for name, first, stop in zip(self._by_name, self._first, self._first[1:])}


def held_out_rows(
    opened: Opened,
    settings: Settings,
    tokenizer: Tokenizer,
    *,
    length: int,
    rows: int,
    processes: Processes = Processes(),
) -> Sources:
    """Held-out rows of the data that the settings name, or of the model's own run.

    Args:
        length: tokens of a row.
        rows: of a batch.
        processes: those that share the rows.

    Raises:
        ValueError: no such data, or data that do not fit.
    """
    share: Table = {"sequence_length": length, "rows": rows, "rank": processes.rank, "world_size": processes.size}
    if settings.data:
        datas = {spec: DataConfig(validation=spec, text_column=settings.text_column) for spec in settings.data}
        tokens = settings.tokens
    elif opened.recipe is None:
        raise ValueError(
            f"{opened.folder} lies in no training run, so it has no validation rows of its own: name text with --data"
        )
    elif opened.recipe.tuning is not None:
        return _conversations(
            opened.model, opened.recipe, settings, tokenizer, length=length, rows=rows, processes=processes
        )
    else:
        datas = {"validation": dataclasses.replace(opened.recipe.data, workers=0)}
        tokens = settings.tokens or opened.recipe.evaluation.tokens
    try:
        loaders = {
            name: build_loader(data, tokenizer=tokenizer, split="validation", limit_tokens=tokens, **share)
            for name, data in datas.items()
        }
    except ValueError as error:
        raise ValueError(_in_options(str(error)) if settings.data else str(error)) from None
    return Sources(loaders)  # type: ignore[arg-type]


def _conversations(
    model: LatentRecurrentModel,
    recipe: Recipe,
    settings: Settings,
    tokenizer: Tokenizer,
    *,
    length: int,
    rows: int,
    processes: Processes,
) -> Sources:
    """The conversations that a tuning run held out; an adapted model cuts attention between them as it did in that
    run."""
    if isinstance(model.backbone, FamilyDecoder):
        model.backbone.attention_reset = recipe.model.attention_reset
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, sequence_length=length))
    share: Table = {"rows": rows, "rank": processes.rank, "world_size": processes.size}
    held_out = open_rows(
        recipe, tokenizer, split="validation", limit_tokens=settings.tokens or recipe.evaluation.tokens, **share
    )
    return Sources({"conversations": held_out})  # type: ignore[dict-item]


def _in_options(message: str) -> str:
    """An error about a recipe's keys, in words of the command line."""
    options = {"data.validation": "--data", "data.text_column": "--text-column", "data.tokenizer": "--tokenizer"}
    for key, option in {**options, "model.sequence_length": "--sequence-length"}.items():
        message = message.replace(f"{key} = ", f"{option} ").replace(key, option)
    return message


# ------------------------------------------------------------------ in words


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _few(values: Sequence[float]) -> str:
    return " ".join("-" if math.isnan(value) else f"{value:.4f}" for value in values)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
