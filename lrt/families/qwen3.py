"""Qwen3: Llama with a norm of every query and key head."""

from dataclasses import replace

from lrt.families.llama import LLAMA

QWEN3 = replace(LLAMA, name="qwen3", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
