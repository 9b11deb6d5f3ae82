"""Time training steps: variants x shapes in one process, interleaved in time; docs/benchmarks.md is made from it.

examples:
  python tools/bench/training.py --suites tiny                         # CPU: does it run, are the graphs as expected
  python tools/bench/training.py --suites d12 d20 --out one.json       # one GPU: forward + backward
  python tools/bench/training.py --suites d12 --reference ../official  # also the official code, from your checkout
  torchrun --nproc_per_node=2 tools/bench/training.py --suites d20 --against one.json   # FSDP2, against one GPU

The last line printed is one JSON object. Milliseconds are medians of single steps between device events; peak memory is
that of the warm-up, because a replayed CUDA graph asks for none. Exit code 1: a row failed, or a CPU run compiled more
or fewer graphs than expected (the counts hold for the default variants, or the first of them); 2: bad input, nothing
was run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lrt.accounting import peak_flops, training_flops
from lrt.commands.bench.steps import bare_step, held_bytes, official_step, recipe_of, whole_step
from lrt.commands.bench.suites import OFFICIAL, OFFICIAL_LRT, SUITES, VARIANTS, Suite, Variant, check, parser
from lrt.commands.bench.timing import Subject, device_name, graph_count, profiled
from lrt.config import ParallelConfig, Recipe, RecurrenceConfig
from lrt.model import build
from lrt.tables import Table
from lrt.train import plan
from lrt.train.distributed.graphs import Runner
from lrt.train.distributed.parallel import named_parameters
from lrt.train.distributed.world import World, open_world
from lrt.train.optim.groups import MuonAdamW, parameter_groups

RECIPE_TOKENS = 524288  # of a step by the recipes


# ------------------------------------------------------------------ a suite


def build_for(recipe: Recipe, world: World, options: argparse.Namespace, pool: tuple[int, int] | None) -> Runner:
    """What runs the recipe's model under the plan that the options name; graphs that take turns share ``pool``."""
    parallel = dataclasses.replace(recipe.parallel, cuda_graphs=options.plan != "fsdp")
    world = world if options.plan.startswith("fsdp") else dataclasses.replace(world, working_copy=True)
    model, runner = plan.build(dataclasses.replace(recipe, parallel=parallel), world, pool=pool)
    model.train()
    if options.backend is not None:
        for block in runner.compute.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=options.backend)
    return runner


def run_suite(
    name: str,
    world: World,
    options: argparse.Namespace,
    *,
    one: dict[tuple[str, str], float],
    keep: Callable[[Table], None],
) -> None:
    """Build every model of a shape, warm up, then take turns.

    Args:
        name: of the suite.
        world: the processes.
        options: that ``check`` has passed.
        one: tokens a second of one GPU, by suite and row; empty = no scaling.
        keep: called with the result as soon as there are rows, and again when there is more.
    """
    suite = SUITES[name]
    suite = suite._replace(rows=options.rows or suite.rows)
    parallel = ParallelConfig(
        compile=options.backend is None, loss_chunk=options.loss_chunk, activation_checkpointing=options.checkpointing,
        reshard=options.reshard,
        param_dtype="bfloat16" if world.device.type == "cuda" else "float32",
    )  # fmt: skip
    failed: list[str] = []

    def fail(title: str, error: Exception, *, everywhere: bool = True) -> None:  # the others are still worth timing
        if world.size > 1 and not everywhere:
            raise error  # the other ranks may be waiting for this one
        say(world, f"{name}: {title}: FAILED: {type(error).__name__}: {str(error)[:3000]}")
        failed.append(title)

    def attempt(action: Callable[[Subject], None], *, everywhere: bool) -> None:
        for subject in list(subjects):
            torch.compiler.set_stance("force_eager" if subject.name == OFFICIAL_LRT else "default")
            try:
                action(subject)
            except Exception as error:
                fail(subject.name, error, everywhere=everywhere)
                subjects.remove(subject)
        torch.compiler.set_stance("default")

    def warm_up(subject: Subject) -> None:
        subject.warm_up()
        say(
            world,
            f"{name}: {subject.name}: warm after {subject.compile_s:.1f} s, {subject.graphs} graphs, syncs: "
            f"{subject.syncs or 'none'}",
        )

    chosen = {key: VARIANTS[key] for key in VARIANTS if key in options.variants}
    models: dict[RecurrenceConfig | None, Runner] = {}
    pool = torch.cuda.graph_pool_handle() if world.device.type == "cuda" else None
    subjects: list[Subject] = []
    tokens = suite.rows * suite.length * options.accumulation
    expected = 0
    windows = len(set(suite.model().windows()))
    for key, variant in chosen.items():
        recipe = recipe_of(suite, variant.recurrence(suite), parallel)
        if recipe.recurrence not in models:
            models[recipe.recurrence] = build_for(recipe, world, options, pool)
        runner = models[recipe.recurrence]
        flops = training_flops(build(recipe, device="meta"), variant.schedule, suite.length)
        step = bare_step(runner, variant.schedule, suite, world, accumulation=options.accumulation)
        subjects.append(Subject(key, step, own_bytes=held_bytes(runner), flops=flops, world=world, tokens=tokens))
        expected += variant.graphs[0] * windows + variant.graphs[1]
    for recurrent in (False, True) if options.reference else ():
        if not recurrent or options.reference_lrt:
            title = OFFICIAL_LRT if recurrent else OFFICIAL
            try:
                step, own = official_step(options.reference, suite, world, recurrent=recurrent)
            except Exception as error:  # such as a package that the official code needs
                fail(title, error)
                continue
            subjects.append(Subject(title, step, own_bytes=own, flops=None, world=world, tokens=tokens))
    attempt(warm_up, everywhere=True)  # no memory, or no kernel: on every rank alike
    ours = graph_count()
    for _ in range(options.turns):
        attempt(lambda subject: subject.measure(options.steps), everywhere=False)
    rows = [subject.row() for subject in subjects]
    shape = {"batch": suite.rows, "length": suite.length, "pattern": suite.pattern}
    result: Table = {
        "suite": name,
        **shape,
        "rows": rows,
        "failed": failed,
        "recompiles_while_timing": graph_count() - ours,
    }
    if options.backend is not None:
        result |= {"graphs": sum(s.graphs for s in subjects), "graphs_expected": expected}
    fastest = min((r["ms"] for r in rows if r["variant"] in ("baseline", OFFICIAL)), default=None)
    own = next((r["peak_gib"] for r in rows if r["variant"] == "baseline"), None)
    for row in rows:
        row["ratio"] = None if fastest is None else row["ms"] / fastest
        row["memory_ratio"] = None if own is None or row["peak_gib"] is None else row["peak_gib"] / own
        if one:
            row["scaling"] = row["tokens_per_second"] / one[name, row["variant"]]
    say(world, table(result))  # now: what follows takes long, and may be cut
    keep(result)
    if options.profile:
        result["profiles"] = {s.name: profiled(s) for s in subjects if s.name in options.profile}
    if options.whole_step:
        result["whole_steps"] = []
        for key in options.whole_step:
            try:
                result["whole_steps"].append(whole_steps(key, chosen[key], models, suite, parallel, world, options))
            except Exception as error:
                fail(f"whole step, {key}", error, everywhere=False)
    for line in details(result):
        say(world, line)
    keep(result)
    subjects.clear()
    models.clear()
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def whole_steps(
    key: str,
    variant: Variant,
    models: dict[RecurrenceConfig | None, Runner],
    suite: Suite,
    parallel: ParallelConfig,
    world: World,
    options: argparse.Namespace,
) -> Table:
    """Whole steps of one and of many micro-batches, and bare forward + backward of one, taking turns."""
    recipe = recipe_of(suite, variant.recurrence(suite), parallel)
    runner = models[recipe.recurrence]
    optimizer = MuonAdamW(parameter_groups(named_parameters(runner.model), recipe), compile=options.backend is None)
    micro_batches = (
        max(1, round(RECIPE_TOKENS / (suite.rows * suite.length * world.size))) if world.device.type == "cuda" else 2
    )
    options_of: Table = {"own_bytes": 0, "flops": None, "world": world, "tokens": suite.rows * suite.length}
    bare = Subject(key, bare_step(runner, variant.schedule, suite, world), **options_of)
    one, many = (
        Subject(key, whole_step(runner, variant.schedule, recipe, world, optimizer, accumulation=count), **options_of)
        for count in (1, micro_batches)
    )
    for whole in (one, many):
        whole.warm_up()
    for _ in range(options.turns):
        bare.measure(options.steps)
        one.measure(options.steps)
        many.measure(1)
    ms, whole_ms, many_ms = (subject.row()["ms"] for subject in (bare, one, many))
    return {
        "variant": key, "forward_backward_ms": ms, "ms": whole_ms, "outside_share": 1 - ms / whole_ms,
        "micro_batches": micro_batches, "ms_of_many": many_ms,
        "outside_share_of_many": 1 - micro_batches * ms / many_ms, "host_syncs": one.syncs or many.syncs or "none",
        "recompiles": one.recompiles + many.recompiles,
        "kernels_outside": outside(profiled(one), profiled(bare)) if options.profile else [],
    }  # fmt: skip


def outside(whole: list[tuple[str, int, float]], bare: list[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    """Kernels of a whole step less those of its forward and backward: name, calls, milliseconds."""
    known = {name: (calls, ms) for name, calls, ms in bare}
    rest = [(name, calls - known.get(name, (0, 0))[0], ms - known.get(name, (0, 0.0))[1]) for name, calls, ms in whole]
    return sorted((row for row in rest if row[1] > 0), key=lambda row: -row[2])


# ------------------------------------------------------------------ the report


def say(world: World, text: str) -> None:
    if world.main:
        print(text, flush=True)


def table(result: Table) -> str:
    lines = [f"{result['suite']}: {result['batch']} x {result['length']} a GPU, window pattern {result['pattern']}"]
    head = f"{'':42s}{'ms':>9s}{'ratio':>7s}{'GiB':>7s}{'x':>6s}{'tok/s':>10s}{'MFU':>7s}"
    lines.append(f"{head}{'compile s':>11s}{'graphs':>8s}{'again':>7s}  host syncs")
    for r in result["rows"]:
        share, ratio, memory = r.get("mfu"), r["ratio"], r["memory_ratio"]
        lines.append(
            f"{r['variant']:42s}{r['ms']:9.2f}{0 if ratio is None else ratio:7.3f}"
            f"{r['peak_gib'] or 0:7.1f}{0 if memory is None else memory:6.2f}"
            f"{r['tokens_per_second']:10.0f}{'' if share is None else f'{100 * share:.1f} %':>7s}{r['compile_s']:11.1f}"
            f"{r['graphs']:8d}{r['recompiles']:7d}  {r['host_syncs']}"
        )
    lines += [f"{r['variant']}: {r['scaling']:.3f}x the tokens/s of one GPU" for r in result["rows"] if "scaling" in r]
    if result.get("graphs") != result.get("graphs_expected"):
        lines.append(f"{result['graphs']} graphs, but {result['graphs_expected']} were expected")
    return "\n".join(lines)


def details(result: Table) -> list[str]:
    """Lines about whole steps and kernels, where they were asked for."""
    lines = []
    for w in result.get("whole_steps", ()):
        lines.append(
            f"whole step, {w['variant']}: {w['ms']:.2f} ms, forward + backward {w['forward_backward_ms']:.2f}; "
            f"outside {100 * w['outside_share']:.1f} %; of {w['micro_batches']} micro-batches: "
            f"{w['ms_of_many']:.1f} ms, outside {100 * w['outside_share_of_many']:.2f} %; host syncs: {w['host_syncs']}"
        )
        if w["kernels_outside"]:
            lines.append(f"kernels outside forward and backward: {sum(k[2] for k in w['kernels_outside']):.2f} ms")
            lines += [f"  {ms:8.3f} ms x{calls:<5d} {kernel}" for kernel, calls, ms in w["kernels_outside"][:30]]
    for name, kernels in result.get("profiles", {}).items():
        lines.append(f"kernels of {name}: {sum(k[2] for k in kernels):.2f} ms")
        lines += [f"  {ms:8.3f} ms x{calls:<5d} {kernel}" for kernel, calls, ms in kernels[:30]]
    return lines


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__ or "").parse_args(arguments)
    cuda = torch.cuda.is_available()
    try:
        one = check(options, cuda=cuda)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not cuda and options.backend is None:
        options.backend = "aot_eager"
    torch.set_float32_matmul_precision("high")
    plain = Recipe(parallel=ParallelConfig(param_dtype="bfloat16" if cuda else "float32"))
    with open_world(plain) as world:
        options.plan = options.plan or ("single" if world.size == 1 else "fsdp-graph" if cuda else "fsdp")
        if options.plan != "single" and not world.sharded:  # FSDP on one rank, to see what it costs
            torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
            world = dataclasses.replace(world, sharded=True, working_copy=False)
        torch.manual_seed(world.rank)
        torch._dynamo.config.recompile_limit = 128
        results: list[Table] = []
        summary = {
            "device": device_name(world), "gpus": world.size, "torch": torch.__version__,
            "peak_flops": peak_flops(device_name(world)), "accumulation": options.accumulation, "plan": options.plan,
            "reshard": options.reshard, "suites": results,
        }  # fmt: skip

        def keep(result: Table) -> None:
            if all(result is not known for known in results):
                results.append(result)
            if options.out and world.main:
                beside = Path(f"{options.out}.part")
                beside.write_text(json.dumps(summary))
                beside.replace(options.out)

        try:
            for name in options.suites:
                run_suite(name, world, options, one=one, keep=keep)
        finally:
            for result in results:
                for kernels in (
                    *result.get("profiles", {}).values(),
                    *(w["kernels_outside"] for w in result.get("whole_steps", ())),
                ):
                    del kernels[40:]
            say(world, json.dumps(summary))
    return int(any(r["failed"] or r.get("graphs") != r.get("graphs_expected") for r in results))
