"""How one pass is computed, in plain PyTorch: rows taken apart, what blocks attend to, and the buffer between passes.

Nothing is written in place where autograd follows: the buffer is tuples of tensors, one per residue, and writing back
replaces an entry, so untouched positions are never copied.

Legend: B batch, T row length, P positions of the pass, S subsets, D width, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.attention import Buffer, Cache, Mask, causal_mask
from lrt.forward import Row, at_hand, for_keys, run_blocks
from lrt.kernels.attention import usable
from lrt.kernels.gradients import Branch, Branched, branch
from lrt.recurrence import reset_memory
from lrt.types import KV, BlockContext, KVStore, Later, Pass, PassOutput, RecurrentDecoder

Stores = Sequence[KVStore | None]  # what each block attends to; None: the positions of the pass
Field = Tensor | Later[Tensor] | None  # of a context


class Entries:
    """One block's keys or values in the buffer, an entry (B, n, G, K) a residue."""

    def __init__(self, known: Branched) -> None:
        self._all = list(known.parts)

    def __setitem__(self, residue: int, fresh: Tensor) -> None:
        self._all[residue] = fresh

    def read_by(self, residue: int, mask: Mask) -> tuple[Tensor, ...]:
        """The entries as a pass over ``residue`` reads them under its mask."""
        return tuple(self._all)


class Engine:
    """Computes the passes of one model.

    Args:
        model: the decoder's parts.
        keep_inputs: every pass also returns the input of every block.
    """

    branch: Callable[[Tensor, int], Branched] = staticmethod(branch)  # a tensor for all positions, and by residue
    entries: type[Entries] = Entries

    def __init__(self, model: RecurrentDecoder, *, keep_inputs: bool = False) -> None:
        self.model = model
        self.keep_inputs = keep_inputs

    # -------------------------------------------------------------- rows

    def split(self, row: Row, subsets: int) -> tuple[Row, list[Row]]:
        """The row for a pass over all positions, and the rows of the positions t = r (mod S), residue by residue."""
        return take_apart(row, subsets, self.branch)

    def pieces(self, row: Row, sizes: Sequence[int]) -> tuple[Row, list[Row]]:
        """The row for a pass over all positions, and the rows of contiguous chunks of these sizes."""
        return take_apart(row, len(sizes), lambda x, _: Branched(x, x.split(list(sizes), 1), ()))

    # -------------------------------------------------------------- passes

    def run(
        self, row: Row, received: Tensor | None = None, *, stores: Stores | None = None, stop: int | None = None,
        index: int = 0, graded: bool = True, keep_kv: bool = True, keep_inputs: bool = False,
    ) -> PassOutput:  # fmt: skip
        """Run the blocks from ``row.start`` on.

        Args:
            row: the positions of the pass.
            received: their m[t-1] (B, P, D); None = zero memory.
            stores: what each block attends to; None = the pass's own positions, which are a whole row.
            stop: the first block that does not run (zero-based); None = run all.
            index: of the pass among the graded ones of its schedule.
            graded: gradients come back through it; otherwise nothing that goes in asks for one.
            keep_kv: a later pass reads the keys and values of this one.
            keep_inputs: ``refresh`` will need the input of every block.
        """
        if not graded:
            row, received = row._replace(hidden=row.hidden.detach()), None if received is None else received.detach()
        stores = self.whole_row(row) if stores is None else stores
        keep_inputs = keep_inputs or self.keep_inputs
        with torch.set_grad_enabled(graded and torch.is_grad_enabled()):
            return self.compute(row, received, stores, index=index, stop=stop, keep_kv=keep_kv, keep_inputs=keep_inputs)

    def compute(
        self, row: Row, received: Tensor | None, stores: Stores, *, index: int, stop: int | None, keep_kv: bool,
        keep_inputs: bool,
    ) -> PassOutput:  # fmt: skip
        """``run`` when all is at hand."""
        return run_blocks(
            self.model, row.hidden, row.contexts, received, stores=stores, start=row.start, stop=stop, keep_kv=keep_kv,
            keep_inputs=keep_inputs,
        )  # fmt: skip

    def whole_row(self, row: Row) -> list[KVStore | None]:
        """Stores of a pass over all positions: none, unless the block's kernel wants a mask."""
        return [None if mask is None else Buffer((), (), 0, mask) for mask in self.masks(row, groups=1, residue=0)]

    def masks(self, row: Row, *, groups: int, residue: int) -> Sequence[Mask]:
        """One mask per block for the positions t = residue (mod S) over keys by residue; None:
        the kernel needs none."""
        fast = usable(device=row.hidden.device, dtype=dtype_of(row), head_dim=self.model.backbone.head_dim)
        if row.documents is None and (fast or groups == 1):
            return [None] * len(self.model.blocks)
        places = torch.arange(row.length, device=row.hidden.device)
        keys = torch.cat([places[g::groups] for g in range(groups)])
        return dense_masks(self.model, places[residue::groups], keys, row)

    # -------------------------------------------------------------- what passes leave for later ones

    def buffer(self, row: Row, parts: Sequence[Row], first: PassOutput) -> PositionBuffer:
        """The buffer after the pass ``first`` over all positions of a row that was split into ``parts``."""
        return PositionBuffer(self, row, parts, first)

    def prefix(self, row: Row) -> Prefix:
        """The keys and values of chunks of a row, from left to right."""
        return Prefix(self.model, row) if torch.is_grad_enabled() else StaticPrefix(self.model, row)

    def chunkwise(self, count: int) -> AbstractContextManager[object]:
        """The setting in which the blocks run over ``count`` chunks, one after the other."""
        return nullcontext()


class PositionBuffer:
    """Memory, keys and values of a row by residue, as last computed (paper section 4).

    Args:
        engine: computes the passes.
        row: all positions.
        parts: its positions by residue.
        first: the pass over all positions.
    """

    def __init__(self, engine: Engine, row: Row, parts: Sequence[Row], first: PassOutput) -> None:
        assert first.memory is not None
        self._engine, self._row, self._parts = engine, row, parts

        def apart(x: Tensor) -> Branched:
            return engine.branch(x, len(parts))

        self._memory = list(apart(first.memory).parts)
        self._kv = [(engine.entries(apart(key)), engine.entries(apart(value))) for key, value in first.kv]
        kept = engine.model.receivers if first.inputs else ()
        self._inputs = {layer: apart(first.inputs[layer - row.start]).parts for layer in kept}

    def received(self, residue: int) -> Tensor:
        """m[t-1] (B, P, D) of the positions of a residue, from the newest pass over the position before."""
        memory, count = self._memory, self._memory[residue].shape[1]
        before = memory[residue - 1][:, :count] if residue else F.pad(memory[-1][:, : count - 1], (0, 0, 1, 0))
        return reset_memory(before, self._parts[residue].starts)

    def stores(self, residue: int) -> list[KVStore | None]:
        """What each block attends to in a pass over a residue."""
        start = self._row.start
        masks = self._engine.masks(self._row, groups=len(self._parts), residue=residue)[start:]

        def store(keys: Entries, values: Entries, mask: Mask) -> Buffer:
            return Buffer(keys.read_by(residue, mask), values.read_by(residue, mask), residue, mask)

        return [*[None] * start, *(store(*kv, mask) for kv, mask in zip(self._kv, masks))]

    def write_back(self, residue: int, out: PassOutput) -> None:
        """Put what a pass over a residue computed in the place of what was known."""
        assert out.memory is not None
        self._memory[residue] = out.memory
        for (keys, values), fresh in zip(self._kv, out.kv):
            keys[residue], values[residue] = fresh

    def refresh(self, residues: Iterable[int]) -> None:
        """Bring the newest memory into keys and values of some residues; gates and local parts stay as they were."""
        model = self._engine.model
        for residue in residues:
            newest = for_keys(model, self.received(residue))
            for layer in model.receivers:
                keys, values = self._kv[layer - self._row.start]
                context = at_hand(self._parts[residue].contexts[layer])
                hidden = self._inputs[layer][residue]
                keys[residue], values[residue] = model.blocks[layer].refresh(hidden, newest, context)


class Prefix:
    """Keys and values of a row's first positions, in the order of time; they grow, and autograd may follow."""

    def __init__(self, model: RecurrentDecoder, row: Row) -> None:
        self._start, self._places = row.start, torch.arange(row.length, device=row.hidden.device)
        self._masks = dense_masks(model, self._places, self._places, row)
        self._kv: list[KV] = []

    def stores(self, step: Pass) -> list[KVStore | None]:
        """What each block attends to in the chunk ``step``: what was kept, and the chunk itself."""
        masks = [mask[..., step.positions, : step.stop] for mask in self._masks]
        if not self._kv:
            return [Buffer((), (), 0, mask) for mask in masks]
        known = zip(self._kv, masks[self._start :])
        return [*[None] * self._start, *(Buffer((key,), (value,), 1, mask) for (key, value), mask in known)]

    def keep(self, kv: Sequence[KV]) -> None:
        """Add the keys and values of the next chunk."""
        known = self._kv
        self._kv = [KV(*(torch.cat(both, 1) for both in zip(*pair))) for pair in zip(known, kv)] if known else list(kv)


class StaticPrefix(Prefix):
    """The same without gradients: written in place, so that shapes never grow."""

    def stores(self, step: Pass) -> list[KVStore | None]:
        if not self._kv:
            return super().stores(step)
        slots = self._places[step.positions]
        masks = [mask[..., step.positions, :] for mask in self._masks[self._start :]]
        return [*[None] * self._start, *(Cache(key, value, slots, mask) for (key, value), mask in zip(self._kv, masks))]

    def keep(self, kv: Sequence[KV]) -> None:
        if not self._kv:
            length = len(self._places)
            self._kv = [KV(*(F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1])) for x in mine)) for mine in kv]


# ------------------------------------------------------------------ parts of rows


def take_apart(row: Row, count: int, branch: Branch) -> tuple[Row, list[Row]]:
    """The row for a pass over all positions, and its ``count`` parts as ``branch`` divides tensors."""
    hidden, below = branch(row.hidden, count), row.contexts[: row.start]
    whole, contexts = split_contexts(row.contexts[row.start :], count, branch)
    starts = (None,) * count if row.starts is None else branch(row.starts, count).parts
    parts = [Row(h, (*below, *c), s, None, row.start) for h, c, s in zip(hidden.parts, contexts, starts)]
    return row._replace(hidden=hidden.whole, contexts=(*below, *whole)), parts


def split_contexts(
    contexts: Sequence[BlockContext], subsets: int, branch: Branch
) -> tuple[list[BlockContext], list[list[BlockContext]]]:
    """Contexts by block for a pass over all positions, then by part and block.

    What broadcasts over positions is shared, a tensor of several blocks is split once, and one that comes ``Later`` is
    split later.
    """
    known: dict[int, tuple[Field, Sequence[Field]]] = {}

    def apart(x: Field) -> tuple[Field, Sequence[Field]]:
        if id(x) not in known:
            known[id(x)] = _apart(x, subsets, branch)
        return known[id(x)]

    fields = [[apart(x) for x in context] for context in contexts]
    whole = [type(c)(*(everywhere for everywhere, _ in mine)) for c, mine in zip(contexts, fields)]
    parts = [[type(c)(*(part[g] for _, part in mine)) for c, mine in zip(contexts, fields)] for g in range(subsets)]
    return whole, parts


def _apart(x: Field, subsets: int, branch: Branch) -> tuple[Field, Sequence[Field]]:
    if isinstance(x, Later):
        both = Later(lambda: branch(x(), subsets))
        return Later(lambda: both().whole), [Later(partial(_part, both, g)) for g in range(subsets)]
    if x is None or x.shape[1] == 1:
        return x, (x,) * subsets
    return branch(x, subsets)[:2]


def _part(both: Later[Branched], number: int) -> Tensor:
    return both().parts[number]


def dense_masks(model: RecurrentDecoder, queries: Tensor, keys: Tensor, row: Row) -> list[Tensor]:
    """One boolean mask (1 or B, 1, P, N) per block, built once for each distinct window.

    Args:
        model: its blocks have the windows.
        queries, keys: (P,) and (N,) indices into the row.
        row: attention stays inside its documents.
    """
    documents: dict[str, Tensor | None] = {}
    if row.documents is not None:
        documents = {"query_documents": row.documents[:, queries], "key_documents": row.documents[:, keys]}
    windows = {block.window for block in model.blocks}
    masks = {window: causal_mask(queries, keys, window=window, **documents) for window in windows}
    return [masks[block.window] for block in model.blocks]


def dtype_of(row: Row) -> torch.dtype:
    """The dtype that attention will compute in."""
    kind = row.hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else row.hidden.dtype
