"""Gradients of a working copy, added up in the masters' precision where they stay.

The micro-batches of a step each give a gradient of every parameter. Kept apart and added afterwards, they cost 12 bytes
of traffic a number and micro-batch, and those of token tables, most of whose rows are zero, as much as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lrt.backbone import lookup
from lrt.train.parallel import named_parameters, token_tables


def add_rows(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Add rows (B, P, D) to those of ``total`` (V, D) that the tokens (B, P) name, in its dtype."""
    total.index_put_((tokens,), rows.to(total.dtype), accumulate=True)


@lru_cache(maxsize=1)
def _add_rows_compiled() -> Callable[[Tensor, Tensor, Tensor], None]:
    return torch.compile(add_rows, dynamic=False)  # on a GPU by atomics, where eager PyTorch sorts


class _LookUp(torch.autograd.Function):
    """Rows of a table whose gradients go to ``add``; autograd hears of none."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, dtype: torch.dtype, look_up: Callable[..., Tensor], add: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.add = add
        return look_up(tokens, weight, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.add(*ctx.saved_tensors, grad.contiguous())
        return (None,) * 5


def _look_up(look_up: Callable[..., Tensor], add: Callable[..., None], tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return _LookUp.apply(weight, tokens, dtype, look_up, add)


class Sums:
    """One sum for each master, at an address that graphs can write to.

    A gradient is added when the backward pass has it, and let go. That of a compiled token table is never made: the
    gradients of its rows are added where they belong.

    Args:
        masters: what the gradients are for.
        compute: the working copy, with a parameter for each master; token tables may be the masters themselves.
    """

    def __init__(self, masters: Sequence[Tensor], compute: nn.Module) -> None:
        self._masters = masters
        self._totals = [torch.zeros_like(m) if m.requires_grad else None for m in masters]
        self._shared: list[int] = []
        self._tables: set[int] = set()
        self._written: set[int] = set()  # totals that hold something to add to
        self._given: set[int] = set()  # masters that got a gradient since begin
        self._kept: list[Tensor | None] = []
        for index, (_, parameter) in enumerate(named_parameters(compute)):
            if parameter is masters[index]:
                self._shared.append(index)
            elif parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._take, index))
        for table in token_tables(compute):
            for index in self._shared:
                if masters[index] is table.weight and table.weight.requires_grad and table.lookup is not lookup:
                    self._tables.add(index)
                    table.lookup = partial(_look_up, table.lookup, partial(self._take_rows, index))

    @property
    def bytes(self) -> int:
        return sum(total.numel() * total.element_size() for total in self._totals if total is not None)

    def adopt(self) -> bool:
        """Make the gradients that masters have, if any, the totals to add to; returns whether there are any."""
        if all(master.grad is None for master in self._masters):
            return False
        for master, total in zip(self._masters, self._totals):
            if total is None or master.grad is total:
                continue
            if master.grad is None:
                total.zero_()
            else:
                master.grad = total.copy_(master.grad)
        return True

    def begin(self, *, add: bool) -> None:
        """Before a forward whose gradients are added to the totals, or take their place."""
        self._written = set(range(len(self._totals)) if add else self._tables)
        self._given = set()
        self._kept = [self._masters[index].grad for index in self._shared]
        for index in self._shared:
            self._masters[index].grad = None  # autograd would add to it
        if not add:
            for index in self._tables:
                self._total(index).zero_()

    def end(self) -> tuple[Tensor | None, ...]:
        """After the backward: for each master its total, or None if it got no gradient."""
        for index, kept in zip(self._shared, self._kept):
            if self._masters[index].grad is not None:
                self._take(index, self._masters[index])
            self._masters[index].grad = kept
        return tuple(total if index in self._given else None for index, total in enumerate(self._totals))

    def _total(self, index: int) -> Tensor:
        total = self._totals[index]
        assert total is not None
        return total

    @torch.no_grad()
    def _take(self, index: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        total = self._total(index)
        if index in self._written:
            total.add_(parameter.grad)
        else:
            total.copy_(parameter.grad)
        self._written.add(index)
        self._given.add(index)
        parameter.grad = None

    def _take_rows(self, index: int, tokens: Tensor, rows: Tensor) -> None:
        self._given.add(index)
        _add_rows_compiled()(self._total(index), tokens, rows)
