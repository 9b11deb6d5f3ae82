"""Phases and mixtures in recipes: what they mean, how layers replace them, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrt
from lrt.config import Recipe, ScheduleConfig, dump_recipe, load_recipe, parse_recipe
from lrt.config.settings import PhaseConfig, ShareConfig
from lrt.schedules import from_config, phases_of

PHASES = """
[[schedule.phases]]
until = 0.7
kind = "baseline"
[[schedule.phases]]
until = 0.9
kind = "refine"
passes = 2
weights = [0.1, 0.3, 0.6]
[[schedule.phases]]
until = 1.0
kind = "mixture"
mix = [{share = 0.75, kind = "baseline"}, {share = 0.25, kind = "interleaved", subsets = 4}]
"""
MIXTURE = (
    '[schedule]\nkind = "mixture"\nmix = [{share = 0.75, kind = "baseline"}, {share = 0.25, kind = "refine", '
    "passes = 2}]\n"
)


def test_phases_are_schedules_with_their_ends():
    phases = phases_of(parse_recipe(PHASES).schedule)
    assert [phase.until for phase in phases] == [0.7, 0.9, 1.0]
    assert [phase.schedule for phase in phases] == [
        lrt.baseline(),
        lrt.refine(2, weights=(0.1, 0.3, 0.6)),
        lrt.mixture([(0.75, lrt.baseline()), (0.25, lrt.interleaved(4))]),
    ]
    assert phases_of(parse_recipe(MIXTURE).schedule)[0].schedule == lrt.mixture(
        [(0.75, lrt.baseline()), (0.25, lrt.refine(2))]
    )


def test_the_schedule_of_a_recipe_is_its_last_and_of_a_mixture_the_member_with_most_passes():
    assert from_config(parse_recipe(PHASES).schedule) == lrt.interleaved(4)
    assert from_config(parse_recipe(MIXTURE).schedule) == lrt.refine(2)
    assert lrt.build(
        parse_recipe(MIXTURE + "[model]\nn_layers = 1\nwidth = 128\nvocab_size = 64\n")
    ).train_schedule == lrt.refine(2)


# ------------------------------------------------------------------ dump and parse

passes = st.one_of(
    st.fixed_dictionaries({"kind": st.just("baseline")}),
    st.fixed_dictionaries({"kind": st.just("refine"), "passes": st.integers(1, 4)}),
    st.fixed_dictionaries(
        {
            "kind": st.just("interleaved"),
            "subsets": st.integers(1, 8),
            "weights": st.sampled_from(["paper", (0.25, 0.75)]),
        }
    ),
    st.fixed_dictionaries({"kind": st.just("chunked"), "chunks": st.integers(1, 9)}),
    st.fixed_dictionaries({"kind": st.just("sequential")}),
)


@st.composite
def stretches(draw):
    """Keys of a phase: passes, or a mixture of them."""
    if draw(st.booleans()):
        return draw(passes)
    members = draw(st.lists(passes, min_size=1, max_size=3))
    cuts = draw(st.lists(st.integers(1, 99), min_size=len(members) - 1, max_size=len(members) - 1, unique=True))
    ends = [0, *sorted(cuts), 100]
    shares = [(b - a) / 100 for a, b in zip(ends, ends[1:])]
    return {
        "kind": "mixture",
        "mix": tuple(ShareConfig(share=share, **member) for share, member in zip(shares, members)),
    }


@st.composite
def schedules(draw):
    if draw(st.booleans()):
        return ScheduleConfig(**draw(stretches()))
    ends = sorted(draw(st.lists(st.floats(0.001, 0.999), max_size=3, unique=True)))
    return ScheduleConfig(phases=tuple(PhaseConfig(until=until, **draw(stretches())) for until in (*ends, 1.0)))


@given(schedule=schedules())
def test_load_of_dump_is_the_recipe(schedule):
    recipe = Recipe(schedule=schedule)
    again = parse_recipe(dump_recipe(recipe))
    assert again == recipe and phases_of(again.schedule) == phases_of(schedule)


# ------------------------------------------------------------------ layers


def test_a_layer_that_gives_kind_or_phases_drops_the_other(tmp_path):
    (tmp_path / "plain.toml").write_text('[schedule]\nkind = "interleaved"\nsubsets = 4\nweights = [0.5, 0.5]\n')
    (tmp_path / "phased.toml").write_text(PHASES)
    (tmp_path / "mixed.toml").write_text(MIXTURE)
    three = parse_recipe(PHASES).schedule
    for name in ("plain", "mixed"):
        (tmp_path / "above.toml").write_text(f'base = "{name}.toml"\n{PHASES}')
        assert load_recipe(tmp_path / "above.toml").schedule == three
        sets = ['schedule.phases=[{until=0.7, kind="baseline"}, {until=1, kind="refine", passes=3}]']
        two = load_recipe(tmp_path / f"{name}.toml", overrides=sets).schedule
        assert [phase.schedule for phase in phases_of(two)] == [lrt.baseline(), lrt.refine(3)]
        assert load_recipe(tmp_path / "above.toml", overrides=sets).schedule == two  # the whole list is replaced
    for table in (PHASES, dump_recipe(parse_recipe(PHASES))):
        assert parse_recipe(table, overrides=["schedule.kind=refine", "schedule.passes=3"]).schedule == ScheduleConfig(
            kind="refine", passes=3
        )
        assert parse_recipe(table, overrides=["schedule.kind=interleaved"]).schedule == ScheduleConfig()
        assert parse_recipe(table, overrides=["schedule.phases=none"]).schedule == ScheduleConfig()
    assert parse_recipe(
        dump_recipe(parse_recipe(MIXTURE)), overrides=["schedule.kind=refine"]
    ).schedule == ScheduleConfig(kind="refine")
    with pytest.raises(ValueError, match=r"schedule.passes = 3 has no effect beside schedule.phases"):
        parse_recipe(PHASES, overrides=["schedule.passes=3"])


def test_recurrence_off_needs_plain_phases():
    plain = PHASES.replace("refine", "baseline").replace("interleaved", "baseline")
    plain = "\n".join(
        line
        for line in plain.replace(", subsets = 4", "").splitlines()
        if "passes" not in line and "weights" not in line
    )
    assert from_config(parse_recipe("recurrence = false\n" + plain).schedule) == lrt.baseline()
    for text, key in (
        (PHASES, r"schedule.phases\[1\].kind = 'refine'"),
        (MIXTURE, r"schedule.mix\[1\].kind = 'refine'"),
    ):
        with pytest.raises(ValueError, match=key + r" needs memory, but recurrence is off"):
            parse_recipe("recurrence = false\n" + text)


# ------------------------------------------------------------------ mistakes


def phases(*tables):
    return [f"schedule.phases=[{', '.join('{' + table + '}' for table in tables)}]"]


END = 'until = 1, kind = "baseline"'
MEMORY = 'until = 1, kind = "refine"'


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            phases('until = 0.7, kind = "baseline"'),
            "schedule.phases end at until = [0.7]: use rising shares of the steps, the last 1.0",
        ),
        (
            phases('until = 0.7, kind = "baseline"', 'until = 0.3, kind = "refine"', END),
            "schedule.phases end at until = [0.7, 0.3, 1.0]",
        ),
        (
            phases('until = 0.7, kind = "baseline"', 'until = 0.7, kind = "refine"', END),
            "schedule.phases end at until = [0.7, 0.7, 1.0]",
        ),
        (phases(), "schedule.phases = []: give at least one phase, or schedule.kind"),
        (
            phases('until = 0, kind = "baseline"', END),
            "schedule.phases[0].until = 0.0: use a number above 0, at most 1",
        ),
        (phases('until = 1.5, kind = "baseline"'), "schedule.phases[0].until = 1.5: use a number above 0, at most 1"),
        (phases('kind = "baseline"'), "schedule.phases[0] has no until"),
        (phases('until = "half", kind = "baseline"'), "schedule.phases[0].until = 'half': expected a number"),
        (phases('until = 1, kind = "refin"'), "schedule.phases[0].kind = 'refin': expected one of baseline"),
        (
            phases('until = 1, kind = "refine", pases = 2'),
            "unknown key 'schedule.phases[0].pases'; did you mean 'schedule.phases[0].passes'?",
        ),
        (
            phases('until = 1, kind = "refine", passes = 0'),
            "schedule.phases[0].passes = 0: use a whole number of 1 or more",
        ),
        (
            phases('until = 1, kind = "refine", subsets = 3'),
            "schedule.phases[0].subsets = 3 has no effect with schedule.phases[0].kind = 'refine'",
        ),
        (
            phases('until = 1, kind = "baseline", ramp = 3'),
            "schedule.phases[0].ramp = 3 has no effect with schedule.phases[0].kind = 'baseline'",
        ),
        (
            ["schedule.kind=mixture", 'schedule.mix=[{share = 1, kind = "baseline"}]', "schedule.ramp=5"],
            "schedule.ramp = 5 has no effect: every member of schedule.mix is plain; leave it out",
        ),
        (
            phases('until = 0.5, kind = "mixture", ramp = 5, mix = [{share = 1, kind = "baseline"}]', MEMORY),
            "schedule.phases[0].ramp = 5 has no effect: every member of schedule.phases[0].mix is plain; leave it out",
        ),
        (["schedule.phases=[3]"], "schedule.phases[0] = 3: expected a table"),
        (["schedule.phases=3"], "schedule.phases = 3: expected a list"),
        ([*phases(END), "schedule.kind=baseline"], "schedule.kind = 'baseline' has no effect beside schedule.phases"),
        (
            [*phases(END), "schedule.kind=interleaved"],
            "schedule.kind = 'interleaved' has no effect beside schedule.phases",
        ),
        (["schedule.kind=mixture"], "schedule.mix = []: a mixture needs members"),
        (
            ["schedule.kind=mixture", 'schedule.mix=[{share = 0.5, kind = "refine"}]'],
            "schedule.mix has shares that sum to 0.5: they must sum to 1",
        ),
        (
            ["schedule.kind=mixture", 'schedule.mix=[{share = 0, kind = "refine"}]'],
            "schedule.mix[0].share = 0.0: use a number above 0, at most 1",
        ),
        (["schedule.kind=mixture", 'schedule.mix=[{kind = "refine"}]'], "schedule.mix[0] has no share"),
        (
            ["schedule.kind=mixture", 'schedule.mix=[{share = 1, kind = "mixture"}]'],
            "schedule.mix[0].kind = 'mixture': expected one of baseline",
        ),
        (
            ["schedule.kind=mixture", 'schedule.mix=[{share = 1, kind = "refine", until = 1}]'],
            "unknown key 'schedule.mix[0].until'",
        ),
        (
            ['schedule.mix=[{share = 1, kind = "refine"}]'],
            "has no effect with schedule.kind = 'interleaved': leave it out, or use mixture",
        ),
        (
            phases('until = 1, kind = "mixture", mix = [{share = 0.3, kind = "refine"}]'),
            "schedule.phases[0].mix has shares that sum to 0.3",
        ),
        (
            phases('until = 1, kind = "mixture", mix = [{share = 1, kind = "refine", chunks = 2}]'),
            "schedule.phases[0].mix[0].chunks = 2 has no effect",
        ),
        (
            [*phases('until = 0.5, kind = "baseline"', MEMORY), "training.stage=memory"],
            "has nothing to train where schedule.phases[0] is plain",
        ),
        (
            ["schedule.kind=baseline", "training.stage=memory"],
            'training.stage = "memory" has nothing to train where schedule is plain',
        ),
        (
            phases('until = 0.5, kind = "refine"', MEMORY + ", ramp = 5"),
            "schedule.phases[1].ramp = 5 has no effect: memory came in before",
        ),
        (
            ["schedule.settle=3"],
            "schedule.settle = 3 has no effect with schedule.kind = 'interleaved': leave it out, or use refine",
        ),
        (
            ["schedule.ramp=5", "training.init_from=x"],
            "schedule.ramp = 5 would add the values of recurrence.init to those of training.init_from",
        ),
    ],
)
def test_mistakes_are_named(sets, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_recipe("", overrides=sets)
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)


def test_all_mistakes_are_told_at_once():
    text = (
        PHASES.replace("until = 0.9", "until = 2")
        .replace("passes = 2", "pases = 2")
        .replace("share = 0.75", 'share = "most"')
    )
    with pytest.raises(ValueError) as caught:
        parse_recipe(text + "[training]\nstepz = 3\nmicro_batch = 0\n")
    parts = ("schedule.phases[1].until = 2", "'schedule.phases[1].pases'", "schedule.phases[2].mix[0].share = 'most'")
    for part in (*parts, "'training.stepz'", "training.micro_batch = 0"):
        assert str(caught.value).count(part) == 1, (part, str(caught.value))
    broken = ScheduleConfig(
        phases=(PhaseConfig(until=0.5, kind="refine", chunks=2), PhaseConfig(until=0.4, kind="mixture"))
    )
    with pytest.raises(ValueError) as caught:
        Recipe(schedule=broken)
    for part in ("until = [0.5, 0.4]", "schedule.phases[0].chunks = 2 has no effect", "schedule.phases[1].mix = []"):
        assert part in str(caught.value), (part, str(caught.value))


def test_weights_of_a_phase_are_refused_with_its_place():
    recipe = parse_recipe("", overrides=phases('until = 0.5, kind = "baseline"', MEMORY + ", weights = [1, 1, 1]"))
    with pytest.raises(
        ValueError, match=r"schedule.phases\[1\]: schedule.weights has 3 values, but there are 2 groups"
    ):
        phases_of(recipe.schedule)
