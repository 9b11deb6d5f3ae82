"""Log-probabilities of continuations, for tasks that compare them: a common context is decoded once,
its state forked per option.

Legend: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.decoding import prefill as prefills
from lrt.decoding.step import Runner, WithoutMemory, graphed
from lrt.model import LatentRecurrentModel
from lrt.outcome import by_group, in_order
from lrt.schedules import Interleaved, Refine, single


class Scored(NamedTuple):
    """A continuation under a model."""

    logprobs: tuple[float, ...]  # of its tokens
    greedy: bool  # every token is the most probable one


class ChoiceScorer:
    """Scores continuations of contexts in one memory mode.

    Args:
        model: in evaluation mode, on its device.
        memory: "decode" (true recurrence), "zero", or "parallel" (the training schedule over context and continuation).
        max_length: tokens that the model reads at most; longer contexts lose tokens on the left.
        rows: contexts and continuations that run at once.
        runner: how the steps of decoding run.

    Raises:
        ValueError: another mode, or one that the model lacks.
    """

    def __init__(
        self,
        model: LatentRecurrentModel,
        *,
        memory: str = "decode",
        max_length: int,
        rows: int = 16,
        runner: Runner = graphed,
    ) -> None:
        if memory not in ("decode", "zero", "parallel"):
            raise ValueError(f"memory = {memory!r}: use decode, zero or parallel")
        if memory == "parallel" and model.recurrence is None:
            raise ValueError(
                "memory = 'parallel', but the model has no memory: use zero, or decode, which is the same for it"
            )
        self._model, self._memory, self._max_length, self._rows, self._runner = model, memory, max_length, rows, runner
        self._decoder = WithoutMemory(model) if memory == "zero" else model

    def __call__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """Score continuations.

        Args:
            pairs: token ids of a context (at least one) and of its continuation (at least one).

        Raises:
            ValueError: an empty context or continuation, or a continuation longer than the model reads.
        """
        cut = [self._cut(tuple(context), tuple(continuation)) for context, continuation in pairs]
        found: dict[int, Scored] = {}
        if self._memory == "parallel":
            order = sorted(range(len(cut)), key=lambda i: len(cut[i][0]) + len(cut[i][1]))
            for first in range(0, len(order), self._rows):
                chosen = order[first : first + self._rows]
                found.update(zip(chosen, self._in_parallel([cut[i] for i in chosen])))
            return [found[i] for i in range(len(cut))]
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(cut):
            by_context.setdefault(context, []).append(index)
        contexts = sorted(by_context, key=len)
        for first in range(0, len(contexts), self._rows):
            some = contexts[first : first + self._rows]
            options = [[cut[i][1] for i in by_context[context]] for context in some]
            for context, scored in zip(some, self._by_decoding(some, options)):
                found.update(zip(by_context[context], scored))
        return [found[i] for i in range(len(cut))]

    def _cut(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not context or not continuation:
            raise ValueError(
                "an empty context or continuation: begin a context with the separator (BOS), and give a token to score"
            )
        room = self._max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than the model reads "
                f"({self._max_length}): cut it"
            )
        return context[-room:], continuation

    @torch.no_grad()
    def _by_decoding(
        self, contexts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Scored]]:
        """Decode every context once, and every option from a fork of its state."""
        longest = max(len(option) for some in options for option in some)
        tokens, lengths = self._padded(contexts)
        capacity = tokens.shape[1] + longest
        done = prefills.run(self._decoder, tokens, lengths=lengths, capacity=capacity, runner=self._runner)
        flat = [(row, option) for row, some in enumerate(options) for option in some]
        scored: list[Scored] = []
        for first in range(0, len(flat), self._rows):
            part = flat[first : first + self._rows]
            owners = torch.tensor([row for row, _ in part], device=tokens.device)
            hidden = done.hidden.index_select(0, owners)[:, None]
            given = [option[:-1] for _, option in part]
            if max(map(len, given)):
                # A row with nothing to read reads one token, and what it says is not looked at.
                more, counts = self._padded([option or (0,) for option in given])
                after = prefills.run(
                    self._decoder,
                    more,
                    lengths=counts,
                    state=done.state.select(owners),
                    everywhere=True,
                    runner=self._runner,
                )
                hidden = torch.cat([hidden, after.hidden], dim=1)
            scored += self._read(hidden, [option for _, option in part])
        results = iter(scored)
        return [[next(results) for _ in some] for some in options]

    @torch.no_grad()
    def _in_parallel(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        tokens, _ = self._padded([(*context, *continuation[:-1]) for context, continuation in pairs])
        schedule = single(self._model.train_schedule)
        if isinstance(schedule, (Interleaved, Refine)):
            # a group of weight 0 would not be computed to the end
            schedule = type(schedule)(**{**vars(schedule), "weights": "paper"})
        groups = by_group(self._model.run(tokens, schedule), len(schedule.group_weights(tokens.shape[1])))
        whole = in_order(*groups[-1])
        width = max(len(continuation) for _, continuation in pairs)
        starts = torch.tensor([len(context) - 1 for context, _ in pairs], device=tokens.device)
        index = (starts[:, None] + torch.arange(width, device=tokens.device)).clamp_max(whole.shape[1] - 1)
        hidden = whole.gather(1, index[..., None].expand(-1, -1, whole.shape[-1]))
        return self._read(hidden, [continuation for _, continuation in pairs])

    def _read(self, hidden: Tensor, continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """What the outputs (B, T, D) before each token say of the tokens."""
        goals, lengths = self._padded(continuations)
        logits = self._model.backbone.logits(hidden[:, : goals.shape[1]]).float()
        logprobs = logits.log_softmax(-1).gather(2, goals[..., None])[..., 0].tolist()
        greedy = (logits.argmax(-1) == goals).tolist()
        return [Scored(tuple(p[:n]), all(g[:n])) for p, g, n in zip(logprobs, greedy, lengths.tolist())]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        device = next(self._model.parameters()).device
        width = max(map(len, rows))
        return (
            torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device),
            torch.tensor([len(row) for row in rows], device=device),
        )
