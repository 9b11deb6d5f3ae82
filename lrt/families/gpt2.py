"""GPT-2 and GPT-BigCode: learned positions, LayerNorm, one projection for queries, keys and values."""

from dataclasses import replace

from lrt.families.description import Family, Foreign
from lrt.families.gpt_neox import split_by_head
from lrt.families.phi3 import split_in_order


def dropout_rate(attention: Foreign) -> float:
    return attention.attn_dropout.p


def score_scale(attention: Foreign) -> float:
    """Head width ** -0.5, or what the config asks for (before transformers 5 the attention does not hold it)."""
    config = attention.config
    scale = attention.head_dim**-0.5 if config.scale_attn_weights else 1.0
    return scale / (attention.layer_idx + 1) if config.scale_attn_by_inverse_layer_idx else scale


GPT2 = Family(
    name="gpt2",
    embedding="transformer.wte",
    position_embedding="transformer.wpe",
    embedding_out=("transformer.drop",),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention="attn",
    attention_in=("ln_1",),
    attention_out=("attn.resid_dropout",),
    mlp_in=("ln_2",),
    fused="attn.c_attn",
    split=split_in_order,
    output="attn.c_proj",
    scale=score_scale,
    dropout=dropout_rate,
)


def plain_rate(attention: Foreign) -> float:
    return attention.attn_dropout


# StarCoder 1: all query heads share one key, or every head has its own.
GPT_BIGCODE = replace(GPT2, name="gpt_bigcode", scale=None, dropout=plain_rate)
GPT_BIGCODE_BY_HEAD = replace(GPT_BIGCODE, name="gpt_bigcode_by_head", split=split_by_head)
