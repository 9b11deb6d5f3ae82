"""One tensor for many blocks, with the gradients of all summed at once.

A tensor that every block reads (x_0, the memory and its shared projections) gets a gradient from every block. Autograd
adds them one by one: L - 1 additions that read two tensors and write one each. Here the sum is one kernel that reads
each gradient once, in float32, and rounds once. Likewise the gradients of a tensor that is split into subsets of
positions are put back into one by one kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lrt.types import at_least_float32


def add_up(parts: list[Tensor]) -> Tensor:
    """Sum of tensors of one shape, in float32 at least, in their dtype."""
    total = at_least_float32(parts[0])
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


@lru_cache(maxsize=1)
def _add_up_compiled() -> Callable[[list[Tensor]], Tensor]:
    return torch.compile(add_up, dynamic=False)  # not when this file is imported: the compiler takes a second to come


def interleave(parts: list[Tensor]) -> Tensor:
    """(B, n, ...) for each of S parts -> (B, S n, ...), part g at positions g, g + S, ..."""
    return torch.stack(parts, 2).flatten(1, 2)


@lru_cache(maxsize=1)
def _interleave_compiled() -> Callable[[list[Tensor]], Tensor]:
    return torch.compile(interleave, dynamic=False)


class _Fan(torch.autograd.Function):
    """Aliases of one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an alias that no block read adds nothing
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        parts = [grad for grad in grads if grad is not None]
        if len(parts) < 2:
            return (parts[0] if parts else None), None
        flat = [part.contiguous().view(-1) for part in parts]  # tensors of one size share a compiled kernel
        total = (_add_up_compiled() if flat[0].is_cuda else add_up)(flat)
        return total.view(parts[0].shape), None


class _Split(torch.autograd.Function):
    """Views of every S-th position; S divides the length."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, ...]:
        return x.unflatten(1, (-1, groups)).unbind(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat = [grad.flatten(2) for grad in grads]
        return (_interleave_compiled() if flat[0].is_cuda else interleave)(flat).view(grads[0].shape[0], -1, *grads[0].shape[2:]), None


def split(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Positions (dimension 1) by residue: entry g holds g, g + S, ...; views."""
    if x.shape[1] % groups:
        return tuple(x[:, g::groups] for g in range(groups))
    if groups > 1 and x.requires_grad and torch.is_grad_enabled() and x.ndim > 2:
        return _Split.apply(x, groups)
    return x.unflatten(1, (-1, groups)).unbind(2)


def fan_out(tuples: Sequence[Any]) -> list[Any]:
    """The same named tuples of tensors, with an alias of its own for each that receives a tensor of several.

    Args:
        tuples: one a block, or None; tensors that need no gradient, and small ones, stay as they are.
    """
    shared = Counter(id(x) for fields in tuples if fields is not None for x in fields if x is not None and _worth(x))
    aliases: dict[int, Any] = {}
    fanned: list[Any] = []
    for fields in tuples:
        if fields is None:
            fanned.append(None)
            continue
        mine = []
        for x in fields:
            if x is not None and shared[id(x)] > 1:
                if id(x) not in aliases:
                    aliases[id(x)] = iter(_Fan.apply(x, shared[id(x)]))
                x = next(aliases[id(x)])
            mine.append(x)
        fanned.append(type(fields)(*mine))
    return fanned


def _worth(x: Tensor) -> bool:
    return x.requires_grad and x.shape[1] > 1
