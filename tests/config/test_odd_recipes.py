"""Recipes and overrides of bad shapes, one line each: found by fuzzing, kept."""

from __future__ import annotations

import pytest

from lrt.config import RecipeError, load_recipe, parse_recipe

DEEP = 5000


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.steps=" + "[" * DEEP + "]" * DEEP, r"training.steps = '\[\[\["),
        ("training.steps=" + "{a=" * DEEP, r"training.steps = '\{a=\{a="),
        ("training.steps=" + "9" * 401, r"training.steps = 9{401}: use a whole number of 0 or more, "
            r"at most 4611686018427387904"),
        ("training.steps=" + "9" * 5000, r"training.steps = '999"),
        ("optimizer.matrix_lr=" + "9" * 401, r"optimizer.matrix_lr = 9{401}: expected a number that fits a float"),
        ("model.width=" + str(10**30), r"model.width = 10{30}: use a whole number of 1 or more, at most 1048576"),
        ("model.n_layers=1000000000", r"model.n_layers = 1000000000: use a whole number of 1 or more, at most 10000"),
        ("a" + "." * 50_000 + "b=1", r"--set 'a\.\.\..*: write section.key=value"),
        ("training.steps=5\nrun.name = 'x'", r"--set .training.steps=5\\nrun.name = 'x'.: holds more than one value"),
        (
            "run.name=" + "x" * 300,
            r"run.name = 'x{100}...' has a part of more than 255 bytes: give the name of a folder",
        ),
        ('run.name="a\\nb"', r"run.name = 'a\\nb' holds characters that cannot be printed"),
        ("run.name=", r"run.name = '' is empty, perhaps an unset variable: give the name of a folder"),
        ("run.name=../x", r"run.name = '../x' leads out of run.output"),
        ("run.name=/x", r"run.name = '/x' leads out of run.output"),
        ("run.output= ", r"run.output = '' is empty, perhaps an unset variable"),
        ("data.train=", r"data.train = '' is empty, perhaps an unset variable"),
        ("run.backbone=" + "m" * 5000, r"run.backbone = 'm{100}'... has a name of more than 255 bytes"),
        ('run.backbone="a\\nb"', r"run.backbone = 'a\\nb' holds a zero byte, a line break or the like"),
        ('data.train="a\\u0000b"', r"data.train = 'a\\x00b' holds a zero byte, a line break or the like"),
        ("training.tokens_per_parameter=1e300", r"training.tokens_per_parameter = 1e\+300: "
            r"use a number above 0, at most"),
        ("recurrence.blocks=[" + ",".join(map(str, range(9000))) + "]", r"recurrence.blocks = \[0, 1, .* \.\.\. "),
        ("schedule.phases=[[1]]", r"schedule.phases\[0\] = \[1\]: expected a table, such as \{kind = ..., "
            r"subsets = ...\}"),
    ],
)  # fmt: skip
def test_an_override_of_a_bad_shape_is_one_short_line(override, message):
    with pytest.raises(RecipeError, match=message) as refused:
        load_recipe("lrt_tiny", overrides=[override])
    assert len(str(refused.value)) < 2100


def test_values_of_several_lines_that_are_one_value_stay(tmp_path):
    recipe = load_recipe(
        "lrt_tiny", overrides=["evaluation.modes=[\n'zero',\n'decode']", "training.steps=5  # a remark\n"]
    )
    assert recipe.evaluation.modes == ("zero", "decode") and recipe.training.steps == 5


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x = " + "9" * 5000, "[a", "\0", "a = {b = 1"])
def test_a_file_that_is_no_toml_is_named(tmp_path, text):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"^r.toml: not valid TOML: "):
        load_recipe(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match=r"^recipe: not valid TOML: "):
        parse_recipe(text)


def test_a_base_or_a_recipe_whose_name_no_file_system_takes(tmp_path):
    (tmp_path / "r.toml").write_text(f'base = "{"x" * 5000}"\n')
    for name in (tmp_path / "r.toml", "y" * 5000, "", "a\0b"):
        with pytest.raises(RecipeError, match=r"^recipe .* not found\. Recipes here: "):
            load_recipe(name)


def test_a_name_is_suggested_only_where_it_is_similar():
    for wrong, right in (
        ("lrt_tinny", "lrt_tiny.toml"),
        ("lrt24l", "lrt_24l.toml"),
        ("baseline_tiny.tml", "baseline_tiny.toml"),
    ):
        with pytest.raises(RecipeError, match=rf"; did you mean {right}\?"):
            load_recipe(wrong)
    for wrong in ("my_model", "train", "gpt2", "tiny_stories", "experiment_7", "layerwise"):
        with pytest.raises(RecipeError) as refused:
            load_recipe(wrong)
        assert "did you mean" not in str(refused.value), wrong
    for wrong, right in (
        ("trainning.steps", "training"),
        ("training.stpes", "training.steps"),
        ("model.n_layer", "model.n_layers"),
    ):
        with pytest.raises(RecipeError, match=f"did you mean '{right}'"):
            load_recipe("lrt_tiny", overrides=[f"{wrong}=5"])
    for wrong in ("hello.world", "training.foo", "model.dropout", "optimizer.lr", "data.path"):
        with pytest.raises(RecipeError) as refused:
            load_recipe("lrt_tiny", overrides=[f"{wrong}=5"])
        assert "did you mean" not in str(refused.value), (wrong, str(refused.value))


def test_of_many_mistakes_twenty_are_listed():
    with pytest.raises(RecipeError) as refused:
        load_recipe("lrt_tiny", overrides=[f"nothing.key{i}=1" for i in range(3)] + [f"odd{i}.x=1" for i in range(40)])
    lines = str(refused.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "  and 21 more mistakes"
