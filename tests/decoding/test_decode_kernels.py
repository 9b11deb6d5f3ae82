"""The decoding kernels: choices of tiles anywhere, the kernels themselves against the ordinary step on a GPU."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import randomized

import lrt
from lrt.adaptation import without_memory
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.decoding import prefill
from lrt.decoding import step as decoding
from lrt.decoding.fast import one_token, tiles
from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.fast.family_parts import unlike
from lrt.decoding.fast.family_token import FusedFamily
from lrt.decoding.state import DecodeState
from lrt.model import build_model
from lrt.schedules import sequential
from lrt.train.distributed.graphs import working_copy
from lrt.train.evaluation import _token_by_token

SETTINGS = {"n_layers": 3, "width": 128, "n_heads": 2, "vocab_size": 50, "sequence_length": 64, "window_pattern": "SL"}
FAMILIES = {
    "shared": (RecurrenceConfig(separator=0), {}),
    "shared-late": (
        RecurrenceConfig(blocks=(2, 3), source_layer=3, gate_channels=32),
        {"attention_reset": 0, "rope_dtype": "bfloat16"},
    ),
    "layerwise-gqa": (
        RecurrenceConfig(sharing="layerwise", gate_channels=32),
        {"n_kv_heads": 1, "value_embeddings": "alternating"},
    ),
    "residual-alone": (
        RecurrenceConfig(kv_projection=False, memory_norm="final"),
        {"value_embeddings": "none", "softcap": None},
    ),
    "odd": (
        RecurrenceConfig(gate_channels=3),
        {"mlp_ratio": 1.3, "n_heads": 4, "n_kv_heads": 2, "embedding_residual": False},
    ),
    "plain": (None, {"qk_norm": False, "residual_scales": False}),
}


def is_power(n):
    return n > 0 and n & (n - 1) == 0


# ------------------------------------------------------------------ choices


@given(rows=st.integers(1, 300), outputs=st.integers(1, 200_000), width=st.integers(16, 40_000))
def test_every_product_has_a_tile_that_fits(rows, outputs, width):
    tile = tiles.tile_of(rows, outputs, width)
    assert is_power(tile.outputs) and is_power(tile.inputs) and is_power(tile.warps)
    if rows == 1:
        assert tile.inputs == 256 * tile.warps  # every thread keeps what it loads
        assert tile.outputs * -(-width // tile.inputs) * 8 <= 8 * tiles.HELD or tile.outputs == 1
    else:
        assert 16 <= tile.inputs <= max(16, 2 * width)


@given(pairs=st.integers(1, 5000), slots=st.integers(1, 100_000), width=st.sampled_from([16, 32, 64, 128, 256]))
def test_shares_of_attention_fit_the_cache_and_the_gpu(pairs, slots, width):
    splits, share = tiles.share_of(pairs, slots, width)
    assert 1 <= splits <= 64 and is_power(share.slots)
    assert splits == 1 or (splits * pairs <= share.programs and (splits - 1) * share.slots < slots)


def test_what_the_kernels_cannot_do_is_left_to_the_ordinary_step(monkeypatch):
    model = build_model(ModelConfig(n_layers=1, width=32, n_heads=2, vocab_size=7), None)
    found = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: SimpleNamespace() if name == "triton" else found(name, *a, **k)
    )
    assert one_token.can_fuse(model)
    assert not one_token.can_fuse(model.double())
    assert not one_token.can_fuse(build_model(ModelConfig(n_layers=1, width=24, n_heads=1, vocab_size=7), None))
    assert not one_token.can_fuse(SimpleNamespace(backbone=object()))


def test_a_stepper_takes_the_models_place():
    """Steps, logits and stretches are what it says; everything else is the model's own."""
    model = randomized(build_model(ModelConfig(n_layers=1, width=32, n_heads=2, vocab_size=7), None), 1).eval()
    state, asked = DecodeState.empty(model, batch=2, capacity=3), []

    class Own(decoding.Stepper):
        def step(self, *given, row=None, stop=None):
            asked.append(given)
            return super().step(*given, row=row, stop=stop)

        def logits(self, hidden):
            return super().logits(hidden) + 1

        def stretch(self, *given, kind):
            asked.append(kind)
            return super().stretch(*given, kind=kind)

    own, other = Own(model), state.fork()
    tokens, active = torch.tensor([1, 2]), torch.tensor([True, False])
    got = decoding.decode_one_token(own, state, tokens, active)
    assert torch.equal(got, decoding.decode_one_token(model, other, tokens, active) + 1)
    assert asked == [(state, tokens, active)] and state.lengths.tolist() == [1, 0]
    assert own.backbone is model.backbone and decoding.stepper_of(own) is own
    done = prefill.run(own, torch.tensor([[1, 2, 3]]), method=prefill.refine(1))
    assert asked[1:] == ["plain"] and done.state.fingerprint == state.fingerprint


@pytest.mark.slow
def test_steps_of_llama_style_decoders_in_tritons_interpreter():
    """Biases, norms of heads, windows, groups, aligned, shared and layerwise memory; no GPU is needed."""
    pytest.importorskip("triton")
    lib = Path(__file__).parent.parent / "lib"
    here = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(lib.parent.parent), str(lib)])}
    out = subprocess.run([sys.executable, lib / "fused_families.py"], env=here, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("the same") == 10


def test_decoders_that_the_kernels_do_not_compute_are_refused_by_what_they_lack():
    import transformers as hf

    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 20}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    model = lrt.adapt(llama, RecurrenceConfig(projection="aligned"))
    assert unlike(model) is None and unlike(without_memory(model)) is None
    assert unlike(lrt.adapt(hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes)).bfloat16())) is None  # RoPE's frequencies too
    hook = model.blocks[1].register_forward_hook(lambda *given: None)
    assert "block 2 has hooks" in unlike(model)
    hook.remove()
    llama.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    assert "block 2 is not Llama's" in unlike(model)
    with pytest.raises(ValueError, match="do not compute this model: block 2"):
        FusedFamily(model, many=decoding.Stepper(model))
    lrt.release(model)
    again = lrt.adapt(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)), RecurrenceConfig(residual="projected"))
    assert "a residual of another kind" in unlike(again)
    gemma = hf.Gemma2Config(**sizes, layer_types=["full_attention"] * 2)
    assert unlike(lrt.adapt(hf.Gemma2ForCausalLM(gemma).eval())) is not None
    assert "not an adapted one" in unlike(build_model(ModelConfig(n_layers=1, width=32, n_heads=2, vocab_size=7), None))


# ------------------------------------------------------------------ the kernels


def gpu(function):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(function))


def make(family, dtype=torch.float32):
    recurrence, changes = FAMILIES[family]
    return randomized(build_model(ModelConfig(**SETTINGS | changes), recurrence), 1, 0.1).cuda().eval().to(dtype)


def filled(model, batch, capacity, longest):
    """A state as after up to ``longest`` tokens, rows of different length."""
    state = DecodeState.empty(model, batch=batch, capacity=capacity)
    generator = torch.Generator(device="cuda").manual_seed(1)
    for x in (*state.keys, *state.values, *(() if state.memory is None else (state.memory,))):
        x.normal_(generator=generator)
    state.lengths.copy_(torch.randint(0, longest, (batch,), generator=generator, device="cuda"))
    return state


def both(model, state, steps):
    """Logits and states of the ordinary and of the fused step, one row in five waiting for a while."""
    quick, fast = state.fork(), one_token.fuse(model)
    generator = torch.Generator().manual_seed(2)
    out = []
    for step in range(steps):
        tokens = torch.randint(0, 50, (state.batch,), generator=generator).cuda()
        active = (torch.arange(state.batch) % 5 != step).cuda()
        out.append([decoding.decode_one_token(m, s, tokens, active) for m, s in ((model, state), (fast, quick))])
    return out, quick


@gpu
@pytest.mark.parametrize("batch", [1, 3, 17, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_step_equals_the_ordinary_one(family, batch):
    model = make(family)
    state = filled(model, batch, capacity=300, longest=280)  # rings of 33 slots, wrapped or not
    out, quick = both(model, state, 12)
    for expected, got in out:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(quick.lengths, state.lengths) and torch.equal(quick.document_starts, state.document_starts)
    for a, b in zip((*quick.keys, *quick.values), (*state.keys, *state.values)):
        torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-4, atol=1e-4)
    if state.memory is not None:
        torch.testing.assert_close(quick.memory, state.memory, rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_a_fused_step_is_as_near_to_float32_as_the_ordinary_one(dtype, batch):
    model = make("shared", dtype)
    state = filled(model, batch, capacity=300, longest=280)
    exact = make("shared")
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    right = filled(exact, batch, capacity=300, longest=280)
    for a, b in zip((*right.keys, *right.values, right.memory), (*state.keys, *state.values, state.memory)):
        a.copy_(b)
    tokens, active = torch.arange(batch, device="cuda") % 50, torch.ones(batch, dtype=torch.bool, device="cuda")
    quick = state.fork()
    expected = decoding.decode_one_token(exact, right, tokens, active)
    ordinary = decoding.decode_one_token(model, state, tokens, active)
    got = decoding.decode_one_token(one_token.fuse(model), quick, tokens, active)

    def error(x, y):
        return float((x.double() - y.double()).norm() / y.double().norm())

    assert error(got, expected) <= 1.5 * error(ordinary, expected) + 1e-3
    assert error(quick.memory, right.memory) <= 1.5 * error(state.memory, right.memory) + 1e-3


@gpu
@pytest.mark.parametrize("batch", [1, 4])
def test_a_captured_step_repeats_itself_and_sees_an_update(batch):
    model = make("shared", torch.bfloat16)
    start = filled(model, batch, capacity=300, longest=200)
    state, fast = start.fork(), one_token.fuse(model)
    tokens, active = torch.arange(1, batch + 1, device="cuda"), torch.ones(batch, dtype=torch.bool, device="cuda")
    logits = torch.empty(batch, 50, device="cuda")
    replay = decoding.graphed(lambda: logits.copy_(decoding.decode_one_token(fast, state, tokens, active)), active)

    def run():
        state.put(list(range(batch)), start)
        replay()
        return logits.clone()

    first = run()
    assert torch.equal(first, decoding.decode_one_token(fast, start.fork(), tokens, active))
    assert all(torch.equal(run(), first) for _ in range(50))  # the order in which programs end does not matter
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    updated = run()
    assert not torch.equal(updated, first)
    assert torch.equal(updated, decoding.decode_one_token(fast, start.fork(), tokens, active))


@gpu
@pytest.mark.parametrize("batch", [1, 33])
def test_every_share_counts_once(batch, monkeypatch):
    model = make("layerwise-gqa")
    state = filled(model, batch, capacity=1000, longest=990)
    monkeypatch.setattr(tiles, "SHARES", ((tiles.ANY, tiles.ANY, tiles.Share(16, 4, 1, 1)),))
    whole, _ = both(model, state.fork(), 3)
    monkeypatch.setattr(tiles, "SHARES", ((tiles.ANY, tiles.ANY, tiles.Share(32, 4, 3, 10_000)),))
    shared, _ = both(model, state.fork(), 3)
    for (expected, one), (_, many) in zip(whole, shared):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(many, expected, rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.parametrize("family", [name for name, (recurrence, _) in FAMILIES.items() if recurrence is not None])
def test_exact_prefill_in_fused_kernels_is_that_of_the_blocks(family):
    """The loop alone is fused, from the first receiver to the source; rows of different length, rings that wrap,
    two parts."""
    model = make(family)
    tokens, lengths = torch.randint(0, 50, (3, 60)).cuda(), torch.tensor([60, 7, 41]).cuda()
    runs = []
    for one in (model, accelerate(model)):
        first = prefill.run(one, tokens, lengths=lengths, capacity=80, everywhere=True, runner=decoding.graphed)
        rest = prefill.run(one, tokens[:, :9], state=first.state, runner=decoding.graphed)
        runs.append(
            (*(first.hidden[row, :n] for row, n in enumerate(lengths.tolist())), rest.hidden, rest.state.memory)
        )
    for got, expected in zip(*runs):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.parametrize("family, rows", [("shared", 3), ("layerwise-gqa", 3), ("shared-late", 1)])
def test_the_trainers_working_copy_is_scored_token_by_token(family, rows):
    """Blocks in half precision beside tables in float32: as near to float32 as the ordinary steps of the same copy."""
    model = make(family)
    work = working_copy(model, dtype=torch.bfloat16)
    tokens = torch.randint(0, 50, (rows, 41), generator=torch.Generator().manual_seed(2)).cuda()
    given = tokens[:, :-1], tokens[:, 1:]
    exact, ordinary = (m.score(*given, sequential())[-1].detach() for m in (model, work))
    assert 0 < (ordinary - exact).norm() < 0.05 * exact.norm()
    assert (_token_by_token(work, runner=decoding.graphed)(*given) - exact).norm() <= 1.5 * (ordinary - exact).norm()
