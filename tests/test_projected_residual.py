"""A projected residual: what it adds, what it leaves unchanged, and everything that has to know of it."""

from __future__ import annotations

import sys

import pytest
import torch
from hf_decoders import make, stir
from strategies import randomized

import lrt
from lrt.accounting import count_parameters, shared_flops, training_flops
from lrt.config import ModelConfig, RecurrenceConfig, dump_recipe, load_recipe, parse_recipe
from lrt.conversion import official
from lrt.decoding import accelerate
from lrt.decoding.fast import one_token
from lrt.eval.activations import activation_statistics
from lrt.eval.parameters import recurrence_statistics
from lrt.model import build_model
from lrt.recurrence import into_residual
from lrt.serialization import native_config
from lrt.train.dry_run import dry_run
from lrt.train.entrance import Entrance
from lrt.train.optim.groups import group_of, is_memory

CONFIG = ModelConfig(n_layers=3, width=32, n_heads=2, vocab_size=64, sequence_length=16)
TOKENS = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["separate", "aligned"])
def recurrence(request):
    return RecurrenceConfig(projection=request.param, residual="projected", separator=1)


def native(recurrence):
    return randomized(build_model(CONFIG, recurrence, dtype=torch.float64), 0, 0.3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("projection", ["separate", "aligned"])
def test_a_decoder_is_unchanged_at_step_0_and_recurrence_is_exact(family, projection):
    decoder = make(family)
    tokens = TOKENS % 57 + 1
    theirs = decoder(tokens, labels=tokens, use_cache=False)
    theirs.loss.backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    model = lrt.adapt(decoder, RecurrenceConfig(projection=projection, residual="projected", init="identity"))
    ours = model(tokens, labels=tokens, schedule=lrt.baseline(), return_logits=True)
    ours.loss.backward()
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(p.grad, expected[name]) for name, p in decoder.named_parameters() if p.grad is not None)
    with torch.no_grad():
        for schedule in (lrt.interleaved(3), lrt.refine(2), lrt.sequential()):
            torch.testing.assert_close(model(tokens, schedule=schedule).logits, theirs.logits, rtol=1e-5, atol=1e-5)
    model(tokens, labels=tokens, schedule=lrt.refine(1)).loss.backward()
    assert (model.injection.gains.grad != 0).all()  # it learns from the first step on
    stir(model)
    found = []
    for schedule in (lrt.sequential(), lrt.interleaved(13, weights=(0, 1))):
        model.zero_grad()
        model(tokens, labels=tokens, schedule=schedule).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= model.memory_parameters().keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_it_adds_as_much_as_its_gain_says_of_streams_of_any_size():
    model = lrt.adapt(make("llama"), RecurrenceConfig(residual="projected", kv_projection=False, init="identity"))
    stir(model)
    with torch.no_grad():
        model.injection.gains.copy_(torch.tensor([0.1, -0.3, 2.0]))
        memory = 50 * torch.randn(1, 4, 24, dtype=torch.float64)
        for given, gain in zip(lrt.forward.memory_inputs(model, memory), model.injection.gains):
            for size in (1e-3, 30.0):
                stream = size * torch.randn(1, 4, 24, dtype=torch.float64)
                ratio = into_residual(stream, given).norm(dim=-1) / stream.norm(dim=-1)
                torch.testing.assert_close(ratio, gain.abs().expand_as(ratio), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", ["project", 1, 0, None])
def test_settings_that_do_not_fit(value):
    with pytest.raises(ValueError, match=rf"recurrence.residual = {value!r}: use true, false or projected"):
        RecurrenceConfig(residual=value)


def test_recipes_and_folders_hold_it(recurrence, tmp_path):
    recipe = parse_recipe("", overrides=["recurrence.residual=projected"])
    assert recipe.recurrence.residual == "projected" and parse_recipe(dump_recipe(recipe)) == recipe
    assert parse_recipe("", overrides=["recurrence.residual=false"]).recurrence.residual is False
    model = native(recurrence).float()
    lrt.save(model, tmp_path / "model")
    again = lrt.load(tmp_path / "model")
    assert again.recurrence == recurrence
    assert torch.equal(again(TOKENS, schedule=lrt.refine(1)).logits, model(TOKENS, schedule=lrt.refine(1)).logits)
    adapted = stir(lrt.adapt(make("smollm", dtype=torch.float32), recurrence))
    lrt.save(adapted, tmp_path / "memory", adapter_only=True)
    again = lrt.load(tmp_path / "memory", base=make("smollm", dtype=torch.float32))
    assert torch.equal(
        again(TOKENS % 60, schedule=lrt.refine(1)).logits, adapted(TOKENS % 60, schedule=lrt.refine(1)).logits
    )
    config = native_config(build_model(ModelConfig(n_layers=2, width=256), recurrence, device="meta"))
    with pytest.raises(ValueError, match=r"recurrence.residual = 'projected' \(it has True\)"):
        official.official_from_native(config)


@pytest.mark.parametrize(("init", "gain"), [("identity", 0.0), ("paper", 0.1)])
def test_it_starts_as_its_init_says(init, gain):
    model = build_model(CONFIG, RecurrenceConfig(residual="projected", init=init))
    model.init_weights(generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.injection.map.weight, torch.eye(32)) and (model.injection.gains == gain).all()


def test_its_parameters_and_products_are_counted(recurrence):
    model, scalar = native(recurrence), native(RecurrenceConfig(projection=recurrence.projection, separator=1))
    counts = count_parameters(model)
    assert counts.injection == 3 + 32 * 32 and counts.memory == sum(
        p.numel() for p in model.memory_parameters().values()
    )
    assert {name for name, _ in model.named_parameters() if is_memory(name)} == model.memory_parameters().keys()
    assert group_of("injection.map.weight", model.injection.map.weight).kind == "muon"
    assert shared_flops(model) - shared_flops(scalar) == 2 * 32 * 32
    # a refresh adds nothing
    for schedule, rows in ((lrt.refine(2), 2), (lrt.interleaved(3, kv_refresh=True), 1), (lrt.baseline(), 0)):
        more = training_flops(model, schedule, 16) - training_flops(scalar, schedule, 16)
        assert more == pytest.approx(rows * 3 * 2 * 32 * 32)


def test_a_dry_run_knows_of_it():
    def memory(*overrides):
        recipe = load_recipe("lrt_tiny.toml", overrides=list(overrides))
        line = next(line for line in dry_run(recipe, world_size=1).splitlines() if "activations" in line)
        return float(line.split()[-1])

    plain = memory("training.micro_batch=16")
    assert (
        memory("training.micro_batch=16", "recurrence.residual=projected", "recurrence.projection=aligned") > plain > 0
    )


def test_decoding_is_true_recurrence_without_the_fused_kernels(recurrence, monkeypatch):
    model, exact = native(recurrence).float().eval(), TOKENS
    with torch.no_grad():
        for _ in range(5):
            exact = torch.cat([exact, model(exact, schedule=lrt.sequential()).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(lrt.generate(model, TOKENS, max_new_tokens=5, temperature=0.0), exact)
    assert torch.equal(
        lrt.generate(accelerate(model, backend="aot_eager"), TOKENS, max_new_tokens=5, temperature=0.0), exact
    )
    monkeypatch.setitem(sys.modules, "triton", object())
    assert not one_token.can_fuse(model)


def test_a_ramp_begins_at_nothing_and_turns_by_no_jump(recurrence):
    """While the gains are zero nothing is added, and they have a gradient, because the map keeps its value."""
    model = native(recurrence)
    whole_map = model.injection.map.weight.detach().clone()
    entrance = Entrance.of(model.named_parameters(), start=0, steps=4)
    plain = model(TOKENS, schedule=lrt.baseline()).logits
    for step in range(-1, 4):
        if step >= 0:
            entrance.advance(step)
        model.zero_grad()
        out = model(TOKENS, targets=TOKENS, schedule=lrt.refine(2), return_logits=True)
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        # so that training can begin
        assert torch.equal(model.injection.map.weight, whole_map) and model.injection.gains.grad.all()
        assert ((out.logits - plain).abs().max() < 1e-12) == (step < 0)
    for parameter, whole in zip(entrance.parameters, entrance.wholes):
        torch.testing.assert_close(parameter, whole)


def test_what_is_said_of_it(recurrence):
    model = native(recurrence)
    assert recurrence_statistics(model)["residual_map_rms"] == pytest.approx(
        [float(model.injection.map.weight.detach().square().mean().sqrt())]
    )
    found = activation_statistics(model, TOKENS, schedule=lrt.refine(1))
    # told to six digits
    assert found["injection_ratio"]["mean"] == pytest.approx(model.injection.gains.abs().tolist(), rel=1e-5)
