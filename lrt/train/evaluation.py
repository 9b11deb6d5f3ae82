"""Scores during and after a run: bits per byte, what the recurrence learned, a sample of text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrt.config import Recipe
from lrt.data import Tokenizer
from lrt.data.conversations import HeldOutConversations
from lrt.data.held_out import ValidationLoader
from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.fast.one_token import can_fuse
from lrt.eval import BitsPerByte, activation_statistics, evaluate_bpb
from lrt.eval.activations import Statistics
from lrt.eval.bootstrap import DocumentScores
from lrt.eval.exact import exact_steps
from lrt.eval.parameters import recurrence_statistics
from lrt.model import LatentRecurrentModel
from lrt.schedules import baseline
from lrt.tables import Table
from lrt.train.core_subset import ask_core
from lrt.train.distributed.parallel import free_gathered, fsdp_modules
from lrt.train.distributed.world import World
from lrt.train.run import Run
from lrt.train.tuning import answer_problems

DOCUMENTS = "documents.npz"  # in a run's folder: what each held-out document cost at the newest evaluation


class Evaluated(NamedTuple):
    """What an evaluation has found.

    Attributes:
        scores: bits per byte by memory mode, over all ranks.
        activations: what the memory does in this rank's first batch; rank 0's holds the same rows for any number of
            ranks.
        sources: scores of the further sources, by name.
    """

    scores: dict[str, BitsPerByte]
    activations: Statistics
    sources: dict[str, dict[str, BitsPerByte]]


def evaluate(
    model: LatentRecurrentModel,
    recipe: Recipe,
    rows: ValidationLoader | HeldOutConversations,
    tokenizer: Tokenizer,
    world: World,
    *,
    progress: Callable[[], None],
    sources: Mapping[str, ValidationLoader] | None = None,
) -> Evaluated:
    """Score held-out rows in every mode of the recipe.

    Args:
        model: plain or parallel.
        recipe: of the run.
        rows: of the run's validation data.
        tokenizer: of the data.
        world: the processes; every rank must call this.
        progress: called after every batch and mode.
        sources: further rows, by name.
    """
    decode = None
    # a sharded decoder from a folder gathers by its modules' calls
    stepped = can_fuse(model) or not fsdp_modules(model)
    if "decode" in recipe.evaluation.modes and world.device.type == "cuda" and stepped:
        decode = _token_by_token(model, runner=decoding.graphed if recipe.parallel.cuda_graphs else decoding.eager)
    # true recurrence would otherwise gather every parameter for every token
    keep = recipe.parallel.reshard == "after_forward"
    _reshard_after_forward(model, False)

    def score(rows: ValidationLoader | HeldOutConversations) -> dict[str, BitsPerByte]:
        return evaluate_bpb(
            model,
            rows,
            token_bytes=None
            if isinstance(rows, (ValidationLoader, HeldOutConversations))
            else _token_bytes(tokenizer, model.vocab_size),
            modes=recipe.evaluation.modes,
            buckets=recipe.evaluation.buckets,
            device=world.device,
            reduce=world.total,
            progress=progress,
            decode=decode,
        )

    try:
        scores = score(rows)
        by_source = {name: score(further) for name, further in (sources or {}).items()}
        first = next(iter(rows), None)
        if first is None:
            return Evaluated(scores, {}, by_source)
        activations = activation_statistics(model, first.input_ids.to(world.device), first.targets.to(world.device))
        return Evaluated(scores, activations, by_source)
    finally:
        free_gathered(model)
        _reshard_after_forward(model, keep)


def _token_by_token(model: LatentRecurrentModel, *, runner: decoding.Runner) -> Callable[[Tensor, Tensor], Tensor]:
    """Mode ``decode`` by the step that generation uses: block by block the processor would be the limit."""
    by_steps = exact_steps(accelerate(model) if can_fuse(model) else model, runner=runner)
    sharded = fsdp_modules(model)

    def nats(tokens: Tensor, targets: Tensor) -> Tensor:
        if sharded:
            with torch.compiler.set_stance("force_eager"):
                # FSDP wants its first call through the whole model
                model.score(tokens[:1, :1], targets[:1, :1], baseline())
        for module in sharded:
            module.unshard()  # the step's kernels read parameters without calling the modules
        return by_steps(tokens, targets)

    return nats


def _token_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """The tokenizer's table with a row for every id of the model."""
    known = torch.from_numpy(tokenizer.token_bytes())
    return torch.nn.functional.pad(known, (0, vocab_size - len(known)))


def _reshard_after_forward(model: nn.Module, reshard: bool) -> None:
    for module in fsdp_modules(model):
        # the root's parameters stay, as in the plan
        module.set_reshard_after_forward(reshard and module is not model, recurse=False)


def evaluate_run(run: Run) -> Table:
    """Score the held-out rows and record everything that is known of the model at this step;
    every rank must call this."""
    heart, where = run.heart, f"evaluation at step {run.state.step}"
    heart.beat(where)
    began = time.perf_counter()
    model = run.runner.refresh()
    scores, activations, sources = evaluate(
        model,
        run.recipe,
        run.validation,
        run.tokenizer,
        run.world,
        progress=lambda: heart.beat(where),
        sources=run.sources,
    )
    core = ask_core(run, progress=lambda: heart.beat(where))
    answers = answer_problems(run, progress=lambda: heart.beat(where))
    record = {
        "kind": "evaluation",
        "step": run.state.step,
        "tokens": run.state.tokens,
        "bpb": _values(scores),
        "bpb_interval": {mode: _interval(score) for mode, score in scores.items()},
        "bpb_of_groups": {mode: list(score.groups) for mode, score in scores.items()},
        "bpb_of_buckets": {mode: list(score.buckets) for mode, score in scores.items()},
        **({"bpb_of_sources": {name: _values(found) for name, found in sources.items()}} if sources else {}),
        **({"core": core} if core else {}),
        **({"exact_match": {mode: found.value for mode, found in answers.items()}} if answers else {}),
        **({"exact_match_by_steps": {mode: found.by_steps for mode, found in answers.items()}} if answers else {}),
        "scored": next(({"tokens": s.tokens, "bytes": s.bytes} for s in scores.values()), {}),
        "validation": run.validation.fingerprint,
        "recurrence": recurrence_statistics(run.model),
        "activations": activations,
        "unreadable": run.loader.skipped,
        "seconds": time.perf_counter() - began,
    }
    run.recorder.write(record)
    for callback in run.callbacks:
        callback.evaluated(run, record)
    for mode, found in answers.items():
        run.say(f"{'':>8} exact match, {mode}: {found.describe()}")
    if run.world.main and scores:
        DocumentScores.of(scores, data=run.validation.fingerprint).save(run.folder / DOCUMENTS)
    return record


def _values(scores: Mapping[str, BitsPerByte]) -> dict[str, float]:
    return {mode: score.value for mode, score in scores.items()}


def _interval(score: BitsPerByte) -> list[float] | None:
    """Both ends of the bootstrap interval over documents; None where there are too few."""
    found = score.interval()
    return None if math.isnan(found.low) else [found.low, found.high]
