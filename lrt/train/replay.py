"""Forward and backward as one CUDA graph, and on one GPU a working copy in half precision.

A step of a small model is some thousand kernels of a few microseconds; launched one by one, the processor is slower
than the GPU. A graph launches them at once. It is captured for each shape and plan of passes, after the compiler has
run, and replayed on copies of the inputs. On one GPU the masters stay in float32 beside a working copy, and nothing is
gathered; on several, FSDP (``lrt.train.parallel``) does both, and its collectives are part of the graph.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrt.config import ParallelConfig
from lrt.train.distributed import World, register_graph
from lrt.train.parallel import DTYPES, free_gathered, named_parameters, parallelize, reduce_gradients, token_tables
from lrt.types import Pass, Schedule

GRAPHS = 4  # plans captured at most, each with gradients of its own: a schedule with more runs the others eagerly
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
    """Where a micro-batch stands in its step: the first gathers parameters, the last reduces gradients and frees both."""

    first: bool = True
    last: bool = True


ALONE = (Place(),)
ACCUMULATED = (Place(last=False), Place(first=False, last=False), Place(first=False))  # captured in this order


class Captured(NamedTuple):
    """A graph, what it reads and what it writes."""

    graph: Any
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
    """

    def __init__(self, model: nn.Module, compute: nn.Module, *, graphs: bool) -> None:
        self.model, self.compute = model, compute
        self._masters = [p for _, p in named_parameters(model)]
        self._working = [p for _, p in named_parameters(compute)]
        self._graphs: dict[Any, dict[Place, Captured]] | None = {} if graphs else None
        self._begun: Any = None  # the graphs of the step whose first micro-batch was the last to begin one
        self.pool: Any = torch.cuda.graph_pool_handle() if graphs else None  # runners that take turns may share one

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """The working copy, brought up to date: to evaluate with."""
        pairs = [(w, m) for w, m in zip(self._working, self._masters) if w is not m]
        if pairs:
            torch._foreach_copy_([w for w, _ in pairs], [m for _, m in pairs])
        return self.compute

    def forward_backward(
        self, input_ids: Tensor, targets: Tensor, *, schedule: Schedule, seed: int, valid_targets: Tensor, first: bool = True, last: bool = True
    ) -> Tensor:
        """Add the gradients of one micro-batch to the masters'.

        Args:
            input_ids, targets: (B, T).
            schedule: passes of the forward.
            seed: for schedules that draw their order.
            valid_targets: number of targets that normalises the loss.
            first, last: of the step's micro-batches, all of one shape and seed; the gradients may be there only after the last.

        Returns:
            1-D: the loss, then the loss of every group.

        Raises:
            ValueError: a micro-batch differs from the first of its step.
        """
        place = Place(first, last) if getattr(self.compute, "reduces_once", False) else Place()
        plan: tuple[Pass, ...] = schedule.plan(input_ids.shape[1], generator=torch.Generator().manual_seed(seed))
        key = (tuple(input_ids.shape), schedule, plan, place in ALONE)
        if place.first:
            self._begun = key
        elif key != self._begun:
            raise ValueError("a micro-batch has another shape, schedule or plan than the first of its step, whose gradients wait for it")
        if self._graphs is None or (key not in self._graphs and len(self._graphs) == GRAPHS):
            scores = self._run(input_ids, targets, schedule, seed, valid_targets, last=place.last)
            self._hand_over(self._take_gradients())
            return scores
        if key not in self._graphs:
            places = ALONE if place in ALONE else ACCUMULATED
            self._graphs[key] = self._capture(places, input_ids, targets, schedule, seed, valid_targets)
        captured = self._graphs[key][place]
        for master, *known in zip(self._masters, *(one.gradients for places in self._graphs.values() for one in places.values())):
            if master.grad is not None and any(master.grad is gradient for gradient in known):
                master.grad = master.grad.clone()  # the replay may overwrite it: graphs share their memory
        captured.input_ids.copy_(input_ids, non_blocking=True)
        captured.targets.copy_(targets, non_blocking=True)
        captured.valid.copy_(valid_targets, non_blocking=True)
        captured.graph.replay()
        self._hand_over(captured.gradients)
        return captured.scores.clone()

    def _run(self, input_ids: Tensor, targets: Tensor, schedule: Schedule, seed: int, valid: Tensor, *, last: bool = True) -> Tensor:
        self.refresh()
        reduce_gradients(self.compute, schedule, now=last)
        scores = forward_backward(self.compute, input_ids, targets, schedule=schedule, seed=seed, valid_targets=valid)
        if last:
            free_gathered(self.compute)
        return scores

    def _take_gradients(self) -> tuple[Tensor | None, ...]:
        """The working copy's gradients in the masters' dtype; none are left behind."""
        taken = []
        for working, master in zip(self._working, self._masters):
            taken.append(None if working.grad is None else working.grad.to(master.dtype))
            working.grad = None
        return tuple(taken)

    @torch.no_grad()
    def _hand_over(self, gradients: tuple[Tensor | None, ...]) -> None:
        more: list[tuple[Tensor, Tensor]] = []
        for master, gradient in zip(self._masters, gradients):
            if gradient is None:
                continue
            if master.grad is None:
                master.grad = gradient
            else:
                more.append((master.grad, gradient))
        if more:
            torch._foreach_add_([old for old, _ in more], [new for _, new in more])

    def _capture(
        self, places: tuple[Place, ...], input_ids: Tensor, targets: Tensor, schedule: Schedule, seed: int, valid: Tensor
    ) -> dict[Place, Captured]:
        """One graph for each place, in the order in which they will be replayed: what one leaves behind the next takes up."""
        kept = [p.grad for p in self._masters]  # token tables are shared, so the passes below would add to them
        for master in self._masters:
            master.grad = None
        inputs = input_ids.clone(), targets.clone(), torch.as_tensor(valid, device=input_ids.device).clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run(*inputs[:2], schedule, seed, inputs[2])
                self._take_gradients()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph's own pool will hold what the passes above took
        captured = {}
        for place in places:
            graph = torch.cuda.CUDAGraph()
            register_graph(graph)
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                scores = self._run(*inputs[:2], schedule, seed, inputs[2], last=place.last)
                gradients = self._take_gradients()
            captured[place] = Captured(graph, *inputs, scores, gradients)
        for master, gradient in zip(self._masters, kept):
            master.grad = gradient
        return captured


def make_runner(model: nn.Module, config: ParallelConfig, world: World) -> Runner | None:
    """What runs a model that ``build_parallel`` made; None: the model itself."""
    if world.working_copy:
        return single_device(model, config, world)
    return Runner(model, model, graphs=True) if _graphed(config, world) else None


def _graphed(config: ParallelConfig, world: World) -> bool:
    return config.cuda_graphs and config.compile and world.device.type == "cuda"


def single_device(model: nn.Module, config: ParallelConfig, world: World) -> Runner:
    """The plan for one process without FSDP: a working copy in ``parallel.param_dtype``, compiled, with CUDA graphs on a GPU."""
    compute = working_copy(model, dtype=DTYPES[config.param_dtype])
    parallelize(compute, config, dataclasses.replace(world, sharded=False))
    return Runner(model, compute, graphs=_graphed(config, world))


def working_copy(model: nn.Module, *, dtype: torch.dtype) -> Any:
    """The same model in another dtype; token tables stay the model's own, and only their rows are cast."""
    kept = {id(table.weight): table.weight for table in token_tables(model)}
    work: Any = copy.deepcopy(model, dict(kept))  # the memo: what is not copied
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
        table.output_dtype = dtype
    return work
