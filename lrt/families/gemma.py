"""Gemma 1 to 3: scaled embeddings; since 2 norms on both sides of attention and MLP, alternating windows, softcaps."""

from dataclasses import replace

import torch
from torch import Tensor

from lrt.families.description import Foreign
from lrt.families.llama import LLAMA
from lrt.tables import Table


def scale_by_width(embedding: Foreign, hidden: Tensor) -> Tensor:
    """Times sqrt(D), rounded to the dtype, unless the embedding does it itself (since transformers 5)."""
    if hasattr(embedding, "embed_scale"):
        return hidden
    return hidden * torch.tensor(hidden.shape[-1] ** 0.5, dtype=hidden.dtype)


GEMMA = replace(LLAMA, name="gemma", embedding_scale=scale_by_width)
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
# The text part of the models that also see (4B and larger).
_TEXT: Table = {
    "embedding": "model.language_model.embed_tokens",
    "layers": "model.language_model.layers",
    "final_norm": "model.language_model.norm",
    "rotary": "model.language_model.rotary_emb",
    "beside": ("model.vision_tower", "model.multi_modal_projector"),
}
GEMMA3_VISION = replace(GEMMA3, name="gemma3_vision", **_TEXT)
GEMMA3_VISION_TWO_TABLES = replace(GEMMA3_VISION, local_rotary="model.language_model.rotary_emb_local")
GLM4 = replace(LLAMA, name="glm4", attention_out=("post_self_attn_layernorm",), mlp_out=("post_mlp_layernorm",))
