"""By what a norm multiplies a normed channel: its weight, or one plus its weight, found by what it computes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lrt.families.description import Foreign

WITHIN = 0.05  # of the numbers that a norm in half precision gives


@torch.no_grad()
def weight_offset(norm: Foreign) -> float | None:
    """What a norm adds to its weight before it multiplies: 0 (Llama), or 1 (Gemma).

    Args:
        norm: a module with a weight (D,).

    Returns:
        None where it multiplies by something else.
    """
    if norm.weight.ndim != 1:
        return None
    home = norm.weight.device
    with torch.device("cpu" if home.type == "meta" else home):
        norm = _on_cpu(norm) if home.type == "meta" else norm
        signs = torch.ones_like(norm.weight)
        signs[1::2] = -1  # mean zero: a LayerNorm subtracts nothing
        signs[-1] = 0 if len(signs) % 2 else signs[-1]
        by = (norm(signs[None]) - norm(-signs[None]))[0] / 2 * signs
    inside = signs != 0
    seen, known = by[inside].double() * signs.square().mean().double().sqrt(), norm.weight[inside].double()
    errors = {offset: float((seen - known - offset).abs().max()) for offset in (0.0, 1.0)}
    found = min(errors, key=lambda offset: errors[offset])
    return found if errors[found] <= WITHIN * (1.0 + float(known.abs().max())) else None


def _on_cpu(norm: nn.Module) -> nn.Module:
    """A norm of the same kind with numbers in it."""
    made = copy.deepcopy(norm).to_empty(device="cpu")
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.copy_(torch.linspace(0.25, 0.75, tensor.numel()).view(tensor.shape))
    return made


def multiplied(x: Tensor, norm: Foreign, offset: float) -> Tensor:
    """``x`` (B, P, D) times what the norm multiplies by."""
    weight = norm.weight.to(x.dtype)
    return x * (weight + offset) if offset else x * weight
