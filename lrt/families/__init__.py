"""Foreign decoders as backbones: one description a family, recognised by structure, never by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from lrt.families.blocks import FamilyBlock
from lrt.families.decoder import FamilyDecoder
from lrt.families.description import Family, describe_fields, missing_parts, part
from lrt.families.gemma import GEMMA2, GEMMA3, GEMMA3_TWO_TABLES
from lrt.families.gpt2 import GPT2
from lrt.families.gpt_neox import GPT_NEOX, GPT_NEOX_4
from lrt.families.llama import LLAMA
from lrt.families.olmo2 import OLMO2
from lrt.families.phi3 import PHI3
from lrt.families.qwen3 import QWEN3

# GEMMA3_TWO_TABLES before GEMMA3, which needs one part less.
FAMILIES = (LLAMA, QWEN3, GEMMA2, GEMMA3_TWO_TABLES, GEMMA3, OLMO2, PHI3, GPT2, GPT_NEOX, GPT_NEOX_4)
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def recognise(decoder: nn.Module) -> Family:
    """The family whose parts the decoder has, all of them and no others.

    Raises:
        ValueError: not a decoder that memory can enter, or one that no family describes.
    """
    _refuse_other_kinds(decoder)
    wrong = {family.name: missing_parts(family, decoder) for family in FAMILIES}
    for family in FAMILIES:
        if not missing_parts(family, decoder):
            return family
    name, closest = min(wrong.items(), key=lambda item: (len(item[1]), item[0]))
    raise ValueError(
        f"no family of lrt has the structure of this {type(decoder).__name__} ({_structure(decoder)}). The closest is {name!r}: "
        f"{'; '.join(closest[:3])}. Describe it: lrt.adapt(model, family=lrt.Family(name=..., layers=..., ...)), with {describe_fields()}; "
        "docs/adapt.md shows one"
    )


def dismantle(decoder: nn.Module, family: Family) -> tuple[FamilyDecoder, list[FamilyBlock]]:
    """The decoder as a backbone and its blocks; its modules are shared, none is changed.

    Raises:
        ValueError: the description does not fit, or the attention backend is not supported.
    """
    wrong = missing_parts(family, decoder)
    if wrong:
        raise ValueError(f"family {family.name!r} does not fit this {type(decoder).__name__} ({_structure(decoder)}): {'; '.join(wrong[:4])}")
    backend = getattr(getattr(decoder, "config", None), "_attn_implementation", None)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"attention backend {backend!r} is not supported: load the model with attn_implementation= one of {', '.join(BACKENDS)}, "
            "or model.set_attn_implementation('sdpa')"
        )
    geometry = family.geometry(decoder)
    blocks = [FamilyBlock(family, layer, geometry) for layer in part(decoder, family.layers)]
    for index, block in enumerate(blocks):
        if not any(p.is_floating_point() for p in block.parameters()):
            raise ValueError(
                f"block {index + 1} is quantized without a single floating-point parameter, so the memory projections have no dtype to follow: "
                "dequantize it (model.dequantize()), or load it in bf16"
            )
    backbone = FamilyDecoder(family, decoder, blocks)
    mine = {id(p) for module in (backbone, *blocks) for p in module.parameters()}
    left = [name for name, p in decoder.named_parameters() if id(p) not in mine]
    if left:
        raise ValueError(
            f"family {family.name!r} leaves out parameters of this {type(decoder).__name__}: {', '.join(left[:4])}: describe where they belong"
        )
    return backbone, blocks


def _refuse_other_kinds(decoder: nn.Module) -> None:
    config: Any = getattr(decoder, "config", None)
    kind = type(decoder).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: lrt.adapt takes decoder-only language models")
    state_space = [name for name, _ in decoder.named_parameters() if name.endswith((".A_log", ".conv1d.weight"))]
    if state_space:
        raise ValueError(
            f"{kind} is a state-space or hybrid model ({state_space[0]}): it has a recurrence of its own and no keys and values in those "
            "blocks; lrt.adapt takes attention decoders"
        )
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(f"{kind} has blocks of type {', '.join(sorted(other))}: lrt.adapt takes full and sliding-window attention")
    bidirectional = [n for n, m in decoder.named_modules() if getattr(m, "is_causal", None) is False or hasattr(m, "cross_attention")]
    if (
        bidirectional
        or getattr(config, "use_bidirectional_attention", False)
        or (config is not None and getattr(config, "is_decoder", None) is False and _is_encoder(decoder))
    ):
        raise ValueError(f"{kind} is an encoder, or not causal: lrt.adapt takes decoder-only language models, such as those of AutoModelForCausalLM")


def _is_encoder(decoder: nn.Module) -> bool:
    return any(name.endswith("encoder.layer") for name, _ in decoder.named_modules())


def _structure(decoder: nn.Module) -> str:
    """Its longest list of blocks and what a block holds, for errors."""
    lists = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        return "no list of blocks"
    name, layers = max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))
    inside = [f"{child}: {type(module).__name__}" for child, module in layers[0].named_children()]
    return f"{len(layers)} blocks at {name}, each with {', '.join(inside) or type(layers[0]).__name__}"
