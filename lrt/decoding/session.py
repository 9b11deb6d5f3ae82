"""Generation: rows that decode together, ``generate`` and ``complete``.

A prompt's last token is not prefilled: it is the first token that the rows consume, so every new token
comes out of the same step. The host looks at the rows once in ``every`` steps.

Legend: B batch, T prompt tokens, V vocabulary, N tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.decoding import prefill as prefills
from lrt.decoding import step as decoding
from lrt.decoding.lengths import lengthen, rotated_alike, up_to_the_border
from lrt.decoding.prefill import Prefill, Report
from lrt.decoding.prefix_cache import PrefixCache
from lrt.decoding.sampling import Sampling, check_stops, choose, row_seeds
from lrt.decoding.state import DecodeState
from lrt.padding import align, check_prompt, on_device

# New token ids of one row -> how many of them to keep when it must stop, None when it goes on.
StopWhen = Callable[[Sequence[int]], "int | None"]


class Burst(NamedTuple):
    """What the rows emitted in some steps, on the host."""

    tokens: list[list[int]]  # new token ids of each row, in order
    logprobs: list[list[float]]  # under the model's own distribution
    active: list[bool]  # rows that go on


@dataclass(frozen=True)
class Generated:
    """What ``complete`` returns.

    Attributes:
        ids: (B, T + new) prompt and continuation, padded after the end of a row.
        tokens: new token ids of each row, its stop token included.
        logprobs: log-probability of each of them under the model's own distribution.
        report: of the prefill; None when the prompts were one token long.
        state: what the rows remember; it has consumed everything but each row's last token.
    """

    ids: Tensor
    tokens: list[list[int]]
    logprobs: list[list[float]]
    report: Report | None
    state: DecodeState


class Session:
    """Rows that decode together over one static state; iterate for bursts until every row has ended.

    Args:
        model: a RecurrentDecoder.
        state: has consumed each row's prompt but the last token; written in place.
        pending: (B,) the last token of each prompt.
        max_new_tokens: of every row.
        history: the tokens of each row that penalties and processors see, the pending one last; None = only that one.
        sampling: how tokens are chosen.
        stop_ids: a row ends after one of these.
        stop_when: looks at a row's new tokens on the host, once in ``every`` steps.
        pad_id: what ended rows are fed.
        seeds: (B,) from ``row_seeds``.
        every: steps between two looks of the host.
        runner: how the step runs: ``decoding.eager``, ``decoding.graphed``.
    """

    def __init__(
        self,
        model: Any,
        state: DecodeState,
        pending: Tensor,
        *,
        max_new_tokens: int,
        history: Sequence[Tensor] | None = None,
        sampling: Sampling = Sampling(),
        stop_ids: Sequence[int] = (),
        stop_when: StopWhen | None = None,
        pad_id: int = 0,
        seeds: Tensor | None = None,
        every: int = 8,
        runner: decoding.Runner = decoding.graphed,
    ) -> None:
        vocabulary = model.backbone.vocab_size
        sampling.check(vocabulary)
        stops = check_stops(stop_ids, pad_id, vocabulary)
        if every < 1:
            raise ValueError(f"every = {every}: the host looks at the rows every 1 or more steps")
        device, batch = state.lengths.device, state.batch
        self.model, self.state, self.sampling, self.stop_when, self.pad_id, self.every = model, state, sampling, stop_when, pad_id, every
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device)
        self.pending = pending.to(device=device, dtype=torch.int64).clone()
        self.seeds = (row_seeds(batch, None, device) if seeds is None else seeds.to(device)).clone()
        self.remaining = torch.full((batch,), max_new_tokens, dtype=torch.int64, device=device)
        self.active = self.remaining > 0
        self.history = torch.full((batch, state.capacity + 2), pad_id, dtype=torch.int64, device=device) if sampling.processors else None
        self.seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device) if sampling.repetition_penalty != 1 else None
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
        self._emit = getattr(model, "compiled", _same)(self._choose)
        self._run: decoding.Action | None = None

    # -------------------------------------------------------------- the step

    def _step(self) -> None:
        logits = decoding.decode_one_token(self.model, self.state, self.pending, self.active)
        self._emit(logits, self.state.lengths)

    def _choose(self, logits: Tensor, lengths: Tensor) -> None:
        token, logprob = choose(logits, self.sampling, seeds=self.seeds, history=self.history, lengths=lengths, seen=self.seen)
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
        """Run ``steps`` (at most ``every``; None = that many, fewer where a row's room ends) and look at what the rows emitted.

        Raises:
            ValueError: a row goes on and has no room left in the state, or no token could be chosen for a row.
        """
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"advance({steps!r}): use a whole number of 1 or more steps, or leave it out")
        steps = self._fitting(self.every if steps is None else min(steps, self.every))
        steps = up_to_the_border(self.model, self.state, self.prompts, self.rows, self.live, steps=steps)
        if self._run is None:
            self._run = self._runner(self._step, self.active)
        self.column.zero_()
        for _ in range(steps):
            self._run()
        if bool(self.lost.any()):
            rows = self.lost.nonzero()[:, 0].tolist()
            raise ValueError(
                f"no token can be chosen for rows {rows}: their logits are NaN or all -inf; look at the model's weights and at sampling.processors"
            )
        emitted, tokens, logprobs = self.emitted[:, :steps].tolist(), self.new_tokens[:, :steps].tolist(), self.new_logprobs[:, :steps].tolist()
        burst = Burst(
            [[t for t, e in zip(row, on) if e] for row, on in zip(tokens, emitted)],
            [[p for p, e in zip(row, on) if e] for row, on in zip(logprobs, emitted)],
            self.active.tolist(),
        )
        for row, new in enumerate(burst.tokens):
            before = len(self.rows[row])
            self.rows[row] += new
            keep = self.stop_when(self.rows[row]) if self.stop_when is not None and new else None
            if keep is not None:
                del self.rows[row][keep:], new[max(0, keep - before) :], burst.logprobs[row][max(0, keep - before) :]
                burst.active[row] = False
                self.active[row] = False
        self.live = burst.active
        return burst

    def _fitting(self, steps: int) -> int:
        """So many steps, or as few as every row that goes on can take; one host sync."""
        active, left, lengths = torch.stack([self.active.long(), self.remaining, self.state.lengths]).tolist()
        for row, on in enumerate(active):
            room = self.state.capacity - lengths[row]
            if on and room < 1:
                raise ValueError(
                    f"row {row} has {lengths[row]} tokens, and {left[row]} more do not fit a state of capacity {self.state.capacity}: "
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
    def replace(self, row: int, prompt: Sequence[int], *, max_new_tokens: int, seed: int | None = None, prefill: Prefill | None = None,
                prefix_cache: PrefixCache | None = None) -> Report | None:  # fmt: skip
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
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit the session's capacity {self.state.capacity}: "
                "make the session's state with a larger capacity"
            )
        state, report = _before_last(self.model, tokens, counts, self.state.capacity, self.state.kept_at, prefill, prefix_cache, decoding.eager)
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


# ------------------------------------------------------------------ functions


def _same(function: Any) -> Any:
    return function


def generate(
    model: Any,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    generator: torch.Generator | None = None,
    prefill: Prefill | None = None,
    *,
    state: DecodeState | None = None,
) -> Tensor:
    """Continue prompts by true recurrence.

    Args:
        model: a LatentRecurrentModel, with or without recurrence.
        prompt_ids: (B, T) token ids.
        attention_mask: (B, T), 0 marks padding on the left or on the right.
        max_new_tokens: of every row.
        temperature: 0 is greedy.
        top_k, top_p: keep only the k most probable tokens; the fewest whose probability reaches p.
        stop_ids: a row ends after one of these, then comes ``pad_id``.
        pad_id: fills rows that have ended.
        generator: draws one seed a row; the same generator state gives the same tokens.
        prefill: ``lrt.prefill.exact()`` (None), ``.refine(k)`` or ``.fixed_point(...)``.
        state: what the rows have consumed before ``prompt_ids``; it stays as it is. None = nothing.

    Returns:
        (B, T + new) token ids, new <= max_new_tokens.

    Raises:
        ValueError: empty prompts, tokens out of range, settings out of range.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    return complete(
        model, prompt_ids, attention_mask, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids, pad_id=pad_id,
        generator=generator, prefill=prefill, state=state,
    ).ids  # fmt: skip


@torch.no_grad()
def start(
    model: Any,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    generator: torch.Generator | None = None,
    prefill: Prefill | None = None,
    prefix_cache: PrefixCache | None = None,
    keep_at: Sequence[int] = (),
    state: DecodeState | None = None,
    runner: decoding.Runner = decoding.graphed,
    **settings: Any,
) -> tuple[Session, Report | None]:
    """Prefill prompts and open a session over them, for streaming.

    Args:
        model, prompt_ids, attention_mask, max_new_tokens, generator, prefill: as in ``generate``.
        prefix_cache: where known beginnings are looked up and put (one row at a time).
        keep_at: see DecodeState.
        state: as in ``generate``; penalties and processors see only the tokens of ``prompt_ids``.
        runner: how steps run.
        settings: of the Session: sampling, stop_ids, stop_when, pad_id, every.

    Returns:
        The session, and the prefill's report (None when every prompt is one token long).
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens!r}: use a whole number of 0 or more")
    if prefill is not None and not hasattr(prefill, "settle"):
        raise ValueError(f"prefill = {prefill!r}: use lrt.prefill.exact(), .refine(k), .fixed_point(groups), or leave it out")
    device = next(model.parameters()).device
    settings.get("sampling", Sampling()).check(model.backbone.vocab_size)  # before the prefill is paid for
    check_stops(settings.get("stop_ids", ()), settings.get("pad_id", 0), model.backbone.vocab_size)
    tokens, lengths = align(*on_device(prompt_ids, attention_mask, device))
    counts = check_prompt(model, tokens, lengths)
    if state is None:
        state, report = _before_last(model, tokens, counts, tokens.shape[1] + max_new_tokens, keep_at, prefill, prefix_cache, runner)
    else:
        if prefix_cache is not None or keep_at:
            raise ValueError("state goes on with its own keep_at and without prefix_cache: leave both out")
        state, report = _after(model, state, tokens, counts, room=max_new_tokens, method=prefill, runner=runner)
    pending = tokens.gather(1, counts[:, None] - 1)[:, 0]
    seeds = row_seeds(len(tokens), generator, device)
    told = [row[:count] for row, count in zip(tokens, counts.tolist())]
    return Session(model, state, pending, max_new_tokens=max_new_tokens, history=told, seeds=seeds, runner=runner, **settings), report


def complete(model: Any, prompt_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Generated:
    """Continue prompts and return everything there is to know; the arguments are those of ``start``."""
    session, report = start(model, prompt_ids, attention_mask, **settings)
    logprobs: list[list[float]] = [[] for _ in session.rows]
    for burst in session:
        for row, new in enumerate(burst.logprobs):
            logprobs[row] += new
    width = max(map(len, session.rows))
    padded = [row + [session.pad_id] * (width - len(row)) for row in session.rows]
    more = torch.tensor(padded, dtype=prompt_ids.dtype, device=prompt_ids.device).view(len(padded), width)
    return Generated(torch.cat([prompt_ids, more], dim=1), session.rows, logprobs, report, session.state)


def _after(
    model: Any, before: DecodeState, tokens: Tensor, counts: Tensor, *, room: int, method: Prefill | None, runner: decoding.Runner
) -> tuple[DecodeState, Report | None]:
    """A state that has consumed what ``before`` has and every prompt but its last token."""
    before.check_model(model)
    if before.batch != len(tokens):
        raise ValueError(
            f"the state has {before.batch} rows, but the prompt {len(tokens)}: give a row for each, or state.fork(n) and state.select(rows)"
        )
    capacity = int(before.lengths.max()) + tokens.shape[1] + room
    state = DecodeState.empty(model, batch=before.batch, capacity=max(capacity, *before.kept_at, 1), keep_at=before.kept_at)
    state.put(range(before.batch), before)
    lengthen(model, state, state.lengths + counts)
    if tokens.shape[1] == 1 or int(counts.max()) == 1:
        return state, None
    done = prefills.consume(model, state, tokens[:, :-1], counts - 1, method=prefills.exact() if method is None else method, runner=runner)
    return done.state, done.report


def _before_last(
    model: Any, tokens: Tensor, counts: Tensor, capacity: int, keep_at: Sequence[int], prefill: Prefill | None,
    prefix_cache: PrefixCache | None, runner: decoding.Runner,
) -> tuple[DecodeState, Report | None]:  # fmt: skip
    """A state that has consumed every prompt but its last token."""
    method = prefills.exact() if prefill is None else prefill
    if prefix_cache is None or len(tokens) > 1:
        state = DecodeState.empty(model, batch=len(tokens), capacity=capacity, keep_at=keep_at)
        lengthen(model, state, counts)
        if tokens.shape[1] == 1 or int(counts.max()) == 1:
            return state, None
        done = prefills.consume(model, state, tokens[:, :-1], counts - 1, method=method, runner=runner)
        return done.state, done.report
    known, prompt = 0, tokens[0].tolist()
    state = DecodeState.empty(model, batch=1, capacity=capacity, keep_at=keep_at)
    lengthen(model, state, counts)
    found = prefix_cache.find(prompt[:-1], model=model, method=method, keep_at=state.kept_at)
    if found is not None and rotated_alike(model, found, state):
        state.put([0], found)
        known = int(found.lengths[0])
    if known == len(prompt) - 1:
        return state, None
    done = prefills.consume(model, state, tokens[:, known:-1], counts - 1 - known, method=method, runner=runner)
    prefix_cache.put(prompt[:-1], done.state, method=method)
    return done.state, done.report
