"""Gradients of a working copy, added up in the masters' precision where they stay.

The micro-batches of a step each give a gradient of every parameter. Kept apart and added afterwards, they cost 12 bytes
of traffic a number and micro-batch, and those of token tables, most of whose rows are zero, as much as the others. The
passes of a schedule give gradients of the same weights too, which autograd adds one by one and rounds to half precision
each time; here they are read once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lrt.backbone import lookup
from lrt.engine.compiled import is_compiled
from lrt.kernels.mixing import HAS_TRITON
from lrt.model import LatentRecurrentModel
from lrt.train.distributed.parallel import compile_blocks, named_parameters, token_tables
from lrt.types import RecurrentDecoder, Saved

BLOCK = 2048  # numbers a program adds
TWINS = 3  # at most: their gradients are held until the backward's end, and one kernel adds four

# ------------------------------------------------------------------ token tables


def add_rows(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    """Add rows (B, P, D) to those of ``total`` (V, D) that the tokens (B, P) name, in its dtype."""
    total.index_put_((tokens,), rows.to(total.dtype), accumulate=True)


@lru_cache(maxsize=1)
def _add_rows_compiled() -> Callable[[Tensor, Tensor, Tensor], None]:
    return torch.compile(add_rows, dynamic=False)  # on a GPU by atomics, where eager PyTorch sorts


class _Adding(Saved, Protocol):
    """What ``_LookUp`` keeps for its backward."""

    add: Callable[..., None]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _LookUp(torch.autograd.Function):
    """Rows of a table whose gradients go to ``add``; autograd hears of none."""

    @staticmethod
    def forward(
        ctx: _Adding,
        weight: Tensor,
        tokens: Tensor,
        dtype: torch.dtype,
        look_up: Callable[..., Tensor],
        add: Callable[..., None],
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.add = add
        return look_up(tokens, weight, dtype)

    @staticmethod
    def backward(ctx: _Adding, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.add(*ctx.saved_tensors, grad.contiguous())
        return (None,) * 5


def _look_up(
    look_up: Callable[..., Tensor], add: Callable[..., None], tokens: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    return _LookUp.apply(weight, tokens, dtype, look_up, add)


# ------------------------------------------------------------------ weights


def add_parts(total: Tensor, parts: Sequence[Tensor], *, add: bool) -> None:
    """Add one to four tensors of one shape to ``total``, or put their sum in its place, in its dtype."""
    if HAS_TRITON and total.is_cuda and all(x.is_contiguous() for x in (total, *parts)):
        from lrt.kernels import sums_triton

        size, given = total.numel(), [*parts, *[parts[0]] * (1 + TWINS - len(parts))]
        sums_triton.add_kernel[(-(-size // BLOCK),)](total, *given, size, COUNT=len(parts), ADD=add, BLOCK=BLOCK)
        return
    for part in parts:
        if add:
            total.add_(part)
        else:
            total.copy_(part)
        add = True


# ------------------------------------------------------------------ a pass's own parameters


def twin_of(model: LatentRecurrentModel) -> tuple[LatentRecurrentModel, dict[int, nn.Parameter]]:
    """A model with the same weights, whose blocks and memory have parameters of their own for the gradients;
    the rest is the model's.

    Returns:
        The twin, as it is now: ``eval()`` of the model does not reach it; and its parameters by the identity of the
        model's.
    """
    own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()} | own
    twin = copy.copy(model)
    twin.run_passes_by(None)
    twin._modules = dict(model._modules)
    for name in ("blocks", "memory_projection", "injection"):
        if model._modules.get(name) is not None:
            twin._modules[name] = copy.deepcopy(model._modules[name], memo)
    if all(map(is_compiled, model.blocks)):
        compile_blocks(twin)
    return twin, own


class Twins:
    """The model of each pass: itself for the first, then a twin for each; passes beyond the last twin share it.

    Args:
        leaves: for each of the model's parameters, the tensors that get its gradients; twins add theirs.
    """

    def __init__(self, leaves: list[list[nn.Parameter]]) -> None:
        self._leaves = leaves
        self.made: list[LatentRecurrentModel] = []

    def __call__(self, model: RecurrentDecoder, index: int) -> RecurrentDecoder:
        index = min(index, TWINS)
        while len(self.made) < index:
            twin, own = twin_of(cast(LatentRecurrentModel, model))
            self.made.append(twin)
            used = {id(parameter) for parameter in twin.parameters()}
            for leaves in self._leaves:
                if id(own[id(leaves[0])]) in used:
                    leaves.append(own[id(leaves[0])])
        return self.made[index - 1] if index else model


# ------------------------------------------------------------------ the sums


class Sums:
    """One sum for each master, at an address that graphs can write to.

    The gradient of a compiled token table is never made: the gradients of its rows are added where they belong.

    Args:
        masters: what the gradients are for.
        compute: the working copy, with a parameter for each master; token tables may be the masters themselves.
            It is not to be copied afterwards, nor differentiated but between ``begin`` and ``end``.
        apart: give passes after the first twins of ``compute``, so that autograd hands out the gradients of each,
            and they are added here in one kernel, unrounded; otherwise it adds them one by one in the copy's dtype.
    """

    def __init__(self, masters: Sequence[Tensor], compute: LatentRecurrentModel, *, apart: bool = False) -> None:
        self._masters = masters
        self._totals = [torch.zeros_like(m) if m.requires_grad else None for m in masters]
        self._leaves = [[parameter] for _, parameter in named_parameters(compute)]
        self._shared = [index for index, (leaf,) in enumerate(self._leaves) if leaf is masters[index]]
        self._tables: set[int] = set()
        self._read: set[int] = set()  # tables that got gradients since begin
        self._kept: list[Tensor | None] = []
        self._add = False
        for table in token_tables(compute):
            for index in self._shared:
                if masters[index] is table.weight and table.weight.requires_grad and table.lookup is not lookup:
                    self._tables.add(index)
                    table.read_by(partial(_look_up, table.lookup, partial(self._take_rows, index)))
        if apart:
            compute.run_passes_by(Twins(self._leaves))

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
        self._add, self._read = add, set()
        self._kept = [self._masters[index].grad for index in self._shared]
        for leaf in chain(*self._leaves):  # of tables too: autograd would add to theirs
            leaf.grad = None
        if not add:
            for index in self._tables:
                self._total(index).zero_()

    @torch.no_grad()
    def end(self) -> tuple[Tensor | None, ...]:
        """After the backward: for each master its total, or None if it got no gradient."""
        given = set(self._read)
        for index, leaves in enumerate(self._leaves):
            parts = [leaf.grad for leaf in leaves if leaf.grad is not None]
            if parts:
                add_parts(self._total(index), parts, add=self._add or index in self._tables)
                given.add(index)
        self._restore()
        return tuple(total if index in given else None for index, total in enumerate(self._totals))

    def abandon(self) -> None:
        """After an exception: gradients of earlier micro-batches stay, unless the backward has begun;
        then all are gone."""
        begun = bool(self._read) or any(leaf.grad is not None for leaf in chain(*self._leaves))
        self._restore()
        for master in self._masters if begun else ():
            master.grad = None

    def _restore(self) -> None:
        for leaf in chain(*self._leaves):
            leaf.grad = None
        for index, kept in zip(self._shared, self._kept):
            self._masters[index].grad = kept

    def _total(self, index: int) -> Tensor:
        total = self._totals[index]
        assert total is not None
        return total

    def _take_rows(self, index: int, tokens: Tensor, rows: Tensor) -> None:
        self._read.add(index)
        _add_rows_compiled()(self._total(index), tokens, rows)
