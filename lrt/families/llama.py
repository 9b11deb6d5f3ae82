"""Llama, SmolLM, Mistral and Qwen2: pre-norm, separate projections, RoPE; biases and windows are data."""

from lrt.families.description import Family, window_of

LLAMA = Family(name="llama", rotary="model.rotary_emb", attention_in=("input_layernorm",), mlp_in=("post_attention_layernorm",), window=window_of)
