"""Phi-3: Llama with one projection for queries, keys and values, and dropout on the residual."""

from dataclasses import replace

from torch import Tensor

from lrt.families.description import Geometry
from lrt.families.llama import LLAMA


def split_in_order(fused: Tensor, g: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """All queries, then all keys, then all values."""
    query, key, value = fused.split([g.heads * g.head_dim, g.kv_heads * g.head_dim, g.kv_heads * g.head_dim], dim=-1)
    return (
        query.unflatten(-1, (-1, g.head_dim)),
        key.unflatten(-1, (-1, g.head_dim)),
        value.unflatten(-1, (-1, g.head_dim)),
    )


PHI3 = replace(
    LLAMA,
    name="phi3",
    fused="self_attn.qkv_proj",
    split=split_in_order,
    attention_out=("resid_attn_dropout",),
    mlp_out=("resid_mlp_dropout",),
)
