"""A stretch of prompt in flight: the working keys, values and memory of parallel prefill.

The stretch begins where each row of a state ends. Its working keys lie behind a copy of what the state's
caches hold, so a pass over any of its positions is one ``run_blocks`` over them; ``commit`` puts the
settled result into the state.

Legend: B batch, P positions of the stretch, M earlier keys in view, N slots, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.accounting import Work
from lrt.attention import Buffer, Cache, Strided, causal_mask
from lrt.decoding.compiled_block import CompiledBlock
from lrt.decoding.one_position import attention_cut_of, separator_of
from lrt.decoding.ragged_mask import ragged_mask
from lrt.decoding.state import DecodeState, keys_so_far, slot_positions
from lrt.decoding.which_model import Decodes
from lrt.forward import run_blocks, take
from lrt.kernels.attention import usable
from lrt.recurrence import reset_memory
from lrt.types import KV, KVStore, PassOutput, at_least_float32

MASKS = 64  # kept at most
T = TypeVar("T")


class Span:
    """Working tensors of a stretch; ``select`` gives the same for some rows.

    Args:
        model: a RecurrentDecoder.
        state: where the stretch begins.
        tokens: (B, P).
        counts: (B,) real tokens of each row; the rest is padding on the right.
    """

    reach: Tensor | None = None  # (B,) of the state

    def __init__(self, model: Decodes, state: DecodeState, tokens: Tensor, counts: Tensor) -> None:
        self._begin(model, tokens, counts)
        lengths = state.lengths.tolist()
        if any(lengths):
            self._follow(state, lengths)
        self.reach = state.reach
        self._embed(state.memory, state.document_starts)

    def _begin(self, model: Decodes, tokens: Tensor, counts: Tensor) -> None:
        self.model, self.tokens, self.counts = model, tokens, counts
        self.places = torch.arange(tokens.shape[1], device=tokens.device)
        # Compiled blocks want tensors, not numbers that change: masks and slots, and inputs of one layout.
        self.compiled = any(isinstance(block, CompiledBlock) for block in model.blocks)
        self.start: Tensor | None = None  # (B,) tokens that the state has consumed; None = no row has any
        self.straight = True  # all rows begin at one position, so that keys lie in natural order
        self.past: list[KV] = []  # (B, M, G, K) of every block, where the state has consumed tokens
        self.own: dict[int, KV] = {}  # (B, P, G, K) by block, as last computed
        self.work: dict[int, KV] = {}  # (B, M + P, G, K) by block: the same behind the past, written in place
        self.entry = min(model.receivers, default=0)  # the first block that memory reaches; those below run once
        self.in_state = range(0)  # blocks whose keys and values are in the state already
        self.ran: list[Work] = []  # so far, in positions of all rows together
        self._part: tuple[list[int], Span] | None = None  # the rows that are still swept
        self._masks: dict[Any, Tensor] = {}

    def _follow(self, state: DecodeState, lengths: list[int]) -> None:
        """Begin after the tokens that the rows of ``state`` have consumed."""
        self.start, self.straight = state.lengths.clone(), min(lengths) == max(lengths)
        self.past = keys_so_far(state, lengths)

    def _embed(self, memory: Tensor | None, document_starts: Tensor | None) -> None:
        tokens = self.tokens
        positions = self.places if self.start is None else self.start[:, None] + self.places
        more = () if self.reach is None else (self.reach[:, None],)
        self.hidden, self.contexts = self.model.backbone.embed(tokens, positions, *more)
        separator, cut = separator_of(self.model), attention_cut_of(self.model)
        self.starts = None if separator is None else tokens == separator
        self.document_starts = None
        if cut is not None:
            assert document_starts is not None
            where = torch.where(tokens == cut, positions, document_starts[:, None])
            self.document_starts = where.cummax(1).values
        self.memory: Tensor | None = None  # (B, P + 1, D): m before the stretch, then m of every position
        if memory is not None:
            self.memory = F.pad(memory[:, None], (0, 0, 0, self.length))
        self.source_hidden: Tensor | None = None  # (B, P, D) output of the source block
        masked = not self.straight or self.document_starts is not None
        head_dim = self.model.backbone.head_dim
        self.kernels = (
            not masked
            and not self.compiled
            and usable(device=tokens.device, dtype=self.hidden.dtype, head_dim=head_dim)
        )

    @property
    def length(self) -> int:
        return len(self.places)

    def earlier(self, layer: int) -> int:
        """M of one block."""
        return self.past[layer].key.shape[1] if self.past else 0

    # -------------------------------------------------------------- passes

    def received(self, where: slice) -> Tensor:
        """Newest m[t-1] (B, p, D) of some positions."""
        assert self.memory is not None
        return reset_memory(self.memory[:, :-1][:, where], None if self.starts is None else self.starts[:, where])

    def first(self) -> None:
        """Forward over all positions up to the source block; memory arrives only from before the stretch."""
        self._run("first", self._first)
        self._count(self.tokens.numel(), 0, self.entry)
        self._count(self.tokens.numel(), self.entry, self.model.source, received=self.start is not None)

    def again(self) -> Tensor:
        """Pass over all positions, fed by the pass before, up to the source block; residual of every row (B,)."""
        self._count(self.tokens.numel(), self.entry, self.model.source, received=True)
        return self._run("again", self._again)

    def sweep(self, where: slice, keep: Tensor | None = None) -> Tensor:
        """Pass over some positions up to the source block, fed by the newest memory; residual of every row (B,).

        Args:
            where: positions of the stretch.
            keep: bool (B, p), the ones whose result counts; None = all.
        """
        assert self.memory is not None and self.source_hidden is not None
        entry, source = self.entry, self.model.source
        self._open(range(entry, source))
        stores = [None] * entry + [self._store(layer, where, keep) for layer in range(entry, source)]
        contexts = [take(context, where) for context in self.contexts[entry:source]]
        hidden, received = self.hidden[:, where], self.received(where)
        if self.compiled:  # the same strides as in a pass over all positions
            contexts = [_contiguous(context) for context in contexts]
            hidden, received = hidden.contiguous(), received.contiguous()
        contexts = [*self.contexts[:entry], *contexts]
        out = run_blocks(self.model, hidden, contexts, received, stores=stores, start=entry, stop=source)
        assert out.memory is not None
        memory, top = self.memory[:, where.start + 1 : where.stop + 1 : where.step], self.source_hidden[:, where]
        residual = self._residual(out.memory, memory, where, keep)
        for mine, fresh in ((memory, out.memory), (top, out.hidden)):
            if keep is None:
                mine.copy_(fresh)
            else:
                torch.where(keep[:, :, None], fresh, mine, out=mine)
        return residual

    def round(self, rows: list[int], *, groups: int, number: int, longest: int) -> list[float]:
        """Sweep some rows over interleaved groups; the largest residual of each.

        Args:
            rows: they stay the same, or become fewer, from round to round.
            groups: S.
            number: rounds before this one, after which the positions 0 .. S * number are exact.
            longest: of the rows' counts.
        """
        live, certain = self._live(rows), number * groups
        changes = []
        for first in range(certain + 1, min(certain + groups + 1, longest)):
            where = slice(first, longest, groups)
            changes.append(live.sweep(where))
            self._count(len(rows) * len(range(first, longest, groups)), self.entry, self.model.source, received=True)
        return torch.stack(changes).amax(0).tolist()

    def whole(self) -> Tensor:
        """Forward of a model without memory; the last block's output (B, P, D)."""
        self._count(self.tokens.numel(), 0, len(self.model.blocks))
        return self._run("whole", self._whole)

    def finish(self) -> Tensor:
        """The blocks above the source, once, over the settled memory; the last block's output (B, P, D)."""
        self._count(self.tokens.numel(), self.model.source, len(self.model.blocks), received=True)
        return self._run("finish", self._finish)

    def _run(self, name: str, action: Callable[[], T]) -> T:
        """Run a pass; recorded spans may replay it."""
        return action()

    def _count(self, positions: int, start: int, stop: int, *, received: bool = False) -> None:
        self.ran.append(Work(positions, start, stop, received, scored=False))

    def enter(self) -> None:
        """The blocks that memory does not reach, once: ``hidden`` is what the first receiver receives."""
        if self.entry:
            self.hidden = self._pass(self.hidden, None, 0, self.entry).hidden

    def _first(self) -> None:
        self.enter()
        received = None
        if self.start is not None and self.memory is not None:
            received = reset_memory(F.pad(self.memory[:, :1], (0, 0, 0, self.length - 1)), self.starts)
        self._settle(received)

    def _again(self) -> Tensor:
        assert self.memory is not None
        old = self.memory[:, 1:].clone()
        self._settle(self.received(slice(None)))
        return self._residual(self.memory[:, 1:], old, slice(0, self.length))

    def _whole(self) -> Tensor:
        return self._pass(self.hidden, None, 0, len(self.model.blocks)).hidden

    def _finish(self) -> Tensor:
        self._put_back()
        assert self.source_hidden is not None
        return self._pass(
            self.source_hidden, self.received(slice(None)), self.model.source, len(self.model.blocks)
        ).hidden

    def _settle(self, received: Tensor | None) -> None:
        """The blocks from where memory enters up to the source; their memory is the newest from now on."""
        out = self._pass(self.hidden, received, self.entry, self.model.source)
        assert self.memory is not None and out.memory is not None
        self.memory[:, 1:] = out.memory
        self.source_hidden = out.hidden.clone()

    def _pass(self, hidden: Tensor, received: Tensor | None, start: int, stop: int) -> PassOutput:
        """Pass over all positions through some blocks, in plain causal attention after the state's keys."""
        stores: list[KVStore | None] | None = None
        if self.past and self.kernels:
            self._open(range(start, stop))
            stores = [None] * start + [
                self._store(layer, slice(0, self.length, 1), None) for layer in range(start, stop)
            ]
        elif self.past or self.document_starts is not None:
            stores = [None] * start + [self._buffer(layer) for layer in range(start, stop)]
        out = run_blocks(self.model, hidden, self.contexts, received, stores=stores, start=start, stop=stop)
        if not (self.past and self.kernels):
            self.own |= dict(enumerate(out.kv, start))
            self.work = {layer: kv for layer, kv in self.work.items() if not start <= layer < stop}
        return out

    def _buffer(self, layer: int) -> Buffer:
        """What a pass over all positions attends to under a mask: the past, and its own keys."""
        mask = self.mask(slice(0, self.length, 1), layer)
        return (
            Buffer((self.past[layer].key,), (self.past[layer].value,), 1, mask)
            if self.past
            else Buffer((), (), 0, mask)
        )

    def _open(self, layers: range) -> None:
        """Put earlier and own keys into one tensor a block, which passes write in place."""
        for layer in layers:
            if layer in self.work:
                continue
            if not self.past:
                self.work[layer] = KV(*(x.contiguous() for x in self.own[layer]))
            elif layer in self.own:
                self.work[layer] = KV(*(torch.cat(pair, dim=1) for pair in zip(self.past[layer], self.own[layer])))
            else:
                self.work[layer] = KV(*(F.pad(x, (0, 0, 0, 0, 0, self.length)) for x in self.past[layer]))

    def _store(self, layer: int, where: slice, keep: Tensor | None) -> KVStore:
        work, earlier = self.work[layer], self.earlier(layer)
        if self.kernels:
            return Strided(*work, earlier + where.start, where.step, keep)
        mask = self.mask(where, layer)
        if self.compiled:
            return Cache(*work, earlier + self.places[where], mask)
        return Strided(*work, earlier + where.start, where.step, keep, mask)

    def mask(self, where: slice, layer: int) -> Tensor:
        """Which of the M earlier slots and of the stretch's own positions each query sees: (1 or B, 1, p, M + P)."""
        earlier, window = self.earlier(layer), self.model.blocks[layer].window
        name = (where.start, where.stop, where.step, earlier, window)
        if name in self._masks:
            return self._masks[name]
        queries = self.places[where]
        if self.straight and self.document_starts is None:
            mask = causal_mask(
                earlier + queries, torch.arange(earlier + self.length, device=queries.device), window=window
            )
        else:
            mask = ragged_mask(
                self.places, where, earlier=earlier, window=window, start=self.start, straight=self.straight,
                document_starts=self.document_starts,
            )  # fmt: skip
        if len(self._masks) >= MASKS:
            self._masks.clear()
        self._masks[name] = mask
        return mask

    def _residual(self, new: Tensor, old: Tensor, where: slice, keep: Tensor | None = None) -> Tensor:
        new, old = at_least_float32(new), at_least_float32(old)
        size = new.norm(dim=-1)
        change = torch.where(size > 0, (new - old).norm(dim=-1) / size, 0.0)
        real = self.places[where] < self.counts[:, None]
        return torch.where(real if keep is None else real & keep, change, 0.0).amax(1)

    # -------------------------------------------------------------- rows

    def _live(self, rows: list[int]) -> Span:
        """The working tensors of the rows that are still swept; the others stay as they are."""
        if self._part is None or self._part[0] != rows:
            self._put_back()
            if len(rows) == len(self.counts):
                return self
            self._part = (rows, self.select(rows))
        return self._part[1]

    def _put_back(self) -> None:
        if self._part is not None:
            self.put(*self._part)
            self._part = None

    def select(self, rows: Sequence[int]) -> Span:
        """The working tensors of some rows."""
        swept = range(self.entry, self.model.source)
        self._open(swept)
        index = torch.tensor(rows, device=self.counts.device)

        def pick(x: Any) -> Any:
            return x if x is None or x.shape[0] == 1 else x.index_select(0, index)

        part = object.__new__(Span)
        part.__dict__ = dict(self.__dict__)
        part._part, part._masks = None, {}
        for name in ("counts", "start", "hidden", "starts", "document_starts", "memory", "source_hidden"):
            setattr(part, name, pick(getattr(self, name)))
        part.contexts = tuple(type(c)(*map(pick, c)) for c in self.contexts)
        part.past = [KV(*map(pick, kv)) for kv in self.past]
        part.work = {layer: KV(*map(pick, self.work[layer])) for layer in swept}
        return part

    def put(self, rows: Sequence[int], part: Span) -> None:
        """Write what ``part``, the same rows selected, has worked out."""
        index = torch.tensor(rows, device=self.counts.device)
        assert self.memory is not None and part.memory is not None
        assert self.source_hidden is not None and part.source_hidden is not None
        self.memory[index], self.source_hidden[index] = part.memory, part.source_hidden
        for layer, fresh in part.work.items():
            self.work[layer].key[index], self.work[layer].value[index] = fresh

    # -------------------------------------------------------------- the end

    def settled(self, layer: int) -> KV:
        """Keys and values (B, P, G, K) of a block, as last computed."""
        if layer not in self.work:
            return self.own[layer]
        return KV(*(x[:, -self.length :] for x in self.work[layer]))

    def commit(self, state: DecodeState, real: Sequence[int], exact: Sequence[int]) -> None:
        """Let ``state`` consume the stretch: keys and values of every block, memory, lengths.

        Args:
            state: the one the stretch was made from; written in place.
            real: ``counts``, on the host.
            exact: leading positions of each row that are exact.
        """
        before, counts = state.lengths.clone(), self.counts
        last = before + counts - 1
        fits: dict[int, tuple[Tensor, Tensor]] = {}
        simple = self.start is None and min(real) == max(real)
        for layer, (key, value) in enumerate(zip(state.keys, state.values)):
            slots = key.shape[1]
            if layer in self.in_state:
                continue
            if simple and real[0] <= slots:
                for mine, theirs in zip((key, value), self.settled(layer)):
                    mine[:, : real[0]].copy_(theirs[:, : real[0]])
                continue
            if slots not in fits:
                index = slot_positions(last, slots) - before[:, None]
                fresh = (index >= 0) & (index < counts[:, None])
                fits[slots] = fresh[:, :, None, None], index.clamp(0, self.length - 1)[:, :, None, None]
            fresh, index = fits[slots]
            for mine, theirs in zip((key, value), self.settled(layer)):
                torch.where(fresh, theirs.gather(1, index.expand(-1, -1, *theirs.shape[2:])), mine, out=mine)
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
                state.kept[:, i] = torch.where(
                    inside, self.memory[rows, offset.clamp(0, self.length)], state.kept[:, i]
                )
        certain = before + torch.tensor(list(exact), device=counts.device)
        state.approximate_from.copy_(
            torch.where(
                certain < before + counts, torch.minimum(state.approximate_from, certain), state.approximate_from
            )
        )
        state.lengths.copy_(before + counts)


def _contiguous(context: Any) -> Any:
    return type(context)(*(x if x is None else x.contiguous() for x in context))
