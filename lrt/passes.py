"""The one forward, and the one loop that runs a schedule over the buffer (paper section 4).

Initialization, refinement, prefill and decoding are all ``run_blocks``; they differ in their data.
Between passes nothing is written in place: the buffer is a tuple of tensors, one a subset, and writing
back replaces an entry, so untouched positions are never copied.

Legend: B batch, T row length, P positions of the pass, L blocks, D width, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.attention import Buffer, Cache, Mask, Transient, causal_mask
from lrt.kernels.attention import block_mask, natural_order, usable
from lrt.kernels.gradients import Branch, Branched, attached, branch, branch_compiled, fan_out, split
from lrt.recurrence import reset_memory, shift_right
from lrt.types import KV, KVStore, Later, MemoryInput, Pass, PassOutput, RecurrentDecoder, Schedule


class Row(NamedTuple):
    """What a schedule runs over: embedded tokens and what the borders between documents say."""

    hidden: Tensor  # (B, T, D) embedded tokens
    contexts: tuple[Any, ...]  # one a block, positions on dimension 1
    starts: Tensor | None  # bool (B, T): the memory received here is zero
    documents: Tensor | None  # (B, T): attention stays inside a document


class PassResult(NamedTuple):
    """A pass that ran: its plan, the last block's output (B, P, D) and the memory (B, P, D)."""

    plan: Pass
    hidden: Tensor
    memory: Tensor | None


# ------------------------------------------------------------------ the one forward


def memory_inputs(model: RecurrentDecoder, received: Tensor | None) -> list[MemoryInput | None]:
    """The received memory m[t-1] (B, P, D) as each block wants it; a shared projection runs once."""
    inputs: list[MemoryInput | None] = [None] * len(model.blocks)
    if received is None:
        return inputs
    key, value = model.memory_projection(received) if model.memory_projection is not None else (None, None)
    gains = model.injection() if model.injection is not None else (None,) * len(model.receivers)
    for index, gain in zip(model.receivers, gains):
        inputs[index] = MemoryInput(received, key, value, gain)
    return inputs


def compiled(model: RecurrentDecoder) -> bool:
    """Whether every block is compiled, so that kernels and helpers that need the compiler may be used around them."""
    return all(block._compiled_call_impl is not None for block in model.blocks)


def run_blocks(
    model: RecurrentDecoder,
    hidden: Tensor,
    contexts: Sequence[Any],
    received: Tensor | None,
    *,
    stores: Sequence[KVStore | Transient | None] | None = None,
    start: int = 0,
    stop: int | None = None,
    keep_inputs: bool = False,
) -> PassOutput:
    """One forward over some positions.

    Args:
        model: the decoder's parts.
        hidden: (B, P, D) embedded tokens, or the output of block ``start``.
        contexts: one a block, for the same positions.
        received: m[t-1] (B, P, D); None = zero memory, on which nothing is computed.
        stores: keys and values known so far, one a block; None = plain causal attention.
        start, stop: run only these blocks (zero-based, half open).
        keep_inputs: also return the input of every block.

    Returns:
        Output of the last block that ran, memory, keys and values of these positions.
    """
    memory, kv, inputs = None, [], []
    received_by = memory_inputs(model, received)
    if torch.is_grad_enabled() and compiled(model):
        received_by, contexts = fan_out(received_by), fan_out(contexts)
    for index, block in enumerate(model.blocks):
        if index < start:
            continue
        if index == stop:
            break
        if keep_inputs:
            inputs.append(hidden)
        hidden, key, value = block(hidden, received_by[index], at_hand(contexts[index]), None if stores is None else stores[index])
        kv.append(KV(attached(key), attached(value)))
        if index + 1 == model.source:
            memory = model.memory_of(hidden)
    return PassOutput(hidden, memory, tuple(kv), tuple(inputs))


def at_hand(context: Any) -> Any:
    """The context with every tensor made."""
    if not any(isinstance(x, Later) for x in context):
        return context
    return type(context)(*(x() if isinstance(x, Later) else x for x in context))


def take(context: Any, positions: slice) -> Any:
    """The context of some positions: dimension 1 of every tensor, unless it broadcasts."""
    return type(context)(*(x if x is None or x.shape[1] == 1 else x[:, positions] for x in at_hand(context)))


def branch_contexts(contexts: Sequence[Any], groups: int, apart: Branch) -> tuple[list[Any], list[list[Any]]]:
    """Contexts by block for a pass over all positions, then by residue and block, taken ``apart``.

    What broadcasts over positions is shared, and a tensor of several blocks is split once.
    """
    known: dict[int, tuple[Any, Sequence[Any]]] = {}  # for all positions, and by residue
    for context in contexts:
        for x in context:
            if x is None or id(x) in known:
                continue
            if isinstance(x, Later):
                known[id(x)] = _later_apart(x, groups, apart)
            else:
                known[id(x)] = (x, (x,) * groups) if x.shape[1] == 1 else apart(x, groups)[:2]
    whole = [type(context)(*(None if x is None else known[id(x)][0] for x in context)) for context in contexts]
    residues = [[type(context)(*(None if x is None else known[id(x)][1][g] for x in context)) for context in contexts] for g in range(groups)]
    return whole, residues


def _later_apart(x: Later, groups: int, apart: Branch) -> tuple[Later, list[Later]]:
    """What ``apart`` gives, once the tensor is made."""
    both = Later(lambda: apart(x(), groups))
    return Later(lambda: both()[0]), [Later(lambda g=g: both()[1][g]) for g in range(groups)]  # type: ignore[misc]


def build_masks(model: RecurrentDecoder, queries: Tensor, keys: Tensor, row: Row) -> list[Tensor]:
    """One boolean mask a block, built once for each distinct window.

    Args:
        queries, keys: (P,) and (N,) indices into the row.
    """
    documents: dict[str, Tensor | None] = {}
    if row.documents is not None:
        documents = {"query_documents": row.documents[:, queries], "key_documents": row.documents[:, keys]}
    windows = {block.window for block in model.blocks}
    masks = {window: causal_mask(queries, keys, window=window, **documents) for window in windows}
    return [masks[block.window] for block in model.blocks]


def residue_masks(model: RecurrentDecoder, row: Row, *, groups: int, residue: int) -> Sequence[Mask]:
    """One mask a block for the positions t = residue (mod S) over keys grouped by residue; None: the kernel needs none.

    Block masks are for compiled blocks alone: eager FlexAttention would hold all scores.
    """
    length, device = row.hidden.shape[1], row.hidden.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else row.hidden.dtype
    fast = usable(device=device, dtype=dtype, head_dim=model.backbone.head_dim)
    if fast and compiled(model):
        windows = {w: None if w is None or w >= length - 1 else w for w in {block.window for block in model.blocks}}
        place: dict[str, Any] = {"length": length, "groups": groups, "residue": residue, "documents": row.documents, "device": device}
        masks = {w: block_mask(window=seen, **place) for w, seen in windows.items()}
        return [masks[block.window] for block in model.blocks]
    if row.documents is None and (fast or groups == 1):
        return [None] * len(model.blocks)
    everywhere = torch.arange(length, device=device)
    return build_masks(model, everywhere[residue::groups], torch.cat([everywhere[g::groups] for g in range(groups)]), row)


# ------------------------------------------------------------------ the loop


def run_schedule(model: RecurrentDecoder, row: Row, schedule: Schedule, *, generator: torch.Generator | None = None) -> list[PassResult]:
    """Run every pass of a schedule and return what each computed.

    Args:
        model: the decoder's parts.
        row: embedded tokens.
        schedule: which positions, in which order.
        generator: draws the order of subsets, where the schedule asks for it.

    Returns:
        One result a pass, in order. An initialization of weight 0 that only feeds a full refinement stops
        at the source block; its ``hidden`` must not be scored.
    """
    length = row.hidden.shape[1]
    plan = schedule.plan(length, generator=generator)
    if plan[0].memory == "zero" and plan[0].covers(length):
        partial = len(plan) > 1 and not plan[1].covers(length)
        loop: Callable[..., list[PassResult]] = _interleave if partial else _refine
    else:
        loop = _chunks if torch.is_grad_enabled() else _chunks_in_place
    return loop(model, row, plan, schedule)


def _for_pass(model: RecurrentDecoder, index: int) -> RecurrentDecoder:
    return model if model.twins is None or not torch.is_grad_enabled() else model.twins(model, index)


def _refine(model: RecurrentDecoder, row: Row, plan: Sequence[Pass], schedule: Schedule) -> list[PassResult]:
    """Passes over all positions: plain causal attention, no buffer."""
    length = row.hidden.shape[1]
    weights = schedule.group_weights(length)
    stores = [Transient(store) for store in _whole_row(model, row)]
    results: list[PassResult] = []
    received = None
    for index, step in enumerate(plan):
        only_feeds = weights[step.group] == 0 and step is not plan[-1]
        out = run_blocks(_for_pass(model, index), row.hidden, row.contexts, received, stores=stores, stop=model.source if only_feeds else None)
        results.append(PassResult(step, out.hidden, out.memory))
        if step is not plan[-1]:
            assert out.memory is not None
            received = reset_memory(shift_right(_cut(out.memory, schedule)), row.starts)
    return results


def _interleave(model: RecurrentDecoder, row: Row, plan: Sequence[Pass], schedule: Schedule) -> list[PassResult]:
    """Initialization, then passes over residues; the buffer holds one entry a residue."""
    subsets = plan[1].step
    apart = branch_compiled if compiled(model) else branch
    everywhere, hidden, _ = apart(row.hidden, subsets)
    all_contexts, contexts = branch_contexts(row.contexts, subsets, apart)
    first = run_blocks(model, everywhere, all_contexts, None, stores=_whole_row(model, row), keep_inputs=schedule.kv_refresh)
    assert first.memory is not None
    results = [PassResult(plan[0], first.hidden, first.memory)]
    starts = None if row.starts is None else split(row.starts, subsets)
    inputs = [apart(x, subsets).parts for x in first.inputs]
    memory = list(apart(_cut(first.memory, schedule), subsets).parts)
    keys, values = ([_Entries(apart(_cut(x, schedule), subsets)) for x in both] for both in zip(*first.kv))
    visited: set[int] = set()

    def received(residue: int) -> Tensor:
        count = memory[residue].shape[1]
        before = memory[residue - 1][:, :count] if residue else F.pad(memory[-1][:, : count - 1], (0, 0, 1, 0))
        return reset_memory(before, None if starts is None else starts[residue])

    def refresh() -> None:
        for residue in set(range(subsets)) - visited:
            newest = memory_inputs(model, received(residue))
            for layer in model.receivers:
                fresh = model.blocks[layer].refresh(inputs[layer][residue], newest[layer], at_hand(contexts[residue][layer]))
                keys[layer][residue], values[layer][residue] = fresh

    for index, step in enumerate(plan[1:], start=1):
        residue = step.start
        visited.add(residue)  # its own keys are about to be fresh
        if schedule.kv_refresh:
            refresh()
        masks = residue_masks(model, row, groups=subsets, residue=residue)
        stores: list[Any] = [Buffer(k.read_by(residue, mask), v.read_by(residue, mask), residue, mask) for k, v, mask in zip(keys, values, masks)]
        if step is plan[-1]:
            stores = [Transient(store) for store in stores]
        # Contiguous, as the inputs of the later blocks are: a compiled first block would otherwise be a graph of its own.
        out = run_blocks(_for_pass(model, index), hidden[residue].contiguous(), contexts[residue], received(residue), stores=stores)
        assert out.memory is not None
        results.append(PassResult(step, out.hidden, out.memory))
        if step is plan[-1]:
            break
        memory[residue] = _cut(out.memory, schedule)
        for layer, kv in enumerate(out.kv):
            keys[layer][residue], values[layer][residue] = _cut(kv.key, schedule), _cut(kv.value, schedule)
    return results


class _Entries:
    """One block's keys or values in the buffer, an entry (B, n, G, K) a residue."""

    def __init__(self, known: Branched) -> None:
        self._all, self._shorter = list(known.parts), list(known.shorter)

    def __setitem__(self, residue: int, fresh: Tensor) -> None:
        self._all[residue] = self._shorter[residue] = fresh

    def read_by(self, residue: int, mask: Mask) -> tuple[Tensor, ...]:
        """What a pass over ``residue`` sees: of later residues all but the last entry, unless a mask says so."""
        return tuple(all_ if mask is not None or g <= residue else shorter for g, (all_, shorter) in enumerate(zip(self._all, self._shorter)))


def _chunks(model: RecurrentDecoder, row: Row, plan: Sequence[Pass], schedule: Schedule) -> list[PassResult]:
    """Contiguous passes, left to right, over a growing prefix that autograd may follow."""
    everywhere = torch.arange(row.hidden.shape[1], device=row.hidden.device)
    results: list[PassResult] = []
    prefix: list[KV] = []
    for step in plan:
        masks = build_masks(model, everywhere[step.positions], everywhere[: step.stop], row)
        past: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
        past = [((kv.key,), (kv.value,)) for kv in prefix] or [((), ()) for _ in masks]
        stores = [Buffer(k, v, len(k), mask) for (k, v), mask in zip(past, masks)]
        out = _run_chunk(model, row, step, results, stores)
        results.append(PassResult(step, out.hidden, out.memory))
        prefix = [KV(torch.cat([*k, kv.key], 1), torch.cat([*v, kv.value], 1)) for (k, v), kv in zip(past, out.kv)]
    return results


def _chunks_in_place(model: RecurrentDecoder, row: Row, plan: Sequence[Pass], schedule: Schedule) -> list[PassResult]:
    """The same without gradients: static keys and values, written in place, so that shapes never grow."""
    everywhere = torch.arange(row.hidden.shape[1], device=row.hidden.device)
    results: list[PassResult] = []
    caches: list[KV] = []
    for step in plan:
        slots = everywhere[step.positions]
        masks = build_masks(model, slots, everywhere, row)
        if not caches:
            own = [Buffer((), (), 0, mask[..., : step.stop]) for mask in masks]
            out = _run_chunk(model, row, step, results, own)
            caches = [KV(*(F.pad(x, (0, 0, 0, 0, 0, len(everywhere) - step.stop)) for x in kv)) for kv in out.kv]
        else:
            stores = [Cache(kv.key, kv.value, slots, mask) for kv, mask in zip(caches, masks)]
            out = _run_chunk(model, row, step, results, stores)
        results.append(PassResult(step, out.hidden, out.memory))
    return results


def _run_chunk(model: RecurrentDecoder, row: Row, step: Pass, results: list[PassResult], stores: Sequence[KVStore]) -> PassOutput:
    """One chunk: memory arrives at its first position only, from the chunk before."""
    received = None
    if step.memory == "first" and results[-1].memory is not None:
        received = F.pad(results[-1].memory[:, -1:], (0, 0, 0, step.stop - step.start - 1))
        received = reset_memory(received, None if row.starts is None else row.starts[:, step.positions])
    return run_blocks(model, row.hidden[:, step.positions], [take(c, step.positions) for c in row.contexts], received, stores=stores)


def _whole_row(model: RecurrentDecoder, row: Row) -> list[Buffer | None]:
    """Stores for a pass over all positions: none, unless the block's kernel wants a mask."""
    return [None if mask is None else Buffer((), (), 0, mask) for mask in residue_masks(model, row, groups=1, residue=0)]


def _cut(x: Tensor, schedule: Schedule) -> Tensor:
    return x.detach() if schedule.cut_gradient else x


# ------------------------------------------------------------------ what the passes say together


def by_group(results: Sequence[PassResult], groups: int) -> list[tuple[Tensor, Tensor]]:
    """Per loss group: outputs (B, P, D) of its passes side by side, and their positions (P,)."""
    merged = []
    for group in range(groups):
        members = [r for r in results if r.plan.group == group]
        length = max(r.plan.stop for r in members)
        places = torch.arange(length, device=members[0].hidden.device)
        hidden = members[0].hidden if len(members) == 1 else torch.cat([r.hidden for r in members], dim=1)
        merged.append((hidden, torch.cat([places[r.plan.positions] for r in members])))
    return merged


def last_memory(results: Sequence[PassResult], group: int) -> Tensor | None:
    """m[t] (B, T, D) of the positions of a loss group; None for a model without recurrence."""
    members = sorted((r for r in results if r.plan.group == group), key=lambda r: r.plan.start)
    parts = [r.memory for r in members if r.memory is not None]
    if not parts:
        return None
    return natural_order(parts) if len(parts) == members[0].plan.step else torch.cat(parts, dim=1)


def in_order(values: Tensor, positions: Tensor) -> Tensor:
    """Sort dimension 1 of ``values`` (B, P, ...) by ``positions`` (P,), each of 0..P-1 once."""
    return values if len(positions) == 1 else values.index_select(1, torch.argsort(positions))
