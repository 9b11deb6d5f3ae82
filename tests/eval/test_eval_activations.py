"""Statistics of memory, gates and shares at evaluation: against the formulas, and without any trace left in the
model."""

import math

import pytest
import torch
import torch.nn.functional as F
from hf_decoders import make, stir
from runs import files_equal, tiny, train_records

import lrt
from lrt.config import parse_recipe
from lrt.eval import activation_statistics
from lrt.train import evaluation
from lrt.train.checkpoint import latest
from lrt.train.monitor.metrics import memory_table, read_records
from lrt.train.trainer import train

SEPARATOR = 0
IDS = torch.randint(1, 37, (3, 8), generator=torch.Generator().manual_seed(1))
IDS[1, 4] = SEPARATOR
TARGETS = IDS.roll(-1, 1)
TARGETS[2, 5:] = -100


def native(**overrides):
    sets = {
        "model.n_layers": 3, "model.width": 12, "model.n_heads": 3, "model.n_kv_heads": 1, "model.vocab_size": 37,
        "model.vocab_multiple": 1, "model.sequence_length": 8, "recurrence.gate_channels": 4,
        "recurrence.separator": SEPARATOR, **overrides,
    }  # fmt: skip
    model = lrt.build(parse_recipe("", overrides=[f"{k}={v}" for k, v in sets.items()]), dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def of(values):
    """As the statistics are given."""
    x = values.detach().flatten()
    return {"mean": x.mean(), "std": x.std(correction=0), "min": x.min(), "max": x.max()}


def check(found, place, values):
    for name, value in of(values).items():
        assert found[name][place] == pytest.approx(float(value), rel=1e-5, abs=1e-12), name


@pytest.mark.parametrize("sharing", ["shared", "layerwise"])
def test_numbers_are_those_of_the_formulas(sharing):
    model = native(**{"recurrence.sharing": sharing, "recurrence.source_layer": 2})
    calls = []
    hooks = [block.register_forward_hook(lambda block, args, out: calls.append((*args, out))) for block in model.blocks]
    model.eval().run(IDS, lrt.refine(1))
    for hook in hooks:
        hook.remove()
    found = activation_statistics(model, IDS, TARGETS, lrt.refine(1))
    source = calls[1][-1][0]  # of the first pass: what the second receives
    m = F.pad(F.rms_norm(source, (12,), eps=torch.finfo(torch.float64).eps)[:, :-1], (0, 0, 1, 0))
    m[1, 4] = 0
    received = (TARGETS != -100) & (torch.arange(8) > 0) & (IDS != SEPARATOR)
    assert received.sum() == 3 * 8 - 3 - 1 - 3
    counted = TARGETS != -100
    last = calls[4][-1][0]
    check(found["source_norm"], 0, last.norm(dim=-1)[counted])
    check(found["memory_norm"], 0, F.rms_norm(last, (12,), eps=torch.finfo(torch.float64).eps).norm(dim=-1)[counted])
    for layer, block in enumerate(model.blocks):
        hidden, _, context, *_ = calls[3 + layer]
        a, b = model.backbone.residual_scales[layer], model.backbone.embedding_scales[layer]
        g = model.injection.gains[layer]
        stream = a * hidden + b * context.embedding
        check(found["injection_ratio"], layer, ((g * m).norm(dim=-1) / stream.norm(dim=-1))[received])
        normed = F.rms_norm(stream + g * m, (12,))
        gates = 2 / (1 + torch.exp(-normed[..., :4] @ block.gate.weight.T))
        check(found["local_gate"], layer, gates[..., :1][received])
        check(found["memory_gate"], layer, gates[..., 1:][received])
        pair = block.projection if sharing == "layerwise" else model.memory_projection
        for name, memory_weight, weight in (
            ("key", pair.key.weight, block.block.key.weight),
            ("value", pair.value.weight, block.block.value.weight),
        ):
            ratio = (gates[..., 1] * (m @ memory_weight.T).norm(dim=-1)) / (
                gates[..., 0] * (normed @ weight.T).norm(dim=-1)
            )
            check(found[f"{name}_ratio"], layer, ratio[received])


def test_every_position_is_looked_at_once_whatever_the_schedule():
    """With one sweep over S subsets each position is in one pass; with S = T the passes are the true recurrence."""
    model = native()
    exact = activation_statistics(model, IDS, TARGETS, lrt.sequential())
    swept = activation_statistics(model, IDS, TARGETS, lrt.interleaved(8))
    for name, values in exact.items():
        for key, numbers in values.items():
            assert swept[name][key] == pytest.approx(numbers, rel=1e-5), (name, key)
    weighted = activation_statistics(model, IDS, TARGETS, lrt.refine(2, weights=(0.0, 0.0, 1.0)))
    assert weighted == activation_statistics(model, IDS, TARGETS, lrt.refine(2))


def test_what_a_fresh_model_does_is_known():
    recipe = parse_recipe(
        "",
        overrides=[
            "model.n_layers=2",
            "model.width=16",
            "model.n_heads=2",
            "model.vocab_size=37",
            "recurrence.blocks=[2]",
        ],
    )
    found = activation_statistics(lrt.build(recipe), IDS)
    assert found["local_gate"] == {"mean": [1.0], "std": [0.0], "min": [1.0], "max": [1.0]} == found["memory_gate"]
    assert found["memory_norm"]["mean"][0] == pytest.approx(4.0, rel=1e-3)  # sqrt(D)
    assert found["injection_ratio"]["mean"][0] > 0


@pytest.mark.parametrize("family", ["smollm", "gpt2", "gpt_neox", "olmo2"])
def test_adapted_decoders(family):
    model = lrt.adapt(make(family))
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    before = activation_statistics(model, ids, schedule=lrt.refine(1))
    assert (
        before["injection_ratio"]["max"] == before["key_ratio"]["max"] == [0.0] * 3
        and before["local_gate"]["mean"] == [1.0] * 3
    )
    stir(model)
    after = activation_statistics(model, ids, schedule=lrt.interleaved(2))
    assert all(x > 0 for name in ("injection_ratio", "key_ratio", "value_ratio") for x in after[name]["min"])
    assert all(low < 1 < high for low, high in zip(after["memory_gate"]["min"], after["memory_gate"]["max"]))


def test_parts_that_are_off_have_no_numbers():
    assert set(activation_statistics(native(**{"recurrence.kv_projection": "false"}), IDS)) == {
        "source_norm",
        "memory_norm",
        "injection_ratio",
    }
    assert "injection_ratio" not in activation_statistics(native(**{"recurrence.residual": "false"}), IDS)
    assert set(activation_statistics(native(), IDS, schedule=lrt.baseline())) == {"source_norm", "memory_norm"}
    twin = native(**{"recurrence": "false", "schedule.kind": "baseline"})
    assert activation_statistics(twin, IDS) == {}
    alone = activation_statistics(native(), IDS[:, :1])  # nothing is received at position 0
    assert all(math.isnan(x) for x in alone["memory_gate"]["mean"])


@torch._dynamo.config.patch(recompile_limit=64)  # earlier tests compiled the same blocks
def test_compiled_blocks_give_the_same_and_nothing_stays_behind():
    model = native()
    expected = activation_statistics(model, IDS, TARGETS)
    parts = {
        name: list(module._forward_hooks) + list(module._forward_pre_hooks) for name, module in model.named_modules()
    }
    assert not any(parts.values()) and model.training
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    found = activation_statistics(model, IDS, TARGETS)
    for name, values in expected.items():
        for key, numbers in values.items():
            assert found[name][key] == pytest.approx(numbers, rel=1e-5)


# ------------------------------------------------------------------ in a run


def test_a_run_records_them_and_learns_the_same(tmp_path, monkeypatch, capsys):
    with_order = {"schedule.order": "random", "schedule.subsets": 4, "evaluation.every": 2}
    watched = train(tiny(tmp_path / "watched", **with_order))
    shown = capsys.readouterr().out
    record = [r for r in read_records(watched.folder / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert set(record["activations"]) == {
        "source_norm", "memory_norm", "injection_ratio", "local_gate", "memory_gate", "key_ratio", "value_ratio",
    }  # fmt: skip
    assert all(
        len(x) == (1 if "_norm" in name else 2) for name, table in record["activations"].items() for x in table.values()
    )
    assert len(record["recurrence"]["residual_scales"]) == len(record["recurrence"]["gains"]) == 2
    assert all(line in shown for line in memory_table(record))
    monkeypatch.setattr(evaluation, "activation_statistics", lambda *args: {})
    blind = train(tiny(tmp_path / "blind", **with_order))
    files_equal(latest(watched.folder / "checkpoints"), latest(blind.folder / "checkpoints"))
    assert train_records(watched.folder) == train_records(blind.folder) and watched.bpb == blind.bpb


def test_the_table_has_a_line_a_statistic():
    numbers = {"mean": [0.5, 2.0, 1.0], "std": [0.1, 0.2, 0.3], "min": [0, 0, 0], "max": [3, 3, 3]}
    lines = memory_table({"activations": {"memory_gate": numbers}, "recurrence": {"gains": [0.25]}})
    assert [line.split() for line in lines[1:]] == [
        ["memory", "gate,", "mean", "0.5", "1", "2"], ["memory", "gate,", "std", "0.1", "0.2", "0.3"],
        ["gain", "g", "0.25"],
    ]  # fmt: skip
    assert memory_table({"activations": {}}) == []
