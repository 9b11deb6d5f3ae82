"""Foreign decoders as backbones: one description a family, recognised by structure, never by name."""

from __future__ import annotations

from torch import nn

from lrt.families.blocks import FamilyBlock
from lrt.families.cohere import COHERE, COHERE2, COHERE_NORMED
from lrt.families.decoder import FamilyDecoder
from lrt.families.description import Family as Family
from lrt.families.description import Foreign, describe_fields, missing_parts, part, text_config
from lrt.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TWO_TABLES, GEMMA3_VISION, GEMMA3_VISION_TWO_TABLES, GLM4
from lrt.families.gpt2 import GPT2, GPT_BIGCODE, GPT_BIGCODE_BY_HEAD
from lrt.families.gpt_neox import GPT_NEOX, GPT_NEOX_4
from lrt.families.llama import GPT_OSS, GRANITE, LLAMA, OLMO, SEED_OSS, SMOLLM3, STARCODER2
from lrt.families.olmo2 import EXAONE4, EXAONE_MOE, OLMO2
from lrt.families.opt import OPT
from lrt.families.phi import PHI, PHI_NORMED, STABLELM, STABLELM_NORMED, STABLELM_PARALLEL, STABLELM_PARALLEL_NORMED
from lrt.families.phi3 import PHI3
from lrt.families.probe import Departure, departure
from lrt.families.qwen3 import NANOCHAT, OLMOE, QWEN3

# Of one structure the most common comes first; those with more parts before those with fewer.
FAMILIES = (
    LLAMA, GEMMA, GRANITE, SMOLLM3, SEED_OSS, STARCODER2, OLMO, GPT_OSS, QWEN3, EXAONE_MOE, OLMOE, NANOCHAT, GEMMA2,
    GEMMA3_TWO_TABLES, GEMMA3, GEMMA3_VISION_TWO_TABLES, GEMMA3_VISION, GLM4, OLMO2, EXAONE4, PHI3, GPT2, GPT_BIGCODE,
    GPT_BIGCODE_BY_HEAD, GPT_NEOX, GPT_NEOX_4, COHERE, COHERE_NORMED, COHERE2, OPT, PHI, PHI_NORMED, STABLELM,
    STABLELM_PARALLEL, STABLELM_NORMED, STABLELM_PARALLEL_NORMED,
)  # fmt: skip
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def take_apart(decoder: nn.Module, family: Family | None = None) -> tuple[FamilyDecoder, list[FamilyBlock]]:
    """The decoder as a backbone and its blocks, which compute what it computes;
    its modules are shared, none is changed.

    Args:
        decoder: a causal language model.
        family: where its parts are; None = the first known structure that computes the same.

    Raises:
        ValueError: not a decoder that memory can enter, or one that is not described, with what is unknown.
    """
    if family is None:
        _refuse_other_kinds(decoder)
    tried: dict[str, Departure] = {}
    found: dict[str, tuple[FamilyDecoder, list[FamilyBlock]]] = {}
    for candidate in (family,) if family is not None else fitting(decoder):
        try:
            parts = dismantle(decoder, candidate)
        except AttributeError as error:
            tried[candidate.name] = Departure(float("inf"), f"it cannot be taken apart as described: {error}")
            continue
        if next(decoder.parameters()).device.type == "meta":
            return parts  # shapes only, nothing to compare
        tried[candidate.name] = departure(*parts, decoder)
        if tried[candidate.name].words is None:
            found[candidate.name] = parts
            if tried[candidate.name].error == 0:
                break
    if found:
        return found[min(found, key=lambda name: tried[name].error)]
    name = min(tried, key=lambda name: (-tried[name].passed, tried[name].error))
    raise ValueError(
        f"this {type(decoder).__name__} has the structure of {name!r}, but computes something else: "
        f"{tried[name].words}. Describe what it does: lrt.adapt(model, family=lrt.Family(...)); docs/adapt.md"
    )


def fitting(decoder: nn.Module) -> list[Family]:
    """The known families whose parts the decoder has, all of them and no others.

    Raises:
        ValueError: none.
    """
    wrong = [(family, missing_parts(family, decoder)) for family in FAMILIES]
    fit = [family for family, missing in wrong if not missing]
    if fit:
        return fit
    same_stack = [(family.name, missing) for family, missing in wrong if part(decoder, family.layers) is not None]
    name, closest = min(same_stack, key=lambda item: (len(item[1]), item[0]), default=("", []))
    near = (
        f" The closest is {name!r}: {'; '.join(closest[:3])}."
        if closest
        else " No known family keeps its blocks there."
    )
    raise ValueError(
        f"no family of lrt has the structure of this {type(decoder).__name__} ({_structure(decoder)}).{near} Describe "
        f"it: lrt.adapt(model, family=lrt.Family(name=..., layers=..., ...)), with {describe_fields()}; "
        "docs/adapt.md shows one"
    )


def dismantle(decoder: nn.Module, family: Family) -> tuple[FamilyDecoder, list[FamilyBlock]]:
    """The decoder as a backbone and its blocks; its modules are shared, none is changed.

    Raises:
        ValueError: the description does not fit, or the attention backend is not supported.
    """
    wrong = missing_parts(family, decoder)
    if wrong:
        raise ValueError(
            f"family {family.name!r} does not fit this {type(decoder).__name__} ({_structure(decoder)}): "
            f"{'; '.join(wrong[:4])}"
        )
    backend = getattr(text_config(decoder), "_attn_implementation", None)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(
            f"attention backend {backend!r} is not supported: load the model with attn_implementation= one of "
            f"{', '.join(BACKENDS)}, or model.set_attn_implementation('sdpa')"
        )
    geometry = family.geometry(decoder)
    blocks = [FamilyBlock(family, layer, geometry) for layer in part(decoder, family.layers)]
    for index, block in enumerate(blocks):
        if not any(p.is_floating_point() for p in block.parameters()):
            raise ValueError(
                f"block {index + 1} is quantized without a single floating-point parameter, "
                "so the memory projections have no dtype to follow: "
                "dequantize it (model.dequantize()), or load it in bf16"
            )
    backbone = FamilyDecoder(family, decoder, blocks)
    mine = {id(p) for module in (backbone, *blocks) for p in module.parameters()}
    left = [name for name, p in decoder.named_parameters() if id(p) not in mine]
    if left:
        raise ValueError(
            f"family {family.name!r} leaves out parameters of this {type(decoder).__name__}: "
            f"{', '.join(left[:4])}: describe where they belong"
        )
    return backbone, blocks


def _refuse_other_kinds(decoder: nn.Module) -> None:
    config: Foreign = getattr(decoder, "config", None)
    kind = type(decoder).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: lrt.adapt takes decoder-only language models")
    state_space = [name for name, _ in decoder.named_parameters() if name.endswith((".A_log", ".conv1d.weight"))]
    if state_space:
        raise ValueError(
            f"{kind} is a state-space or hybrid model ({state_space[0]}): "
            "it has a recurrence of its own and no keys and values in those blocks; lrt.adapt takes attention decoders"
        )
    other = set(getattr(text_config(decoder), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(
            f"{kind} has blocks of type {', '.join(sorted(other))}: lrt.adapt takes full and sliding-window attention"
        )
    # A model that also sees has an encoder beside its decoder; the description says which is which.
    text = text_config(decoder) is config
    bidirectional = [
        m
        for m in decoder.modules()
        if text and (getattr(m, "is_causal", None) is False or hasattr(m, "cross_attention"))
    ]
    if (
        bidirectional
        or getattr(text_config(decoder), "use_bidirectional_attention", False)
        or (config is not None and getattr(config, "is_decoder", None) is False and _is_encoder(decoder))
    ):
        raise ValueError(
            f"{kind} is an encoder, or not causal: lrt.adapt takes decoder-only language models, "
            "such as those of AutoModelForCausalLM"
        )


def _is_encoder(decoder: nn.Module) -> bool:
    return any(name.endswith("encoder.layer") for name, _ in decoder.named_modules())


def _structure(decoder: nn.Module) -> str:
    """Its longest list of blocks and what a block holds, for errors."""
    lists = [
        (name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        return "no list of blocks"
    name, layers = max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))
    inside = [f"{child}: {type(module).__name__}" for child, module in layers[0].named_children()]
    return f"{len(layers)} blocks at {name}, each with {', '.join(inside) or type(layers[0]).__name__}"
