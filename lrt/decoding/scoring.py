"""Scores of given tokens in ``decode`` semantics, batched.

Legend: B batch, T row length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrt.decoding import prefill as prefills
from lrt.decoding import step as decoding
from lrt.decoding.prefill_contract import Prefill, Report
from lrt.decoding.which_model import Decodes
from lrt.loss import IGNORE
from lrt.padding import align


@torch.no_grad()
def score(
    model: Decodes, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None, *,
    prefill: Prefill | None = None, runner: decoding.Runner = decoding.graphed,
) -> tuple[Tensor, Report]:  # fmt: skip
    """Nats of given targets in ``decode`` semantics, batched.

    Args:
        model: with or without recurrence.
        input_ids, targets: (B, T), targets already shifted; -100 is not scored.
        attention_mask: (B, T), 0 marks padding on the left or on the right; nothing there is scored.
        prefill: exact (None) is true recurrence; any other one must be named with the score.
        runner: how the steps of ``exact`` run.

    Returns:
        Nats (B, T), 0 where nothing is scored, and the report.
    """
    if targets.shape != input_ids.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, but input_ids {tuple(input_ids.shape)}: they must match"
        )
    tokens, lengths = align(input_ids, attention_mask)
    done = prefills.run(model, tokens, lengths=lengths, method=prefill, everywhere=True, runner=runner)
    if attention_mask is None:
        return model.backbone.loss(done.hidden, targets)[1], done.report
    real = attention_mask.bool()
    index = real.cumsum(1).sub(1).clamp_min(0)
    hidden = done.hidden.gather(1, index[:, :, None].expand_as(done.hidden))
    return model.backbone.loss(hidden, targets.masked_fill(~real, IGNORE))[1], done.report


def score_continuations(
    model: Decodes, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *,
    prefill: Prefill | None = None, runner: decoding.Runner = decoding.graphed,
) -> list[list[float]]:  # fmt: skip
    """Log-probability of every token of given continuations, in ``decode`` semantics, all rows in one batch.

    Args:
        model: with or without recurrence.
        prompts, continuations: token ids of each row; a prompt has at least one token.

    Raises:
        ValueError: not one continuation a prompt, or an empty prompt.
    """
    if len(prompts) != len(continuations) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts and {len(continuations)} continuations: "
            "give one continuation a prompt, and at least one"
        )
    if not all(prompts):
        raise ValueError(
            "the prompt is empty: begin it with the tokenizer's separator (BOS), or give at least one token in "
            "every row"
        )
    rows = [[*p, *c] for p, c in zip(prompts, continuations)]
    width = max(2, max(map(len, rows)))
    device = next(model.parameters()).device
    whole = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    nats, _ = score(model, whole[:, :-1], whole[:, 1:], mask[:, :-1], prefill=prefill, runner=runner)
    return [
        (-nats[i, len(p) - 1 : len(p) - 1 + len(c)]).tolist() for i, (p, c) in enumerate(zip(prompts, continuations))
    ]
