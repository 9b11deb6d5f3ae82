"""Schedules as plain data: what they cover, what they cost, what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small

import lrt
from lrt.accounting import Work, training_flops, work_flops
from lrt.config import ScheduleConfig, parse_recipe
from lrt.eval.bpb import evaluate_bpb
from lrt.schedules import from_config
from lrt.types import Pass


def positions(step):
    return list(range(step.start, step.stop, step.step))


@given(
    S=st.integers(1, 12),
    sweeps=st.integers(1, 3),
    length=st.integers(1, 12),
    order=st.sampled_from(["ascending", "rotated", "random"]),
    seed=st.integers(0, 99),
)
def test_every_sweep_visits_every_position_once(S, sweeps, length, order, seed):
    schedule = lrt.interleaved(S, sweeps=sweeps, order=order if S > 1 else "ascending")
    plan = schedule.plan(length, generator=torch.Generator().manual_seed(seed))
    assert positions(plan[0]) == list(range(length)) and plan[0].memory == "zero"
    for group in range(1, sweeps + 1):
        members = [step for step in plan if step.group == group]
        assert len(members) == min(S, length)
        assert sorted(t for step in members for t in positions(step)) == list(range(length))
        assert all({t % min(S, length) for t in positions(step)} == {step.start} for step in members)
    if order == "ascending":
        starts = [step.start for step in plan[1:]]
        assert starts == list(range(min(S, length))) * sweeps
    assert len(schedule.group_weights(length)) == 1 + sweeps


@given(chunk=st.integers(1, 9), length=st.integers(1, 12))
def test_chunks_tile_the_row_from_left_to_right(chunk, length):
    plan = lrt.chunked(chunk).plan(length)
    assert [t for step in plan for t in positions(step)] == list(range(length))
    assert [step.memory for step in plan] == ["zero"] + ["first"] * (len(plan) - 1)


def test_orders_are_drawn_from_the_generator():
    def draw(order, seed):
        generator = torch.Generator().manual_seed(seed)
        return [s.start for s in lrt.interleaved(8, order=order).plan(64, generator=generator)[1:]]

    for order in ("rotated", "random"):
        assert draw(order, 3) == draw(order, 3)
        assert len({tuple(draw(order, seed)) for seed in range(20)}) > 3
    assert all(
        sorted(draw("rotated", s)) == list(range(8)) and (draw("rotated", s)[1] - draw("rotated", s)[0]) % 8 == 1
        for s in range(20)
    )


def test_paper_weights_and_token_compute():
    assert lrt.interleaved(2, sweeps=3).group_weights(64) == (1.0, 2.0, 2.0, 2.0)
    assert lrt.interleaved(8).group_weights(4) == (1.0, 4.0)
    assert lrt.refine(2).group_weights(64) == (1.0, 1.0, 1.0)
    assert lrt.refine(2, weights=(0.1, 0.3, 0.6)).group_weights(64) == (0.1, 0.3, 0.6)
    costs = [
        s.token_compute
        for s in (lrt.baseline(), lrt.chunked(3), lrt.sequential(), lrt.refine(3), lrt.interleaved(4, sweeps=2))
    ]
    assert costs == [1, 1, 1, 4, 3]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: lrt.interleaved(0), r"schedule.subsets = 0: use a whole number of 1 or more"),
        (lambda: lrt.interleaved(2, sweeps=0), r"schedule.sweeps = 0"),
        (lambda: lrt.refine(0), r"schedule.passes = 0"),
        (lambda: lrt.chunked(-1), r"schedule.chunks = -1"),
        (lambda: lrt.interleaved(2.5), r"schedule.subsets = 2.5: use a whole number"),
        (lambda: lrt.interleaved(2, order="up"), r"schedule.order = 'up': use ascending, rotated or random"),
        (lambda: lrt.interleaved(1, order="random"), r"has no effect with one subset"),
        (lambda: lrt.interleaved(1, kv_refresh=True), r"schedule.kv_refresh has no effect with subsets = 1"),
        (
            lambda: lrt.interleaved(2, sweeps=2, kv_refresh=True),
            r"schedule.kv_refresh has no effect with subsets = 2, sweeps = 2",
        ),
        (
            lambda: lrt.interleaved(8, kv_refresh=True).plan(8),
            r"schedule.kv_refresh has no effect with 8 subsets of a row of 8 tokens",
        ),
        (lambda: lrt.refine(2, weights=(1, 1)), r"schedule.weights has 2 values, but there are 3 groups"),
        (lambda: lrt.refine(1, weights=(0, 0)), r"at least one must be above 0"),
        (lambda: lrt.refine(1, weights=(-1, 2)), r"use finite weights of 0 or more"),
        (lambda: lrt.refine(1, weights=3), r'schedule.weights = 3: use "paper" or a list of 2 numbers'),
        (
            lambda: lrt.refine(1, weights=["a", 1]),
            r"schedule.weights = \['a', 1\]: use \"paper\" or a list of 2 numbers",
        ),
        (lambda: lrt.refine(1, settle=-1), r"schedule.settle = -1: use a whole number of 0 or more"),
        (lambda: lrt.refine(1, settle=True), r"schedule.settle = True"),
        (lambda: lrt.refine(1, weights="mean"), r'use "paper" or a list of 2 numbers'),
    ],
)
def test_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_from_config_is_the_constructor():
    assert from_config(ScheduleConfig()) == lrt.interleaved(2)
    assert from_config(ScheduleConfig(kind="refine", passes=2, weights=(1.0, 2.0, 3.0))) == lrt.refine(
        2, weights=(1, 2, 3)
    )
    assert from_config(ScheduleConfig(kind="baseline")) == lrt.baseline()
    assert from_config(ScheduleConfig(kind="chunked", chunks=7)) == lrt.chunked(7)
    assert from_config(ScheduleConfig(kind="sequential")) == lrt.sequential()


def test_settling_passes_have_no_group_and_no_gradient():
    def kinds(schedule):
        return [(step.group, step.graded) for step in schedule.plan(8)]

    assert kinds(lrt.refine(2, settle=2)) == [(0, True), (-1, False), (-1, False), (1, True), (2, True)]
    # it would hand on nothing
    assert kinds(lrt.refine(1, weights=(0, 1), settle=1)) == [(0, False), (-1, False), (1, True)]
    assert kinds(lrt.refine(1, weights=(0, 1))) == [(0, True), (1, True)]
    assert lrt.refine(1, "paper", False, 3) == lrt.refine(1, settle=3) and lrt.refine(1, settle=3).token_compute == 5


def test_settling_passes_cost_a_forward_to_the_source(tmp_path):
    text = (
        "[model]\nn_layers = 4\nwidth = 32\nn_heads = 2\nvocab_size = 32\nsequence_length = 8\n[recurrence]\n"
        "source_layer = 3\n"
    )
    model = lrt.build(parse_recipe(text + '[schedule]\nkind = "refine"\nsettle = 2\n'))
    assert model.train_schedule == lrt.refine(1, settle=2)
    more = training_flops(model, lrt.refine(1, settle=2), 8) - training_flops(model, lrt.refine(1), 8)
    a_pass = work_flops(model, [Work(1.0, 0, 3, received=True, scored=False)], length=8)
    assert more == pytest.approx(2 * a_pass)
    lrt.save(model, tmp_path / "model")
    assert lrt.load(tmp_path / "model").train_schedule == lrt.refine(1, settle=2)


# ------------------------------------------------------------------ mixtures


def test_a_mixture_draws_its_members_by_their_shares():
    members = {lrt.baseline(): 0.5, lrt.refine(1): 0.3, lrt.interleaved(3): 0.2}
    mixed = lrt.mixture([(share, schedule) for schedule, share in members.items()])
    generator = torch.Generator().manual_seed(0)
    drawn = [mixed.draw(generator) for _ in range(3000)]
    for schedule, share in members.items():
        assert abs(drawn.count(schedule) / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    assert mixed.draw(torch.Generator().manual_seed(5)) == mixed.draw(torch.Generator().manual_seed(5))
    assert lrt.mixture([(1, lrt.refine(2))]).draw(generator) == lrt.refine(2)
    assert lrt.mixture([(1 / 3, lrt.baseline())] * 3).draw(generator) == lrt.baseline()  # a sum within 1e-6 of 1


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([], r"schedule.mix = \[\]: give at least one pair"),
        ([(0.5, lrt.baseline()), (0.4, lrt.refine(1))], r"shares that sum to 0.9: they must sum to 1"),
        ([(1.000002, lrt.baseline())], r"shares \[1.000002\]: use numbers above 0, at most 1"),
        ([(0.0, lrt.baseline()), (1.0, lrt.refine(1))], r"shares \[0.0, 1.0\]: use numbers above 0"),
        ([(float("nan"), lrt.baseline())], r"use numbers above 0"),
        ([(1.0, "refine")], r"schedule.mix holds 'refine': use lrt.baseline\(\)"),
        ([(1.0, lrt.mixture([(1.0, lrt.baseline())]))], r"schedule.mix holds Mixture"),
    ],
)
def test_mixtures_that_are_none(members, text):
    with pytest.raises(ValueError, match=text):
        lrt.mixture(members)


def test_a_model_call_draws_from_its_generator(tmp_path):
    """One member for the whole call; where one schedule is asked for, the member with most passes stands for all."""
    text = "[model]\nn_layers = 2\nwidth = 16\nn_heads = 2\nvocab_size = 32\nsequence_length = 8\n"
    model = lrt.build(parse_recipe(text)).train()
    tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    mixed = lrt.mixture([(0.4, lrt.baseline()), (0.3, lrt.refine(2)), (0.3, lrt.interleaved(2))])
    seen = set()
    for seed in range(12):
        expected = mixed.draw(torch.Generator().manual_seed(seed))
        for arguments in ({"schedule": mixed}, {}):
            model.train_schedule = mixed
            out = model(tokens, targets=tokens, generator=torch.Generator().manual_seed(seed), **arguments)
            assert torch.equal(out.loss, model(tokens, targets=tokens, schedule=expected).loss)
        seen.add(expected)
    assert len(seen) == 3
    lrt.save(model, tmp_path / "model")
    assert lrt.load(tmp_path / "model").train_schedule == lrt.refine(2)
    batch = SimpleNamespace(input_ids=tokens, targets=tokens)
    scores = [
        evaluate_bpb(model, [batch], token_bytes=torch.ones(32).long(), modes=["parallel"], schedule=s)
        for s in (None, lrt.refine(2))
    ]
    assert scores[0]["parallel"].groups == scores[1]["parallel"].groups


class Own:
    """A schedule of one's own: a plan and weights, whatever they are."""

    cut_gradient, kv_refresh, token_compute = False, False, 2

    def __init__(self, plan, weights):
        self._plan, self._weights = tuple(Pass(*step) for step in plan), weights

    def group_weights(self, length):
        return self._weights

    def plan(self, length, *, generator=None):
        return self._plan


def test_a_schedule_of_ones_own_runs_or_its_plan_is_refused():
    """Plans of other shapes were an IndexError, or ran as something else."""
    model = small().train()
    ids = torch.arange(16).reshape(2, 8) % 13
    whole = (0, 8, 1, 0, "zero")
    right = [
        ([whole], (1.0,)),
        ([whole, (0, 8, 1, 1, "all")], (1.0, 1.0)),
        ([whole, (1, 8, 2, 1, "all"), (0, 8, 2, 1, "all")], (1.0, 1.0)),
        ([(0, 3, 1, 0, "zero"), (3, 8, 1, 0, "first")], (1.0,)),
    ]
    for plan, weights in right:
        assert torch.isfinite(model(ids, labels=ids, schedule=Own(plan, weights)).loss)
    for plan, weights, words in (
        ([], (1.0,), "it has no passes"),
        ([(0, 9, 1, 0, "zero")], (1.0,), "a pass goes on behind the row's end"),
        ([(0, 8, 1, 0, "all")], (1.0,), r'its first pass receives memory \("all"\)'),
        ([whole, (0, 8, 1, 1, "first")], (1.0, 1.0), 'a pass after the first has memory "first", not "all"'),
        ([whole, (0, 8, 2, 1, "all")], (1.0, 1.0), "after the first pass it has no whole sweeps"),
        ([whole, (0, 8, 2, 1, "all"), (0, 8, 2, 1, "all")], (1.0, 1.0), "after the first pass it has no whole sweeps"),
        ([(0, 3, 1, 0, "zero"), (4, 8, 1, 0, "first")], (1.0,), "the passes are no chunks from 0 to the end"),
        ([whole], (1.0, 1.0), "no pass belongs to loss group 1 of 2"),
        ([whole, (0, 8, 1, 1, "all")], (1.0,), r"a pass belongs to loss group 1, but group_weights has 1"),
    ):
        with pytest.raises(ValueError, match=f"the schedule's plan for 8 positions cannot be run: .*{words}"):
            model(ids, labels=ids, schedule=Own(plan, weights))
