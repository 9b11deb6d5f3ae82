"""Tiny random Hugging Face decoders, one maker a family, for the tests of adapt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

COMMON: dict[str, Any] = {"vocab_size": 61, "max_position_embeddings": 64}
ROPE: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    **COMMON,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", ROPE | {"attention_bias": True, "mlp_bias": True}),
    "smollm": ("Llama", ROPE | {"tie_word_embeddings": True, "head_dim": 8}),
    "mistral": ("Mistral", ROPE | {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2", ROPE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", ROPE | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        ROPE | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3Text",
        ROPE
        | {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo2": ("Olmo2", ROPE),
    "phi3": ("Phi3", ROPE | {"pad_token_id": 0, "sliding_window": 6}),
    "gpt2": ("GPT2", {"n_embd": 24, "n_head": 4, "n_positions": 64, "vocab_size": 61}),
    "gpt_neox": (
        "GPTNeoX",
        {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "rotary_pct": 0.5, **COMMON},
    ),
    "gpt_neox_serial": (
        "GPTNeoX",
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "intermediate_size": 40,
            "use_parallel_residual": False,
            **COMMON,
        },
    ),
}
PLAIN: dict[str, Any] = ROPE | {"head_dim": 8, "pad_token_id": 0}
EXPERTS: dict[str, Any] = PLAIN | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
VISION: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
# Described in families/ beside the ones above: one a description, and one a choice that it makes.
DESCRIBED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", PLAIN),
    "gemma3_vision": (
        "Gemma3",
        {
            "text_config": PLAIN | {"sliding_window": 4, "layer_types": MIXED, "num_hidden_layers": 3},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            "boi_token_index": 59,
            "eoi_token_index": 58,
        },
    ),
    "smollm3": ("SmolLM3", ROPE | {"pad_token_id": 0, "no_rope_layers": [1, 0, 1]}),
    "granite": (
        "Granite",
        ROPE
        | {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.5, "attention_multiplier": 0.3},
    ),
    "granite_swa": ("GraniteSWA", ROPE | {"pad_token_id": 0, "sliding_window": 4, "layer_types": MIXED}),
    "gpt_oss": (
        "GptOss",
        PLAIN | {"sliding_window": 4, "layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "cohere": ("Cohere", ROPE | {"logit_scale": 0.3, "pad_token_id": 0}),
    "cohere_normed": ("Cohere", ROPE | {"logit_scale": 0.3, "use_qk_norm": True, "pad_token_id": 0}),
    "cohere2": ("Cohere2", PLAIN | {"logit_scale": 0.3, "sliding_window": 4, "layer_types": MIXED}),
    "phi": ("Phi", ROPE | {"partial_rotary_factor": 0.5, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "phi_normed": (
        "Phi",
        ROPE | {"partial_rotary_factor": 0.5, "num_attention_heads": 3, "num_key_value_heads": 1, "qk_layernorm": True},
    ),
    "stablelm": ("StableLm", ROPE | {"num_attention_heads": 3, "num_key_value_heads": 3, "use_qkv_bias": True}),
    "stablelm_parallel": (
        "StableLm",
        ROPE | {"num_attention_heads": 3, "num_key_value_heads": 3, "use_parallel_residual": True},
    ),
    "stablelm_normed": ("StableLm", ROPE | {"num_attention_heads": 3, "num_key_value_heads": 1, "qk_layernorm": True}),
    "stablelm_parallel_normed": (
        "StableLm",
        ROPE
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "glm4": ("Glm4", PLAIN),
    "exaone4": ("Exaone4", PLAIN | {"sliding_window": 4, "layer_types": MIXED}),
    "exaone_moe": ("ExaoneMoe", EXPERTS | {"num_experts": 4, "sliding_window": 4, "layer_types": MIXED}),
    "olmo": ("Olmo", ROPE | {"clip_qkv": 0.5, "pad_token_id": 0}),
    "olmoe": ("Olmoe", ROPE | {"clip_qkv": 0.5, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}),
    "nanochat": ("NanoChat", PLAIN | {"final_logit_softcapping": 5.0}),
    "seed_oss": ("SeedOss", PLAIN),
    "starcoder2": ("Starcoder2", ROPE | {"sliding_window": 5}),
    "opt": ("OPT", ROPE | {"num_key_value_heads": 4, "word_embed_proj_dim": 24, "ffn_dim": 40, "pad_token_id": 0}),
    "gpt_bigcode": ("GPTBigCode", {"n_embd": 24, "n_head": 4, "n_positions": 64, "vocab_size": 61}),
    "gpt_bigcode_by_head": (
        "GPTBigCode",
        {"n_embd": 24, "n_head": 4, "n_positions": 64, "vocab_size": 61, "multi_query": False},
    ),
}
# Others of the same structures, checked by the nightly command.
NIGHTLY: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", PLAIN),
    "cwm": ("Cwm", PLAIN | {"sliding_window": 4, "layer_types": MIXED}),
    "dots1": ("Dots1", EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1}),
    "ernie4_5": ("Ernie4_5", PLAIN),
    "ernie4_5_moe": ("Ernie4_5_Moe", PLAIN | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    "flex_olmo": ("FlexOlmo", ROPE | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}),
    "glm": ("Glm", PLAIN),
    "glm4_moe": ("Glm4Moe", EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1}),
    "helium": ("Helium", ROPE | {"head_dim": 6}),
    "hy_v3": ("HYV3", EXPERTS | {"num_experts": 4}),
    "jais2": ("Jais2", PLAIN),
    "mellum": ("Mellum", EXPERTS | {"num_experts": 4}),
    "minimax_m2": ("MiniMaxM2", EXPERTS | {"num_local_experts": 4}),
    "ministral": ("Ministral", PLAIN | {"sliding_window": 4, "layer_types": MIXED}),
    "ministral3": ("Ministral3", PLAIN | {"sliding_window": 4}),
    "mixtral": ("Mixtral", PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "nemotron": ("Nemotron", PLAIN),
    "olmo3": ("Olmo3", ROPE | {"pad_token_id": 0, "sliding_window": 4, "layer_types": MIXED}),
    "phimoe": ("Phimoe", PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS | {"num_experts": 4, "sliding_window": 4, "layer_types": MIXED, "use_sliding_window": True},
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"num_experts": 4}),
    "solar_open": ("SolarOpen", EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1}),
}
CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM", "Gemma3": "Gemma3ForConditionalGeneration"}
NO_SDPA = ("Gemma2", "GptOss", "GraniteSWA")  # a softcap, sinks


def make(
    family: str,
    *,
    seed: int = 0,
    layers: int = 3,
    attention: str | None = None,
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> Any:
    """A random decoder in evaluation mode."""
    import transformers

    name, settings = (FAMILIES | DESCRIBED | NIGHTLY)[family]
    depth = {"n_layer" if "n_head" in settings else "num_hidden_layers": layers}
    config = getattr(transformers, f"{name}Config")(**settings | ({} if "text_config" in settings else depth) | more)
    config._attn_implementation = (
        attention if attention is not None and name not in NO_SDPA else "eager" if name in NO_SDPA else "sdpa"
    )
    if dtype == torch.float64 and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # the others know no float64
    torch.manual_seed(seed)
    decoder = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config)
    with torch.no_grad():  # norms and biases start at one and zero, which would hide a mistake
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder.to(dtype).eval()


def rotation(**settings: Any) -> dict[str, Any]:
    """RoPE settings as the installed version of transformers takes them."""
    import transformers

    if hasattr(transformers.LlamaConfig(), "rope_parameters"):
        return {"rope_parameters": settings}
    apart = {key: settings.pop(key) for key in ("rope_theta", "original_max_position_embeddings") if key in settings}
    return {"rope_scaling": {"type" if key == "rope_type" else key: value for key, value in settings.items()}, **apart}


def stir(model: Any, *, seed: int = 1, size: float = 0.2) -> Any:
    """Give the memory parameters random values, so that memory matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.memory_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


# Before transformers 5 these have other modules, draw other random numbers, know no float64,
# or round as no description says.
LAID_OUT_LATER = frozenset(
    {"dots1", "ernie4_5_moe", "glm4_moe", "mixtral", "nemotron", "olmo3", "opt", "phimoe", "qwen2_moe", "stablelm",
     "stablelm_normed", "stablelm_parallel", "stablelm_parallel_normed"}
)  # fmt: skip


def known(families: Iterable[str]) -> list[str]:
    """Those that the installed version of transformers has, laid out as the newest one does."""
    import transformers

    new = hasattr(transformers.LlamaConfig(), "rope_parameters")
    classes = {family: name for family, (name, _) in (FAMILIES | DESCRIBED | NIGHTLY).items()}
    return [
        family
        for family in families
        if hasattr(transformers, f"{classes[family]}Config") and (new or family not in LAID_OUT_LATER)
    ]
