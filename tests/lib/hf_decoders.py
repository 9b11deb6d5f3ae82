"""Tiny random Hugging Face decoders, one maker a family, for the tests of adapt."""

from __future__ import annotations

from typing import Any

import torch

COMMON: dict[str, Any] = {"vocab_size": 61, "max_position_embeddings": 64}
ROPE: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, **COMMON}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", ROPE | {"attention_bias": True, "mlp_bias": True}),
    "smollm": ("Llama", ROPE | {"tie_word_embeddings": True, "head_dim": 8}),
    "mistral": ("Mistral", ROPE | {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", ROPE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", ROPE | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", ROPE | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3Text",
        ROPE | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo2": ("Olmo2", ROPE),
    "phi3": ("Phi3", ROPE | {"pad_token_id": 0, "sliding_window": 6}),
    "gpt2": ("GPT2", {"n_embd": 24, "n_head": 4, "n_positions": 64, "vocab_size": 61}),
    "gpt_neox": ("GPTNeoX", {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "rotary_pct": 0.5, **COMMON}),
    "gpt_neox_serial": ("GPTNeoX", {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "use_parallel_residual": False, **COMMON}),
}
CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def make(family: str, *, seed: int = 0, layers: int = 3, attention: str | None = None, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A random decoder in evaluation mode."""
    import transformers

    name, settings = FAMILIES[family]
    depth = {"n_layer" if name == "GPT2" else "num_hidden_layers": layers}
    config = getattr(transformers, f"{name}Config")(**settings | depth | more)
    config._attn_implementation = attention or ("eager" if name == "Gemma2" else "sdpa")
    torch.manual_seed(seed)
    decoder = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config)
    with torch.no_grad():  # norms and biases start at one and zero, which would hide a mistake
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder.to(dtype).eval()


def stir(model: Any, *, seed: int = 1, size: float = 0.2) -> Any:
    """Give the memory parameters random values, so that memory matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.memory_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model
