"""Memory in the space that every block's own projections read: what enters keys and values,
and a decoder that stays unchanged."""

from __future__ import annotations

import pytest
import torch
from hf_decoders import DESCRIBED, FAMILIES, NIGHTLY, known, make, stir
from torch import nn

import lrt
from lrt.families.norm_weight import weight_offset
from lrt.forward import memory_inputs
from lrt.types import MemoryInput

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # norms of these decoders compute in float32
ALIGNED = lrt.RecurrenceConfig(projection="aligned", init="identity")
# Beside the common ones: a weight that counts from one (Gemma, Nemotron), norms without weight,
# clipped and normed keys.
SOME = [*FAMILIES, *known({name: DESCRIBED[name] for name in ("gemma", "olmo", "cohere_normed", "stablelm_parallel")})]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in known(DESCRIBED | NIGHTLY) if name not in SOME]


@pytest.fixture(
    scope="module",
    params=[*SOME, *known({"nemotron": NIGHTLY["nemotron"]}), *[m for m in MORE if m.values[0] != "nemotron"]],
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 58, (2, 11), generator=torch.Generator().manual_seed(7))


def found_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_decoder_is_unchanged_at_step_0(family, tokens):
    decoder = make(family)
    theirs = decoder(tokens, labels=tokens, use_cache=False)
    theirs.loss.backward()
    expected = found_gradients(decoder)
    decoder.zero_grad()
    model = lrt.adapt(decoder, ALIGNED)
    ours = model(tokens, labels=tokens, schedule=lrt.baseline(), return_logits=True)
    ours.loss.backward()
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    found = found_gradients(decoder)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        for schedule in (lrt.interleaved(3), lrt.refine(2), lrt.sequential()):
            torch.testing.assert_close(model(tokens, schedule=schedule).logits, theirs.logits, **CLOSE)


def test_schedules_reach_true_recurrence_with_its_gradients(family, tokens):
    model = stir(lrt.adapt(make(family), ALIGNED))
    outputs, gradients = [], []
    for schedule in (lrt.sequential(), lrt.interleaved(tokens.shape[1], weights=(0, 1)), lrt.interleaved(2)):
        model.zero_grad()
        out = model(tokens, labels=tokens, schedule=schedule, return_logits=True)
        out.loss.backward()
        outputs.append(out.logits.detach())
        gradients.append(found_gradients(model))
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-4
    assert gradients[0].keys() == gradients[1].keys() >= model.memory_parameters().keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def by_hand(block, normed, memory, gates, map, which):
    """gate W (n + w A m) + bias of one kind of heads, the parts of the block's modules read out here."""
    family, layer = block.family, block.layer
    norm = layer.get_submodule(family.attention_in[0]) if family.attention_in else None
    weight = getattr(norm, "weight", None)
    counts_from_one = type(norm).__name__.startswith(("Gemma", "NemotronLayerNorm1P"))
    w = torch.ones(normed.shape[-1]) if weight is None else weight + counts_from_one
    moved = normed + w * (memory @ map.T)
    module = layer.get_submodule(family.fused or getattr(family, which))
    matrix = module.weight if isinstance(module, nn.Linear) else module.weight.T  # transformers' Conv1D
    bias = module.bias if module.bias is not None else matrix.new_zeros(len(matrix))
    product, bias = moved @ matrix.T, bias
    if family.fused:
        place = ("query", "key", "value").index(which)
        product, bias = (family.split(x, block.geometry)[place] for x in (product, bias))
    else:
        product, bias = (x.unflatten(-1, (-1, block.geometry.head_dim)) for x in (product, bias))
    return gates[..., None] * product + bias


def test_keys_and_values_are_those_of_the_formula(family):
    model = stir(lrt.adapt(make(family), ALIGNED), size=0.5)
    generator = torch.Generator().manual_seed(3)
    hidden, memory = (
        torch.randn(2, 5, model.backbone.width, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    for wrapper, given in zip(model.blocks, memory_inputs(model, memory)):
        block = wrapper.block
        plainly = {"gate": wrapper.gate, "kv": None, "read_later": False}
        got = wrapper.mixer(block, hidden, given, None, **plainly)
        plain = block.project(hidden, None)
        gates = 2 * torch.sigmoid(plain.normed @ wrapper.gate.weight.T)
        for which in ("key", "value"):
            expected = by_hand(block, plain.normed, memory, gates, model.memory_projection.map.weight, which)
            torch.testing.assert_close(getattr(got, which), expected, **CLOSE)
        torch.testing.assert_close(got.query, plain.query, rtol=1e-12, atol=1e-12)
        zero = wrapper.mixer(block, hidden, MemoryInput(0 * memory, aligned=0 * memory), None, **plainly)
        none = wrapper.mixer(block, hidden, None, None, **plainly)
        for a, b in zip(zero[:4], none[:4]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_half_precision_compiled_blocks_and_generation(tokens):
    decoder = make("llama", dtype=torch.float32)
    model = stir(lrt.adapt(decoder, ALIGNED))
    expected = model(tokens, schedule=lrt.interleaved(2)).logits
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = lrt.generate(model, tokens, max_new_tokens=4, temperature=0.0)
    assert torch.equal(model.generate(tokens, **settings), written)
    exact = tokens
    with torch.no_grad():
        for _ in range(4):
            exact = torch.cat([exact, model(exact, schedule=lrt.sequential()).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, exact)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(model(tokens, schedule=lrt.interleaved(2)).logits, expected, **CLOSE)
    half = stir(lrt.adapt(make("llama", dtype=torch.bfloat16), ALIGNED))
    assert half(tokens, schedule=lrt.refine(1)).logits.isfinite().all()


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_folders_keep_it(family, tokens, tmp_path):
    model = stir(lrt.adapt(make(family, dtype=torch.float32), ALIGNED))
    expected = model(tokens, schedule=lrt.refine(1)).logits
    lrt.save(model, tmp_path / "whole")
    lrt.save(model, tmp_path / "memory", adapter_only=True)
    for again in (lrt.load(tmp_path / "whole"), lrt.load(tmp_path / "memory", base=make(family, dtype=torch.float32))):
        assert again.recurrence == model.recurrence
        assert torch.equal(again(tokens, schedule=lrt.refine(1)).logits, expected)


# ------------------------------------------------------------------ what a norm multiplies by


class Odd(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 3


def test_a_norm_that_multiplies_by_something_else_is_refused(monkeypatch):
    torch.manual_seed(0)
    for width in (24, 25):
        norm, odd = nn.LayerNorm(width), Odd(width)
        with torch.no_grad():
            for module in (norm, odd):
                module.weight.normal_(1.0, 0.3)
                module.bias.normal_()
        assert weight_offset(norm) == 0 and weight_offset(norm.to(torch.bfloat16)) == 0 and weight_offset(odd) is None
    decoder = make("gpt2")
    for layer in decoder.transformer.h:
        layer.ln_1 = Odd(24).double()
    lrt.release(lrt.adapt(decoder))
    with pytest.raises(
        ValueError,
        match=r'recurrence.projection = "aligned" does not fit this block: .*Odd, multiplies by neither its weight',
    ):
        lrt.adapt(decoder, ALIGNED)


def test_blocks_of_ones_own_need_the_method():
    class Plain(nn.Module):
        window = None

    with pytest.raises(ValueError, match="Plain is no lrt.types.AlignableBlock"):
        lrt.recurrence.AlignedBlock(Plain(), gate=lrt.Gate(8, 2))


def test_on_the_meta_device_a_norm_is_known_too():
    with torch.device("meta"):
        model = lrt.adapt(make("gemma2", dtype=torch.float32).to("meta"), ALIGNED)
    assert [block.block.weight_offset for block in model.blocks] == [1.0] * 3
