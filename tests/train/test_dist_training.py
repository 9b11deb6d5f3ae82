"""Two processes (torchrun, gloo) and one give the same numbers: gradients under every schedule, optimizer, checkpoints.

One launch does all checks, since a launch costs seconds; every test below reads one of its results.
Run ``torchrun --nproc_per_node=2 tests/train/test_dist_training.py FOLDER`` to see the launch itself.
"""

import contextlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import gpus

import lrt
from lrt import backbone
from lrt.config import CheckpointConfig, parse_recipe
from lrt.data import Batch
from lrt.decoding import step as decoding
from lrt.decoding.fast import launching, one_token
from lrt.decoding.fast.acceleration import Accelerated
from lrt.kernels import mixing
from lrt.train import evaluation
from lrt.train.checkpoint import CheckpointManager, latest, read_rest, read_tensors
from lrt.train.checkpoint.saving import tensors_of
from lrt.train.checkpoint.weights import export, gather
from lrt.train.distributed import parallel
from lrt.train.distributed.graphs import Runner
from lrt.train.distributed.parallel import free_gathered, named_parameters
from lrt.train.distributed.world import World, open_world
from lrt.train.evaluation import evaluate
from lrt.train.optim import muon
from lrt.train.optim.groups import MuonAdamW, gradient_norm, parameter_groups
from lrt.train.optim.rates import rates_at
from lrt.train.plan import Built, build, build_parallel
from lrt.train.step import train_step

pytestmark = pytest.mark.dist
SCHEDULES = {
    "baseline": lrt.baseline(),
    "interleaved": lrt.interleaved(2),
    "interleaved uneven twice": lrt.interleaved(3, sweeps=2, weights=(0.2, 0.3, 0.5)),
    "interleaved refreshed": lrt.interleaved(4, kv_refresh=True),
    "interleaved random": lrt.interleaved(4, order="random"),
    "refine": lrt.refine(2, weights=(0.0, 0.3, 0.7)),
    "settled": lrt.refine(1, weights=(0.0, 1.0), settle=2),
    "cut": lrt.interleaved(2, weights=(0.0, 1.0), cut_gradient="initialization"),
    "chunked": lrt.chunked(4),
    "sequential": lrt.sequential(),
}
PLANS = {
    "after_step": {},
    "after_forward": {"parallel.reshard": "after_forward"},
    "layerwise": {"recurrence.sharing": "layerwise"},
    "aligned, projected": {"recurrence.projection": "aligned", "recurrence.residual": "projected"},
    "narrow": {"recurrence.blocks": "[2,3]"},
    "narrow, AC block": {
        "recurrence.blocks": "[3]",
        "parallel.activation_checkpointing": "block",
        "parallel.reshard": "after_forward",
    },
    "AC block": {"parallel.activation_checkpointing": "block"},
    "AC selective": {"parallel.activation_checkpointing": "selective", "parallel.reshard": "after_forward"},
}
ONE = World(0, 1, torch.device("cpu"), sharded=False)


def alone(world):
    """The same device without the other ranks: a plain module."""
    return World(0, 1, world.device, sharded=False)


T = 10


def recipe_of(**overrides):
    sets = {
        "model.n_layers": 3, "model.width": 12, "model.n_heads": 3, "model.n_kv_heads": 1, "model.vocab_size": 37,
        "model.vocab_multiple": 1, "model.sequence_length": T, "model.gate_channels": 4, "recurrence.gate_channels": 4,
        "recurrence.separator": 0, "parallel.param_dtype": "float32", "parallel.compile": "false",
        "training.batch_tokens": 4 * T, "training.steps": 10, "parallel.timeout_minutes": 0.3, **overrides,
    }  # fmt: skip
    return parse_recipe("", overrides=[f"{k}={v}" for k, v in sets.items()])


def rows(world, count=4):
    ids = torch.randint(0, 37, (count, T + 1), generator=torch.Generator().manual_seed(3))
    targets = ids[:, 1:].clone()
    targets[0, :7] = -100  # uneven numbers of valid targets: a mean of means would show
    targets[2] = -100
    return Batch(ids[:, :-1].to(world.device), targets.to(world.device), tuple(f"row {i}" for i in range(count)))


def micro_batches(world, size=1):
    batch = rows(world)
    here = range(world.rank, 4, world.size)
    return [Batch(batch.input_ids[list(i)], batch.targets[list(i)], ()) for i in zip(*[iter(here)] * size)]


def awake(model):
    """Zero-initialized projections would hide most gradients."""
    generator = torch.Generator().manual_seed(5)
    from lrt.train.checkpoint.weights import fill

    fill(model, {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in named_parameters(model)})
    return model


def runner_of(recipe, world):
    """What runs the recipe's model, all of whose parameters are random, in training mode."""
    model, runner = build(recipe, world)
    awake(model).train()
    return runner


def gradients(recipe, world, batches, schedule):
    """Loss and whole gradients, by the training step itself with an optimizer that only looks."""
    return look(runner_of(recipe, world), world, batches, schedule)


def look(runner, world, batches, schedule, *, rate=0.0):
    """The same for a model that is there, which then moves against its gradients."""
    model, seen = runner.model, {}

    class Look:
        def step(self, finite, scale):
            assert finite and scale is None
            for name, p in named_parameters(model):
                if p.grad is not None:
                    seen[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
                    p.data.add_(p.grad, alpha=-rate)

        def zero_grad(self, set_to_none):
            for p in model.parameters():
                p.grad = None

    return train_step(runner, Look(), batches, schedule=schedule, seed=1, clip_norm=None, world=world), seen


@contextlib.contextmanager
def float64():
    """Double precision throughout, so that equal means equal and not nearly so."""
    torch.set_default_dtype(torch.float64)
    parallel.DTYPES["float32"] = torch.float64
    yield
    torch.set_default_dtype(torch.float32)
    parallel.DTYPES["float32"] = torch.float32


def check_gradients(world, folder, plan, schedule):
    recipe = recipe_of(**PLANS[plan])
    plain_recipe = recipe_of(**{k: v for k, v in PLANS[plan].items() if k.startswith("recurrence")})
    with float64():
        numbers, seen = gradients(recipe, world, micro_batches(world), SCHEDULES[schedule])
        expected, plain = gradients(plain_recipe, alone(world), [rows(world)], SCHEDULES[schedule])
    assert seen.keys() == plain.keys() and len(plain) > 10
    torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in plain.items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(seen[name], gradient, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def check_replayed(world, folder):
    """The runner leaves the gradients of the sharded model: over one and four micro-batches, and after updates;
    on a GPU as CUDA graphs."""
    model, plain = runner_of(recipe_of(), world).model, runner_of(recipe_of(), world)
    batches = (micro_batches(world) * 2)[:4]
    for schedule in (lrt.interleaved(2), lrt.refine(1), lrt.baseline()):
        ours = Runner(model, model, graphs=world.device.type == "cuda", reduces_once=True)
        for count in (4, 1, 4):
            numbers, seen = look(ours, world, batches[:count], schedule, rate=0.1)
            expected, gradients = look(plain, world, batches[:count], schedule, rate=0.1)
            torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-6)
            assert seen.keys() == gradients.keys() and len(seen) > 10
            for name, gradient in gradients.items():
                torch.testing.assert_close(
                    seen[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
        # outside the graph
        scores = [r.model.score(batches[0].input_ids, batches[0].targets, schedule).detach() for r in (ours, plain)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
        for runner in (ours, plain):
            free_gathered(runner.model)
    uneven = [batches[0], Batch(batches[1].input_ids[:, :-1], batches[1].targets[:, :-1], ())]
    with pytest.raises(ValueError, match="another shape"):
        look(ours, world, uneven, lrt.interleaved(2))


def check_reductions(world, folder):
    """In the last micro-batch, or in each where memory is dear; a table's while the block before is differentiated."""
    half = {"parallel.param_dtype": "bfloat16"}
    for more, times in (
        (half, {1, 2}),  # 2: what the others left may go ahead of the last one's
        ({}, {1, 2}),
        ({"parallel.reshard": "after_forward"}, {4}),
        ({**half, "parallel.reduce_dtype": "bfloat16"}, {4}),  # otherwise micro-batches would be added up in bfloat16
    ):
        runner = runner_of(recipe_of(**more), world)
        model, reduced = runner.model, []
        for name, parameter in named_parameters(model):
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, reduced=reduced: reduced.append(name))
        batches = (micro_batches(world) * 2)[:4]
        # Without memory first: nothing has called its projection then.
        for schedule in (lrt.baseline(), lrt.chunked(T), lrt.interleaved(2), lrt.refine(1)):
            reduced.clear()
            nothing = SimpleNamespace(step=lambda **_: None, zero_grad=model.zero_grad)
            train_step(runner, nothing, batches, schedule=schedule, seed=1, clip_norm=None, world=world)
            assert {reduced.count(name) for name in reduced} <= times and len(set(reduced)) > 10, (
                more,
                schedule,
                reduced,
            )
            tables = [name for name in set(reduced) if "value_embeddings" in name]
            assert len(tables) == 3
            for name in tables:
                layer = int(name.split(".")[2])
                place = {other: index for index, other in enumerate(reduced)}  # the last of each
                assert layer == 0 or place[name] < place[f"blocks.{layer - 1}.block.query.weight"], reduced


def check_operator(world, folder):
    """Blocks that mix at once, as on a GPU in half precision, with the operator's reference in plain torch."""
    before = backbone.usable, mixing._forward
    backbone.usable, mixing._forward = (lambda x, head_dim: x.shape[1] > 1), mixing.reference
    try:
        for plan in ("after_step", "after_forward", "AC block"):
            check_gradients(world, folder, plan, "interleaved")
    finally:
        backbone.usable, mixing._forward = before


def one_step(runner, optimizer, batches, world, seed=0, stop=False):
    return train_step(
        runner, optimizer, batches, schedule=lrt.interleaved(2), seed=seed, clip_norm=1.0, world=world, stop=stop
    )


def steps(recipe, world, batches, count=4):
    runner = runner_of(recipe, world)
    optimizer = MuonAdamW(parameter_groups(named_parameters(runner.model), recipe))
    numbers = []
    for step in range(count):
        optimizer.set_rates(rates_at(step, total=10, training=recipe.training, optimizer=recipe.optimizer))
        numbers.append(one_step(runner, optimizer, batches, world, seed=step))
    return Built(runner.model, runner), optimizer, torch.stack(numbers)


def check_optimizer(world, folder):
    """Same start, same data: after four steps of Muon and AdamW on 2 ranks the weights are those of one process."""
    # in bfloat16 the last bit of a gradient turns the direction of a small matrix
    before, muon.GPU_DTYPE = muon.GPU_DTYPE, torch.float32
    try:
        _check_optimizer(world)
    finally:
        muon.GPU_DTYPE = before


def _check_optimizer(world):
    recipe = recipe_of()
    (model, _), _, numbers = steps(recipe, world, micro_batches(world))
    (plain, _), _, expected = steps(recipe, alone(world), [rows(world)])
    torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-5)
    whole = gather(model, world)
    if world.main:
        plain = plain.cpu()
        start = dict(awake(build_parallel(recipe, ONE)).named_parameters())
        for name, value in plain.named_parameters():
            moved = (value - start[name]).norm()
            assert moved > 0, name
            assert (whole[name] - value).norm() < 2e-3 * moved, (name, float((whole[name] - value).norm() / moved))


def check_muon_exact(world, folder):
    """Given the same gradients, sharded Muon is unsharded Muon bit for bit, for every shape and an uneven share of the
    stack."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh(world.device.type, (world.size,))
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 4), "b": (6, 4), "c": (6, 4), "d": (3, 5), "e": (1, 4), "f": (7, 7)}
    start = {n: torch.randn(s, generator=generator).to(world.device) for n, s in shapes.items()}

    def optimizer_of(parameters):
        group = {
            "name": "m",
            "kind": "muon",
            "params": list(parameters.items()),
            "lr": 0.1,
            "betas": (0.9, 0.95),
            "eps": 1e-10,
        }
        return MuonAdamW([{**group, "weight_decay": 0.1}])

    plain = {n: torch.nn.Parameter(t.clone()) for n, t in start.items()}
    shard = {n: torch.nn.Parameter(distribute_tensor(t.clone(), mesh, [Shard(0)])) for n, t in start.items()}
    ours, theirs = optimizer_of(shard), optimizer_of(plain)
    for _ in range(3):
        for n in shapes:
            gradient = torch.randn(shapes[n], generator=generator).to(world.device)
            plain[n].grad, shard[n].grad = gradient, distribute_tensor(gradient.clone(), mesh, [Shard(0)])
        torch.testing.assert_close(gradient_norm(shard.values()), gradient_norm(plain.values()))
        ours.step()
        theirs.step()
    for n in shapes:
        assert torch.equal(shard[n].full_tensor(), plain[n]), n
        assert torch.equal(ours.state[shard[n]]["second_moment"], theirs.state[plain[n]]["second_moment"]), n


def poisoned_gradient(module, args, output):
    output.register_hook(lambda gradient: gradient * float("nan"))


def check_skipped(world, folder):
    """A bad number on one rank skips the step on all, and nothing but the counter shows it."""
    recipe = recipe_of()
    (model, runner), optimizer, numbers = steps(recipe, world, micro_batches(world), count=2)
    before = {n: t.clone() for n, t in tensors_of(model, optimizer).items()}
    handle = model.backbone.embedding.register_forward_hook(poisoned_gradient) if world.rank == world.size - 1 else None
    bad = one_step(runner, optimizer, micro_batches(world), world)
    assert bad[2] == 0 and numbers[:, 2].eq(1).all()
    for name, tensor in tensors_of(model, optimizer).items():
        same = (
            tensor.to_local().equal(before[name].to_local())
            if hasattr(tensor, "to_local")
            else tensor.equal(before[name])
        )
        assert same, name
    if handle is not None:
        handle.remove()
    good = one_step(runner, optimizer, micro_batches(world), world, stop=True)
    assert good[2] == 1 and good[3] == world.size


def check_saved(world, folder):
    """What two ranks save, one process reads (see the test), and two ranks read what one process saved."""
    recipe = recipe_of()
    (model, _), optimizer, _ = steps(recipe, world, micro_batches(world))
    said, place = [], {"rank": world.rank, "world_size": world.size, "process_group": world.checkpoint_group}
    manager = CheckpointManager(folder / "two", config=CheckpointConfig(), recipe=recipe, report=said.append, **place)
    manager.save(4, tensors=tensors_of(model, optimizer), rank_state={"rank": world.rank}, meta={})
    assert manager.wait(), said
    whole = gather(model, world)
    if world.main:
        torch.save(whole, folder / "two.pt")
    read = tensors_of(model, optimizer)
    read_tensors(folder / "one" / "step_00000003", read, process_group=world.checkpoint_group)
    saved = torch.load(folder / "parent.pt", weights_only=True)
    assert saved.keys() == read.keys()
    for name, tensor in read.items():
        assert torch.equal((tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu(), saved[name]), (
            name
        )


def check_export(world, folder):
    recipe = recipe_of()
    model = awake(build_parallel(recipe, world))
    plain = export(model, recipe, folder / "export", world)
    batch = rows(world)
    world.barrier()
    loaded = lrt.load(folder / "export", device=world.device).eval()
    assert (plain is not None) == world.main
    expected = awake(build_parallel(recipe, alone(world))).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch.input_ids).logits, expected(batch.input_ids).logits)
        scores = model.score(batch.input_ids, batch.targets, lrt.sequential())  # an entry beside forward
    free_gathered(model)
    torch.testing.assert_close(
        scores, expected.score(batch.input_ids, batch.targets, lrt.sequential()), rtol=1e-4, atol=1e-5
    )


def check_mesh(world, folder):
    """Replicas, and on four ranks replicas of shards, in double precision."""
    with float64():
        expected, plain = gradients(recipe_of(), alone(world), [rows(world)], lrt.interleaved(2))
        for replicas in (n for n in (2, 4) if world.size % n == 0):
            recipe = recipe_of(**{"parallel.replicate": replicas})
            numbers, seen = gradients(recipe, world, micro_batches(world, size=4 // world.size), lrt.interleaved(2))
            torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-6)
            for name, gradient in plain.items():
                torch.testing.assert_close(
                    seen[name], gradient, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
                )
    text = rf"parallel.replicate = 3 x parallel.shard = -1 does not make {world.size} processes: .*divides {world.size}"
    with pytest.raises(ValueError, match=text):
        build_parallel(recipe_of(**{"parallel.replicate": 3}), world)


def check_compiled(world, folder):
    """Compiled blocks under FSDP have the plain model's gradients; on a GPU in half precision, with all its kernels,
    inside a CUDA graph."""
    (_compiled_on_gpu if world.device.type == "cuda" else _compiled)(world)


def _compiled(world):
    torch._dynamo.config.recompile_limit = parallel.GRAPHS  # as the plan sets it where it compiles
    with float64():
        for plan, schedule in (("after_step", "interleaved"), ("after_forward", "refine"), ("AC block", "interleaved")):
            runner = runner_of(recipe_of(**PLANS[plan]), world)
            for block in runner.model.blocks:
                block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
            numbers, seen = look(runner, world, micro_batches(world), SCHEDULES[schedule])
            expected, plain = gradients(recipe_of(), alone(world), [rows(world)], SCHEDULES[schedule])
            torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-6)
            assert seen.keys() == plain.keys()
            for name, gradient in plain.items():
                torch.testing.assert_close(
                    seen[name], gradient, rtol=1e-8, atol=1e-11, msg=lambda m, n=f"{plan}, {name}": f"{n}: {m}"
                )


def _compiled_on_gpu(world):
    """No farther from float32 than twice the eager sharded model in the same precision."""
    shape = {"model.width": 64, "model.n_heads": 2, "model.n_kv_heads": 2}
    half = {**shape, "parallel.param_dtype": "bfloat16"}
    batches = micro_batches(world) * 2
    for more in ({}, {"recurrence.sharing": "layerwise"}, {"parallel.reshard": "after_forward"}):
        for schedule in (lrt.interleaved(2), lrt.refine(1, weights=(0.0, 1.0))):
            _, exact = gradients(recipe_of(**shape, **more), world, batches, schedule)
            _, eager = gradients(recipe_of(**half, **more), world, batches, schedule)
            runner = runner_of(recipe_of(**half, **more, **{"parallel.compile": "true"}), world)
            _, seen = look(runner, world, batches, schedule)
            assert seen.keys() == eager.keys() == exact.keys()
            for name, gradient in exact.items():
                far, near = ((g[name] - gradient).norm() / gradient.norm().clamp_min(1e-9) for g in (seen, eager))
                assert far <= 2 * near + 5e-3, (more, schedule, name, float(far), float(near))


def check_bfloat16(world, folder):
    """Masters stay float32, and so does the sum over micro-batches; the computation in bfloat16 is near the one in
    float32."""
    half, batches = {"parallel.param_dtype": "bfloat16"}, micro_batches(world) * 4
    numbers, seen = gradients(recipe_of(**half), world, batches, lrt.interleaved(2))
    # reduced in each
    _, each = gradients(recipe_of(**half, **{"parallel.reshard": "after_forward"}), world, batches, lrt.interleaved(2))
    expected, plain = gradients(recipe_of(), alone(world), [rows(world)], lrt.interleaved(2))
    assert all(g.dtype == torch.float32 for g in seen.values()) and seen.keys() == each.keys() == plain.keys()
    for name, gradient in each.items():
        assert (seen[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert abs(float(numbers[0] - expected[0])) < 0.05 * float(expected[0])
    assert numbers[0] != expected[0]


def check_decoded(world, folder):
    """Mode ``decode`` token by token, on a GPU in the kernels of decoding, is the sequential schedule's score;
    training goes on after it."""
    gpu = world.device.type == "cuda"
    recipe = recipe_of(**{"model.width": 32, "model.n_heads": 2, "evaluation.modes": '["decode"]'})
    runner, plain = runner_of(recipe, world), awake(build_parallel(recipe, alone(world))).train()
    model, batch = runner.model, rows(world)
    given = batch.input_ids, batch.targets
    expected = plain.score(*given, lrt.sequential())[-1].detach()
    before, asked = (evaluation.accelerate, evaluation._token_by_token), []
    if not gpu:
        evaluation.accelerate = lambda model: model  # nothing here is about compiling
    evaluation._token_by_token = lambda *a, **k: (asked.append(k), before[1](*a, **k))[1]
    try:
        nats = before[1](model, runner=decoding.graphed)(*given)
        free_gathered(model)
        tokenizer = SimpleNamespace(token_bytes=lambda: np.ones(37, dtype=np.int64))
        batches = [Batch(batch.input_ids[i : i + 2], batch.targets[i : i + 2], ()) for i in (0, 2)][
            world.rank :: world.size
        ]
        scores, *_ = evaluate(model, recipe, batches, tokenizer, world, progress=lambda: None)
    finally:
        evaluation.accelerate, evaluation._token_by_token = before
    assert asked == ([{"runner": decoding.graphed}] if gpu else [])
    torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-5)
    assert scores["decode"].value == pytest.approx(
        float(expected.double().sum()) / scores["decode"].bytes / np.log(2), rel=1e-4
    )
    assert (
        one_step(runner, MuonAdamW(parameter_groups(named_parameters(model), recipe)), micro_batches(world), world)[2]
        == 1
    )


def check_gathered(world, folder):
    """The kernels of decoding read whole parameters, though nothing tells FSDP that they do."""
    before, seen = (evaluation.can_fuse, evaluation.accelerate, launching.launch), []

    def launch(name, grid, *args, **settings):
        for x in (
            y
            for given in args
            for y in (given if isinstance(given, tuple) else (given,))
            if isinstance(y, torch.Tensor)
        ):
            assert not hasattr(x, "full_tensor") and x.untyped_storage().size() >= x.numel() * x.element_size(), name
        seen.append(name)

    evaluation.can_fuse = lambda model: True
    evaluation.accelerate = lambda model: Accelerated(
        model, one_token=one_token.fuse(model), blocks=list(model.blocks), compiled=lambda f: f
    )
    launching.launch = launch
    try:
        for more in (
            {},
            {"recurrence.sharing": "layerwise"},
            {"parallel.activation_checkpointing": "block", "parallel.param_dtype": "bfloat16"},
        ):
            recipe = recipe_of(**{"model.width": 32, "model.n_heads": 2, **more})
            model, batch = awake(build_parallel(recipe, world)).train(), rows(world)
            evaluation._token_by_token(model, runner=decoding.eager)(batch.input_ids, batch.targets)
            free_gathered(model)
            assert {"start_kernel", "attention_kernel", "memory_kernel"} < set(seen)
            seen.clear()
    finally:
        evaluation.can_fuse, evaluation.accelerate, launching.launch = before


def check_evaluation(world, folder):
    """Bits per byte and activations of sharded, checkpointed, compiled blocks are those of a plain model on the same
    rows."""
    batch = rows(world)
    # global row n: rank n // 2 % ranks
    batches = [Batch(batch.input_ids[i : i + 2], batch.targets[i : i + 2], ()) for i in (0, 2)]
    tokenizer = SimpleNamespace(token_bytes=lambda: np.ones(37, dtype=np.int64))
    more = {
        "parallel.reshard": "after_forward",
        "parallel.activation_checkpointing": "block",
        "schedule.kind": "refine",
        "schedule.passes": 2,
    }
    torch._dynamo.config.recompile_limit = parallel.GRAPHS  # as the plan sets it where it compiles
    with float64():
        for sharing in ("shared", "layerwise"):
            recipe = recipe_of(**more, **{"recurrence.sharing": sharing})
            runner, plain = runner_of(recipe, world), awake(build_parallel(recipe, alone(world))).train()
            model = runner.model
            for block in model.blocks:
                block.compile(backend="eager", fullgraph=True, dynamic=False)
            nothing = {"progress": lambda: None}
            scores, activations, _ = evaluate(
                model, recipe, batches[world.rank :: world.size], tokenizer, world, **nothing
            )
            expected, numbers, _ = evaluate(plain, recipe, batches, tokenizer, alone(world), **nothing)
            for mode, score in scores.items():
                assert score.value == pytest.approx(expected[mode].value, rel=1e-9)
            assert (
                {"injection_ratio", "memory_gate", "value_ratio", "source_norm"} <= activations.keys() == numbers.keys()
            )
            # rank 0's are recorded; the others saw other rows
            for name, table in numbers.items() if world.main else ():
                for key, values in table.items():
                    assert activations[name][key] == pytest.approx(values, rel=1e-5, abs=1e-12), (name, key)
            free_gathered(model)
            assert (
                one_step(
                    runner, MuonAdamW(parameter_groups(named_parameters(model), recipe)), micro_batches(world), world
                )[2]
                == 1
            )


GRADIENTS = [
    (plan, schedule)
    for plan in PLANS
    for schedule in SCHEDULES
    if plan == "after_step" or schedule in ("interleaved", "refine")
]
CHECKS = {
    **{f"gradients: {p}, {s}": lambda w, f, p=p, s=s: check_gradients(w, f, p, s) for p, s in GRADIENTS},
    "operator": check_operator,
    "replayed": check_replayed,
    "reductions": check_reductions,
    "optimizer": check_optimizer,
    "muon exact": check_muon_exact,
    "skipped": check_skipped,
    "saved": check_saved,
    "export": check_export,
    "mesh": check_mesh,
    "compiled": check_compiled,
    "bfloat16": check_bfloat16,
    "decoded": check_decoded,
    "gathered": check_gathered,
    "evaluation": check_evaluation,
}


ON_FOUR = ("mesh", "gradients: after_step, interleaved", "optimizer", "replayed", "gathered")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    with open_world(recipe_of()) as world:
        for name, check in CHECKS.items():
            if world.size > 2 and name not in ON_FOUR:
                continue
            results[name] = "ok"
            try:
                check(world, folder)
                if world.device.type == "cuda":
                    torch.cuda.synchronize()  # a failure belongs to the check that caused it
            except (Exception, pytest.fail.Exception) as error:
                results[name] = traceback.format_exc()
                if any(word in str(error) for word in ("Timed out", "closed", "NCCL", "CUDA error")):
                    break  # the ranks have lost each other
            finally:
                (folder / f"results{world.rank}.json").write_text(json.dumps(results))


def launch(folder, *, ranks, gpu):
    """Results of every rank."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        __file__,
        str(folder),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent.parent), *sys.path]),
    }
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    found = {}
    for rank in range(ranks):
        with contextlib.suppress(FileNotFoundError):
            found[rank] = json.loads((folder / f"results{rank}.json").read_text())
    assert len(found) == ranks and result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-5000:]}"
    return found


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=gpus(2))])
def launched(request, tmp_path_factory):
    folder, gpu = tmp_path_factory.mktemp("two_ranks"), request.param == "gpu"
    recipe = recipe_of()
    (model, _), optimizer, _ = steps(recipe, ONE, [rows(ONE)], count=3)
    torch.save({n: t.clone() for n, t in tensors_of(model, optimizer).items()}, folder / "parent.pt")
    manager = CheckpointManager(folder / "one", config=CheckpointConfig(), recipe=recipe)
    manager.save(3, tensors=tensors_of(model, optimizer), rank_state={}, meta={})
    assert manager.wait()
    return folder, launch(folder, ranks=2, gpu=gpu)


@pytest.fixture(
    scope="module", params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("gpu", marks=gpus(4))]
)
def launched_on_four(request, tmp_path_factory):
    return launch(tmp_path_factory.mktemp("four_ranks"), ranks=4, gpu=request.param == "gpu")


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_equal_one(launched, name):
    for rank, results in launched[1].items():
        assert results.get(name) == "ok", f"rank {rank}: {results.get(name, 'not reached')}"


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_equal_one(launched_on_four, name):
    for rank, results in launched_on_four.items():
        assert results.get(name) == "ok", f"rank {rank}: {results.get(name, 'not reached')}"


def test_one_process_reads_what_two_saved(launched):
    folder = launched[0]
    newest = latest(folder / "two")
    recipe = recipe_of()
    (model, _), optimizer, _ = steps(recipe, ONE, [rows(ONE)], count=1)
    read_tensors(newest, tensors_of(model, optimizer))
    saved = torch.load(folder / "two.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    assert [state["rank"] for state in read_rest(newest).rank_states] == sorted(launched[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
