"""Phi-1 to Phi-2 and StableLM: LayerNorm, partial rotary; Phi and some StableLM run attention and MLP side by side."""

from dataclasses import replace

from lrt.families.description import Foreign
from lrt.families.llama import LLAMA
from lrt.tables import Table


def always(layer: Foreign) -> bool:
    return True


def rotated_channels(attention: Foreign) -> int:
    return attention.rotary_ndims


_NORMS: Table = {"query_norm": "self_attn.q_layernorm", "key_norm": "self_attn.k_layernorm", "norm_heads_first": True}
PHI = replace(
    LLAMA,
    name="phi",
    embedding_out=("model.embed_dropout",),
    final_norm="model.final_layernorm",
    attention_out=("resid_dropout",),
    mlp_in=("input_layernorm",),
    mlp_out=("resid_dropout",),
    output="self_attn.dense",
    parallel=always,
    rotated=rotated_channels,
)
PHI_NORMED = replace(PHI, name="phi_normed", **_NORMS)
STABLELM = replace(LLAMA, name="stablelm", mlp_out=("dropout",), rotated=rotated_channels)
STABLELM_PARALLEL = replace(
    STABLELM, name="stablelm_parallel", mlp_in=("input_layernorm",), parallel=always, residual_first=True
)
STABLELM_NORMED, STABLELM_PARALLEL_NORMED = (
    replace(family, name=f"{family.name}_normed", **_NORMS) for family in (STABLELM, STABLELM_PARALLEL)
)
