"""Memory that the blocks' own projections read, in native models: settings, counts, optimizer, folders, decoding,
reports."""

from __future__ import annotations

import pytest
import torch
from strategies import randomized

import lrt
from lrt import backbone
from lrt.accounting import count_parameters
from lrt.config import ModelConfig, RecurrenceConfig, dump_recipe, parse_recipe
from lrt.conversion import official
from lrt.decoding import accelerate
from lrt.decoding.fast import one_token
from lrt.eval.activations import activation_statistics
from lrt.eval.parameters import recurrence_statistics
from lrt.kernels import mixing
from lrt.model import build_model
from lrt.serialization import native_config
from lrt.train.optim.groups import group_of, is_memory

CONFIG = ModelConfig(
    n_layers=3, width=32, n_heads=2, n_kv_heads=1, vocab_size=64, sequence_length=16, window_pattern="SL"
)
ALIGNED = RecurrenceConfig(projection="aligned", separator=1, gate_channels=8)
TOKENS = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))


def native(recurrence=ALIGNED, **changes):
    return randomized(build_model(CONFIG, recurrence, dtype=torch.float64, **changes), 0, 0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sharing": "layerwise"},
            'recurrence.projection = "aligned" is one map that all blocks share, so sharing = "layerwise" does not fit',
        ),
        (
            {"kv_projection": False},
            r'recurrence.projection = "aligned" has no effect with recurrence.kv_projection = false',
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        RecurrenceConfig(projection="aligned", **settings)
    with pytest.raises(ValueError, match="recurrence.projection = 'aligne': use one of separate, aligned"):
        RecurrenceConfig(projection="aligne")


def test_recipes_and_folders_hold_it(tmp_path):
    recipe = parse_recipe("", overrides=["recurrence.projection=aligned"])
    assert recipe.recurrence.projection == "aligned" and parse_recipe(dump_recipe(recipe)) == recipe
    assert RecurrenceConfig().projection == "separate"
    model = native().float()
    lrt.save(model, tmp_path / "model")
    again = lrt.load(tmp_path / "model")
    assert again.recurrence == ALIGNED
    assert torch.equal(again(TOKENS, schedule=lrt.refine(1)).logits, model(TOKENS, schedule=lrt.refine(1)).logits)


def test_it_starts_as_its_init_says():
    for init, size in (("identity", 0.0), ("paper", 32**-0.5)):
        model = build_model(CONFIG, RecurrenceConfig(projection="aligned", init=init))
        model.init_weights(generator=torch.Generator().manual_seed(0))
        assert float(model.memory_projection.map.weight.detach().std()) == pytest.approx(size, rel=0.05)


def test_its_parameters_are_counted_trained_and_known_as_memory():
    model = native()
    counts = count_parameters(model)
    assert counts.memory_projections == 32 * 32 and counts.memory_gates == 3 * 1 * 8 and counts.injection == 3
    added = model.memory_parameters()
    assert sum(p.numel() for p in added.values()) == counts.memory
    assert {name for name, _ in model.named_parameters() if is_memory(name)} == added.keys()
    assert group_of("memory_projection.map.weight", added["memory_projection.map.weight"]).kind == "muon"


def test_the_official_layout_refuses_it_by_name():
    config = native_config(
        build_model(
            ModelConfig(n_layers=2, width=256), RecurrenceConfig(projection="aligned", source_layer=2), device="meta"
        )
    )
    with pytest.raises(ValueError, match=r"recurrence.projection = 'aligned' \(it has 'separate'\)"):
        official.official_from_native(config)


def test_the_fused_kernels_are_not_asked(monkeypatch):
    """They read one input for queries, keys and values, so they would leave the memory out."""
    model, separate = native().float(), native(RecurrenceConfig()).float()
    monkeypatch.setitem(__import__("sys").modules, "triton", object())
    assert one_token.can_fuse(separate) and not one_token.can_fuse(model)
    expected = model(TOKENS, schedule=lrt.interleaved(2)).logits
    monkeypatch.setattr(backbone, "usable", lambda x, head_dim: True)
    monkeypatch.setattr(mixing, "_forward", lambda *args: pytest.fail("asked"))
    assert torch.equal(model(TOKENS, schedule=lrt.interleaved(2)).logits, expected)


def test_decoding_is_true_recurrence():
    model = native().float().eval()
    ids, exact = lrt.generate(model, TOKENS, max_new_tokens=5, temperature=0.0), TOKENS
    with torch.no_grad():
        for _ in range(5):
            exact = torch.cat([exact, model(exact, schedule=lrt.sequential()).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, exact)
    fast = accelerate(model, backend="aot_eager")
    assert torch.equal(lrt.generate(fast, TOKENS, max_new_tokens=5, temperature=0.0), exact)


def test_what_is_said_of_it():
    model = native()
    numbers = recurrence_statistics(model)
    assert numbers["map_rms"] == pytest.approx(
        [float(model.memory_projection.map.weight.detach().square().mean().sqrt())]
    )
    assert (
        len(numbers["gate_rms"]) == 3 and "key_projection_rms" not in numbers and len(numbers["residual_scales"]) == 3
    )
    found = activation_statistics(model, TOKENS, schedule=lrt.refine(1))
    assert {"local_gate", "key_ratio", "value_ratio", "injection_ratio"} <= found.keys() and "memory_gate" not in found
    assert min(found["key_ratio"]["min"]) > 0
    with torch.no_grad():
        model.memory_projection.map.weight.zero_()
    assert max(activation_statistics(model, TOKENS, schedule=lrt.refine(1))["key_ratio"]["max"]) < 1e-12
