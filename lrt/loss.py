"""Chunked cross entropy, loss groups and their weights.

Legend: B batch, P positions, N = B P, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lrt.types import Saved, at_least_float32

IGNORE = -100


def capped_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32 at least: c tanh(h W^T / c), or plain where softcap is None. Shape (..., V)."""
    logits = at_least_float32(F.linear(hidden, weight))
    # tanh by way of the sigmoid: the same number to float32's accuracy, at a third of the instructions on a GPU.
    return logits if softcap is None else softcap * (2 * torch.sigmoid(logits * (2 / softcap)) - 1)


def _log_sum_exp(logits: Tensor, softcap: float | None) -> Tensor:
    if softcap is None or softcap > 40:
        return torch.logsumexp(logits, dim=-1)
    # a cap bounds the logits, so no maximum is needed: one reading less
    return torch.log(torch.exp(logits).sum(dim=-1))


def chunk_nats(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Nats (n,) of hidden (n, D) under the head's weight (V, D); 0 where the target (n,) is -100."""
    logits = capped_logits(hidden, weight, softcap)
    picked = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets == IGNORE, 0.0, _log_sum_exp(logits, softcap) - picked)


def chunk_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Nats (n,), and the gradients of their sum with respect to the hidden state (n, D) and the weight (V, D)."""
    logits = capped_logits(hidden, weight, softcap)
    lse = _log_sum_exp(logits, softcap)
    picked = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    nats = torch.where(targets == IGNORE, 0.0, lse - picked)
    columns = torch.arange(weight.shape[0], device=weight.device)
    grad = torch.exp(logits - lse[:, None]) - (columns[None, :] == targets[:, None]).to(logits.dtype)
    if softcap is not None:
        grad = grad * (1 - (logits / softcap).square())
    grad = torch.where((targets == IGNORE)[:, None], 0.0, grad).to(hidden.dtype)
    return nats, grad @ weight, grad.t() @ hidden


class Scorer(NamedTuple):
    """The two functions that a chunk of the loss needs; a trainer passes them compiled."""

    nats: Callable[..., Tensor] = chunk_nats
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = chunk_gradients


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of nats; gradients are made chunk by chunk in the forward, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        chunk: int,
        scorer: Scorer,
    ) -> tuple[Tensor, Tensor]:
        nats, grad_hidden = [], []
        grad_weight: Tensor | None = None
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            n, gh, gw = scorer.gradients(h, weight, t, softcap)
            nats.append(n)
            grad_hidden.append(gh)
            grad_weight = at_least_float32(gw) if grad_weight is None else grad_weight.add_(gw)
        assert grad_weight is not None
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight.to(weight.dtype))
        each = torch.cat(nats)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            (grad_hidden * grads[0]).to(grad_hidden.dtype),
            (grad_weight * grads[0]).to(grad_weight.dtype),
            None,
            None,
            None,
            None,
        )


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    chunk: int = 8192,
    scorer: Scorer = Scorer(),
) -> tuple[Tensor, Tensor]:
    """Cross entropy that never holds more than ``chunk`` x V logits.

    Args:
        hidden: (B, P, D), normed.
        weight: (V, D) of the head.
        targets: (B, P) token ids; -100 is ignored.
        softcap: c of c tanh(z / c); None = none.
        chunk: tokens whose logits are held at once; 0 = all.
        scorer: what computes one chunk.

    Returns:
        The sum of nats over valid targets (differentiable) and the nats of every position (B, P), detached.
    """
    flat, goals = hidden.flatten(0, 1), targets.flatten()
    size = chunk if chunk > 0 else max(1, flat.shape[0])
    if flat.shape[0] == 0:
        return flat.sum(), targets.new_zeros(targets.shape, dtype=torch.float32)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, each = _ChunkedCrossEntropy.apply(flat, weight, goals, softcap, size, scorer)
    else:
        each = torch.cat([scorer.nats(h, weight, t, softcap) for h, t in zip(flat.split(size), goals.split(size))])
        total = each.sum()
    return total, each.detach().view(targets.shape)


def group_losses(sums: Sequence[Tensor], valid: Tensor) -> list[Tensor]:
    """Mean nats a valid target of each group; 0 where there is no valid target."""
    return [total / valid.clamp_min(1).to(total.dtype) for total in sums]


def weighted_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum(w_i loss_i) / sum(w_i) over groups of weight above 0 (docs/method.md, section 2)."""
    scale = 1.0 / sum(weights)
    return torch.stack([loss * (w * scale) for loss, w in zip(losses, weights) if w > 0]).sum()
