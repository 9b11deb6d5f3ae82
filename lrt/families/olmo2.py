"""OLMo 2 and EXAONE 4: norms after attention and MLP only; queries and keys normed over the whole projection,
or by head."""

from dataclasses import replace

from lrt.families.description import Family, Foreign, window_of

OLMO2 = Family(
    name="olmo2",
    rotary="model.rotary_emb",
    attention_out=("post_attention_layernorm",),
    mlp_out=("post_feedforward_layernorm",),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    window=window_of,
)


def slides_or_all_see_all(attention: Foreign) -> bool:
    """EXAONE 4 rotates the blocks with a window alone, where it has some."""
    return attention.sliding_window is None or attention.is_sliding


EXAONE4 = replace(OLMO2, name="exaone4", rotates=slides_or_all_see_all)
EXAONE_MOE = replace(
    EXAONE4,
    name="exaone_moe",
    attention_in=("input_layernorm",),
    attention_out=(),
    mlp_in=("post_attention_layernorm",),
    mlp_out=(),
)
