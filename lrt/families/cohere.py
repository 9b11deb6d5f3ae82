"""Cohere and Cohere 2: one norm before attention and MLP side by side; Cohere 2 rotates the blocks with a window
alone."""

from dataclasses import replace

from lrt.families.description import Family, Foreign, window_of
from lrt.families.phi import always


def has_window(attention: Foreign) -> bool:
    return attention.sliding_window is not None


COHERE = Family(
    name="cohere",
    rotary="model.rotary_emb",
    attention_in=("input_layernorm",),
    mlp_in=("input_layernorm",),
    parallel=always,
    residual_first=True,
    logit_factor="logit_scale",
    window=window_of,
)
COHERE_NORMED = replace(COHERE, name="cohere_normed", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
COHERE2 = replace(COHERE, name="cohere2", rotates=has_window)
