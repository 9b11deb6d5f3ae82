"""Which adapted decoders the kernels of a decoding step compute: Llama-style ones, found by what their parts compute.

Pre-norm blocks with RMS norms, three projections with or without biases, norms of heads or none, RoPE over whole heads
by halves, and a gated MLP.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt.decoding.which_model import Decodes
from lrt.families.blocks import FamilyBlock
from lrt.families.decoder import FamilyDecoder
from lrt.families.description import part

WITHIN = 0.03  # of the largest number that a part gives: half precision
ACTIVATIONS = {1: F.silu, 2: lambda x: F.gelu(x, approximate="tanh")}  # by their number in the kernels


class Norm(NamedTuple):
    """An RMS norm that multiplies by a weight."""

    module: Any  # its weight is (K,)
    eps: float


class Parts(NamedTuple):
    """What the kernels read of one block."""

    entry: Norm  # before the attention
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    head_norms: tuple[Norm, Norm] | None  # of queries and keys
    output: nn.Linear
    middle: Norm  # before the MLP
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: int


def unlike(model: Decodes) -> str | None:
    """What of a model the kernels do not compute; None when they compute all of it."""
    backbone, recurrence = model.backbone, model.recurrence
    if not isinstance(backbone, FamilyDecoder):
        return "its decoder is not an adapted one"
    if recurrence is not None and (recurrence.memory_norm != "rms" or recurrence.residual == "projected"):
        return "its memory has a norm or a residual of another kind"
    family = backbone.family
    more = (family.position_embedding, family.embedding_scale, family.local_rotary, backbone.by_length)
    if any(x is not None for x in more) or family.embedding_out:
        return "tokens enter it in another way, or its RoPE depends on windows or lengths"
    if backbone.rotary is None or not turns_alike(backbone.rotary, backbone.embedding.weight):
        return "its rotation is not RoPE of fixed frequencies"
    if {p.device for p in model.parameters()} != {backbone.embedding.weight.device}:
        return "it lies on several devices"
    for index, wrapper in enumerate(model.blocks):
        if wrapper._forward_pre_hooks or wrapper._forward_hooks or not isinstance(wrapper.block, FamilyBlock):
            return f"block {index + 1} has hooks, or is no block of a family"
        if parts_of(wrapper.block) is None:
            return f"block {index + 1} is not Llama's"
    return None


def parts_of(block: FamilyBlock) -> Parts | None:
    """The parts of a block; None where it has others, or they compute something else."""
    family, layer, geometry = block.family, block.layer, block.geometry
    width = geometry.head_dim
    others = (family.fused, block.clip, block.residual_factor, block._softcap(), family.sinks, block.rotated)
    if any(x is not None for x in others) or block.parallel or not block.rotates or family.norm_after_rotation:
        return None
    if family.attention_out or family.mlp_out or len(family.attention_in) != 1 or len(family.mlp_in) != 1:
        return None
    if any(block.norm_whole.values()) or width < 16 or width & (width - 1) or not isinstance(family.mlp, str):
        return None
    entry, middle = (rms_of(part(layer, paths[0])) for paths in (family.attention_in, family.mlp_in))
    heads = [rms_of(part(layer, path)) for path in (family.query_norm, family.key_norm) if path is not None]
    mlp = part(layer, family.mlp)
    names = (family.query, family.key, family.value, family.output)
    linears = [part(layer, name) for name in names]
    linears += [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if entry is None or middle is None or any(norm is None for norm in heads) or not all(map(_plain, linears)):
        return None
    if len(heads) not in (0, 2) or len({norm.eps for norm in heads if norm is not None}) > 1:
        return None
    query, key, value, output, gate, up, down = linears
    activation = activation_of(mlp, gate, up, down)
    if activation is None or (gate.bias is None) != (up.bias is None) or not _turned_by_halves(block):
        return None
    pair = (heads[0], heads[1]) if heads else None
    return Parts(entry, query, key, value, pair, output, middle, gate, up, down, activation)  # type: ignore[arg-type]


def _plain(linear: Any) -> bool:
    """A linear whose weight may be read: nothing wraps it, and it has no hooks."""
    return type(linear) is nn.Linear and not linear._forward_pre_hooks and not linear._forward_hooks


@torch.no_grad()
def rms_of(norm: Any) -> Norm | None:
    """A norm as the kernels compute it; None where it computes something else."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or weight.ndim != 1 or not isinstance(eps, float) or getattr(norm, "bias", None) is not None:
        return None
    x = torch.linspace(0.5, 2.0, len(weight), device=weight.device)
    return (
        Norm(norm, eps) if _near(norm(x.to(weight.dtype)), F.rms_norm(x, x.shape, eps=eps) * weight.float()) else None
    )


@torch.no_grad()
def activation_of(mlp: Any, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> int | None:
    """The number of the function that bends a gated MLP's gate; None where the MLP is another."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, gate.in_features, generator=generator).to(gate.weight)
    got = mlp(x)
    if not isinstance(got, Tensor):
        return None
    return next((n for n, bend in ACTIVATIONS.items() if _near(got, down(bend(gate(x)) * up(x)))), None)


@torch.no_grad()
def turns_alike(rotary: Any, like: Tensor) -> bool:
    """Whether a rotation's tables are cosines and sines of positions times fixed frequencies."""
    frequencies = getattr(rotary, "inv_freq", None)
    if not isinstance(frequencies, Tensor) or "layer_type" in inspect.signature(rotary.forward).parameters:
        return False
    positions = torch.tensor([[0, 1, 7, 100]], device=frequencies.device)
    cos, sin = rotary(like[:1, None].to(torch.float32), positions)
    angles = (positions[..., None].float() * frequencies.float()).repeat(1, 1, 2)
    stretch = getattr(rotary, "attention_scaling", 1.0)
    return _near(cos, stretch * angles.cos()) and _near(sin, stretch * angles.sin())


@torch.no_grad()
def _turned_by_halves(block: FamilyBlock) -> bool:
    width, generator = block.geometry.head_dim, torch.Generator().manual_seed(1)
    x = torch.randn(1, 2, 3, width, generator=generator)
    angles = torch.rand(1, 3, width // 2, generator=generator).repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    want = x * tables[0][:, None] + torch.cat([-second, first], dim=-1) * tables[1][:, None]
    return all(_near(got, want) for got in block.rotate(x, x, *tables))


def _near(got: Tensor, want: Tensor) -> bool:
    want = want.float()
    return got.shape == want.shape and float((got.float() - want).abs().max()) <= WITHIN * float(want.abs().max())
