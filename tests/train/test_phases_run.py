"""Runs whose schedule changes with the step: borders, what is frozen, resume, what is counted."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from phase_runs import MIX, TINY, is_of_memory, steps_of, tensors_at, tiny

import lrt
from lrt.accounting import count_parameters, training_flops
from lrt.config import ScheduleConfig, dump_recipe, parse_recipe
from lrt.schedules import Mixture
from lrt.train.checkpoint import check_same_run, latest, read_rest, step_of
from lrt.train.checkpoint.starting_model import shapes_of
from lrt.train.horizon import plan_horizon
from lrt.train.monitor.metrics import read_records
from lrt.train.timetable import Stretch, Timetable, check_borders, plan_timetable
from lrt.train.trainer import train

LATE = 'schedule.phases=[{until=0.5, kind="baseline"}, {until=1.0, kind="refine", passes=1}]'
RAMP = LATE.replace("passes=1", "passes=1, ramp=3")
MIXED = f'schedule.phases=[{{until=0.25, kind="baseline"}}, {{until=1.0, kind="mixture", mix={MIX}}}]'


# ------------------------------------------------------------------ the timetable


def test_borders_are_rounded_shares_of_the_steps():
    def stretches(steps):
        return [
            (s.start, s.stop, s.plain)
            for s in plan_timetable(parse_recipe(TINY, overrides=[LATE]), steps=steps).stretches
        ]

    assert stretches(8) == [(0, 4, True), (4, 8, False)]
    assert stretches(11) == [(0, 6, True), (6, 11, False)]  # round(5.5)
    assert stretches(0) == [(0, 0, True), (0, 0, False)]
    with pytest.raises(ValueError, match=r"schedule.phases\[0\] ends at step round\(0.5 x 1\) = 0, where it begins"):
        stretches(1)
    table = plan_timetable(parse_recipe(TINY, overrides=[LATE]), steps=8)
    assert [table.schedule(step) for step in range(10)] == [lrt.baseline()] * 4 + [lrt.refine(1)] * 6
    assert table.kinds == (lrt.baseline(), lrt.refine(1))


def test_a_mixture_is_drawn_by_the_step_alone():
    """Every rank and micro-batch draws with the step's seed, so they agree; over the steps the shares come out."""
    shares = {lrt.baseline(): 0.75, lrt.refine(1): 0.22, lrt.refine(2): 0.03}
    mixed = lrt.mixture([(share, schedule) for schedule, share in shares.items()])
    for seed in (1, 2):
        table = Timetable((Stretch(0, 4000, mixed, 0),), seed)
        drawn = [table.schedule(step) for step in range(4000)]
        assert drawn == [table.schedule(step) for step in range(4000)]
        for schedule, share in shares.items():
            assert Counter(drawn)[schedule] / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)
        pairs = Counter(zip(drawn, drawn[1:]))  # neighbouring steps are independent
        assert pairs[lrt.refine(1), lrt.refine(1)] / 4000 == pytest.approx(0.22**2, abs=0.015)
    assert [Timetable((Stretch(0, 99, mixed, 0),), 3).schedule(s) for s in range(99)] != drawn[:99]


def test_the_order_of_subsets_does_not_follow_from_the_member_that_was_drawn():
    mixed = lrt.mixture([(0.5, lrt.baseline()), (0.5, lrt.interleaved(2, order="rotated"))])
    table = Timetable((Stretch(0, 2000, mixed, 0),), 1)
    first = Counter(
        table.schedule(step).plan(8, generator=torch.Generator().manual_seed(table.seed_of(step)))[1].start
        for step in range(2000)
        if table.schedule(step) != lrt.baseline()
    )
    assert 0.4 < first[0] / first.total() < 0.6


def test_a_border_that_was_crossed_stays():
    short, long = (plan_timetable(parse_recipe(TINY, overrides=[LATE]), steps=steps) for steps in (8, 12))
    check_borders(long, before=short, step=4)  # step 4 would have been the first with memory, and is not done
    for step in (5, 8):
        with pytest.raises(
            ValueError,
            match=rf"moves the borders of schedule.phases from steps \[4\] to \[6\], but step {step} is reached",
        ):
            check_borders(long, before=short, step=step)
    check_borders(short, before=long, step=4)
    with pytest.raises(ValueError, match=r"from steps \[6\] to \[4\], but step 5 is reached"):
        check_borders(short, before=long, step=5)


# ------------------------------------------------------------------ the horizon in compute


def test_compute_is_what_the_twin_would_spend_on_so_many_tokens():
    """Steps that cost r times the twin's are r times fewer, every phase and share counted by its part."""

    def relative(schedule):
        recipe = parse_recipe(TINY)
        twin = replace(recipe, recurrence=None, schedule=ScheduleConfig(kind="baseline"))
        return training_flops(shapes_of(recipe), schedule, 32) / training_flops(shapes_of(twin), lrt.baseline(), 32)

    def steps(*sets, compute=256 * 1000):
        recipe = parse_recipe(TINY, overrides=[f"training.compute={compute}", *sets])
        return plan_horizon(recipe, count_parameters(shapes_of(recipe)), world_size=1).steps

    one, two = relative(lrt.baseline()), relative(lrt.refine(1))
    assert steps("recurrence=false", "schedule.kind=baseline") == 1000 and 1 <= one < 1.02 < two < 2.1
    assert steps("schedule.kind=refine") == round(1000 / two)
    assert steps(LATE) == round(1000 / (0.5 * one + 0.5 * two))
    fed = relative(lrt.refine(1, weights=(0, 1), cut_gradient="initialization"))
    assert fed < 1.35  # the first pass ends at the source and has no backward
    mixed = 0.25 * one + 0.75 * (0.5 * one + 0.3 * fed + 0.2 * relative(lrt.interleaved(2)))
    assert steps(MIXED) == round(1000 / mixed)
    assert steps(LATE, compute=1) == 1
    assert steps("schedule.kind=refine", "training.stage=memory") > steps(
        "schedule.kind=refine"
    )  # frozen matrices get no gradient
    with pytest.raises(ValueError, match="training has steps and compute: give exactly one of"):
        parse_recipe("", overrides=["training.steps=1", "training.compute=5"])


def test_dearer_phases_at_equal_compute_are_a_shorter_run(tmp_path):
    """Steps that cost more are fewer, so the rates so far would have been others."""

    def check(*sets, compute=256 * 1000):
        recipe = parse_recipe(TINY, overrides=["training.steps=none", f"training.compute={compute}", LATE, *sets])
        (tmp_path / "recipe.toml").exists() or (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
        steps = plan_horizon(recipe, count_parameters(shapes_of(recipe)), world_size=1).steps
        check_same_run(tmp_path, recipe, step=10, steps=steps, planned=planned or steps, finished=False, same_past=True)
        return steps

    planned = 0
    planned = check()
    dear = LATE.replace("passes=1", "passes=2")
    with pytest.raises(ValueError, match=r"trained with other settings: schedule.phases = .*passes': 2"):
        check(dear)
    assert check(dear, compute=256 * 2000) > planned  # more compute makes up for it
    assert check("training.batch_tokens=512") < planned  # as long a run in larger batches
    with pytest.raises(ValueError, match=r"trained with other settings: schedule.phases = .*passes': 2"):
        check(dear, "training.batch_tokens=512")  # fewer steps for two reasons, one of which is refused
    assert check(dear, "training.batch_tokens=512", compute=256 * 2000)
    with pytest.raises(ValueError, match="trained with other settings: training.compute = "):
        check(compute=256 * 500)


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("late"), LATE, "checkpoint.every=2", "checkpoint.keep_last=9"))


def test_a_plain_phase_is_the_plain_twins_training_bit_for_bit(late, tmp_path):
    """Memory is there and rests: neither its parameters nor their optimizer state move, and the rest moves as if it
    were not there."""
    twin = train(
        tiny(tmp_path, "recurrence=false", "schedule.kind=baseline", "checkpoint.every=2", "checkpoint.keep_last=9")
    )
    ours, theirs, fresh = tensors_at(late.folder, 4), tensors_at(twin.folder, 4), tensors_at(late.folder, 2)
    assert {name for name in ours if not is_of_memory(name)} == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    built = lrt.build(tiny("unused")).state_dict()
    for name in ours.keys() - theirs.keys():
        expected = built[name.removeprefix("model.")] if name.startswith("model.") else torch.zeros_like(ours[name])
        assert torch.equal(ours[name], expected) and torch.equal(ours[name], fresh[name]), name
    same = ("loss", "groups", "grad_norm", "tokens")
    assert [[r[k] for k in same] for r in steps_of(late)[:4]] == [[r[k] for k in same] for r in steps_of(twin)[:4]]


def test_after_the_border_everything_trains(late):
    before, after = tensors_at(late.folder, 4), tensors_at(late.folder, 8)
    still = [name for name in after if name.startswith("model.") and torch.equal(before[name], after[name])]
    assert not still
    assert [len(r["groups"]) for r in steps_of(late)] == [1] * 4 + [2] * 4
    assert [r["schedule"] for r in steps_of(late)] == ["baseline"] * 4 + ["refine(1)"] * 4
    assert (
        lrt.build(late_recipe := tiny("unused", LATE)).train_schedule == lrt.refine(1) and late_recipe.schedule.phases
    )


@pytest.mark.parametrize(
    "sets", [[LATE], [MIXED], [LATE, "recurrence.init=identity"], [RAMP]], ids=["late", "mixed", "identity", "ramp"]
)
def test_resumed_across_a_border_equals_uninterrupted_bit_for_bit(tmp_path, sets):
    whole = train(tiny(tmp_path / "whole", *sets, "checkpoint.every=1", "checkpoint.keep_last=99"))
    for step in (1, 3, 4, 5):
        folder = tmp_path / f"from{step}" / "tiny"
        shutil.copytree(whole.folder / "checkpoints" / f"step_{step:08d}", folder / "checkpoints" / f"step_{step:08d}")
        shutil.copy(whole.folder / "metrics.jsonl", folder / "metrics.jsonl")
        again = train(tiny(folder.parent, *sets, "checkpoint.every=0"))
        ours, theirs = tensors_at(again.folder, 8), tensors_at(whole.folder, 8)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert read_rest(latest(folder / "checkpoints")).meta == read_rest(latest(whole.folder / "checkpoints")).meta
        assert steps_of(again) == steps_of(whole)


def test_flops_are_the_sum_over_what_ran(tmp_path):
    recipe = tiny(tmp_path, MIXED)
    records, table = steps_of(train(recipe)), plan_timetable(recipe, steps=8)
    shapes = shapes_of(recipe)
    total = 0.0
    assert isinstance(table.stretches[1].schedule, Mixture) and len({table.schedule(step) for step in range(8)}) > 1
    for step, record in enumerate(records):
        total += 256 * training_flops(shapes, table.schedule(step), 32)
        assert record["flops"] == pytest.approx(total, rel=1e-12)


def test_a_horizon_that_moves_a_crossed_border_is_refused(late, tmp_path):
    shutil.copytree(late.folder, tmp_path / "tiny")
    with pytest.raises(
        ValueError, match=r"from steps \[4\] to \[8\], but step 8 is reached: keep the horizon.*training.branch_from"
    ):
        train(tiny(tmp_path, LATE, "training.steps=16"))
    for step in (6, 8):
        shutil.rmtree(tmp_path / "tiny" / "checkpoints" / f"step_{step:08d}")
    longer = train(tiny(tmp_path, LATE, "training.steps=12"))  # from step 4, which had not crossed it
    assert [r["schedule"] for r in steps_of(longer)] == ["baseline"] * 6 + ["refine(1)"] * 6
    other = LATE.replace("0.5", "0.375").replace("passes=1", "passes=2")
    with pytest.raises(ValueError, match=r"trained with other settings: schedule.phases = .*training.branch_from"):
        train(tiny(tmp_path, other, "training.steps=16"))  # steps 6..12 were not trained so
    later = (
        'schedule.phases=[{until=0.375, kind="baseline"}, {until=0.75, kind="refine"}, {until=1.0, kind="refine", '
        "passes=2}]"
    )
    again = train(tiny(tmp_path, later, "training.steps=16"))  # what follows is another phase
    assert [r["schedule"] for r in steps_of(again)] == ["baseline"] * 6 + ["refine(1)"] * 6 + ["refine(2)"] * 4


def test_the_run_of_a_mixture_is_scored_by_its_longest_member(tmp_path):
    mix = 'schedule.mix=[{share=0.5, kind="refine", passes=2}, {share=0.5, kind="baseline"}]'
    result = train(tiny(tmp_path, "schedule.kind=mixture", mix, "checkpoint.export_at_end=true"))
    (score,) = [r for r in read_records(result.folder / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert len(score["bpb_of_groups"]["parallel"]) == 3
    assert lrt.load(result.folder / "export").train_schedule == lrt.refine(2)
    assert step_of(latest(result.folder / "checkpoints")) == 8


# ------------------------------------------------------------------ the entrance


@pytest.mark.parametrize("sets", [[LATE, "recurrence.init=identity"], [RAMP]], ids=["identity", "ramp"])
def test_entering_leaves_the_function_unchanged_at_the_border(tmp_path, sets):
    """The first pass with memory computes what the pass without computes, and the plain twin would go on with."""
    ours = steps_of(train(tiny(tmp_path / "ours", *sets)))
    twin = steps_of(train(tiny(tmp_path / "twin", "recurrence=false", "schedule.kind=baseline")))
    assert ours[4]["groups"][0] == twin[4]["groups"][0]
    assert ours[4]["groups"][1] == pytest.approx(ours[4]["groups"][0], rel=1e-6)
    assert abs(ours[7]["groups"][1] - ours[7]["groups"][0]) > 1e-5  # and then memory does something
    jump = steps_of(train(tiny(tmp_path / "jump", LATE)))
    assert abs(jump[4]["groups"][1] - jump[4]["groups"][0]) > 1e-3


def test_a_ramp_brings_the_initial_values_in_equal_parts(tmp_path):
    """With rates of 0 for them nothing else moves the memory's parameters; before the border they are zero."""
    still = ("optimizer.kind=adamw", "optimizer.adamw_lr=0.001", "optimizer.adamw_memory_lr=0")
    result = train(tiny(tmp_path, RAMP, *still, "checkpoint.every=1", "checkpoint.keep_last=9"))
    built = lrt.build(tiny("unused"))
    initial = {f"model.{name}": parameter for name, parameter in built.memory_parameters().items()}
    assert any(parameter.any() for parameter in initial.values())
    for step, share in {1: 0, 4: 0, 5: 1 / 3, 6: 2 / 3, 7: 1, 8: 1}.items():
        tensors = tensors_at(result.folder, step)
        for name, whole in initial.items():
            torch.testing.assert_close(tensors[name], share * whole.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("init", ["paper", "identity"])
def test_the_memorys_rates_rise_over_the_ramp(tmp_path, init):
    """An identity start alone disturbed a trained model: the first full steps of the memory took its loss from 1.11 to
    2.84."""
    result = train(tiny(tmp_path, RAMP, f"recurrence.init={init}"))
    backbone, memory = (
        [r["lr"][name] / r["lr_scale"] for r in steps_of(result)] for name in ("matrices", "memory_matrices")
    )
    assert backbone == pytest.approx([backbone[0]] * 8)
    assert memory[4:] == pytest.approx([backbone[0] * share for share in (1 / 3, 2 / 3, 1, 1)])
    gains = [r["lr"]["gains"] / r["lr_scale"] for r in steps_of(result)]
    assert gains[4] == pytest.approx(gains[7] / 3)


def test_a_ramp_needs_room():
    with pytest.raises(
        ValueError, match=r"schedule.phases\[1\].ramp = 9, but the phase has 4 steps: use at most so many"
    ):
        plan_timetable(parse_recipe(TINY, overrides=[LATE.replace("passes=1", "ramp=9")]), steps=8)
    table = plan_timetable(parse_recipe(TINY, overrides=["schedule.ramp=8"]), steps=8)  # from the first step on
    assert (table.entrance.start, table.entrance.ramp) == (0, 8)
