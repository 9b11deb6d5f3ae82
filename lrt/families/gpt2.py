"""GPT-2: learned positions, LayerNorm, one projection (Conv1D) for queries, keys and values."""

from typing import Any

from lrt.families.description import Family
from lrt.families.phi3 import split_in_order

def dropout_rate(attention: Any) -> float:
    return attention.attn_dropout.p


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
    dropout=dropout_rate,
)
