"""From logits to the next token: penalties, filters, and noise that depends on the row alone.

A draw is decided by the row's seed and the token's position in its row, through a counter-based hash.
So a row gets the same tokens alone or in a batch, streamed or not, compiled or not, and whatever its
neighbours do, and a CUDA graph needs no generator.

Legend: B batch, V vocabulary, N tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

# (logits (B, V), history (B, N) token ids, lengths (B,) of the history) -> logits (B, V)
# temperatures: below, float32 cannot tell a draw from the best token; above, from an even draw
COLDEST, HOTTEST = 1e-8, 1e30
LogitProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy, and so is what is too small for two different logits to differ less than it (below
            1e-8).
        top_k: keep the k most probable tokens.
        top_p: keep the fewest tokens whose probability is at least p.
        min_p: keep tokens at least this fraction as probable as the best one.
        repetition_penalty: above 1 makes tokens of prompt and continuation less likely (arXiv 1909.05858, section 4.1).
        processors: functions on the logits, applied first; tensor code without host syncs.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    processors: tuple[LogitProcessor, ...] = ()

    def check(self, vocab_size: int) -> None:
        """Raises ValueError, with every mistake, for a vocabulary of ``vocab_size`` tokens."""
        errors = []
        if not (_is_number(self.temperature) and 0 <= self.temperature < float("inf")):
            errors.append(f"temperature = {self.temperature!r}: use 0 (greedy) or more")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        if self.top_k is not None and not (whole and 1 <= self.top_k <= vocab_size):
            errors.append(f"top_k = {self.top_k!r}: use 1..{vocab_size}, the size of the vocabulary, or leave it out")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                errors.append(f"{name} = {value!r}: use a number above 0 and at most 1, or leave it out")
        if not (_is_number(self.repetition_penalty) and 0 < self.repetition_penalty < float("inf")):
            errors.append(f"repetition_penalty = {self.repetition_penalty!r}: use a number above 0; 1 = none")
        if errors:
            raise ValueError("; ".join(errors))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def row_seeds(rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """One seed per row (B,) int64, drawn one after the other from ``generator``; None = torch's default one."""
    where = torch.device("cpu") if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator, device=where, dtype=torch.int64).to(device)


def choose(
    logits: Tensor, sampling: Sampling, *, seeds: Tensor, history: Tensor | None, lengths: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The next token of every row.

    Args:
        logits: (B, V) in float32 at least.
        sampling: how.
        seeds: (B,) from ``row_seeds``.
        history: (B, N) token ids of each row, for the processors; None without any.
        lengths: (B,) tokens of each row so far, which is the position of the draw.
        seen: bool (B, V) tokens that occurred; None without a repetition penalty.

    Returns:
        Tokens (B,) and their log-probability (B,) under the model's own, unchanged distribution. The token is -1 where
        there is none to choose: scores hold NaN, or all are -inf.

    Raises:
        ValueError: a processor gave scores of another shape.
    """
    scores = logits
    for processor in sampling.processors:
        assert history is not None
        scores = processor(scores, history, lengths)
        if scores.shape != logits.shape:
            raise ValueError(
                f"a processor of sampling.processors gave logits of shape {tuple(scores.shape)}, "
                f"but took {tuple(logits.shape)}: it must change numbers alone"
            )
    if seen is not None:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    there = scores.amax(-1) > float("-inf")  # not so for NaN either
    if sampling.temperature > COLDEST:
        scores = keep_probable(scores / min(sampling.temperature, HOTTEST), sampling)
        scores = scores - exponential_noise(seeds, lengths, scores.shape[-1]).log()
    token = torch.where(there, scores.argmax(-1), -1)
    logprob = logits.gather(1, token.clamp_min(0)[:, None])[:, 0] - logits.logsumexp(-1)
    return token, logprob


def keep_probable(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores (B, V) with those that top_k, top_p and min_p leave out at -inf, in this order."""
    if sampling.top_k is not None:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p is not None:
        order = scores.sort(dim=-1, descending=True)
        probability = order.values.softmax(-1)
        # A token stays while those before it do not reach p; the first always does.
        out = (probability.cumsum(-1) - probability) >= sampling.top_p
        scores = scores.masked_fill(out.scatter(-1, order.indices, out), float("-inf"))
    if sampling.min_p is not None:
        probability = scores.softmax(-1)
        scores = scores.masked_fill(probability < sampling.min_p * probability.amax(-1, keepdim=True), float("-inf"))
    return scores


def exponential_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Exponential variates (B, V) in float32, a function of seed, position and token.

    argmax(log p - log e) is a draw from p (the exponential race). The hash is the finalizer of splitmix64.
    """
    tokens = torch.arange(vocab_size, device=seeds.device)
    x = _mix(seeds + _GOLDEN * (positions + 1))[:, None] + _GOLDEN * (tokens + 1)
    # 47 bits as float32 are dense near 0, where rare tokens are decided.
    uniform = _shift(_mix(x), 17).to(torch.float32) * 2.0**-47
    return -torch.log1p(-uniform.clamp(2.0**-48, 1 - 2.0**-24))


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def check_stops(stop_ids: Sequence[int], pad_id: int, vocab_size: int) -> tuple[int, ...]:
    """Raises ValueError for stop or pad tokens that are no token ids, or outside the vocabulary."""
    if (
        not isinstance(stop_ids, Iterable)
        or isinstance(stop_ids, str)
        or not all(_is_id(t) for t in (*stop_ids, pad_id))
    ):
        raise ValueError(
            f"stop_ids = {stop_ids!r}, pad_id = {pad_id!r}: use a list of token ids such as [2], and one token id"
        )
    wrong = [t for t in (*stop_ids, pad_id) if not 0 <= int(t) < vocab_size]
    if wrong:
        raise ValueError(
            f"stop_ids = {list(stop_ids)}, pad_id = {pad_id}: {wrong} not in the vocabulary of {vocab_size} "
            f"tokens (0..{vocab_size - 1})"
        )
    return tuple(int(t) for t in stop_ids)


def _is_id(value: object) -> bool:
    """An int, or what stands for one: of numpy, or a tensor of one number."""
    return hasattr(value, "__index__") and not isinstance(value, bool)
