"""Llama, SmolLM, Mistral and Qwen2: pre-norm, separate projections, RoPE; biases, windows and norms without weight are
data."""

from dataclasses import replace

from lrt.families.description import Family, Foreign, window_of


def uses_rope(attention: Foreign) -> bool:
    return bool(attention.use_rope)


def residual_dropout(attention: Foreign) -> float:
    return attention.residual_dropout


LLAMA = Family(
    name="llama",
    rotary="model.rotary_emb",
    attention_in=("input_layernorm",),
    mlp_in=("post_attention_layernorm",),
    window=window_of,
)
SMOLLM3 = replace(LLAMA, name="smollm3", rotates=uses_rope)
SEED_OSS = replace(LLAMA, name="seed_oss", output_dropout=residual_dropout)
STARCODER2 = replace(SEED_OSS, name="starcoder2", embedding_dropout="embedding_dropout")
OLMO = replace(LLAMA, name="olmo", clip="clip_qkv")
GRANITE = replace(
    LLAMA,
    name="granite",
    embedding_factor="embedding_multiplier",
    residual_factor="residual_multiplier",
    logit_divisor="logits_scaling",
)
GPT_OSS = replace(LLAMA, name="gpt_oss", sinks="sinks")
