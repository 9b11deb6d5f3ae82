"""Sums of gradients: whatever came before and however a table is read, they are those of plain PyTorch."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import lrt
from lrt.backbone import lookup
from lrt.config import ModelConfig, Recipe, RecurrenceConfig
from lrt.model import build
from lrt.passes import compiled
from lrt.train.parallel import token_tables
from lrt.train.replay import Runner, working_copy
from lrt.train.sums import Sums, add_parts, twin_of

SCHEDULES = [lrt.baseline(), lrt.refine(1, weights=(0.0, 1.0)), lrt.interleaved(2), lrt.interleaved(3, sweeps=2), lrt.chunked(4)]


def small():
    torch.manual_seed(0)
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=32, sequence_length=8, window_pattern="L")
    model = build(Recipe(model=config, recurrence=RecurrenceConfig(separator=1))).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def runner_of(model, *, gpu, dtype=torch.float64):
    """A runner as ``single_device`` makes it, on a GPU or not; a lookup that is not the plain one stands for the compiled one."""
    work = working_copy(model, dtype=dtype)
    for table in token_tables(work) if gpu else ():
        table.lookup = lambda *args: lookup(*args)
    runner = Runner(model, work, graphs=False)
    if gpu:
        runner.sums = Sums(list(model.parameters()), work, apart=True)
    return runner


def batch(seed):
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def add_plain(model, seed, schedule):
    tokens, targets = batch(seed)
    model(tokens, targets=targets, schedule=schedule, valid_targets=torch.tensor(16)).loss.backward()


def add_ours(runner, seed, schedule, **place):
    tokens, targets = batch(seed)
    runner.forward_backward(tokens, targets, schedule=schedule, seed=0, valid_targets=torch.tensor(16), **place)


def assert_same(model, plain):
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@given(steps=st.lists(st.lists(st.sampled_from(SCHEDULES), min_size=1, max_size=3), min_size=1, max_size=2), gpu=st.booleans())
@settings(max_examples=15, deadline=None)
def test_sums_are_the_gradients_of_the_model(steps, gpu):
    """Over steps of several micro-batches, also of different schedules, which give gradients to different parameters."""
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=gpu)
    for step in steps:
        model.zero_grad(set_to_none=True), plain.zero_grad(set_to_none=True)
        for seed, schedule in enumerate(step):
            add_plain(plain, seed, schedule)
            add_ours(runner, seed, schedule)
        assert_same(model, plain)


@pytest.mark.parametrize("gpu", [False, True])
def test_gradients_from_elsewhere_are_added_to(gpu):
    """Those that the masters' own backward left, before and between."""
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=gpu)
    for seed in range(4):
        add_plain(plain, seed, SCHEDULES[2])
        if seed % 2 == 0:
            add_plain(model, seed, SCHEDULES[2])
        else:
            add_ours(runner, seed, SCHEDULES[2])
    assert_same(model, plain)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_bad_number_does_not_outlive_its_step(gpu):
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=gpu)
    add_ours(runner, 0, SCHEDULES[2])
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("nan"))
    model.zero_grad(set_to_none=True)
    add_ours(runner, 1, SCHEDULES[2])
    add_plain(plain, 1, SCHEDULES[2])
    assert_same(model, plain)


def test_gradients_stay_where_they_are_and_none_are_left_with_the_copy():
    model = small()
    runner = runner_of(model, gpu=True)
    places = []
    for _ in range(2):
        for seed in range(2):
            add_ours(runner, seed, SCHEDULES[2], first=seed == 0, last=seed == 1)
            places.append({name: p.grad.data_ptr() for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in runner.compute.parameters())
    assert all(p == places[0] for p in places)


def test_frozen_parameters_cost_nothing():
    model = small()
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    runner = runner_of(model, gpu=True)
    add_ours(runner, 0, SCHEDULES[2])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert runner.sums.bytes == sum(p.numel() * p.element_size() for p in trained)
    assert all(p.grad is None for p in model.backbone.parameters()) and any(p.grad is not None for p in trained)


# ------------------------------------------------------------------ twins


def test_a_twin_shares_weights_and_compiled_graphs_and_nothing_else():
    torch._dynamo.reset()
    model = small()

    def compile_blocks(model):
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)

    compile_blocks(model)
    with mock.patch("lrt.train.sums.compile_blocks", compile_blocks):
        twin = twin_of(model)
    pairs = list(zip(model.named_parameters(), twin.named_parameters(), strict=True))
    assert all(a == b and p.data_ptr() == q.data_ptr() for (a, p), (b, q) in pairs)
    apart = {name for (name, p), (_, q) in pairs if p is not q}
    assert apart == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    assert compiled(twin) and twin.blocks[0] is not model.blocks[0] and twin.backbone is model.backbone
    graphs = []
    for one in (model, twin, model):
        add_plain(one, 0, SCHEDULES[2])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


def test_passes_are_added_up_in_the_precision_of_the_masters():
    """Gradients of three passes in half precision: their sum is rounded nowhere, where autograd rounds every addition."""
    model = small().float()
    tokens, targets = batch(0)
    together, apart = (runner_of(copy.deepcopy(model), gpu=gpu, dtype=torch.bfloat16) for gpu in (False, True))
    for runner in (together, apart):
        add_ours(runner, 0, SCHEDULES[2])
    rounded = [torch.equal(p.grad, p.grad.bfloat16().float()) for p in together.model.blocks.parameters()]
    exact = [torch.equal(p.grad, p.grad.bfloat16().float()) for p in apart.model.blocks.parameters()]
    assert all(rounded) and not all(exact)
    for a, b in zip(together.model.parameters(), apart.model.parameters()):
        assert (a.grad - b.grad).norm() <= 2**-7 * b.grad.norm()


def test_an_evaluation_makes_no_twins():
    model = small()
    runner = runner_of(model, gpu=True)
    with torch.no_grad():
        runner.refresh().score(*batch(0), SCHEDULES[2])
    assert runner.sums._twins == []
    add_ours(runner, 0, SCHEDULES[2])
    assert len(runner.sums._twins) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("add", [False, True])
def test_the_kernel_that_adds(count, add):
    for size in (1, 2047, 2048, 70_001):
        total = torch.randn(size, device="cuda")
        parts = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        exact = sum(part.double() for part in parts) + (total.double() if add else 0)
        before = total.data_ptr()
        add_parts(total, parts, add=add)
        assert total.data_ptr() == before
        torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-6)
