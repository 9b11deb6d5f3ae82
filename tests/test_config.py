"""Recipes: TOML in and out, inheritance, overrides, and errors that are collected."""

from __future__ import annotations

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
            ModelConfig, n_layers=st.integers(8, 12), width=st.just(256), softcap=st.one_of(st.none(), st.floats(1, 50)), rope_base=st.floats(1, 1e6)
        )
    )
    weights = draw(st.one_of(st.just("paper"), st.just((0.1, 0.9))))
    schedule = ScheduleConfig(kind="baseline") if recurrence is None else ScheduleConfig(weights=weights)
    training = draw(st.builds(TrainingConfig, tokens=optional_int, clip_norm=st.one_of(st.none(), st.floats(0.1, 2))))
    optimizer = draw(
        st.builds(OptimizerConfig, betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), adamw_memory_lr=st.one_of(st.none(), st.floats(1e-6, 1)))
    )
    return Recipe(model=model, recurrence=recurrence, schedule=schedule, training=training, optimizer=optimizer)


@given(recipe=recipes())
def test_load_of_dump_is_the_recipe(recipe):
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_base_and_overrides(tmp_path):
    (tmp_path / "below.toml").write_text("[model]\nn_layers = 3\nwidth = 64\n[training]\nsteps = 5\n")
    (tmp_path / "above.toml").write_text('base = "below.toml"\n[model]\nwidth = 96\n')
    recipe = load_recipe(tmp_path / "above.toml", overrides=["training.steps=7", "run.name=mine", "recurrence.blocks=[1, 2]", "model.softcap=none"])
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
            '[modle]\nx = 1\n[model]\nn_layer = 3\nsoftcap = "high"\nwidth = 2.5\n[schedule]\nkind = "interlaved"\n[training]\nsteps = true\n'
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
        ("[training]\nbatch_tokens = 1000\n", r"training.batch_tokens = 1000 is not a multiple of model.sequence_length = 2048"),
        ("recurrence = false\n", r"schedule.kind = 'interleaved' needs memory, but recurrence is off"),
        ("recurrence = 3\n", r"recurrence = 3: expected a table \[recurrence\], or recurrence = false"),
    ],
)
def test_values_that_do_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize("key", ["gate_channels", "separator", "blocks"])
@pytest.mark.parametrize("value", ["4", 1.5, True, ("a",)])
def test_recurrence_settings_of_a_wrong_type(key, value):
    with pytest.raises(ValueError, match=rf"recurrence.{key} = "):
        lrt.RecurrenceConfig(**{key: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(value_embeddings="alternate"), "model.value_embeddings = 'alternate': use one of all, alternating, none"),
        (lambda: lrt.RecurrenceConfig(sharing="tied"), "recurrence.sharing = 'tied': use one of shared, layerwise"),
        (lambda: Recipe(parallel=ParallelConfig(reshard="never")), "parallel.reshard = 'never': use one of after_step, after_forward"),
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
