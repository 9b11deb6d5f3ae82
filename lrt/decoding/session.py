"""Rows that decode together. The host looks at them once in ``every`` steps.

Legend: B batch, T prompt tokens, V vocabulary, N tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.decoding import step as decoding
from lrt.decoding.lengths import up_to_the_border
from lrt.decoding.prefill_contract import Prefill, Report
from lrt.decoding.prefix_cache import PrefixCache
from lrt.decoding.prompts import before_last
from lrt.decoding.request import Request, StopWhen
from lrt.decoding.sampling import choose, row_seeds
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes
from lrt.padding import check_prompt


class Burst(NamedTuple):
    """What the rows emitted in some steps, on the host."""

    tokens: list[list[int]]  # new token ids of each row, in order
    logprobs: list[list[float]]  # under the model's own distribution
    active: list[bool]  # rows that go on


class Session:
    """Rows that decode together over one static state; iterate for bursts until every row has ended.

    Args:
        model: a RecurrentDecoder.
        state: has consumed each row's prompt but the last token; written in place.
        pending: (B,) the last token of each prompt.
        request: what is asked of every row.
        history: the tokens of each row that penalties and processors see, the pending one last; None = only that one.
        seeds: (B,) from ``row_seeds``.
        runner: how the step runs: ``decoding.eager``, ``decoding.graphed``.
    """

    def __init__(
        self,
        model: Decodes,
        state: DecodeState,
        pending: Tensor,
        request: Request,
        *,
        history: Sequence[Tensor] | None = None,
        seeds: Tensor | None = None,
        runner: decoding.Runner = decoding.graphed,
    ) -> None:
        vocabulary = model.backbone.vocab_size
        stops = request.check(vocabulary)
        device, batch, sampling, every = state.lengths.device, state.batch, request.sampling, request.every
        self.model, self.state, self.request, self.every, self.pad_id = model, state, request, every, request.pad_id
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device)
        self.pending = pending.to(device=device, dtype=torch.int64).clone()
        self.seeds = (row_seeds(batch, None, device) if seeds is None else seeds.to(device)).clone()
        self.remaining = torch.full((batch,), request.max_new_tokens, dtype=torch.int64, device=device)
        self.active = self.remaining > 0
        self.history = (
            torch.full((batch, state.capacity + 2), request.pad_id, dtype=torch.int64, device=device)
            if sampling.processors
            else None
        )
        self.seen = (
            torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
            if sampling.repetition_penalty != 1
            else None
        )
        self.new_tokens = torch.zeros(batch, every, dtype=torch.int64, device=device)
        self.new_logprobs = torch.zeros(batch, every, dtype=torch.float32, device=device)
        self.emitted = torch.zeros(batch, every, dtype=torch.bool, device=device)
        self.lost = torch.zeros(batch, dtype=torch.bool, device=device)  # rows for which no token could be chosen
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows: list[list[int]] = [[] for _ in range(batch)]  # new tokens so far, on the host
        self.live = self.active.tolist()
        self.prompts: list[list[int]] = [[] for _ in range(batch)]  # on the host, where they may have to be read again
        for row in range(batch):
            self._remember(row, None if history is None else history[row])
        self._runner = runner
        self._emit = decoding.stepper_of(model).quick(self._choose)
        self._run: decoding.Action | None = None

    # -------------------------------------------------------------- the step

    def _step(self) -> None:
        logits = decoding.decode_one_token(self.model, self.state, self.pending, self.active)
        self._emit(logits, self.state.lengths)

    def _choose(self, logits: Tensor, lengths: Tensor) -> None:
        token, logprob = choose(
            logits, self.request.sampling, seeds=self.seeds, history=self.history, lengths=lengths, seen=self.seen
        )
        self.lost.logical_or_(self.active & (token < 0))
        self.active.logical_and_(token >= 0)
        token = torch.where(self.active, token, self.pad_id)
        self.new_tokens.index_copy_(1, self.column, token[:, None])
        self.new_logprobs.index_copy_(1, self.column, logprob.to(torch.float32)[:, None])
        self.emitted.index_copy_(1, self.column, self.active[:, None])
        if self.history is not None:
            old = self.history.gather(1, lengths[:, None])
            self.history.scatter_(1, lengths[:, None], torch.where(self.active[:, None], token[:, None], old))
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], self.active[:, None] | self.seen.gather(1, token[:, None]))
        self.remaining.sub_(self.active.to(torch.int64))
        stopped = (token[:, None] == self.stops).any(1)
        self.pending.copy_(torch.where(self.active, token, self.pending))
        self.active.logical_and_(~stopped & (self.remaining > 0))
        self.column.copy_((self.column + 1).remainder(self.every))

    @torch.no_grad()
    def advance(self, steps: int | None = None) -> Burst:
        """Run ``steps`` (at most ``every``; None = that many, fewer where a row's room ends)
        and look at what the rows emitted.

        Raises:
            ValueError: a row goes on and has no room left in the state, or no token could be chosen for a row.
        """
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"advance({steps!r}): use a whole number of 1 or more steps, or leave it out")
        steps = self._fitting(self.every if steps is None else min(steps, self.every))
        steps = up_to_the_border(self.model, self.state, self.prompts, self.rows, self.live, steps=steps)
        self._decode(steps)
        burst = self._emitted(steps)
        self._end(burst)
        self.live = burst.active
        return burst

    def _decode(self, steps: int) -> None:
        """Run the step so often; a graph of it is captured at the first call."""
        if self._run is None:
            self._run = self._runner(self._step, self.active)
        self.column.zero_()
        for _ in range(steps):
            self._run()

    def _emitted(self, steps: int) -> Burst:
        """What the rows emitted in the last ``steps``, on the host."""
        if bool(self.lost.any()):
            rows = self.lost.nonzero()[:, 0].tolist()
            raise ValueError(
                f"no token can be chosen for rows {rows}: their logits are NaN or all -inf; "
                "look at the model's weights and at sampling.processors"
            )
        emitted, tokens, logprobs = (x[:, :steps].tolist() for x in (self.emitted, self.new_tokens, self.new_logprobs))
        return Burst(
            [[t for t, e in zip(row, on) if e] for row, on in zip(tokens, emitted)],
            [[p for p, e in zip(row, on) if e] for row, on in zip(logprobs, emitted)],
            self.active.tolist(),
        )

    def _end(self, burst: Burst) -> None:
        """Remember the tokens of a burst, and end the rows that ``stop_when`` ends; what comes after is taken out."""
        stop_when = self.request.stop_when
        for row, new in enumerate(burst.tokens):
            before = len(self.rows[row])
            self.rows[row] += new
            keep = stop_when(self.rows[row]) if stop_when is not None and new else None
            if keep is not None:
                del self.rows[row][keep:], new[max(0, keep - before) :], burst.logprobs[row][max(0, keep - before) :]
                burst.active[row] = False
                self.active[row] = False

    def _fitting(self, steps: int) -> int:
        """So many steps, or as few as every row that goes on can take; one host sync."""
        active, left, lengths = torch.stack([self.active.long(), self.remaining, self.state.lengths]).tolist()
        for row, on in enumerate(active):
            room = self.state.capacity - lengths[row]
            if on and room < 1:
                raise ValueError(
                    f"row {row} has {lengths[row]} tokens, and {left[row]} more do not fit a state of capacity "
                    f"{self.state.capacity}: "
                    f"end it with retire({row}), and the others go on, or make the state with a larger capacity"
                )
            if on and left[row] > room:
                steps = min(steps, room)
        return max(1, min(steps, max((n for n, on in zip(left, active) if on), default=1)))

    def __iter__(self) -> Iterator[Burst]:
        while any(self.live):
            yield self.advance()

    # -------------------------------------------------------------- rows come and go

    def retire(self, row: int) -> None:
        """End a row; others go on.

        Raises:
            ValueError: there is no such row.
        """
        self._check_row(row)
        self.active[row] = False
        self.live[row] = False

    @torch.no_grad()
    def replace(
        self, row: int, prompt: Sequence[int], *, max_new_tokens: int, seed: int | None = None,
        prefill: Prefill | None = None, prefix_cache: PrefixCache | None = None,
    ) -> Report | None:  # fmt: skip
        """Put a new prompt in the place of a row, while the others stay as they are.

        Args:
            row: which.
            prompt: token ids, at least one.
            max_new_tokens: of this row.
            seed: of this row's draws; None = drawn from torch's default generator.
            prefill: None = exact.
            prefix_cache: where known beginnings are looked up, and this one is put.

        Returns:
            The prefill's report, or None when nothing was prefilled.

        Raises:
            ValueError: there is no such row, or the prompt does not fit.
        """
        self._check_row(row)
        tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=self.state.lengths.device)
        counts = check_prompt(self.model, tokens, None)
        if len(prompt) - 1 + max_new_tokens > self.state.capacity:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit the session's "
                f"capacity {self.state.capacity}: make the session's state with a larger capacity"
            )
        state, report = before_last(
            self.model, tokens, counts, self.state.capacity, self.state.kept_at, prefill, prefix_cache, decoding.eager
        )
        self.state.put([row], state)
        self.pending[row] = tokens[0, -1]
        self.seeds[row] = row_seeds(1, None, self.seeds.device)[0] if seed is None else seed
        self.lost[row] = False
        self.remaining[row] = max_new_tokens
        self.active[row] = max_new_tokens > 0
        self.live[row] = max_new_tokens > 0
        self.rows[row] = []
        self._remember(row, tokens[0])
        return report

    def _check_row(self, row: int) -> None:
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < self.state.batch:
            raise ValueError(f"row {row!r}: this session has rows 0..{self.state.batch - 1}")

    def _remember(self, row: int, prompt: Tensor | None) -> None:
        length = int(self.state.lengths[row]) + 1
        told = self.pending[row : row + 1] if prompt is None else prompt[:length]
        if self.state.reach is not None:
            self.prompts[row] = told.tolist()
        if self.history is not None:
            self.history[row] = self.pad_id
            self.history[row, length - len(told) : length] = told
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, told] = True


def stop_at(decode: Callable[[Sequence[int]], str], strings: Sequence[str]) -> StopWhen:
    """End a row where its text holds one of ``strings``; the tokens up to the string's end are kept.

    Args:
        decode: token ids to text.
        strings: none of them empty.
    """
    if not strings or not all(strings):
        raise ValueError(f"stop strings {list(strings)}: give at least one, and none empty")

    def stop(tokens: Sequence[int]) -> int | None:
        def held(count: int) -> bool:
            return any(string in decode(tokens[:count]) for string in strings)

        return next((n for n in range(1, len(tokens) + 1) if held(n)), None) if held(len(tokens)) else None

    return stop
