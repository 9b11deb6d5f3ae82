"""One position for every row of a state, in plain PyTorch.

It works on static tensors and never asks the device for anything, so the same function runs eagerly, under
``torch.compile``, or replayed as a CUDA graph.

Legend: B batch, N slots, L blocks, D width, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrt.attention import Cache
from lrt.decoding.state import DecodeState, slot_positions
from lrt.decoding.which_model import Decodes
from lrt.forward import Row, run_blocks
from lrt.recurrence import reset_memory
from lrt.types import PassOutput


def separator_of(model: Decodes) -> int | None:
    """Token at which the received memory is zero; None = none."""
    return None if model.recurrence is None else model.recurrence.separator


def attention_cut_of(model: Decodes) -> int | None:
    """Token at which attention is cut too; None = none."""
    return getattr(model.backbone, "attention_reset", None)


@torch.no_grad()
def consume(
    model: Decodes, state: DecodeState, tokens: Tensor, active: Tensor, *, row: Row | None = None,
    stop: int | None = None, stores: Any = None, keep_inputs: bool = False,
) -> PassOutput:  # fmt: skip
    """Let every active row of ``state`` consume one token, in place; all that the blocks computed, (B, 1, ...).

    Args:
        model: a RecurrentDecoder.
        state: its rows; must have room for one token.
        tokens: (B,) token ids.
        active: (B,) bool; other rows stay as they are.
        row: what block ``row.start`` receives at these tokens, with contexts;
            None = the tokens embedded, for the first block.
        stop: the first block that does not run, above the source; None = all run.
        stores: what each block attends to; None = the caches of ``state``.
        keep_inputs: also return the input of every block.
    """
    positions = state.lengths[:, None]
    cut = attention_cut_of(model)
    if cut is not None:
        state.document_starts.copy_(torch.where(active & (tokens == cut), state.lengths, state.document_starts))
    if row is None:
        more = () if state.reach is None else (state.reach[:, None],)
        hidden, contexts = model.backbone.embed(tokens[:, None], positions, *more)
        row = Row(hidden, contexts, None, None)
    received = None
    if state.memory is not None:
        separator = separator_of(model)
        received = reset_memory(state.memory[:, None], None if separator is None else (tokens == separator)[:, None])
    stores = masked_caches(state) if stores is None else stores
    out = run_blocks(
        model, row.hidden, row.contexts, received, stores=stores, start=row.start, stop=stop, keep_inputs=keep_inputs
    )
    state.lengths.add_(active)
    if state.memory is not None and out.memory is not None:
        torch.where(active[:, None], out.memory[:, 0], state.memory, out=state.memory)
        keep_memory(state)
    return out


def keep_memory(state: DecodeState) -> None:
    """Keep the memory of rows whose length is one of ``kept_at``."""
    if state.kept is not None and state.memory is not None:
        here = torch.stack([state.lengths == length for length in state.kept_at], dim=1)[..., None]
        state.kept.copy_(torch.where(here, state.memory[:, None], state.kept))


def masked_caches(state: DecodeState) -> list[Cache]:
    """The stores of one token per row: where its key goes, and which slots it sees."""
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    for key in state.keys:
        slots = key.shape[1]
        if slots not in shared:
            held = slot_positions(state.lengths, slots)
            shared[slots] = (
                state.lengths.remainder(slots)[:, None],
                (held >= state.document_starts[:, None])[:, None, None],
            )
    return [Cache(key, value, *shared[key.shape[1]]) for key, value in zip(state.keys, state.values)]
