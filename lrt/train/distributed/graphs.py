"""Forward and backward as one CUDA graph, and on one GPU a working copy in half precision.

A step of a small model is some thousand kernels of a few microseconds; launched one by one, the processor is slower
than the GPU. A graph launches them at once. It is captured for each shape and plan of passes, after the compiler has
run, and replayed on copies of the inputs. On one GPU the masters stay in float32 beside a working copy, whose gradients
are added up in float32 (``gradient_sums``); on several, FSDP (``parallel``) does both, and its collectives are part of
the graph.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lrt.config import ParallelConfig
from lrt.model import LatentRecurrentModel
from lrt.train.distributed.gradient_sums import Sums
from lrt.train.distributed.parallel import (
    DTYPES,
    free_gathered,
    named_parameters,
    parallelize,
    reduce_gradients,
    token_tables,
)
from lrt.train.distributed.world import World, register_graph
from lrt.types import Pass, Schedule

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

    Pool = _POOL_HANDLE | None  # of the memory of CUDA graphs; None: one of its own

GRAPHS = 16  # plans captured at most, each as up to three graphs; what a run draws beyond them runs eagerly
WARM_UP = 3  # runs before a capture: the compiler, cuBLAS and cuDNN choose and allocate


def forward_backward(
    model: nn.Module, input_ids: Tensor, targets: Tensor, *, schedule: Schedule, seed: int, valid_targets: Tensor
) -> Tensor:
    """Add the gradients of one micro-batch; returns the loss, then the loss of every group (1-D, detached)."""
    generator = torch.Generator().manual_seed(seed)
    out = model(input_ids, targets=targets, schedule=schedule, valid_targets=valid_targets, generator=generator)
    out.loss.backward()
    return torch.stack([out.loss.detach(), *out.groups])


class Place(NamedTuple):
    """Where a micro-batch stands in its step.

    With FSDP the first gathers parameters, and the last reduces gradients and frees both.
    With a working copy the first is the one that finds no gradients: it writes the sums, the others add to them.
    """

    first: bool = True
    last: bool = True


ALONE: tuple[Place, ...] = (Place(),)
ACCUMULATED = (Place(last=False), Place(first=False, last=False), Place(first=False))  # captured in this order


class Captured(NamedTuple):
    """A graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    input_ids: Tensor
    targets: Tensor
    valid: Tensor
    scores: Tensor
    gradients: tuple[Tensor | None, ...]  # one a master


class Runner:
    """Runs forward and backward of a model and leaves the gradients with its float32 masters.

    Args:
        model: the masters, which the optimizer updates and a checkpoint holds: plain, or sharded by FSDP.
        compute: what computes: ``model`` itself, or its ``working_copy``.
        graphs: capture CUDA graphs; the model must be on a GPU, with compiled blocks.
        reduces_once: of a sharded model, gradients are reduced in the last micro-batch of a step
            (``reduce_gradients``).
        pool: memory of graphs, which runners that take turns may share; None = one of its own.
        report: receives one line for the user when there are more plans than graphs.
    """

    def __init__(
        self, model: LatentRecurrentModel, compute: LatentRecurrentModel, *, graphs: bool, reduces_once: bool = False,
        pool: Pool = None, report: Callable[[str], None] = warnings.warn,
    ) -> None:  # fmt: skip
        self.model, self.compute = model, compute
        self._masters = [p for _, p in named_parameters(model)]
        self._working = [p for _, p in named_parameters(compute)]
        self.sums = None if compute is model else Sums(self._masters, compute, apart=graphs)
        self._graphs: dict[Any, dict[Place, Captured]] | None = {} if graphs else None
        self._reduces_once = reduces_once
        self._report: Callable[[str], None] | None = report  # None: it has been said
        self._begun: Any = None  # the graphs of the step whose first micro-batch was the last to begin one
        self._pool: Pool = torch.cuda.graph_pool_handle() if graphs and pool is None else pool

    @torch.no_grad()
    def refresh(self) -> LatentRecurrentModel:
        """The working copy, brought up to date: to evaluate with."""
        pairs = [(w, m) for w, m in zip(self._working, self._masters) if w is not m]
        if pairs:
            torch._foreach_copy_([w for w, _ in pairs], [m for _, m in pairs])
        return self.compute

    def forward_backward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        *,
        schedule: Schedule,
        seed: int,
        valid_targets: Tensor,
        first: bool = True,
        last: bool = True,
    ) -> Tensor:
        """Add the gradients of one micro-batch to the masters'.

        With a working copy these are buffers that the next step overwrites.
        After an exception in the backward they are gone.

        Args:
            input_ids, targets: (B, T).
            schedule: passes of the forward.
            seed: for schedules that draw their order.
            valid_targets: number of targets that normalises the loss.
            first, last: of the step's micro-batches; with FSDP all are of one shape and seed,
                and the gradients may be there only after the last.

        Returns:
            1-D: the loss, then the loss of every group.

        Raises:
            ValueError: with FSDP, a micro-batch differs from the first of its step.
        """
        place, places = Place(), ALONE
        if self.sums is not None:
            place = Place(first=not self.sums.adopt())
            places = (place,)
        elif self._reduces_once and not (first and last):
            place, places = Place(first, last), ACCUMULATED
        plan: tuple[Pass, ...] = schedule.plan(input_ids.shape[1], generator=torch.Generator().manual_seed(seed))
        key = (tuple(input_ids.shape), schedule, plan, places is ACCUMULATED)
        if first or places is not ACCUMULATED:
            self._begun = key
        elif key != self._begun:
            raise ValueError(
                "a micro-batch has another shape, schedule or plan than the first of its step, "
                "whose gradients wait for it"
            )
        if self._graphs is None and self.sums is None:
            return self._add(input_ids, targets, schedule, seed, valid_targets, place=place)
        beyond = self._graphs is not None and key not in self._graphs and len(self._graphs) >= GRAPHS
        if beyond and self._report is not None:
            self._report(
                f"more than {GRAPHS} plans of passes: the first {GRAPHS} are CUDA graphs, the others run slower, "
                "launched kernel by kernel; fewer kinds in schedule.mix or schedule.phases, "
                "or fewer orders (schedule.order, schedule.subsets), avoid it"
            )
            self._report = None
        if self._graphs is None or beyond:
            scores, gradients = self._run(input_ids, targets, schedule, seed, valid_targets, place=place)
            self._hand_over(gradients)
            return scores
        graphs = self._graphs.setdefault(key, {})
        if place not in graphs:
            graphs.update(self._capture(places, input_ids, targets, schedule, seed, valid_targets, warm=bool(graphs)))
        captured = graphs[place]
        if self.sums is None:
            self._keep_apart()
        captured.input_ids.copy_(input_ids, non_blocking=True)
        captured.targets.copy_(targets, non_blocking=True)
        captured.valid.copy_(valid_targets, non_blocking=True)
        captured.graph.replay()
        self._hand_over(captured.gradients)
        return captured.scores.clone()

    def _run(
        self, input_ids: Tensor, targets: Tensor, schedule: Schedule, seed: int, valid: Tensor, *, place: Place
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Scores of one micro-batch, and the gradients that it leaves, one a master."""
        self.refresh()
        if self.sums is not None:
            self.sums.begin(add=not place.first)
        try:
            scores = self._add(input_ids, targets, schedule, seed, valid, place=place)
        except BaseException:
            if self.sums is not None:
                self.sums.abandon()
            raise
        if place.last:
            free_gathered(self.compute)
        if self.sums is not None:
            return scores, self.sums.end()
        gradients = tuple(p.grad for p in self._masters)
        for master in self._masters:
            master.grad = None
        return scores, gradients

    def _add(
        self, input_ids: Tensor, targets: Tensor, schedule: Schedule, seed: int, valid: Tensor, *, place: Place
    ) -> Tensor:
        """Scores of one micro-batch, whose gradients autograd adds to those that are there."""
        if self._reduces_once:
            reduce_gradients(self.compute, schedule, now=place.last)
        return forward_backward(self.compute, input_ids, targets, schedule=schedule, seed=seed, valid_targets=valid)

    def _keep_apart(self) -> None:
        """Copy gradients that lie where a graph has its own: the replay may overwrite them,
        since graphs share their memory."""
        assert self._graphs is not None
        for master, *known in zip(
            self._masters, *(one.gradients for places in self._graphs.values() for one in places.values())
        ):
            if master.grad is not None and any(master.grad is gradient for gradient in known):
                master.grad = master.grad.clone()

    @torch.no_grad()
    def _hand_over(self, gradients: tuple[Tensor | None, ...]) -> None:
        more: list[tuple[Tensor, Tensor]] = []
        for master, gradient in zip(self._masters, gradients):
            if gradient is None:
                continue
            if master.grad is None:
                master.grad = gradient
            elif master.grad is not gradient:  # a sum has it already
                more.append((master.grad, gradient))
        if more:
            torch._foreach_add_([old for old, _ in more], [new for _, new in more])

    def _capture(
        self,
        places: tuple[Place, ...],
        input_ids: Tensor,
        targets: Tensor,
        schedule: Schedule,
        seed: int,
        valid: Tensor,
        *,
        warm: bool,
    ) -> dict[Place, Captured]:
        """One graph for each place, in the order in which they will be replayed:
        what one leaves behind the next takes up."""
        kept = [p.grad for p in self._masters]
        if self.sums is not None and not warm:  # the passes below overwrite the sums
            kept = [None if gradient is None else gradient.clone() for gradient in kept]
        for master in self._masters:
            master.grad = None
        inputs = input_ids.clone(), targets.clone(), torch.as_tensor(valid, device=input_ids.device).clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(0 if warm else WARM_UP):
                self._run(*inputs[:2], schedule, seed, inputs[2], place=Place())
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph's own pool will hold what the passes above took
        captured = {}
        for place in places:
            graph = torch.cuda.CUDAGraph()
            register_graph(graph)
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                scores, gradients = self._run(*inputs[:2], schedule, seed, inputs[2], place=place)
            captured[place] = Captured(graph, *inputs, scores, gradients)
        for master, gradient in zip(self._masters, kept):
            master.grad = gradient
        if self.sums is not None:
            self.sums.adopt()
        return captured


def graphed(config: ParallelConfig, world: World) -> bool:
    """Whether steps are captured as CUDA graphs."""
    return config.cuda_graphs and config.compile and world.device.type == "cuda"


def single_device(
    model: LatentRecurrentModel, config: ParallelConfig, world: World, *, pool: Pool = None,
    report: Callable[[str], None] = warnings.warn,
) -> Runner:  # fmt: skip
    """The plan for one process without FSDP: a working copy in ``parallel.param_dtype``, compiled,
    with CUDA graphs on a GPU."""
    compute = working_copy(model, dtype=DTYPES[config.param_dtype])
    parallelize(compute, config, dataclasses.replace(world, sharded=False))
    return Runner(model, compute, graphs=graphed(config, world), pool=pool, report=report)


def working_copy(model: LatentRecurrentModel, *, dtype: torch.dtype) -> LatentRecurrentModel:
    """The same model in another dtype; token tables stay the model's own, and only their rows are cast."""
    kept: dict[int, nn.Parameter] = {id(p): p for table in token_tables(model) for p in table.parameters()}
    work = copy.deepcopy(model, dict(kept))  # the memo: what is not copied
    cast = dict(kept)  # by identity, so that tied weights stay tied
    for module in work.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in cast:
                cast[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                kept[id(parameter)] = parameter  # alive, so that no other tensor takes its identity
            module._parameters[name] = cast[id(parameter)]
    for table in token_tables(work):
        table.read_as(dtype)
    return work
