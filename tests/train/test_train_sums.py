"""Sums of gradients: whatever came before and however a table is read, they are those of plain PyTorch."""

import contextlib
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
from lrt.engine.compiled import is_compiled
from lrt.model import build
from lrt.train.distributed.gradient_sums import Sums, add_parts, twin_of
from lrt.train.distributed.graphs import Runner, working_copy
from lrt.train.distributed.parallel import checkpointed, token_tables

SCHEDULES = [
    lrt.baseline(),
    lrt.refine(1, weights=(0.0, 1.0)),
    lrt.interleaved(2),
    lrt.interleaved(3, sweeps=2),
    lrt.chunked(4),
]


def small(layers=2, **recurrence):
    torch.manual_seed(0)
    config = ModelConfig(n_layers=layers, width=16, n_heads=2, vocab_size=32, sequence_length=8, window_pattern="L")
    model = build(Recipe(model=config, recurrence=RecurrenceConfig(separator=1, **recurrence))).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def runner_of(model, *, gpu, dtype=torch.float64):
    """A runner as ``single_device`` makes it, on a GPU or not; a lookup that is not the plain one stands for the
    compiled one."""
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
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


@given(
    steps=st.lists(st.lists(st.sampled_from(SCHEDULES), min_size=1, max_size=3), min_size=1, max_size=2),
    gpu=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_sums_are_the_gradients_of_the_model(steps, gpu):
    """Over steps of several micro-batches, also of different schedules, which give gradients to different
    parameters."""
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


@pytest.mark.parametrize("gpu", [False, True])
def test_an_exception_loses_no_earlier_micro_batch_or_the_whole_step(gpu):
    """In the forward nothing has been added yet; in the backward a part has, so nothing of the step is left,
    in no parameter."""
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=gpu)
    for seed in (0, 2):
        add_plain(plain, seed, SCHEDULES[2])
    add_ours(runner, 0, SCHEDULES[2])
    wrong = torch.full((2, 8), 99)
    with pytest.raises(ValueError, match="99"):
        runner.forward_backward(wrong, wrong, schedule=SCHEDULES[2], seed=0, valid_targets=torch.tensor(16))
    add_ours(runner, 2, SCHEDULES[2])
    assert_same(model, plain)

    with (
        mock.patch("lrt.engine.plain.reset_memory", lambda received, starts: Failing.apply(received)),
        pytest.raises(RuntimeError, match="cut"),
    ):
        add_ours(runner, 0, SCHEDULES[2])  # after the last pass, whose blocks have their gradients
    assert all(p.grad is None for p in (*model.parameters(), *runner.compute.parameters()))
    plain.zero_grad(set_to_none=True)
    add_plain(plain, 1, SCHEDULES[2])
    add_ours(runner, 1, SCHEDULES[2])
    assert_same(model, plain)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("cut")


def test_a_table_that_is_also_read_as_a_weight():
    """A tied head: rows of the table and the gradient of the whole matrix come to one sum."""
    model = small()
    model.backbone.head.weight = model.backbone.embedding.weight
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=True)
    for seed in range(2):
        add_plain(plain, seed, SCHEDULES[2])
        add_ours(runner, seed, SCHEDULES[2])
    assert_same(model, plain)


# ------------------------------------------------------------------ graphs, played on a CPU


class Graph:
    """What a CUDA graph does, by running again what was captured; nothing in python changes."""

    def replay(self):
        runner = self.runner
        kept = [p.grad for p in runner.model.parameters()]
        for parameter in runner.model.parameters():
            parameter.grad = None
        scores, _ = runner._run(*self.arguments, place=self.place)
        for parameter, gradient in zip(runner.model.parameters(), kept):
            parameter.grad = gradient
        self.scores.copy_(scores)


@contextlib.contextmanager
def played(runner):
    """Captures of this runner become ``Graph``; a capture computes nothing, so the sums are what they were before."""
    run = runner._run

    @contextlib.contextmanager
    def capture(graph, **_):
        before = [total.clone() for total in runner.sums._totals]

        def recorded(*arguments, place):
            graph.runner, graph.arguments, graph.place = runner, arguments, place
            graph.scores, gradients = run(*arguments, place=place)
            return graph.scores, gradients

        runner._run = recorded
        yield
        del runner._run
        for total, value in zip(runner.sums._totals, before):
            total.copy_(value)

    stream = mock.Mock()
    with contextlib.ExitStack() as stack:
        for name, value in {
            "graph": capture,
            "CUDAGraph": Graph,
            "Stream": stream,
            "stream": lambda s: contextlib.nullcontext(),
        }.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", value))
        for name in ("current_stream", "synchronize", "empty_cache"):
            stack.enter_context(mock.patch(f"torch.cuda.{name}", stream))
        stack.enter_context(mock.patch("lrt.train.distributed.graphs.register_graph", stream))
        yield


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_graphs_write_or_add_as_the_step_needs(data):
    """Any order of plans, on top of gradients of other plans and of the masters' own, over sums that hold anything."""
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=True)
    runner._graphs = {}
    with played(runner):
        for _ in range(3):
            model.zero_grad(set_to_none=True), plain.zero_grad(set_to_none=True)
            for total in runner.sums._totals:
                total.fill_(float("nan"))
            for seed in range(data.draw(st.integers(1, 3))):
                if data.draw(st.booleans()):
                    add_plain(model, seed, SCHEDULES[2]), add_plain(plain, seed, SCHEDULES[2])
                schedule = data.draw(st.sampled_from(SCHEDULES))
                add_plain(plain, seed, schedule)
                add_ours(runner, seed, schedule)
            assert_same(model, plain)


# ------------------------------------------------------------------ twins


def test_a_twin_shares_weights_and_compiled_graphs_and_nothing_else():
    torch._dynamo.reset()
    model = small()

    def compile_blocks(model):
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)

    compile_blocks(model)
    with mock.patch("lrt.train.distributed.gradient_sums.compile_blocks", compile_blocks):
        twin, own = twin_of(model)
    pairs = list(zip(model.named_parameters(), twin.named_parameters(), strict=True))
    assert all(a == b and p.data_ptr() == q.data_ptr() for (a, p), (b, q) in pairs)
    apart = {name for (name, p), (_, q) in pairs if p is not q}
    assert apart == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    assert all(own[id(p)] is q for (_, p), (_, q) in pairs if p is not q)
    assert (
        all(map(is_compiled, twin.blocks)) and twin.blocks[0] is not model.blocks[0] and twin.backbone is model.backbone
    )
    graphs = []
    for one in (model, twin, model):
        add_plain(one, 0, SCHEDULES[2])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


def test_passes_are_added_up_in_the_precision_of_the_masters():
    """Gradients of three passes in half precision: their sum is rounded nowhere, where autograd rounds every
    addition."""
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
    assert runner.compute.twins.made == []
    add_ours(runner, 0, SCHEDULES[2])
    assert len(runner.compute.twins.made) == 2


def test_many_passes_share_the_last_twin():
    """Gradients of passes are held until the backward's end, so their number has a limit."""
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=True)
    schedule = lrt.interleaved(3, sweeps=2, order="random")
    add_ours(runner, 0, schedule)
    tokens, targets = batch(0)
    generator = torch.Generator().manual_seed(0)
    plain(
        tokens, targets=targets, schedule=schedule, valid_targets=torch.tensor(16), generator=generator
    ).loss.backward()
    assert_same(model, plain)
    assert len(runner.compute.twins.made) == 3 and max(map(len, runner.sums._leaves)) == 4


def test_narrow_passes_have_twins_and_the_blocks_that_they_share_have_none():
    model = small(layers=4, blocks=(3, 4))
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=True)
    for seed, schedule in enumerate(
        [lrt.refine(2, weights=(0.3, 0, 0.7)), lrt.interleaved(3, sweeps=2), lrt.interleaved(2, kv_refresh=True)]
    ):
        add_plain(plain, seed, schedule)
        add_ours(runner, seed, schedule)
        assert_same(model, plain)
    calls = []
    for twin in runner.compute.twins.made:
        for index, block in enumerate(twin.blocks):
            block.register_forward_pre_hook(lambda module, args, index=index: calls.append(index))
    add_ours(runner, 0, lrt.refine(2))
    assert sorted(calls) == [2, 2, 3, 3]


@pytest.mark.parametrize("selective", [False, True])
def test_twins_of_checkpointed_blocks(selective):
    model = small()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpointed(block, selective=selective)
    plain, runner = copy.deepcopy(model), runner_of(model, gpu=True)
    add_plain(plain, 0, SCHEDULES[2])
    add_ours(runner, 0, SCHEDULES[2])
    assert_same(model, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
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
