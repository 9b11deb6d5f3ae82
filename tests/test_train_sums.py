"""Sums of gradients: whatever came before and however a table is read, they are those of plain PyTorch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrt
from lrt.backbone import lookup
from lrt.config import ModelConfig, Recipe, RecurrenceConfig
from lrt.model import build
from lrt.train.parallel import token_tables
from lrt.train.replay import Runner, working_copy

SCHEDULES = [lrt.baseline(), lrt.refine(1, weights=(0.0, 1.0)), lrt.interleaved(2)]


def small():
    torch.manual_seed(0)
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=32, sequence_length=8, window_pattern="L")
    model = build(Recipe(model=config, recurrence=RecurrenceConfig(separator=1))).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def runner_of(model, *, compiled_tables):
    """A runner as ``single_device`` makes it; a lookup that is not the plain one stands for the compiled one."""
    work = working_copy(model, dtype=torch.float64)
    for table in token_tables(work) if compiled_tables else ():
        table.lookup = lambda *args: lookup(*args)
    return Runner(model, work, graphs=False)


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


@given(steps=st.lists(st.lists(st.sampled_from(SCHEDULES), min_size=1, max_size=3), min_size=1, max_size=2), compiled_tables=st.booleans())
@settings(max_examples=15, deadline=None)
def test_sums_are_the_gradients_of_the_model(steps, compiled_tables):
    """Over steps of several micro-batches, also of different schedules, which give gradients to different parameters."""
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, compiled_tables=compiled_tables)
    for step in steps:
        model.zero_grad(set_to_none=True), plain.zero_grad(set_to_none=True)
        for seed, schedule in enumerate(step):
            add_plain(plain, seed, schedule)
            add_ours(runner, seed, schedule)
        assert_same(model, plain)


@pytest.mark.parametrize("compiled_tables", [False, True])
def test_gradients_from_elsewhere_are_added_to(compiled_tables):
    """Those that the masters' own backward left, before and between."""
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, compiled_tables=compiled_tables)
    for seed in range(4):
        add_plain(plain, seed, SCHEDULES[2])
        if seed % 2 == 0:
            add_plain(model, seed, SCHEDULES[2])
        else:
            add_ours(runner, seed, SCHEDULES[2])
    assert_same(model, plain)


@pytest.mark.parametrize("compiled_tables", [False, True])
def test_a_bad_number_does_not_outlive_its_step(compiled_tables):
    model = small()
    plain, runner = copy.deepcopy(model), runner_of(model, compiled_tables=compiled_tables)
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
    runner = runner_of(model, compiled_tables=True)
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
    runner = runner_of(model, compiled_tables=True)
    add_ours(runner, 0, SCHEDULES[2])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert runner.sums.bytes == sum(p.numel() * p.element_size() for p in trained)
    assert all(p.grad is None for p in model.backbone.parameters()) and any(p.grad is not None for p in trained)
