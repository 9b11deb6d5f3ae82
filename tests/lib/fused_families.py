"""Steps of small adapted decoders in the decoding kernels, beside the ordinary ones, in Triton's interpreter.

Run with TRITON_INTERPRET=1 and lrt and tests/lib on PYTHONPATH; prints a line per decoder, and ends with an error where
a number differs.
"""

from __future__ import annotations

import interpreted
import torch
import transformers as hf
from strategies import randomized

import lrt
from lrt.config import RecurrenceConfig
from lrt.decoding import step as decoding
from lrt.decoding.fast.family_token import FusedFamily
from lrt.decoding.state import DecodeState

SIZES = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
CASES = {
    "llama, aligned": (
        hf.LlamaForCausalLM, hf.LlamaConfig, {}, {"projection": "aligned", "blocks": (2, 3), "separator": 3},
    ),
    "llama with biases, shared": (
        hf.LlamaForCausalLM, hf.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}, {},
    ),
    "qwen2, aligned": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {}, {"projection": "aligned", "gate_channels": 5}),
    "qwen3, layerwise": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {}, {"sharing": "layerwise", "blocks": (1, 3)}),
    "mistral, window, residual alone": (
        hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": 6}, {"kv_projection": False},
    ),
}  # fmt: skip


def model_of(name: str) -> lrt.LatentRecurrentModel:
    """An adapted decoder with numbers everywhere, biases and norms included."""
    kind, config, changes, entry = CASES[name]
    torch.manual_seed(1)
    decoder = kind(config(**SIZES | changes))
    return randomized(lrt.adapt(decoder.eval(), RecurrenceConfig(source_layer=2, **entry)), 2, 0.3).eval()


@torch.no_grad()
def compare(name: str, rows: int) -> None:
    """Logits, caches and memory of three steps from states of different length; one row waits for a step."""
    model = model_of(name)
    fast = FusedFamily(model, many=decoding.Stepper(model))
    state = DecodeState.empty(model, batch=rows, capacity=12)
    generator = torch.Generator().manual_seed(3)
    for x in (*state.keys, *state.values, *(() if state.memory is None else (state.memory,))):
        x.normal_(generator=generator)
    state.lengths.copy_(torch.randint(0, 9, (rows,), generator=generator))
    quick = state.fork()
    for step in range(3):
        tokens = torch.randint(0, 20, (rows,), generator=generator)
        active = torch.arange(rows) != step - 1
        expected = decoding.decode_one_token(model, state, tokens, active)
        got = decoding.decode_one_token(fast, quick, tokens, active)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(quick.lengths, state.lengths)
    for mine, theirs in zip((*quick.keys, *quick.values), (*state.keys, *state.values)):
        torch.testing.assert_close(mine[:, :-1], theirs[:, :-1], rtol=1e-4, atol=1e-4)
    if state.memory is not None:
        torch.testing.assert_close(quick.memory, state.memory, rtol=1e-4, atol=1e-4)
    print(f"{name}, {rows} rows: the same", flush=True)


if __name__ == "__main__":
    interpreted.allow_masks_of_scalars()
    for case in CASES:
        for count in (1, 3):
            compare(case, count)
