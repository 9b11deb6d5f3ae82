"""Qwen3: Llama with a norm of every query and key head. OLMoE norms whole projections; NanoChat norms after RoPE."""

from dataclasses import replace

from lrt.families.llama import LLAMA

QWEN3 = replace(LLAMA, name="qwen3", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
OLMOE = replace(QWEN3, name="olmoe", clip="clip_qkv")
NANOCHAT = replace(
    QWEN3,
    name="nanochat",
    embedding_out=("model.norm",),
    norm_after_rotation=True,
    logit_softcap="final_logit_softcapping",
)
