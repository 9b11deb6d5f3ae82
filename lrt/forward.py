"""The one forward. Initialization, refinement, prefill and decoding are all ``run_blocks``; they differ in their data.

Legend: B batch, T row length, P positions of the pass, D width, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lrt.kernels.gradients import Share, attached
from lrt.recurrence import Injected
from lrt.types import KV, BlockContext, KVStore, Later, MemoryInput, PassOutput, RecurrentDecoder


class Row(NamedTuple):
    """What passes run over: a hidden state for every position, and what the borders between documents say."""

    hidden: Tensor  # (B, T, D) embedded tokens, or what block ``start`` receives
    contexts: tuple[BlockContext, ...]  # one per block, positions on dimension 1
    starts: Tensor | None  # bool (B, T): the memory received here is zero
    documents: Tensor | None  # (B, T): attention stays inside a document
    start: int = 0  # zero-based; the blocks before this one have run

    @property
    def length(self) -> int:
        return self.hidden.shape[1]


def memory_inputs(
    model: RecurrentDecoder, received: Tensor | None, *, start: int = 0, stop: int | None = None
) -> list[MemoryInput | None]:
    """The received memory m[t-1] as each block wants it; a shared projection runs once.

    Args:
        model: the decoder's parts.
        received: (B, P, D); None = zero memory.
        start, stop: only these blocks will run (zero-based, half open).

    Returns:
        One a block of the model; None for a block that receives nothing.
    """
    inputs: list[MemoryInput | None] = [None] * len(model.blocks)
    stop = len(model.blocks) if stop is None else stop
    if received is None or not any(start <= index < stop for index in model.receivers):
        return inputs
    into_keys = for_keys(model, received)
    if model.injection is None:
        return [into_keys if index in model.receivers else None for index in range(len(model.blocks))]
    made = model.injection(received)
    gains, direction = made if isinstance(made, Injected) else (made, None)
    for index, gain in zip(model.receivers, gains):
        inputs[index] = into_keys._replace(gain=gain, direction=direction)
    return inputs


def for_keys(model: RecurrentDecoder, received: Tensor) -> MemoryInput:
    """The received memory (B, P, D) as the keys and values of every block want it, and no residual."""
    if model.memory_projection is None:
        return MemoryInput(received)
    made = model.memory_projection(received)
    return MemoryInput(received, aligned=made) if isinstance(made, Tensor) else MemoryInput(received, *made)


def run_blocks(
    model: RecurrentDecoder,
    hidden: Tensor,
    contexts: Sequence[BlockContext],
    received: Tensor | None,
    *,
    stores: Sequence[KVStore | None] | None = None,
    start: int = 0,
    stop: int | None = None,
    keep_kv: bool = True,
    keep_inputs: bool = False,
    share: Share = list,
) -> PassOutput:
    """One forward over some positions.

    Args:
        model: the decoder's parts.
        hidden: (B, P, D) what block ``start`` receives: embedded tokens, or the output of the block before.
        contexts: one per block of the model, for the same positions.
        received: m[t-1] (B, P, D); None = zero memory, on which nothing is computed.
        stores: what each block attends to, a ``KVStore``; None = plain causal attention.
        start, stop: run only these blocks (zero-based, half open).
        keep_kv: also return the keys and values of every block that ran.
        keep_inputs: also return the input of every block that ran.
        share: applied to the tuples of tensors that the blocks read, one per block; several may hold one tensor.

    Returns:
        Output of the last block that ran, memory, keys and values of these positions.
    """
    stop = len(model.blocks) if stop is None else stop
    received_by = share(memory_inputs(model, received, start=start, stop=stop)[start:stop])
    contexts = share(contexts[start:stop])
    memory, kv, inputs = None, [], []
    for index, mine, context in zip(range(start, stop), received_by, contexts):
        if keep_inputs:
            inputs.append(hidden)
        store = None if stores is None else stores[index]
        if keep_kv:
            hidden, key, value = model.blocks[index](hidden, mine, at_hand(context), store)
            kv.append(KV(attached(key), attached(value)))
        else:
            hidden = model.blocks[index](hidden, mine, at_hand(context), store, False)[0]
        if index + 1 == model.source:
            memory = model.memory_of(hidden)
    return PassOutput(hidden, memory, tuple(kv), tuple(inputs))


# ------------------------------------------------------------------ contexts


def at_hand(context: BlockContext) -> BlockContext:
    """The context with every tensor made."""
    if not any(isinstance(x, Later) for x in context):
        return context
    return type(context)(*(x() if isinstance(x, Later) else x for x in context))


def take(context: BlockContext, positions: slice) -> BlockContext:
    """The context of some positions: dimension 1 of every tensor, unless it broadcasts."""
    return type(context)(*(x if x is None or x.shape[1] == 1 else x[:, positions] for x in at_hand(context)))
