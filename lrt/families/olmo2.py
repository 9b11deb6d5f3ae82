"""OLMo 2: norms after attention and MLP only, queries and keys normed over the whole projection."""

from lrt.families.description import Family, window_of

OLMO2 = Family(
    name="olmo2",
    rotary="model.rotary_emb",
    attention_out=("post_attention_layernorm",),
    mlp_out=("post_feedforward_layernorm",),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    window=window_of,
)
