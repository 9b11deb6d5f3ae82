"""Recipes: TOML in and out, inheritance, overrides, and errors that are collected."""

from __future__ import annotations

import dataclasses
import math
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrt
from lrt.config import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    RecurrenceConfig,
    ScheduleConfig,
    TrainingConfig,
    dump_recipe,
    load_recipe,
    parse_recipe,
)
from lrt.config.ranges import RANGES, USED, number_types

optional_int = st.one_of(st.none(), st.integers(1, 64))


@st.composite
def recipes(draw):
    recurrence = draw(
        st.one_of(
            st.none(),
            st.builds(
                RecurrenceConfig,
                sharing=st.sampled_from(["shared", "layerwise"]),
                source_layer=st.one_of(st.none(), st.integers(1, 8), st.floats(0.01, 0.99)),
                blocks=st.one_of(st.none(), st.just((1, 2))),
                gate_channels=optional_int,
                separator=st.one_of(st.none(), st.integers(0, 9)),
            ),
        )
    )
    model = draw(
        st.builds(
            ModelConfig,
            n_layers=st.integers(8, 12),
            width=st.just(256),
            softcap=st.one_of(st.none(), st.floats(1, 50)),
            rope_base=st.floats(1, 1e6),
        )
    )
    weights = draw(st.one_of(st.just("paper"), st.just((0.1, 0.9))))
    refined = st.builds(ScheduleConfig, kind=st.just("refine"), passes=st.integers(1, 4))
    schedule = (
        ScheduleConfig(kind="baseline")
        if recurrence is None
        else draw(st.one_of(st.just(ScheduleConfig(weights=weights)), refined))
    )
    training = draw(st.builds(TrainingConfig, tokens=optional_int, clip_norm=st.one_of(st.none(), st.floats(0.1, 2))))
    betas = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))
    adamw = st.builds(OptimizerConfig, kind=st.just("adamw"), adamw_memory_lr=st.one_of(st.none(), st.floats(1e-6, 1)))
    optimizer = draw(st.one_of(st.builds(OptimizerConfig, betas=betas), adamw))
    return Recipe(model=model, recurrence=recurrence, schedule=schedule, training=training, optimizer=optimizer)


@given(recipe=recipes())
def test_load_of_dump_is_the_recipe(recipe):
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_base_and_overrides(tmp_path):
    (tmp_path / "below.toml").write_text("[model]\nn_layers = 3\nwidth = 64\n[training]\nsteps = 5\n")
    (tmp_path / "above.toml").write_text('base = "below.toml"\n[model]\nwidth = 96\n')
    recipe = load_recipe(
        tmp_path / "above.toml",
        overrides=["training.steps=7", "run.name=mine", "recurrence.blocks=[1, 2]", "model.softcap=none"],
    )
    assert (recipe.model.n_layers, recipe.model.width, recipe.training.steps) == (3, 96, 7)
    assert (recipe.run.name, recipe.recurrence.blocks, recipe.model.softcap) == ("mine", (1, 2), None)
    (tmp_path / "top.toml").write_text('base = "above.toml"\n')
    with pytest.raises(ValueError, match="at most one level is allowed"):
        load_recipe(tmp_path / "top.toml")


def test_twin_without_memory():
    twin = parse_recipe('recurrence = false\n[schedule]\nkind = "baseline"\n')
    assert twin.recurrence is None
    assert parse_recipe(dump_recipe(twin)) == twin
    back = load_recipe("baseline_tiny.toml", overrides=["recurrence.sharing=layerwise", "schedule.kind=interleaved"])
    assert back.recurrence.sharing == "layerwise"


def test_all_errors_at_once_with_suggestions():
    with pytest.raises(ValueError) as caught:
        parse_recipe(
            '[modle]\nx = 1\n[model]\nn_layer = 3\nsoftcap = "high"\nwidth = 2.5\n[schedule]\nkind = '
            '"interlaved"\n[training]\nsteps = true\n'
        )
    text = str(caught.value)
    for part in (
        "unknown section 'modle'; did you mean 'model'?",
        "unknown key 'model.n_layer'; did you mean 'model.n_layers'?",
        "model.softcap = 'high': expected a number or \"none\"",
        "model.width = 2.5: expected a whole number",
        "schedule.kind = 'interlaved': expected one of baseline, interleaved",
        "did you mean 'interleaved'?",
        "training.steps = True: expected a whole number",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[recurrence]\nsource_layer = 30\n[model]\nn_layers = 24\n",
            r"recurrence.source_layer = 30, but the model has 24 blocks: use 1..24, or a fraction such as 0.67",
        ),
        ("[recurrence]\nsource_layer = 1.5\n", r"recurrence.source_layer = 1.5: a fraction lies between 0 and 1"),
        ("[recurrence]\nblocks = []\n", r"recurrence.blocks = \[\]: name at least one block by its number"),
        ("[recurrence]\nblocks = [40]\n", r"recurrence.blocks = \[40\]: \[40\] not in the model, which has 12 blocks"),
        ("[recurrence]\nkv_projection = false\nresidual = false\n", r"are both false, so memory could not enter"),
        ("[model]\nwidth = 100\nn_heads = 3\n", r"model.width = 100 is not a multiple of n_heads = 3"),
        ("[model]\nwidth = 96\nn_heads = 4\nn_kv_heads = 3\n", r"model.n_kv_heads = 3 does not divide n_heads = 4"),
        ('[model]\nwindow_pattern = "SXL"\n', r"model.window_pattern = 'SXL': use letters S \(short\) and L \(long\)"),
        ("[training]\nsteps = 3\ntokens = 5\n", r"give exactly one of steps, tokens, tokens_per_parameter"),
        (
            "[training]\nbatch_tokens = 1000\n",
            r"training.batch_tokens = 1000 is not a multiple of model.sequence_length = 2048",
        ),
        ("recurrence = false\n", r"schedule.kind = 'interleaved' needs memory, but recurrence is off"),
        ("recurrence = 3\n", r"recurrence = 3: expected a table \[recurrence\], or recurrence = false"),
    ],
)
def test_values_that_do_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(text)


# ------------------------------------------------------------------ ranges


def section_class(hint):
    return next(c for c in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(c))


SECTIONS = {name: section_class(hint) for name, hint in typing.get_type_hints(Recipe).items()}
NUMBERS = [
    (section, key, hint)
    for section, cls in SECTIONS.items()
    for key, hint in typing.get_type_hints(cls).items()
    if number_types(hint)
]


def as_toml(value, hint):
    """The number as a value of this type: in lists of one or two where the type is a tuple."""
    arms = [arm for arm in (hint, *typing.get_args(hint)) if typing.get_origin(arm) is tuple]
    return str([value] * (1 if Ellipsis in typing.get_args(arms[0]) else 2)) if arms else str(value)


def refused(section, key, hint, value):
    with pytest.raises(ValueError, match=re.escape(f"{section}.{key} = ")) as caught:
        parse_recipe("", overrides=[f"{section}.{key}={as_toml(value, hint)}"])
    assert len(str(caught.value).splitlines()) == 1


def test_the_table_of_ranges_has_exactly_the_numbers_of_the_recipe():
    assert {(section, key) for section, keys in RANGES.items() for key in keys} == {
        (section, key) for section, key, _ in NUMBERS
    }


@pytest.mark.parametrize(("section", "key", "hint"), NUMBERS, ids=[f"{s}.{k}" for s, k, _ in NUMBERS])
@given(data=st.data())
def test_numbers_out_of_range_are_refused_by_name(section, key, hint, data):
    allowed, whole = RANGES[section][key], float not in number_types(hint)
    least = math.ceil(allowed.least) if whole else allowed.least
    below = (
        st.integers(-(2**70), least - 1)
        if whole
        else st.floats(max_value=least, exclude_max=not allowed.above, allow_infinity=False)
    )
    value = data.draw(below.filter(lambda number: number != allowed.also))
    refused(section, key, hint, value)
    if allowed.most < math.inf:
        reals = st.floats(min_value=allowed.most, exclude_min=not allowed.below, allow_infinity=False)
        refused(section, key, hint, data.draw(st.integers(allowed.most + 1, 2**70) if whole else reals))
    if not whole:
        refused(section, key, hint, data.draw(st.sampled_from(["nan", "inf", "-inf"])))


@pytest.mark.parametrize(
    "key, written, value",
    [
        ("training.steps", "0", 0), ("optimizer.matrix_lr", "0", 0.0), ("optimizer.betas", "[0, 0]", (0.0, 0.0)),
        ("parallel.shard", "-1", -1), ("parallel.loss_chunk", "0", 0), ("checkpoint.every", "0", 0),
        ("evaluation.every", "0", 0), ("evaluation.sample_tokens", "0", 0), ("training.final_lr_fraction", "1", 1.0),
        ("training.clip_norm", "none", None), ("optimizer.weight_decay", "0", 0.0),
    ],
)  # fmt: skip
def test_numbers_that_mean_something_are_kept(key, written, value):
    section, name = key.split(".")
    recipe = parse_recipe("", overrides=[f"{key}={written}"])
    for kept in (recipe, parse_recipe(dump_recipe(recipe))):
        found = getattr(getattr(kept, section), name)
        assert found == value and type(found) is type(value)


def test_all_ranges_are_told_at_once():
    sets = [
        "training.clip_norm=0",
        "optimizer.matrix_lr=-1",
        "optimizer.reference_batch_tokens=0",
        "parallel.loss_chunk=-4",
        "data.workers=-1",
    ]
    for more in (
        [],
        ["model.n_layers=0"],
        ["training.steps=true"],
        ["recurrence.separator=-1"],
        ["training.batch_tokens=1000"],
    ):
        with pytest.raises(ValueError) as caught:
            parse_recipe("", overrides=[*sets, *more])
        for key in (setting.split("=")[0] for setting in [*sets, *more]):
            assert str(caught.value).count(f"{key} = ") == 1, (key, str(caught.value))
    for words in (
        'training.clip_norm = 0.0: use a number above 0, or "none"',
        "parallel.loss_chunk = -4: use a whole number of 0 or more (0 = all)",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("value", ["4", 2.5, True, None])
def test_numbers_of_a_wrong_type_are_refused_in_code_too(value):
    with pytest.raises(ValueError, match=r"training.micro_batch = .*: use a whole number of 1 or more"):
        Recipe(training=TrainingConfig(micro_batch=value))
    with pytest.raises(ValueError, match=r"model.n_layers = .*: use a whole number of 1 or more"):
        ModelConfig(n_layers=value)


# ------------------------------------------------------------------ what a choice leaves unused, and what replaces what


def test_every_choice_names_every_kind_and_real_keys():
    for (section, choice), uses in USED.items():
        hints = typing.get_type_hints(SECTIONS[section])
        assert set(uses) == set(typing.get_args(hints[choice]))
        assert {key for keys in uses.values() for key in keys} <= set(hints) - {choice}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[schedule]\npasses = 2\n",
            r"schedule.passes = 2 has no effect with schedule.kind = 'interleaved': leave it out, or use refine",
        ),
        (
            "[schedule]\nkind = 'refine'\nsubsets = 4\n",
            r"schedule.subsets = 4 has no effect with schedule.kind = 'refine'.*use interleaved",
        ),
        (
            "[schedule]\nkind = 'baseline'\nweights = [1.0]\n",
            r"schedule.weights = .* has no effect .* use interleaved or refine",
        ),
        (
            "[optimizer]\nkind = 'adamw'\nmatrix_lr = 1.0\n",
            r"optimizer.matrix_lr = 1.0 has no effect with optimizer.kind = 'adamw'.*use muon",
        ),
        ("[optimizer]\nadamw_lr = 1.0\n", r"optimizer.adamw_lr = 1.0 has no effect with optimizer.kind = 'muon'"),
        (
            "[training]\nlr_schedule = 'cosine'\nwarmdown_fraction = 0.2\n",
            r"training.warmdown_fraction = 0.2 has no effect .* use warmdown or wsd",
        ),
    ],
)
def test_keys_without_effect_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(text)
    section, *lines = text.split()[0].strip("[]"), *text.strip().split("\n")[1:]
    with pytest.raises(ValueError, match=message):
        parse_recipe("", overrides=[f"{section}.{line.replace(' = ', '=')}" for line in lines])


def test_a_default_is_no_mistake_and_another_kind_leaves_behind_what_it_does_not_use(tmp_path):
    assert parse_recipe("[schedule]\nkind = 'refine'\nsubsets = 2\n").schedule == ScheduleConfig(kind="refine")
    (tmp_path / "below.toml").write_text("[schedule]\nsubsets = 4\nweights = [0.5, 0.5]\n")
    (tmp_path / "above.toml").write_text('base = "below.toml"\n[schedule]\nkind = "refine"\n')
    expected = ScheduleConfig(kind="refine", weights=(0.5, 0.5))
    assert load_recipe(tmp_path / "above.toml").schedule == expected
    assert load_recipe(tmp_path / "below.toml", overrides=["schedule.kind=refine"]).schedule == expected
    assert load_recipe(tmp_path / "below.toml", overrides=["schedule.kind=interleaved"]).schedule.subsets == 4
    with pytest.raises(ValueError, match="schedule.subsets = 3 has no effect with schedule.kind = 'refine'"):
        load_recipe(tmp_path / "above.toml", overrides=["schedule.subsets=3"])
    dumped = dump_recipe(load_recipe(tmp_path / "below.toml"))
    assert parse_recipe(dumped, overrides=["schedule.kind=refine"]).schedule == expected


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 100), ("tokens", 7), ("tokens_per_parameter", 2.0), ("compute", 9)]
)
def test_a_horizon_given_above_replaces_the_one_below(tmp_path, key, value):
    none = dict.fromkeys(("steps", "tokens", "tokens_per_parameter", "compute"))

    def horizon(recipe):
        return {name: getattr(recipe.training, name) for name in none}

    (tmp_path / "below.toml").write_text("[training]\ntokens_per_parameter = 10.0\nmicro_batch = 3\n")
    (tmp_path / "above.toml").write_text(f'base = "below.toml"\n[training]\n{key} = {value}\n')
    for recipe in (
        load_recipe(tmp_path / "above.toml"),
        load_recipe(tmp_path / "below.toml", overrides=[f"training.{key}={value}"]),
        load_recipe(
            tmp_path / "below.toml",
            overrides=[f"training.{key}={value}", f"training.{'tokens' if key == 'steps' else 'steps'}=none"],
        ),
        parse_recipe(dump_recipe(load_recipe(tmp_path / "below.toml")), overrides=[f"training.{key}={value}"]),
    ):
        assert horizon(recipe) == {**none, key: value} and recipe.training.micro_batch == 3
    assert horizon(load_recipe(tmp_path / "below.toml", overrides=["training.tokens_per_parameter=none"])) == none
    with pytest.raises(
        ValueError,
        match=r"has steps and tokens: give exactly one of .* take back another with --set training.tokens=none",
    ):
        load_recipe(tmp_path / "below.toml", overrides=["training.steps=1", "training.tokens=5"])


@pytest.mark.parametrize("key", ["gate_channels", "separator", "blocks"])
@pytest.mark.parametrize("value", ["4", 1.5, True, ("a",)])
def test_recurrence_settings_of_a_wrong_type(key, value):
    with pytest.raises(ValueError, match=rf"recurrence.{key} = "):
        lrt.RecurrenceConfig(**{key: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ModelConfig(value_embeddings="alternate"),
            "model.value_embeddings = 'alternate': use one of all, alternating, none",
        ),
        (lambda: lrt.RecurrenceConfig(sharing="tied"), "recurrence.sharing = 'tied': use one of shared, layerwise"),
        (
            lambda: Recipe(parallel=ParallelConfig(reshard="never")),
            "parallel.reshard = 'never': use one of after_step, after_forward",
        ),
    ],
)
def test_a_choice_that_is_none_is_refused_in_code_too(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_recipe_and_bad_override():
    with pytest.raises(ValueError, match=r"recipe 'lrt_tinny.toml' not found; did you mean lrt_tiny.toml\?"):
        load_recipe("lrt_tinny.toml")
    with pytest.raises(ValueError, match=r"recipe 'xyz' not found. Recipes here: "):
        load_recipe("xyz")
    with pytest.raises(ValueError, match=r"--set 'steps': write section.key=value"):
        load_recipe("lrt_tiny.toml", overrides=["steps"])
    with pytest.raises(ValueError, match=r"unknown key 'training.step'; did you mean 'training.steps'\?"):
        load_recipe("lrt_tiny.toml", overrides=["training.step=3"])


def test_source_layer_as_default_and_as_fraction():
    assert lrt.RecurrenceConfig().source_index(12) == 8  # None = round(2L/3)
    assert [lrt.RecurrenceConfig(source_layer=f).source_index(24) for f in (0.01, 0.5, 0.99)] == [1, 12, 24]
