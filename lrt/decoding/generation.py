"""Generation: ``generate`` and ``complete`` prompts, or ``start`` a session over them.

A prompt's last token is not prefilled: it is the first token that the rows consume, so every new token
comes out of the same step.

Legend: B batch, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrt.decoding import step as decoding
from lrt.decoding.prefill_contract import Prefill, Report
from lrt.decoding.prefix_cache import PrefixCache
from lrt.decoding.prompts import after, before_last
from lrt.decoding.request import Asked, Request
from lrt.decoding.sampling import Sampling, row_seeds
from lrt.decoding.session import Session
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes
from lrt.padding import align, check_prompt, on_device

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


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
    model: Decodes,
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
        model, prompt_ids, attention_mask, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids,
        pad_id=pad_id, generator=generator, prefill=prefill, state=state,
    ).ids  # fmt: skip


@torch.no_grad()
def start(
    model: Decodes,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    prefill: Prefill | None = None,
    prefix_cache: PrefixCache | None = None,
    keep_at: Sequence[int] = (),
    state: DecodeState | None = None,
    runner: decoding.Runner = decoding.graphed,
    **asked: Unpack[Asked],
) -> tuple[Session, Report | None]:
    """Prefill prompts and open a session over them, for streaming.

    Args:
        model, prompt_ids, attention_mask, generator, prefill: as in ``generate``.
        prefix_cache: where known beginnings are looked up and put (one row at a time).
        keep_at: see DecodeState.
        state: as in ``generate``; penalties and processors see only the tokens of ``prompt_ids``.
        runner: how steps run.
        asked: fields of a ``Request``: max_new_tokens, sampling, stop_ids, stop_when, pad_id, every.

    Returns:
        The session, and the prefill's report (None when every prompt is one token long).
    """
    request = Request(**asked)
    request.check(model.backbone.vocab_size)  # before the prefill is paid for
    if prefill is not None and not hasattr(prefill, "settle"):
        raise ValueError(
            f"prefill = {prefill!r}: use lrt.prefill.exact(), .refine(k), .fixed_point(groups), or leave it out"
        )
    device = next(model.parameters()).device
    tokens, lengths = align(*on_device(prompt_ids, attention_mask, device))
    counts = check_prompt(model, tokens, lengths)
    if state is None:
        state, report = before_last(
            model, tokens, counts, tokens.shape[1] + request.max_new_tokens, keep_at, prefill, prefix_cache, runner
        )
    else:
        if prefix_cache is not None or keep_at:
            raise ValueError("state goes on with its own keep_at and without prefix_cache: leave both out")
        state, report = after(model, state, tokens, counts, room=request.max_new_tokens, method=prefill, runner=runner)
    pending = tokens.gather(1, counts[:, None] - 1)[:, 0]
    seeds = row_seeds(len(tokens), generator, device)
    told = [row[:count] for row, count in zip(tokens, counts.tolist())]
    return Session(model, state, pending, request, history=told, seeds=seeds, runner=runner), report


def complete(
    model: Decodes,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    prefill: Prefill | None = None,
    prefix_cache: PrefixCache | None = None,
    keep_at: Sequence[int] = (),
    state: DecodeState | None = None,
    runner: decoding.Runner = decoding.graphed,
    **asked: Unpack[Asked],
) -> Generated:
    """Continue prompts and return everything there is to know; the arguments are those of ``start``."""
    session, report = start(
        model, prompt_ids, attention_mask, generator=generator, prefill=prefill, prefix_cache=prefix_cache,
        keep_at=keep_at, state=state, runner=runner, **asked,
    )  # fmt: skip
    logprobs: list[list[float]] = [[] for _ in session.rows]
    for burst in session:
        for row, new in enumerate(burst.logprobs):
            logprobs[row] += new
    width = max(map(len, session.rows))
    padded = [row + [session.pad_id] * (width - len(row)) for row in session.rows]
    more = torch.tensor(padded, dtype=prompt_ids.dtype, device=prompt_ids.device).view(len(padded), width)
    return Generated(torch.cat([prompt_ids, more], dim=1), session.rows, logprobs, report, session.state)
