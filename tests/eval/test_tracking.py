"""State tracking: the tasks by hand, learning in seconds, and what the command writes."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from lrt.config import load_recipe
from lrt.eval import tracking
from lrt.eval.tracking import accuracy, fit, parity, symmetric_group, variant_of


def test_states_by_hand():
    generator = torch.Generator().manual_seed(0)
    bits, states = parity().draw(5, 40, generator=generator)
    assert torch.equal(states, bits.cumsum(1) % 2) and set(bits.flatten().tolist()) == {0, 1}
    task = symmetric_group()
    elements, swaps = list(itertools.permutations(range(5))), list(itertools.combinations(range(5), 2))
    inputs, states = task.draw(3, 30, generator=generator)
    assert task.vocabulary == 120 and task.table.shape == (120, 10)
    for row in range(3):
        things = list(range(5))
        for given, state in zip(inputs[row].tolist(), states[row].tolist()):
            a, b = swaps[given]
            things[a], things[b] = things[b], things[a]
            assert elements[state] == tuple(things)
    assert len({tuple(column) for column in task.table.T.tolist()}) == 10  # ten different permutations of the states
    assert all(sorted(column) == list(range(120)) for column in task.table.T.tolist())


def test_the_recurrence_carries_parity_beyond_its_training_and_a_plain_twin_does_not():
    recipe = load_recipe(
        "tracking_parity", overrides=["training.steps=240", "training.micro_batch=32", "training.batch_tokens=640"]
    )
    for seed in (1, 2):
        model = fit(variant_of(recipe, "sequential"), parity(), length=20, seed=seed)
        known = accuracy(model, parity(), length=60)
        # chance is 0.5, at twice and thrice the length
        assert sum(known[20:40]) / 20 > 0.9 and sum(known[40:]) / 20 > 0.75, seed
    plain = accuracy(fit(variant_of(recipe, "plain"), parity(), length=20, seed=1), parity(), length=60)
    assert sum(plain[20:]) / 40 < 0.6


def test_variants_are_the_recipe_with_another_schedule():
    recipe = load_recipe("tracking_s5")
    assert variant_of(recipe, "plain").recurrence is None and variant_of(recipe, "sequential") == recipe
    assert variant_of(recipe, "refine:3").schedule.weights == (0, 0, 0, 1)
    for name in ("refine", "refine:0", "chunked"):
        with pytest.raises(ValueError, match="use sequential, plain, or refine:K"):
            variant_of(recipe, name)


def test_the_command_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    options = [
        "--out",
        str(tmp_path),
        "--test-length",
        "20",
        "--train-length",
        "8",
        "--seeds",
        "1",
        "2",
        "--set",
        "training.steps=2",
    ]
    assert tracking.main([*options, "--variants", "plain"]) == 0
    trained = []
    monkeypatch.setattr(tracking, "fit", lambda *a, **k: trained.append(k["seed"]) or fit(*a, **k))
    assert tracking.main([*options, "--variants", "plain", "refine:2"]) == 0
    assert trained == [1, 2]
    out = capsys.readouterr().out.splitlines()
    records = json.loads(out[-1])
    assert [(r["variant"], r["seed"]) for r in records] == [
        ("plain", 1),
        ("plain", 2),
        ("refine:2", 1),
        ("refine:2", 2),
    ]
    assert out[-3].split()[:3] == ["plain", "8", "2"]
    from matplotlib import image

    assert tracking.main([*options, "--variants", "plain", "--set", "training.steps=3"]) == 0
    assert trained[2:] == [1, 2]  # other settings are other runs, and stand in a table of their own
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 2
    assert image.imread(tmp_path / "tracking.png")[..., :3].std() > 0.05
    assert tracking.main(["--recipe", "lrt_tiny", "--out", str(tmp_path)]) == 2
    assert 'data.train = "demo" with training.steps: use "task:" and one of parity, s5' in capsys.readouterr().err
