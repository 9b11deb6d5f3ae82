"""A part of overlap.py, a candidate: token tables by columns, whose rows are exchanged in the place of tables."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrt.config import Recipe
from lrt.model import build
from lrt.train.checkpoint.starting_model import shapes_of
from lrt.train.checkpoint.weights import fill, named_tensors
from lrt.train.distributed import parallel
from lrt.train.distributed.world import World


class Columns:
    """Tables by columns: each rank has every row of some columns, and ranks exchange rows of tokens, not tables.

    Every rank looks up the tokens of all in its own columns. The gradient takes the same way back, and is added in
    float32 where it stays.
    """

    def __init__(self, world: World, *, dtype: torch.dtype) -> None:
        self.world, self.dtype, self.group = world, dtype, dist.new_group()
        cuda = world.device.type == "cuda"
        self.stream = torch.cuda.Stream() if cuda else None
        self.add = torch.compile(add_rows, dynamic=False) if cuda else add_rows
        self.look = torch.compile(look_up, dynamic=False) if cuda else look_up
        self.tables: list[ColumnTable] = []
        self.held: list[Tensor] = []
        self.made: dict[int, tuple[Tensor, Any]] = {}
        self.tokens: Tensor | None = None
        self.joining = False

    def beside(self) -> Any:
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def ask(self, tokens: Tensor) -> None:
        if self.tokens is not tokens:
            self.tokens, self.of_all = tokens, tokens.new_empty(self.world.size, *tokens.shape)
            dist.all_gather_into_tensor(self.of_all.view(-1), tokens.reshape(-1), group=self.group)

    def swap(self, parts: Tensor) -> Tensor:
        """(N, ...) by receiver -> (N, ...) by sender."""
        found = torch.empty_like(parts)
        dist.all_to_all_single(found.view(-1), parts.reshape(-1), group=self.group)
        return found

    def fetch(self, index: int) -> None:
        if index >= len(self.tables) or index in self.made:
            return
        with self.beside():
            found = self.swap(self.look(self.of_all, self.tables[index].shard, self.dtype))
            event = None if self.stream is None else self.stream.record_event()
        self.made[index] = found, event

    def take(self, index: int) -> Tensor:
        self.fetch(index)
        self.fetch(index + 1)
        found, event = self.made[index]
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        return found.movedim(0, -2).flatten(-2)

    def give(self, table: ColumnTable, gradient: Tensor) -> None:
        if not self.joining:
            self.joining = True
            torch.autograd.Variable._execution_engine.queue_callback(self.join)
        with self.beside():
            parts = gradient.unflatten(-1, (self.world.size, -1)).movedim(-2, 0).contiguous()
            found = self.swap(parts)
            self.add(table.total, self.of_all, found)
        self.held += [gradient, parts, found]

    def join(self) -> None:
        self.joining, self.tokens = False, None
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.held.clear()
        self.made.clear()


def look_up(tokens: Tensor, shard: Tensor, dtype: torch.dtype) -> Tensor:
    return nn.functional.embedding(tokens, shard).to(dtype)


def add_rows(total: Tensor, tokens: Tensor, rows: Tensor) -> None:
    total.index_put_((tokens,), rows.to(total.dtype), accumulate=True)


class Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: ColumnTable) -> Tensor:
        ctx.table = table
        return table.shared.take(table.index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.table.shared.give(ctx.table, gradient)
        return gradient.new_zeros((), dtype=torch.float32), None


class ColumnTable(nn.Module):
    def __init__(self, whole: Tensor, shared: Columns) -> None:
        super().__init__()
        self.shard = whole.detach().chunk(shared.world.size, dim=1)[shared.world.rank].contiguous()
        self.total, self.index = torch.zeros_like(self.shard), len(shared.tables)
        self.__dict__["shared"] = shared
        shared.tables.append(self)

    def forward(self, tokens: Tensor) -> Tensor:
        self.shared.ask(tokens)
        return Taken.apply(torch.zeros((), device=tokens.device, requires_grad=True), self)


def by_columns(recipe: Recipe, world: World) -> tuple[Any, Columns]:
    """The recipe's model on this rank, whose value embeddings FSDP does not know."""
    model = shapes_of(recipe)
    model.backbone.value_embeddings = nn.ModuleDict()
    parallel.parallelize(model, recipe.parallel, world)
    model.to_empty(device=world.device)
    whole = named_tensors(build(recipe, device=world.device))
    fill(model, whole)
    shared = Columns(world, dtype=parallel.DTYPES[recipe.parallel.param_dtype])
    for block in range(recipe.model.n_layers):
        name = f"backbone.value_embeddings.{block}.weight"
        model.backbone.value_embeddings[str(block)] = ColumnTable(whole[name], shared)
    return model, shared
