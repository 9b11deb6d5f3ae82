"""Supervised tuning: what is read, what is scored, and what does not go with it; no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrt.config.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Training on the answers of conversations, instead of on text."""

    train: str = "arithmetic"  # "arithmetic", or JSONL: a file, a folder or a glob
    validation: str = "auto"  # JSONL; "auto" = other problems, or a twentieth of the conversations of train
    problems: int = 64  # held-out conversations that the model answers at every evaluation; 0 = none
    answer_tokens: int = 96  # tokens of an answer at most
    lora_rank: int = 0  # adapters of this rank in place of the decoder's own weights; 0 = these train
    lora_alpha: float = 16.0  # the adapters' share is lora_alpha / lora_rank
    lora_targets: tuple[str, ...] = ()  # names of the matrices that get adapters; () = all of the blocks


def tuning_errors(r: Recipe) -> list[str]:
    """Keys of a recipe that do not go with its section [tuning], or that it needs."""
    t = r.tuning
    if t is None:
        return []
    errors = [
        f"data.{f.name} = {getattr(r.data, f.name)!r} has no effect with [tuning], which has data of its own: "
        "leave it out"
        for f in fields(r.data)
        if f.name not in ("tokenizer", "shuffle_seed") and getattr(r.data, f.name) != f.default
    ]
    if r.evaluation.sources:
        errors.append("evaluation.sources has no effect with [tuning]: leave it out")
    needed = {"model.attention_reset": r.model.attention_reset}
    if r.recurrence is not None:
        needed["recurrence.separator"] = r.recurrence.separator
    errors += [
        f"[tuning] packs conversations into rows, and {key} keeps them apart: set it to the tokenizer's separator"
        for key, value in needed.items()
        if value is None
    ]
    defaults = {f.name: f.default for f in fields(t)}
    if t.lora_rank == 0:
        errors += [
            f"tuning.{key} = {getattr(t, key)!r} has no effect with tuning.lora_rank = 0: leave it out"
            for key in ("lora_alpha", "lora_targets")
            if getattr(t, key) != defaults[key]
        ]
    elif r.run.backbone == "native":
        errors.append('tuning.lora_rank adapts a decoder from a folder, but run.backbone = "native": leave it out')
    elif r.training.stage == "memory":
        errors.append(
            'tuning.lora_rank has no effect with training.stage = "memory", which trains the memory alone: '
            "leave one out"
        )
    if t.problems == 0 and t.answer_tokens != defaults["answer_tokens"]:
        errors.append(f"tuning.answer_tokens = {t.answer_tokens} has no effect with tuning.problems = 0: leave it out")
    return errors
