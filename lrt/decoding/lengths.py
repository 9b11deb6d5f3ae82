"""Rows whose RoPE depends on how long they are: what a state must know before it rotates,
and when its keys are made anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrt.decoding import prefill
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes


def lengthen(model: Decodes, state: DecodeState, after: Tensor) -> None:
    """Say that rows of ``state`` get ``after`` (B,) tokens long.

    Raises:
        ValueError: a row that has consumed tokens gets so long that they would be rotated otherwise.
    """
    if state.reach is None:
        return
    rotary = model.backbone.by_length
    if rotary.crosses(torch.where(state.reach > rotary.border, 0, state.lengths), after):
        raise ValueError(
            f"a row gets longer than {rotary.border} tokens, where this decoder's RoPE changes and every key "
            "is made anew: begin with a fresh state (cache.reset()) and pass all tokens again, as generate does"
        )
    state.reach.copy_(torch.where(state.lengths == 0, after, state.reach))


def rotated_alike(model: Decodes, a: DecodeState, b: DecodeState) -> bool:
    """Whether the keys of both states are rotated by the same factors."""
    if a.reach is None or b.reach is None:
        return True
    border = model.backbone.by_length.border
    return bool(((a.reach > border) == (b.reach > border)).all())


def up_to_the_border(
    model: Decodes,
    state: DecodeState,
    prompts: Sequence[Sequence[int]],
    new: Sequence[Sequence[int]],
    live: Sequence[bool],
    *,
    steps: int,
) -> int:
    """How many of ``steps`` come before a row gets so long that RoPE changes;
    a row that is so far is read again, in place.

    Args:
        model, state: whose rows are decoded.
        prompts, new: tokens of every row, from its first on.
        live: rows that go on.
        steps: wanted.

    Raises:
        ValueError: a row must be read again, but its first tokens are not known.
    """
    if state.reach is None:
        return steps
    rotary = model.backbone.by_length
    for row, (length, reach) in enumerate(zip(state.lengths.tolist(), state.reach.tolist())):
        if not live[row] or length > rotary.border or reach > rotary.border:
            continue
        if length < rotary.border:
            steps = min(steps, rotary.border - length)
            continue
        told = [*prompts[row], *new[row]]
        if len(told) < length:
            raise ValueError(
                f"row {row} gets longer than {rotary.border} tokens, where this decoder's RoPE changes and "
                "every key is made anew, but its "
                "earlier tokens are not known: generate from all of its tokens in place of a state"
            )
        fresh = DecodeState.empty(model, batch=1, capacity=state.capacity, keep_at=state.kept_at)
        lengthen(model, fresh, torch.full_like(fresh.lengths, length + 1))
        tokens = torch.tensor([told[:length]], device=state.lengths.device)
        state.put([row], prefill.run(model, tokens, state=fresh).state)
    return steps
