"""A part of several_gpus.py: steps of FSDP2 on several GPUs, what runs beside nothing in them, and candidates.

    torchrun --nproc_per_node=2 tools/experiments/overlap.py --candidate trainer --out trainer.json

One candidate a process, because a capture that fails spoils the ones after it. ``one`` times one GPU, the others idle.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from columns import Columns, by_columns
from torch import Tensor

import lrt
from lrt.commands.bench.steps import bare_step, random_rows, recipe_of
from lrt.commands.bench.suites import SUITES, VARIANTS
from lrt.commands.bench.timing import mark, span, synchronize
from lrt.config import ParallelConfig, Recipe
from lrt.model import build
from lrt.train import plan
from lrt.train.checkpoint.weights import fill, named_tensors
from lrt.train.distributed import graphs
from lrt.train.distributed.graphs import Runner, forward_backward, graphed
from lrt.train.distributed.parallel import free_gathered, named_parameters
from lrt.train.distributed.world import World, open_world

SCHEDULES = {
    "interleaved(2)": lrt.interleaved(2),
    "plain": lrt.baseline(),
    "the recipes' memory step": lrt.refine(1, weights=(0.0, 1.0), cut_gradient="initialization"),
}
STEP = 524288  # tokens of the recipes' steps
CANDIDATES = ("one", "trainer", "gather_ahead", "two_reductions", "columns", "bfloat16", "replicas")

# ------------------------------------------------------------------ candidates


def gather_ahead(model: Any) -> None:
    """Have every block gather what the next one needs, its token table first, while it computes.

    FSDP gathers a module when it is called, one ahead of what it waits for. A table is looked up in an instant, so the
    gathering of its block, which begins with that lookup, would have nothing to run beside.
    """
    backbone, blocks = model.backbone, model.blocks
    tables = [[table] if (table := dict(backbone.value_embeddings).get(str(i))) else [] for i in range(len(blocks))]
    needs = [[*table, block] for table, block in zip(tables, blocks)]
    needs = [[backbone.embedding, *needs[0]], *needs[1:], [backbone.head]]
    for module, following in zip((model, *blocks), needs):
        module.set_modules_to_forward_prefetch(following)


class Apart:
    """FSDP's communication context with a reduction in flight of its own (torch 2.11 waits for the one before)."""

    def __init__(self, inner: Any) -> None:
        self.__dict__.update(inner=inner, reduce_scatter_state=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "reduce_scatter_state":
            self.__dict__[name] = value
        else:
            setattr(self.inner, name, value)


def two_reductions(model: Any) -> None:
    """A table's reduction does not wait for its block's."""
    if hasattr(model, "set_reduce_scatter_max_input_buffers"):
        model.set_reduce_scatter_max_input_buffers(2)
        return
    apart: list[Apart] = []

    def give_contexts(*_: Any) -> None:
        """After FSDP's own first call has made the contexts."""
        for table in model.backbone.value_embeddings.values() if not apart else ():
            group = table._get_fsdp_state()._fsdp_param_group
            group.comm_ctx = Apart(group.comm_ctx)
            apart.append(group.comm_ctx)

    def let_go(which: Any) -> None:
        for context in apart:
            context.reduce_scatter_state = None
        free(which)

    free = graphs.free_gathered
    graphs.free_gathered = let_go
    model.register_forward_hook(give_contexts)


# ------------------------------------------------------------------ measuring


def timed(step: Callable[[], None], world: World, *, steps: int, warm: int = 2) -> dict[str, float]:
    for _ in range(warm):
        step()
    synchronize(world)
    marks = [mark(world)]
    for _ in range(steps):
        step()
        marks.append(mark(world))
    synchronize(world)
    times = sorted(span(a, b) for a, b in zip(marks, marks[1:]))
    return {"ms": times[len(times) // 2], "spread_ms": times[-1] - times[0]}


Spans = list[tuple[float, float]]


def union(spans: Spans) -> Spans:
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def without(spans: Spans, others: Spans) -> Spans:
    """The parts of merged spans that lie in none of the other merged ones."""
    left: Spans = []
    for start, end in spans:
        for a, b in others:
            if b > start and a < end:
                if a > start:
                    left.append((start, a))
                start = max(start, b)
        if start < end:
            left.append((start, end))
    return left


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def kind(kernel: str) -> str:
    low = kernel.lower()
    if "nccl" in low:
        return next((k for k in ("AllGather", "ReduceScatter", "AllReduce", "SendRecv") if k.lower() in low), "NCCL")
    copies = ("split_with_sizes_copy", "chunk_cat", "memcpy", "memset", "foreach")
    return "copies" if any(word in low for word in copies) else "computation"


def profiled(step: Callable[[], None], path: Path, *, steps: int = 3) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and of each kind beside no computation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as log:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    log.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat", "").startswith(("kernel", "gpu_"))]
    spans: dict[str, Spans] = collections.defaultdict(list)
    sums: collections.Counter[str] = collections.Counter()
    for event in events:
        start, took = float(event["ts"]), float(event["dur"])
        spans[kind(event["name"])].append((start, start + took))
        sums[event["name"][:90]] += took / steps / 1e3
    every = union([x for some in spans.values() for x in some])
    own, first, wall = union(spans["computation"]), every[0][0], every[-1][1] - every[0][0]
    tenths = [0.0] * 10
    for start, end in without(every, own):
        tenths[min(9, int(10 * (((start + end) / 2 - first) * steps / wall % 1)))] += (end - start) / steps / 1e3
    return {
        "step_ms": wall / steps / 1e3,
        "idle_ms": (wall - length(every)) / steps / 1e3,
        "ms": {k: length(union(v)) / steps / 1e3 for k, v in spans.items()},
        "beside_no_computation_ms": {
            k: length(without(union(v), own)) / steps / 1e3 for k, v in spans.items() if k != "computation"
        },
        "by_tenth_of_the_step_ms": tenths,
        "kernels_ms": dict(sums.most_common(25)),
    }


def gradients_of(model: Any, suite: Any, world: World, shared: Columns | None) -> dict[str, Tensor]:
    """Whole gradients of one micro-batch."""
    torch.manual_seed(5 + world.rank)
    tokens, targets = random_rows(suite, world)
    valid = torch.tensor(targets.numel() * world.size)
    forward_backward(model, tokens, targets, schedule=lrt.interleaved(2), seed=1, valid_targets=valid)
    free_gathered(model)
    found = {n: p.grad.full_tensor() for n, p in named_parameters(model) if p.grad is not None}
    for table in shared.tables if shared is not None else ():
        parts = [torch.empty_like(table.total) for _ in range(world.size)]
        dist.all_gather(parts, table.total)
        found[f"backbone.value_embeddings.{table.index}.weight"] = torch.cat(parts, dim=1)
    return found


def awake(model: Any, recipe: Recipe, world: World, shared: Columns | None) -> Any:
    """Values that hide no gradient, the same for every candidate."""
    generator = torch.Generator().manual_seed(5)
    plain = named_parameters(build(recipe, device="cpu"))
    values = {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in plain}
    here = named_tensors(model)
    fill(model, {name: values.get(name, tensor) for name, tensor in here.items()})
    for table in shared.tables if shared is not None else ():
        whole = values[f"backbone.value_embeddings.{table.index}.weight"]
        table.shard.copy_(whole.chunk(world.size, dim=1)[world.rank])
    return model


def made(candidate: str, recipe: Recipe, world: World) -> tuple[Runner, Columns | None]:
    """What runs the model under the plan that a candidate names."""
    changes: dict[str, Any] = {"bfloat16": {"reduce_dtype": "bfloat16"}, "replicas": {"replicate": 2}}
    changed = dataclasses.replace(recipe.parallel, **changes.get(candidate, {}))
    recipe = dataclasses.replace(recipe, parallel=changed)
    if candidate == "columns":
        model, shared = by_columns(recipe, world)
        once = recipe.parallel.reduces_once
        return Runner(model.train(), model, graphs=graphed(recipe.parallel, world), reduces_once=once), shared
    if candidate == "one":
        world = World(0, 1, world.device, sharded=False, working_copy=world.device.type == "cuda")
    runner = plan.build(recipe, world).runner
    runner.compute.train()
    {"gather_ahead": gather_ahead, "two_reductions": two_reductions}.get(candidate, lambda model: None)(runner.model)
    return runner, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidate", choices=CANDIDATES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; a trace lies beside it while it is read")
    parser.add_argument("--suite", choices=sorted(SUITES), default="d20")
    parser.add_argument("--no-profile", action="store_true")
    options = parser.parse_args()
    suite, cuda = SUITES[options.suite], torch.cuda.is_available()
    torch.set_float32_matmul_precision("high")
    dtype: Any = "bfloat16" if cuda else "float32"
    with open_world(Recipe(parallel=ParallelConfig(param_dtype=dtype))) as world:
        torch.manual_seed(world.rank)
        recurrence = VARIANTS["interleaved(2)"].recurrence(suite)
        recipe = recipe_of(suite, recurrence, ParallelConfig(compile=cuda, param_dtype=dtype))
        here = world
        if options.candidate == "one":
            here = World(0, 1, world.device, sharded=False, working_copy=cuda)
        runner, shared = made(options.candidate, recipe, world)
        many = max(1, STEP // (suite.rows * suite.length * world.size)) if cuda else 2
        result: dict[str, Any] = {
            "candidate": options.candidate, "gpus": world.size, "torch": torch.__version__, "micro_batches": many,
            "device": torch.cuda.get_device_name() if cuda else "CPU", "steps": {},
        }  # fmt: skip

        def step_of(name: str, count: int) -> Callable[[], None]:
            step = bare_step(runner, SCHEDULES[name], suite, here, accumulation=count)

            def zeroed() -> None:
                for table in shared.tables if shared is not None else ():
                    table.total.zero_()
                step()

            return zeroed

        def keep(**found: Any) -> None:
            result.update(found)
            if world.main:
                options.out.write_text(json.dumps(result, indent=1))

        for name in SCHEDULES:
            step_of(name, 1)()  # on all ranks, one GPU too
        world.barrier()
        if options.candidate != "one" or world.main:
            for name in SCHEDULES:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                result["steps"][name] = timed(step_of(name, 1), here, steps=8 if cuda else 2)
                if cuda:
                    result["steps"][name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                keep()
            first = next(iter(SCHEDULES))
            keep(many=timed(step_of(first, many), here, steps=2, warm=1))
            if cuda and not options.no_profile:
                keep(profile=profiled(step_of(first, 1), options.out.with_suffix(f".trace{world.rank}")))
                options.out.with_suffix(f".trace{world.rank}").unlink()
        world.barrier()
        if not cuda and options.candidate not in ("one", "trainer"):
            build_awake = partial(awake, recipe=recipe, world=world)
            trained = gradients_of(
                build_awake(made("trainer", recipe, world)[0].model, shared=None), suite, world, None
            )
            ours, shared = made(options.candidate, recipe, world)
            found = gradients_of(build_awake(ours.model, shared=shared), suite, world, shared)
            assert found.keys() == trained.keys()
            worst = max(float((found[n] - trained[n]).norm() / trained[n].norm().clamp_min(1e-9)) for n in trained)
            keep(worst_difference_of_gradients=worst)
            assert worst < (1e-5 if options.candidate != "bfloat16" else 2e-2), worst
        if world.main:
            print(json.dumps({k: v for k, v in result.items() if k != "profile"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
