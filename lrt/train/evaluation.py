"""Scores during and after a run: bits per byte, what the recurrence learned, a sample of text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrt.config import Recipe
from lrt.data import Tokenizer
from lrt.data.loader import ValidationLoader
from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.fast.one_token import can_fuse
from lrt.eval import BitsPerByte, activation_statistics, evaluate_bpb
from lrt.eval.activations import Statistics
from lrt.eval.bootstrap import DocumentScores
from lrt.eval.exact import exact_steps
from lrt.eval.parameters import recurrence_statistics
from lrt.schedules import baseline
from lrt.train.distributed.parallel import free_gathered, fsdp_modules
from lrt.train.distributed.world import World
from lrt.train.monitor.faults import Heartbeat
from lrt.train.run import Run

DOCUMENTS = "documents.npz"  # in a run's folder: what each held-out document cost at the newest evaluation


def evaluate(
    model: Any, recipe: Recipe, rows: ValidationLoader, tokenizer: Tokenizer, world: World, *, progress: Callable[[], None]
) -> tuple[dict[str, BitsPerByte], Statistics]:
    """Bits per byte in every mode of the recipe, over all ranks, and what the memory does in this rank's first batch.

    The first batch of rank 0 holds the same rows whatever the number of ranks. ``progress`` is called after every batch and mode.
    """
    decode = None
    if "decode" in recipe.evaluation.modes and world.device.type == "cuda" and can_fuse(model):
        decode = _token_by_token(model, runner=decoding.graphed if recipe.parallel.cuda_graphs else decoding.eager)
    keep = recipe.parallel.reshard == "after_forward"  # true recurrence would otherwise gather every parameter for every token
    _reshard_after_forward(model, False)
    try:
        scores = evaluate_bpb(
            model,
            rows,
            token_bytes=None if isinstance(rows, ValidationLoader) else _token_bytes(tokenizer, model.vocab_size),
            modes=recipe.evaluation.modes,
            buckets=recipe.evaluation.buckets,
            device=world.device,
            reduce=world.total,
            progress=progress,
            decode=decode,
        )
        first = next(iter(rows), None)
        if first is None:
            return scores, {}
        return scores, activation_statistics(model, first.input_ids.to(world.device), first.targets.to(world.device))
    finally:
        free_gathered(model)
        _reshard_after_forward(model, keep)


def _token_by_token(model: Any, *, runner: decoding.Runner) -> Callable[[Tensor, Tensor], Tensor]:
    """Mode ``decode`` by the step that generation uses: block by block the processor would be the limit."""
    by_steps, sharded = exact_steps(accelerate(model), runner=runner), fsdp_modules(model)

    def nats(tokens: Tensor, targets: Tensor) -> Tensor:
        if sharded:
            with torch.compiler.set_stance("force_eager"):
                model.score(tokens[:1, :1], targets[:1, :1], baseline())  # FSDP wants its first call through the whole model
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
        module.set_reshard_after_forward(reshard and module is not model, recurse=False)  # the root's parameters stay, as in the plan


def evaluate_run(run: Run, heart: Heartbeat) -> dict[str, Any]:
    """Score the held-out rows and record everything that is known of the model at this step; every rank must call this."""
    where = f"evaluation at step {run.state.step}"
    heart.beat(where)
    began = time.perf_counter()
    model = run.model if run.runner is None else run.runner.refresh()
    scores, activations = evaluate(model, run.recipe, run.validation, run.tokenizer, run.world, progress=lambda: heart.beat(where))
    record = {
        "kind": "evaluation",
        "step": run.state.step,
        "tokens": run.state.tokens,
        "bpb": {mode: score.value for mode, score in scores.items()},
        "bpb_interval": {mode: _interval(score) for mode, score in scores.items()},
        "bpb_of_groups": {mode: list(score.groups) for mode, score in scores.items()},
        "bpb_of_buckets": {mode: list(score.buckets) for mode, score in scores.items()},
        "scored": next(({"tokens": s.tokens, "bytes": s.bytes} for s in scores.values()), {}),
        "validation": run.validation.fingerprint,
        "recurrence": recurrence_statistics(run.model),
        "activations": activations,
        "unreadable": run.loader.skipped,
        "seconds": time.perf_counter() - began,
    }
    run.recorder.write(record)
    if run.world.main and scores:
        DocumentScores.of(scores, data=run.validation.fingerprint).save(run.folder / DOCUMENTS)
    return record


def _interval(score: BitsPerByte) -> list[float] | None:
    """Both ends of the bootstrap interval over documents; None where there are too few."""
    found = score.interval()
    return None if math.isnan(found.low) else [found.low, found.high]
