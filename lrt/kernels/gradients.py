"""One tensor for many blocks, with the gradients of all summed at once.

A tensor that every block reads (x_0, the memory and its shared projections) gets a gradient from every block. Autograd
adds them one by one: L - 1 additions that read two tensors and write one each. Here the sum is one kernel that reads
each gradient once, in float32, and rounds once. Likewise the gradients of a tensor that is split into subsets of
positions are put back into one by one kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lrt.types import Handed, at_least_float32

# a named tuple of tensors, or None: nothing
T = TypeVar("T", bound="tuple[object, ...] | None")


def add_up(parts: list[Tensor]) -> Tensor:
    """Sum of tensors of one shape, in float32 at least, in their dtype."""
    total = at_least_float32(parts[0])
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


@lru_cache(maxsize=1)
def _add_up_compiled() -> Callable[[list[Tensor]], Tensor]:
    return torch.compile(add_up, dynamic=False)  # not when this file is imported: the compiler takes a second to come


def interleave(whole: Tensor | None, parts: list[Tensor | None], length: int) -> Tensor:
    """``whole`` (B, S n, ...) plus each of S parts (B, up to n, ...) at the positions g, g + S, ...;
    None is zero, but not every part is.

    Args:
        length: n; what a part lacks at its end is zero.
    """
    given = next(part for part in parts if part is not None)
    missing = given.new_zeros(1, 1, 1).expand(given.shape[0], length, given.shape[2])
    long = [missing if part is None else F.pad(part, (0, 0, 0, length - part.shape[1])) for part in parts]
    together = torch.stack(long, 2).flatten(1, 2)
    return together if whole is None else (at_least_float32(together) + whole).to(together.dtype)


@lru_cache(maxsize=1)
def _interleave_compiled() -> Callable[..., Tensor]:
    return torch.compile(interleave, dynamic=False)


class Share(Protocol):
    """Gives the tuples of tensors that blocks read to each block."""

    def __call__(self, tuples: Sequence[T], /) -> Sequence[T]: ...


class _Fan(torch.autograd.Function):
    """Aliases of one tensor."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # an alias that no block read adds nothing
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = [grad for grad in grads if grad is not None]
        if len(parts) < 2:
            return (parts[0] if parts else None), None
        flat = [part.contiguous().view(-1) for part in parts]  # tensors of one size share a compiled kernel
        total = (_add_up_compiled() if flat[0].is_cuda else add_up)(flat)
        return total.view(parts[0].shape), None


class _Lengths(FunctionCtx):
    length: int  # positions of a residue


class _Branch(torch.autograd.Function):
    """An alias, views of every S-th position, and these views without their last; S divides the length."""

    @staticmethod
    def forward(ctx: _Lengths, x: Tensor, groups: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what no pass read adds nothing
        ctx.length = x.shape[1] // groups
        parts = x.unflatten(1, (-1, groups)).unbind(2)
        return x.view_as(x), *parts, *(part[:, :-1] for part in parts)

    @staticmethod
    def backward(ctx: _Lengths, whole: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = [_sum(part, short) for part, short in zip(grads[: len(grads) // 2], grads[len(grads) // 2 :])]
        given = [part for part in parts if part is not None]
        if not given:
            return whole, None
        flat = [None if part is None else part.flatten(2) for part in parts]
        put_back = _interleave_compiled() if given[0].is_cuda else interleave
        total = put_back(None if whole is None else whole.flatten(2), flat, ctx.length)
        return total.view(total.shape[0], -1, *given[0].shape[2:]), None


def _sum(part: Tensor | None, short: Tensor | None) -> Tensor | None:
    """The gradient of some positions, where all but the last may have one more."""
    if part is None or short is None:
        return short if part is None else part
    return part + F.pad(short, (0, 0) * (part.ndim - 2) + (0, part.shape[1] - short.shape[1]))


def split(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Positions (dimension 1) by residue: entry g holds g, g + S, ...; views."""
    if x.shape[1] % groups == 0:
        return x.unflatten(1, (-1, groups)).unbind(2)
    return tuple(x[:, g::groups] for g in range(groups))


class Branched(NamedTuple):
    """A tensor (B, T, ...) and its positions by residue."""

    whole: Tensor  # for a pass over all positions
    parts: tuple[Tensor, ...]  # entry g: positions g, g + S, ...
    # the same without their last, where that costs the backward nothing: keys that a pass reads one step late
    shorter: tuple[Tensor, ...]


Branch = Callable[[Tensor, int], Branched]


def branch(x: Tensor, groups: int) -> Branched:
    """A tensor for passes over all positions and over residues; autograd adds the gradients."""
    parts = split(x, groups)
    return Branched(x, parts, parts)


def branch_compiled(x: Tensor, groups: int) -> Branched:
    """The same, with one kernel that adds the gradients; on a GPU it needs the compiler."""
    if x.shape[1] % groups or x.ndim < 3 or not (x.requires_grad and torch.is_grad_enabled()):
        return branch(x, groups)
    whole, *parts = _Branch.apply(x, groups)
    return Branched(whole, tuple(parts[:groups]), tuple(parts[groups:]))


class _Attach(torch.autograd.Function):
    """A tensor whose gradient goes to another of its shape."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, path: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


def attached(x: Tensor | Handed | None) -> Tensor:
    """The tensor of a ``Handed``, its gradient on its path; a tensor as it is."""
    assert x is not None
    return _Attach.apply(x.value, x.path) if isinstance(x, Handed) else x


def fan_out(tuples: Sequence[T]) -> list[T]:
    """The same named tuples of tensors, with an alias of its own for each that receives a tensor of several.

    Args:
        tuples: one per block, or None; tensors that need no gradient, and small ones, stay as they are.
    """
    shared = Counter(id(x) for fields in tuples if fields is not None for x in fields if x is not None and _worth(x))
    aliases: dict[int, Iterator[Tensor]] = {}
    fanned: list[T] = []
    for fields in tuples:
        if fields is None:
            fanned.append(fields)
            continue
        mine = []
        for x in fields:
            if x is not None and shared[id(x)] > 1:
                if id(x) not in aliases:
                    aliases[id(x)] = iter(_Fan.apply(x, shared[id(x)]))
                x = next(aliases[id(x)])
            mine.append(x)
        remake: Callable[..., T] = type(fields)
        fanned.append(remake(*mine))
    return fanned


def _worth(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.shape[1] > 1
