"""Adapted Hugging Face decoders decode through the same code; the decoding kernels against the ordinary step."""

from __future__ import annotations

import pytest
import torch
from strategies import randomized

import lrt
from lrt.config import ModelConfig, RecurrenceConfig
from lrt.decoding import prefill
from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.generation import complete
from lrt.decoding.sampling import Sampling
from lrt.decoding.state import DecodeState
from lrt.model import build_model


def adapted(family):
    import transformers as hf

    torch.manual_seed(0)
    if family == "llama":
        settings = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        decoder = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, **settings))
    else:
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        decoder = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, **ends)
        )
    return lrt.adapt(decoder.double().eval(), lrt.RecurrenceConfig(init="paper", source_layer=2)).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method", [prefill.exact(), prefill.fixed_point(3, tol=1e-300, chunk=3), prefill.refine(8)], ids=str
)
def test_adapted_decoders_decode_as_the_sequential_schedule_says(family, method):
    model = adapted(family)
    prompt = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    ids = lrt.generate(model, prompt, max_new_tokens=8, temperature=0.0, prefill=method)
    logits = model(ids[:, :-1], schedule=lrt.sequential()).logits
    assert torch.equal(logits[:, 6:].argmax(-1), ids[:, 7:])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    padded = lrt.generate(model, prompt, mask, max_new_tokens=5, temperature=0.0, prefill=method)
    alone = lrt.generate(model, prompt[:1, 2:], max_new_tokens=5, temperature=0.0, prefill=method)
    assert torch.equal(padded[0, 7:], alone[0, 5:])


def test_without_memory_is_the_zero_mode():
    config = ModelConfig(n_layers=3, width=16, n_heads=2, vocab_size=13, sequence_length=8)
    model = randomized(build_model(config, RecurrenceConfig(separator=0), dtype=torch.float64), 1).eval()
    prompt = torch.tensor([[1, 2, 3, 4]])
    out = complete(decoding.WithoutMemory(model), prompt, max_new_tokens=6, sampling=Sampling(temperature=0.0)).ids
    assert torch.equal(model(out[:, :-1], schedule=lrt.baseline()).logits[:, 3:].argmax(-1), out[:, 4:])
    assert out.tolist() != lrt.generate(model, prompt, max_new_tokens=6, temperature=0.0).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 3, 20, 70])
@pytest.mark.parametrize(
    ("recurrence", "changes"),
    [
        (RecurrenceConfig(separator=0), {}),
        (RecurrenceConfig(sharing="layerwise", gate_channels=32), {"n_kv_heads": 1, "value_embeddings": "alternating"}),
        (RecurrenceConfig(sharing="layerwise", residual=False, blocks=(1, 3)), {"residual_scales": False}),
        (RecurrenceConfig(kv_projection=False, memory_norm="final"), {"value_embeddings": "none", "softcap": None}),
        (None, {"qk_norm": False}),
    ],
)
def test_the_decoding_kernels_equal_the_ordinary_step(recurrence, changes, batch):
    settings = {
        "n_layers": 3,
        "width": 128,
        "n_heads": 2,
        "vocab_size": 50,
        "sequence_length": 8,
        "window_pattern": "SL",
    }
    model = randomized(build_model(ModelConfig(**settings | changes), recurrence), 1, 0.1).cuda().eval()
    fast = accelerate(model)
    slow_state = DecodeState.empty(model, batch=batch, capacity=20)
    fast_state = slow_state.fork()
    generator = torch.Generator().manual_seed(1)
    for step in range(15):
        tokens = torch.randint(0, 50, (batch,), generator=generator).cuda()
        active = (torch.arange(batch) % 5 != step).cuda()
        expected = decoding.decode_one_token(model, slow_state, tokens, active)
        got = decoding.decode_one_token(fast, fast_state, tokens, active)
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(fast_state.lengths, slow_state.lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_gives_the_eager_tokens():
    config = ModelConfig(n_layers=3, width=128, n_heads=2, vocab_size=50, sequence_length=8)
    model = randomized(build_model(config, RecurrenceConfig(separator=0)), 1, 0.1).cuda().eval()
    prompt = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(temperature=0.0), Sampling(top_k=20, top_p=0.9, repetition_penalty=1.1)):
        eager, graphed = (
            complete(
                model, prompt, max_new_tokens=20, sampling=sampling, runner=runner,
                generator=torch.Generator().manual_seed(1),
            ).tokens
            for runner in (decoding.eager, decoding.graphed)
        )  # fmt: skip
        assert eager == graphed
