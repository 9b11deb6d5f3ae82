"""Generation: ``generate`` and ``complete`` prompts, or ``start`` a session over them.

A prompt's last token is not prefilled: it is the first token that the rows consume, so every new token
comes out of the same step.

Legend: B batch, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrt.decoding import step as decoding
from lrt.decoding.prefill_contract import Prefill, Report
from lrt.decoding.prefix_cache import PrefixCache
from lrt.decoding.prompts import after, before_last
from lrt.decoding.sampling import Sampling, check_stops, row_seeds
from lrt.decoding.session import Session
from lrt.decoding.state import DecodeState
from lrt.padding import align, check_prompt, on_device


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
        generator: draws one seed per row; the same generator state gives the same tokens.
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
        raise ValueError(
            f"prefill = {prefill!r}: use lrt.prefill.exact(), .refine(k), .fixed_point(groups), or leave it out"
        )
    device = next(model.parameters()).device
    settings.get("sampling", Sampling()).check(model.backbone.vocab_size)  # before the prefill is paid for
    check_stops(settings.get("stop_ids", ()), settings.get("pad_id", 0), model.backbone.vocab_size)
    tokens, lengths = align(*on_device(prompt_ids, attention_mask, device))
    counts = check_prompt(model, tokens, lengths)
    if state is None:
        state, report = before_last(
            model, tokens, counts, tokens.shape[1] + max_new_tokens, keep_at, prefill, prefix_cache, runner
        )
    else:
        if prefix_cache is not None or keep_at:
            raise ValueError("state goes on with its own keep_at and without prefix_cache: leave both out")
        state, report = after(model, state, tokens, counts, room=max_new_tokens, method=prefill, runner=runner)
    pending = tokens.gather(1, counts[:, None] - 1)[:, 0]
    seeds = row_seeds(len(tokens), generator, device)
    told = [row[:count] for row, count in zip(tokens, counts.tolist())]
    return Session(
        model, state, pending, max_new_tokens=max_new_tokens, history=told, seeds=seeds, runner=runner, **settings
    ), report


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
