"""adapt beyond the families: decoders of one's own, native models, PEFT, frozen backbones, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from hf_decoders import COMMON, make, stir
from own_decoders import PLAIN, plain
from torch import Tensor, nn

import lrt


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------ a decoder of one's own


def test_a_described_stack_is_adapted(tokens: Tensor, tmp_path: Any) -> None:
    decoder = plain()
    model = lrt.adapt(decoder, family=PLAIN)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, schedule=lrt.baseline()).logits, decoder(tokens))
        exact = stir(model)(tokens, schedule=lrt.sequential()).logits
        torch.testing.assert_close(model(tokens, schedule=lrt.interleaved(9)).logits, exact)
        assert (exact - decoder(tokens)).abs().max() > 0.01
    assert lrt.generate(model, tokens, max_new_tokens=3, temperature=0.0).shape == (2, 12)
    with pytest.raises(ValueError, match="lrt cannot build a Plain from a folder: pass base="):
        lrt.load(lrt.save(model, tmp_path / "whole"))
    folder = lrt.save(model, tmp_path / "memory", adapter_only=True)
    again = lrt.load(folder, base=plain(), family=PLAIN)
    with torch.no_grad():
        assert torch.equal(again(tokens, schedule=lrt.sequential()).logits, exact)


def test_an_unknown_decoder_names_what_was_found() -> None:
    with pytest.raises(
        ValueError,
        match=r"Plain \(3 blocks at stack, each with before: LayerNorm, attention: Attention.*family=lrt.Family",
    ):
        lrt.adapt(plain())
    with pytest.raises(ValueError, match="family 'llama' does not fit this Plain"):
        lrt.adapt(plain(), family=lrt.families.LLAMA)


def test_a_description_that_computes_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="has the structure of 'plain', but computes something else"):
        lrt.adapt(plain(scale=1.5), family=PLAIN)


# ------------------------------------------------------------------ native models


def test_native_models_are_adapted_and_released(tokens: Tensor, tmp_path: Any) -> None:
    recipe = "[model]\nn_layers=3\nwidth=32\nsequence_length=32\nvocab_size=61\n[training]\nsteps=1\nbatch_tokens=32"
    twin = lrt.build(lrt.config.parse_recipe("recurrence = false\nschedule.kind = 'baseline'\n" + recipe))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs = twin(tokens, targets=tokens)
    theirs.loss.backward()
    expected = {id(p): p.grad.clone() for p in twin.parameters()}
    twin.zero_grad()
    model = lrt.adapt(twin)
    ours = model(tokens, targets=tokens, schedule=lrt.baseline())
    ours.loss.backward()
    assert torch.equal(ours.loss, theirs.loss)
    added = {id(p) for p in model.memory_parameters().values()}
    assert all(torch.equal(p.grad, expected[id(p)]) for p in model.parameters() if id(p) not in added)
    with pytest.raises(ValueError, match="recurrent already"):
        lrt.adapt(model)
    stir(model).eval()
    with torch.no_grad():
        exact = model(tokens).logits
    folder = lrt.save(model, tmp_path / "memory", adapter_only=True)
    assert lrt.release(model) is twin
    with torch.no_grad():
        assert torch.equal(lrt.load(folder, base=twin)(tokens).logits, exact)


# ------------------------------------------------------------------ parts of the model trained, PEFT


def test_only_the_memory_trains_on_a_frozen_backbone(tokens: Tensor) -> None:
    decoder = make("llama")
    decoder.requires_grad_(False)
    model = lrt.adapt(decoder)
    with torch.no_grad():
        original = decoder(tokens).logits
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    first = None
    for _ in range(6):
        loss = model(tokens, labels=tokens, schedule=lrt.refine(1, weights=(0, 1))).loss
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {
        id(p) for p in model.memory_parameters().values()
    }
    assert float(loss.detach()) < first - 0.01
    assert torch.equal(lrt.release(model)(tokens).logits, original)


def test_lora_trains_beside_the_memory(tokens: Tensor, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        make("llama"), peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        theirs = wrapped(tokens, use_cache=False).logits
    model = lrt.adapt(wrapped)
    with torch.no_grad():
        assert torch.equal(model(tokens, schedule=lrt.baseline()).logits, theirs)
    stir(model)(tokens, labels=tokens, schedule=lrt.interleaved(2)).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in trained) and set(model.memory_parameters()) <= trained
    assert not any("base_layer" in name for name in trained)
    lrt.save(model, tmp_path / "memory", adapter_only=True)
    assert lrt.release(model) is wrapped
    prompts = peft.get_peft_model(make("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="learns a prompt through past keys and values"):
        lrt.adapt(prompts)


def test_a_copy_shares_nothing(tokens: Tensor) -> None:
    model = stir(lrt.adapt(make("llama")))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(tokens).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(tokens).logits, expected)
        assert lrt.release(twin) is not lrt.release(model)


# ------------------------------------------------------------------ bad input


def others() -> dict[str, tuple[Any, str]]:
    t = transformers
    bert = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 61,
        "intermediate_size": 16,
    }
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 61}
    mamba = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 61}
    bloom = {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 61}
    return {
        "encoder-decoder": (lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)), "is an encoder-decoder"),
        "encoder": (lambda: t.BertForMaskedLM(t.BertConfig(**bert)), "is an encoder, or not causal"),
        "state space": (lambda: t.MambaForCausalLM(t.MambaConfig(**mamba)), "is a state-space or hybrid model"),
        "unknown": (lambda: t.BloomForCausalLM(t.BloomConfig(**bloom)), "no family of lrt has the structure"),
        "lookalike": (
            _lookalike,
            r"computes something else: model\.layers\.1\.self_attn\.q_proj is given something else",
        ),
        "quantized": (_quantized, "is quantized without a single floating-point parameter"),
        "no head": (lambda: make("llama").model, "no family of lrt has the structure"),
        "not a model": (lambda: "smollm", "pass a model, such as AutoModelForCausalLM"),
    }


def _lookalike() -> Any:
    decoder = make("llama")
    decoder.model.layers[0].register_forward_hook(lambda layer, given, out: out * 1.5)
    return decoder


def _quantized() -> Any:
    decoder = make("llama")
    for layer in decoder.model.layers:
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(torch.int8)
    return decoder


@pytest.mark.parametrize("kind", others())
def test_what_cannot_be_adapted_says_why(kind: str) -> None:
    build, text = others()[kind]
    with pytest.raises(ValueError, match=text):
        lrt.adapt(build())


def test_models_in_a_state_that_cannot_be_adapted() -> None:
    decoder = make("llama")
    model = lrt.adapt(decoder)
    with pytest.raises(ValueError, match="adapted already"):
        lrt.adapt(decoder)
    with pytest.raises(ValueError, match="recurrent already"):
        lrt.adapt(model)
    lrt.release(model)
    with pytest.raises(ValueError, match="compiled: adapt the plain model"):
        lrt.adapt(torch.compile(decoder))
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        lrt.adapt(nn.DataParallel(decoder))
    decoder.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="it drops the cache inside a block"):
        lrt.adapt(decoder)
    decoder.gradient_checkpointing_disable()
    decoder.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="attention backend .* is not supported"):
        lrt.adapt(decoder)
    decoder.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="source_layer = 9, but the model has 3 blocks"):
        lrt.adapt(decoder, lrt.RecurrenceConfig(source_layer=9))
    with pytest.raises(ValueError, match="there is no decoder to give back"):
        lrt.release(decoder)
    assert lrt.adapt(decoder).source == 2


def test_an_adapter_of_another_decoder_is_refused(tmp_path: Any) -> None:
    folder = lrt.save(lrt.adapt(make("llama")), tmp_path / "memory", adapter_only=True)
    other = make("gpt2")
    with pytest.raises(ValueError, match="was trained on another decoder than this GPT2LMHeadModel"):
        lrt.load(folder, base=other)
    lrt.adapt(other)  # the failed load released it
    whole = lrt.save(lrt.adapt(make("llama")), tmp_path / "whole")
    with pytest.raises(ValueError, match="holds a whole model: leave base out"):
        lrt.load(whole, base=make("llama"))


def test_learned_positions_end(tokens: Tensor) -> None:
    model = lrt.adapt(make("gpt2"))
    assert COMMON["max_position_embeddings"] == 64
    with pytest.raises(ValueError, match="learned positions end at 64"):
        model(torch.ones(1, 65, dtype=torch.int64))


# ------------------------------------------------------------------ CUDA


@pytest.mark.gpu
def test_a_decoder_on_two_devices(tokens: Tensor) -> None:
    decoder = make("llama", dtype=torch.float32)
    alone = stir(lrt.adapt(make("llama", dtype=torch.float32)))
    from accelerate import dispatch_model

    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.norm": 0,
        "lm_head": 0,
    }
    decoder = dispatch_model(decoder, places | {"model.layers.1": 0, "model.layers.2": 0}, main_device="cpu")
    model = stir(lrt.adapt(decoder))
    assert len({p.device for p in model.memory_parameters().values()}) == 2
    for schedule in (lrt.interleaved(3), lrt.interleaved(3, kv_refresh=True), lrt.refine(2), lrt.sequential()):
        found, expected = (m(tokens, labels=tokens, schedule=schedule, return_logits=True) for m in (model, alone))
        torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
        found.loss.backward()
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    # rows of the state are selected, and it grows past its first 64 tokens
    for more in ({}, {"num_beams": 2}, {"max_new_tokens": 60}):
        assert torch.equal(model.generate(tokens, **greedy | more).cpu(), alone.generate(tokens, **greedy | more))


@pytest.mark.gpu
@pytest.mark.parametrize("family, attention", [
    ("llama", "sdpa"), ("llama", "flex_attention"), ("gemma2", "eager"), ("gemma2", "flex_attention"), ("gpt2", "sdpa"),
])  # fmt: skip
def test_cuda_backends_keep_the_original(family: str, attention: str) -> None:
    size = {} if family == "gpt2" else {"head_dim": 16}  # torch's flex kernels want heads of 16 channels or more
    torch.compiler.reset()
    decoder = make(family, attention=attention, dtype=torch.bfloat16, **size).cuda()
    rows = torch.randint(1, 61, (2, 32), generator=torch.Generator().manual_seed(0)).cuda()
    # first: after its short probe flex attention is compiled for every length, for both alike
    model = lrt.adapt(decoder)
    with torch.no_grad():
        theirs = decoder(rows, use_cache=False).logits
        assert torch.equal(model(rows, schedule=lrt.baseline()).logits, theirs)
    model.train()(rows, labels=rows, schedule=lrt.interleaved(2)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
