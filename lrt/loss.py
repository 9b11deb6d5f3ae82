"""Chunked cross entropy, loss groups and their weights.

Legend: B batch, P positions, N = B P, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.types import at_least_float32

IGNORE = -100


def capped_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32 at least: c tanh(h W^T / c), or plain where softcap is None. Shape (..., V)."""
    logits = at_least_float32(F.linear(hidden, weight))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _chunk_nats(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Nats (n,) of one chunk, its capped logits (n, V) and their log-sum-exp (n,)."""
    logits = capped_logits(hidden, weight, softcap)
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets == IGNORE, 0.0, lse - picked), logits, lse


def _chunk_grads(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Nats (n,), and the gradients of their sum with respect to hidden (n, D) and weight (V, D)."""
    nats, logits, lse = _chunk_nats(hidden, weight, targets, softcap)
    grad = torch.exp(logits - lse[:, None])
    columns = torch.arange(weight.shape[0], device=weight.device)
    grad = grad - (columns[None, :] == targets[:, None]).to(grad.dtype)
    if softcap is not None:
        grad = grad * (1 - (logits / softcap).square())
    grad = torch.where((targets == IGNORE)[:, None], 0.0, grad).to(hidden.dtype)
    return nats, grad @ weight, grad.t() @ hidden


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of nats; gradients are made chunk by chunk in the forward, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk: int) -> tuple[Tensor, Tensor]:
        nats, grad_hidden = [], []
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            n, gh, gw = _chunk_grads(h, weight, t, softcap)
            nats.append(n)
            grad_hidden.append(gh)
            grad_weight += gw
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight.to(weight.dtype))
        each = torch.cat(nats)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * grads[0]).to(grad_hidden.dtype), (grad_weight * grads[0]).to(grad_weight.dtype), None, None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float | None = None, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Cross entropy that never holds more than ``chunk`` x V logits.

    Args:
        hidden: (B, P, D), normed.
        weight: (V, D) of the head.
        targets: (B, P) token ids; -100 is ignored.
        softcap: c of c tanh(z / c); None = none.
        chunk: tokens whose logits are held at once; 0 = all.

    Returns:
        The sum of nats over valid targets (differentiable) and the nats of every position (B, P), detached.
    """
    flat, goals = hidden.flatten(0, 1), targets.flatten()
    size = chunk if chunk > 0 else max(1, flat.shape[0])
    if flat.shape[0] == 0:
        return flat.sum(), targets.new_zeros(targets.shape, dtype=torch.float32)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, each = _ChunkedCrossEntropy.apply(flat, weight, goals, softcap, size)
    else:
        each = torch.cat([_chunk_nats(h, weight, t, softcap)[0] for h, t in zip(flat.split(size), goals.split(size))])
        total = each.sum()
    return total, each.detach().view(targets.shape)


def group_losses(sums: Sequence[Tensor], valid: Tensor) -> list[Tensor]:
    """Mean nats a valid target of each group; 0 where there is no valid target."""
    return [total / valid.clamp_min(1).to(total.dtype) for total in sums]


def weighted_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum(w_i loss_i) / sum(w_i) over groups of weight above 0 (spec section 2)."""
    scale = 1.0 / sum(weights)
    return torch.stack([loss * (w * scale) for loss, w in zip(losses, weights) if w > 0]).sum()
