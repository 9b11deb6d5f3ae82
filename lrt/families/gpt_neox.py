"""GPT-NeoX and Pythia: attention and MLP side by side, one projection ordered by head, partial rotary."""

from dataclasses import replace

from torch import Tensor

from lrt.families.description import Family, Foreign, Geometry


def split_by_head(fused: Tensor, g: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of head 0, then those of head 1, and so on."""
    query, key, value = fused.unflatten(-1, (g.heads, 3 * g.head_dim)).chunk(3, dim=-1)
    return query, key, value


def side_by_side(layer: Foreign) -> bool:
    return layer.use_parallel_residual


GPT_NEOX = Family(
    name="gpt_neox",
    embedding="gpt_neox.embed_in",
    embedding_out=("gpt_neox.emb_dropout",),
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    rotary="gpt_neox.rotary_emb",
    attention="attention",
    attention_in=("input_layernorm",),
    attention_out=("post_attention_dropout",),
    mlp_in=("post_attention_layernorm",),
    mlp_out=("post_mlp_dropout",),
    parallel=side_by_side,
    fused="attention.query_key_value",
    split=split_by_head,
    output="attention.dense",
)
GPT_NEOX_4 = replace(GPT_NEOX, head="embed_out")  # before transformers 5
