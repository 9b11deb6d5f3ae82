"""Diagnostics on models whose memory is known: one that does nothing, one that jumps between two states,
and random ones."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from strategies import randomized

import lrt
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.data import load_tokenizer
from lrt.eval.diagnosis import PARTS, changed_memories, diagnose
from lrt.eval.diagnosis_figures import draw
from lrt.model import build_model

TOOLS = Path(__file__).parent.parent.parent / "tools"


def batch(rows=3, length=12, vocabulary=16, seed=0):
    ids = torch.randint(1, vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:]
    return SimpleNamespace(
        input_ids=ids[:, :-1], targets=targets, documents=torch.zeros_like(targets), sizes=torch.ones_like(targets)
    )


def random_model(**recurrence):
    config = ModelConfig(n_layers=3, width=16, n_heads=2, vocab_size=16, sequence_length=16)
    return randomized(build_model(config, RecurrenceConfig(**recurrence), dtype=torch.float64), 3, 0.3).eval()


@pytest.mark.parametrize("projection", ["separate", "aligned"])
def test_a_memory_that_does_nothing_costs_nothing(projection):
    model = random_model(projection=projection)
    with torch.no_grad():
        for name, parameter in model.memory_parameters().items():
            if "gate" not in name:
                parameter.zero_()
    report = diagnose(model, batch(), separator=0, decode_tokens=5)
    changes = {name: parts for name, parts in report["loss"].items() if isinstance(parts, dict)}
    assert len(changes) == 4 and all(parts["all"] == 0 for parts in changes.values())
    assert all(abs(value) < 1e-12 for parts in changes.values() for part in PARTS for value in parts[part])
    for mode in ("zero", "parallel"):
        assert report["positions"][mode] == pytest.approx(report["positions"]["decode"], abs=1e-12)
    assert max(report["sweeps"]["error"]) < 1e-9 and report["sweeps"]["exact_prefix"] == [12] * 8
    assert report["parameters"]["gains"] == [0, 0, 0] and not any("two states" in line for line in report["findings"])


@pytest.fixture
def two_states():
    """One block that answers its memory with the opposite: m[t] is nearly -m[t-1], and the loss is good in one of the
    states alone."""
    config = ModelConfig(n_layers=1, width=16, n_heads=2, vocab_size=16, sequence_length=16, value_embeddings="none")
    recurrence = RecurrenceConfig(source_layer=1, kv_projection=False, init="paper")
    model = build_model(config, recurrence, dtype=torch.float64).eval()
    model.init_weights(generator=torch.Generator().manual_seed(0))
    model.train_schedule = lrt.interleaved(2)
    common = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        model.injection.gains.fill_(-10.0)
        model.backbone.embedding.weight.copy_(
            common + 0.05 * torch.randn(64, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        )
        model.backbone.head.weight.zero_()
        model.backbone.head.weight[1] = common
    return model


def test_two_states_are_seen(two_states):
    given = batch(length=16)
    given.targets.fill_(1)
    report = diagnose(two_states, given, separator=0, sweeps=6, decode_tokens=20)
    sweeps = report["sweeps"]
    assert (
        sweeps["change"][-1] > 1
        and sweeps["change_over_two"][-1] < 0.2
        and sweeps["exact_prefix"] == [2, 3, 4, 5, 6, 7]
    )
    assert any("jumps between two states" in line for line in report["findings"])
    even, odd = report["residues"]["decode"]
    assert odd - even > 1  # bits per byte: every other position is in the state that predicts nothing
    # in training it was the even positions: the mean of both gaps would hide it
    assert report["residues"]["parallel"][0] - even > 1
    drift = report["drift"]
    assert (
        min(drift["angle"]) > 150
        and max(drift["angle_over_two"]) < 30
        and len(drift["rms"]) == 20
        and min(drift["rms"][1:]) > 5
    )


@pytest.mark.parametrize("sharing", ["shared", "layerwise"])
def test_changes_are_those_of_a_model_without_that_part(sharing):
    """Zeroing a part everywhere is the model without that part, fed the same memory."""
    model, given = random_model(sharing=sharing), batch()
    tokens, targets = given.input_ids, given.targets
    memory = torch.cat([r.memory for r in model.run(tokens, lrt.sequential())], dim=1).detach()
    scored = torch.ones_like(targets, dtype=torch.bool)
    with torch.no_grad():
        found = changed_memories(model, tokens, targets, scored, targets.numel(), memory)
        exact = model.score(tokens, targets, lrt.sequential())[-1].sum() / targets.numel() / math.log(2)
        assert found["intact"] == pytest.approx(float(exact), rel=1e-9)
        model.injection.gains[1] = 0
        without = changed_memories(model, tokens, targets, scored, targets.numel(), memory)["intact"]
    assert found["zeroed"]["residual"][1] == pytest.approx(without - found["intact"], rel=1e-6)
    assert abs(found["zeroed"]["residual"][1]) > 1e-6
    model = random_model(sharing=sharing)
    if sharing == "layerwise":
        with torch.no_grad():
            for part in (model.blocks[2].projection.key, model.blocks[2].projection.value):
                part.weight.zero_()
            without = changed_memories(model, tokens, targets, scored, targets.numel(), memory)["intact"]
        assert found["zeroed"]["keys and values"][2] == pytest.approx(without - found["intact"], rel=1e-6)


def test_frozen_and_foreign_memories_by_hand():
    model = random_model(kv_projection=False, blocks=(2,), source_layer=2)
    given = batch(rows=2, length=5)
    tokens, targets = given.input_ids, given.targets
    with torch.no_grad():
        memory = torch.cat([r.memory for r in model.run(tokens, lrt.sequential())], dim=1)
        found = changed_memories(
            model, tokens, targets, torch.ones_like(targets, dtype=torch.bool), targets.numel(), memory
        )
        assert found["blocks"] == [2] and "keys and values" not in found["zeroed"]
        hidden, contexts = model.backbone.embed(tokens, torch.arange(5))
        for name, state in {
            "frozen at the first": memory[:, :1].expand_as(memory),
            "of another row": torch.nn.functional.pad(memory.flip(0)[:, :-1], (0, 0, 1, 0)),
            "replaced by the mean": memory.mean((0, 1)).expand_as(memory),
        }.items():
            x = model.blocks[0](hidden, None, contexts[0], None)[0]
            x = model.blocks[1](x, lrt.types.MemoryInput(state, None, None, model.injection()[0]), contexts[1], None)[0]
            x = model.blocks[2](x, None, contexts[2], None)[0]
            nats = model.backbone.loss(x, targets)[1].sum() / targets.numel() / math.log(2)
            assert found[name]["residual"] == pytest.approx([float(nats) - found["intact"]], rel=1e-9)
            assert found[name]["all"] == pytest.approx(found[name]["residual"][0])


def test_what_cannot_be_diagnosed_is_refused():
    plain = build_model(ModelConfig(n_layers=1, width=8, n_heads=1, vocab_size=16), None)
    with pytest.raises(ValueError, match="has no memory, so there is nothing to diagnose"):
        diagnose(plain, batch(), separator=0)
    with pytest.raises(ValueError, match="one row of text"):
        diagnose(random_model(), batch(rows=1), separator=0)


def test_the_command_writes_a_page_and_json(tmp_path, monkeypatch, capsys):
    tool = importlib.import_module("lrt.commands.diagnose")
    config = ModelConfig(n_layers=2, width=16, n_heads=2, vocab_size=257, sequence_length=32)
    lrt.save(randomized(build_model(config, RecurrenceConfig(separator=256)), 1, 0.2), tmp_path / "model")
    load_tokenizer("bytes").save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Text {n} of the fox." for n in range(30)))
    given = [
        tmp_path / "model",
        "--data",
        tmp_path / "text.txt",
        "--out",
        tmp_path / "out",
        "--decode-tokens",
        9,
        "--rows",
        3,
    ]
    assert tool.main(list(map(str, given))) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert (
        last == {"findings": report["findings"], "report": str(tmp_path / "out")} and len(report["drift"]["angle"]) == 8
    )
    from matplotlib import image

    page = image.imread(tmp_path / "out" / "diagnosis.png")
    assert page.shape[0] > 1000 and page.shape[1] > 2000 and page[..., :3].std() > 0.05
    drawn = draw({**report, "drift": None}, tmp_path / "again.png", title="again")
    assert drawn.stat().st_size > 50_000
    assert (
        tool.main([str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "text.txt")])
        == 2
    )
    assert "a file; name a folder" in capsys.readouterr().err
