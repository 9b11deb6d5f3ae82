"""A stretch of prompt in flight: the working keys, values and memory of parallel prefill.

The stretch begins where each row of a state ends. Its working keys lie behind a copy of what the state's
caches hold, so a pass over any of its positions is one ``run_blocks`` over a ``Cache``; ``commit`` puts the
settled result into the state.

Legend: B batch, P positions of the stretch, M earlier keys in view, N slots, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.attention import Buffer, Cache, causal_mask
from lrt.decoding import attention_cut_of, separator_of
from lrt.passes import run_blocks, take
from lrt.recurrence import reset_memory
from lrt.state import DecodeState, slot_positions
from lrt.types import KV, KVStore, PassOutput, at_least_float32


class Settled(NamedTuple):
    """What settling a stretch gave, one entry a row."""

    hidden: Tensor  # (B, D) at the last token, or (B, P, D)
    sweeps: list[int]
    residual: list[float]
    exact: list[int]  # leading positions of the stretch that are exact, given an exact state
    converged: list[bool]
    lower: float  # positions run through the blocks up to the source, all rows and passes together
    upper: float  # positions run through the blocks above it


class Span:
    """Working tensors of a stretch; ``select`` gives the same for some rows.

    Args:
        model: a RecurrentDecoder.
        state: where the stretch begins.
        tokens: (B, P).
        counts: (B,) real tokens of each row; the rest is padding on the right.
    """

    def __init__(self, model: Any, state: DecodeState, tokens: Tensor, counts: Tensor) -> None:
        self.model, self.counts = model, counts
        length = tokens.shape[1]
        self.places = torch.arange(length, device=tokens.device)
        used = int(state.lengths.max())
        self.start = state.lengths.clone() if used else None
        positions = self.places if self.start is None else self.start[:, None] + self.places
        self.hidden, self.contexts = model.backbone.embed(tokens, positions)
        separator, cut = separator_of(model), attention_cut_of(model)
        self.starts = None if separator is None else tokens == separator
        self.past = [KV(k[:, :used], v[:, :used]) for k, v in zip(state.keys, state.values)]
        self.document_starts = None
        if cut is not None:
            where = torch.where(tokens == cut, positions, state.document_starts[:, None])
            self.document_starts = where.cummax(1).values
        self.memory: Tensor | None = None  # (B, P + 1, D): m before the stretch, then m of every position
        if state.memory is not None:
            self.memory = torch.cat([state.memory[:, None], state.memory.new_zeros(len(counts), length, state.memory.shape[-1])], dim=1)
        self.source_hidden: Tensor | None = None  # (B, P, D) output of the source block
        self.work: list[KV] = []  # (B, M + P, G, K) of the blocks up to the source
        self._masks: dict[Any, Tensor] = {}

    @property
    def length(self) -> int:
        return len(self.places)

    # -------------------------------------------------------------- passes

    def received(self, where: slice) -> Tensor:
        """Newest m[t-1] (B, p, D) of some positions."""
        assert self.memory is not None
        return reset_memory(self.memory[:, :-1][:, where], None if self.starts is None else self.starts[:, where])

    def first(self) -> None:
        """Forward over all positions; memory arrives only from before the stretch."""
        received = None
        if self.start is not None and self.memory is not None:
            received = reset_memory(F.pad(self.memory[:, :1], (0, 0, 0, self.length - 1)), self.starts)
        self._keep_all(self.whole(received, stop=self.model.source))

    def again(self) -> Tensor:
        """Pass over all positions, fed by the pass before, up to the source block; residual of every row (B,)."""
        assert self.memory is not None
        old = self.memory[:, 1:].clone()
        self._keep_all(self.whole(self.received(slice(None)), stop=self.model.source))
        return self._residual(self.memory[:, 1:], old, slice(0, self.length))

    def sweep(self, where: slice) -> Tensor:
        """Pass over some positions up to the source block, fed by the newest memory; residual of every row (B,)."""
        assert self.memory is not None and self.source_hidden is not None
        source = self.model.source
        self._open()
        stores = []
        for block, past, work in zip(self.model.blocks, self.past, self.work):
            stores.append(Cache(*work, past.key.shape[1] + self.places[where], self.mask(where, past.key.shape[1], block.window)))
        # Contiguous, so that compiled blocks see the same strides as in a pass over all positions.
        contexts = [_contiguous(take(context, where)) for context in self.contexts[:source]]
        hidden, received = self.hidden[:, where].contiguous(), self.received(where).contiguous()
        out = run_blocks(self.model, hidden, contexts, received, stores=stores, stop=source)
        assert out.memory is not None
        after = slice(where.start + 1, where.stop + 1, where.step)
        residual = self._residual(out.memory, self.memory[:, after], where)
        self.memory[:, after] = out.memory
        self.source_hidden[:, where] = out.hidden
        return residual

    def _open(self) -> None:
        """Put earlier and own keys into one tensor a block, which sweeps write in place."""
        if not self.work:
            self.work = [KV(*(torch.cat(pair, dim=1) for pair in zip(past, own))) for past, own in zip(self.past, self.own)]

    def whole(self, received: Tensor | None, *, start: int = 0, stop: int | None = None) -> PassOutput:
        """Pass over all positions through some blocks, in plain causal attention after the state's keys."""
        hidden = self.hidden
        if start:
            assert self.source_hidden is not None
            hidden = self.source_hidden
        stores: list[KVStore] | None = None
        if self.start is not None or self.document_starts is not None:
            everywhere = slice(0, self.length, 1)
            stores = []
            for block, past in zip(self.model.blocks, self.past):
                stores.append(Buffer((past.key,), (past.value,), 1, self.mask(everywhere, past.key.shape[1], block.window)))
        return run_blocks(self.model, hidden, self.contexts, received, stores=stores, start=start, stop=stop)

    def finish(self) -> PassOutput:
        """The blocks above the source, once, over the settled memory."""
        return self.whole(self.received(slice(None)), start=self.model.source)

    def mask(self, where: slice, earlier: int, window: int | None) -> Tensor:
        """Which of the ``earlier`` slots and of the stretch's own positions each query sees: (1 or B, 1, p, M + P)."""
        name = (where.start, where.stop, where.step, earlier, window)
        if name in self._masks:
            return self._masks[name]
        queries = self.places[where]
        mask = causal_mask(queries, self.places, window=window)
        if self.document_starts is not None:
            begin = self.document_starts[:, None, where, None]
            first = self.places if self.start is None else self.start[:, None, None, None] + self.places
            mask = mask & (first >= begin)
        if self.start is not None:
            held = slot_positions(self.start - 1, earlier)[:, None, None]
            distance = (self.start[:, None] + queries)[:, None, :, None] - held
            seen = held >= 0
            if window is not None:
                seen = seen & (distance <= window)
            seen = seen.expand(-1, -1, len(queries), -1)
            if self.document_starts is not None:
                seen = seen & (held >= self.document_starts[:, None, where, None])
            mask = torch.cat([seen, mask.expand(len(seen), -1, -1, -1)], dim=-1)
        self._masks = {name: mask} if len(self._masks) > 16 else {**self._masks, name: mask}
        return mask

    def _keep_all(self, out: PassOutput) -> None:
        assert self.memory is not None and out.memory is not None
        self.memory[:, 1:] = out.memory
        self.source_hidden = out.hidden.clone()
        self.own = list(out.kv)
        self.work = []

    def _residual(self, new: Tensor, old: Tensor, where: slice) -> Tensor:
        new, old = at_least_float32(new), at_least_float32(old)
        size = new.norm(dim=-1)
        change = torch.where(size > 0, (new - old).norm(dim=-1) / size, 0.0)
        real = self.places[where] < self.counts[:, None]
        return torch.where(real, change, 0.0).amax(1)

    # -------------------------------------------------------------- rows

    def select(self, rows: Sequence[int]) -> Span:
        """The working tensors of some rows."""
        self._open()
        index = torch.tensor(rows, device=self.counts.device)

        def pick(x: Any) -> Any:
            return x if x is None or x.shape[0] == 1 else x.index_select(0, index)

        part = object.__new__(Span)
        part.__dict__ = dict(self.__dict__)
        part._masks = {}
        for name in ("counts", "start", "hidden", "starts", "document_starts", "memory", "source_hidden"):
            setattr(part, name, pick(getattr(self, name)))
        part.contexts = tuple(type(c)(*map(pick, c)) for c in self.contexts)
        for name in ("past", "own", "work"):
            setattr(part, name, [KV(*map(pick, kv)) for kv in getattr(self, name)])
        return part

    def put(self, rows: Sequence[int], part: Span) -> None:
        """Write what ``part``, the same rows selected, has worked out."""
        index = torch.tensor(rows, device=self.counts.device)
        assert self.memory is not None and part.memory is not None and self.source_hidden is not None and part.source_hidden is not None
        self.memory[index], self.source_hidden[index] = part.memory, part.source_hidden
        for mine, theirs in zip(self.work, part.work):
            mine.key[index], mine.value[index] = theirs.key, theirs.value

    # -------------------------------------------------------------- the end

    def lower_kv(self) -> list[KV]:
        """Keys and values (B, P, G, K) of the blocks up to the source, as last computed."""
        return [KV(k[:, -self.length :], v[:, -self.length :]) for k, v in self.work] or self.own

    def commit(self, state: DecodeState, kv: Sequence[KV], exact: Sequence[int]) -> None:
        """Let ``state`` consume the stretch: keys and values of every block, memory, lengths.

        Args:
            state: the one the stretch was made from; written in place.
            kv: (B, P, G, K) of every block.
            exact: leading positions of each row that are exact.
        """
        before, counts = state.lengths.clone(), self.counts
        last = before + counts - 1
        for key, value, own in zip(state.keys, state.values, kv):
            index = slot_positions(last, key.shape[1]) - before[:, None]
            fresh = ((index >= 0) & (index < counts[:, None]))[:, :, None, None]
            index = index.clamp(0, self.length - 1)[:, :, None, None]
            for mine, theirs in ((key, own.key), (value, own.value)):
                mine.copy_(torch.where(fresh, theirs.gather(1, index.expand(-1, -1, *theirs.shape[2:])), mine))
        rows = torch.arange(len(counts), device=counts.device)
        if self.document_starts is not None:
            newest = self.document_starts[rows, (counts - 1).clamp_min(0)]
            state.document_starts.copy_(torch.where(counts > 0, newest, state.document_starts))
        if self.memory is not None and state.memory is not None:
            state.memory.copy_(self.memory[rows, counts])
            for i, at in enumerate(state.kept_at):
                assert state.kept is not None
                offset = at - before
                inside = ((offset >= 1) & (offset <= counts))[:, None]
                state.kept[:, i] = torch.where(inside, self.memory[rows, offset.clamp(0, self.length)], state.kept[:, i])
        certain = before + torch.tensor(list(exact), device=counts.device)
        state.approximate_from.copy_(torch.where(certain < before + counts, torch.minimum(state.approximate_from, certain), state.approximate_from))
        state.lengths.copy_(before + counts)


def _contiguous(context: Any) -> Any:
    return type(context)(*(x if x is None else x.contiguous() for x in context))
