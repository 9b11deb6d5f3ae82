"""Gemma 2 and 3: norms on both sides of attention and MLP, scaled embeddings, alternating windows, softcaps."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrt.families.llama import LLAMA


def scale_by_width(embedding: Any, hidden: Tensor) -> Tensor:
    """Times sqrt(D), rounded to the dtype, unless the embedding does it itself (since transformers 5)."""
    if hasattr(embedding, "embed_scale"):
        return hidden
    return hidden * torch.tensor(hidden.shape[-1] ** 0.5, dtype=hidden.dtype)


GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    attention_out=("post_attention_layernorm",),
    mlp_in=("pre_feedforward_layernorm",),
    mlp_out=("post_feedforward_layernorm",),
    embedding_scale=scale_by_width,
    softcap="attn_logit_softcapping",
    logit_softcap="final_logit_softcapping",
)
# Gemma 3 drops the cap on scores, norms queries and keys, and rotates blocks with a window by another base.
GEMMA3 = replace(GEMMA2, name="gemma3", softcap=None, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
GEMMA3_TWO_TABLES = replace(GEMMA3, local_rotary="model.rotary_emb_local")  # before transformers 5
