"""A native model as one decoding step wants it: the same blocks, one token a row, in five kernels a block.

``fuse`` gives a decoder whose blocks follow the ordinary call, so ``run_blocks`` runs it like any other.
Parameters stay where they are; nothing is copied or packed.

Legend: B rows, D width, H query heads, G key/value heads, W head width, C slots of a cache.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.backbone import Decoder, rms_norm
from lrt.state import DecodeState
from lrt.types import MemoryInput


class Slots(NamedTuple):
    """One block's cache, as the attention kernel reads it."""

    key: Tensor  # (B, C, G, W)
    value: Tensor
    lengths: Tensor  # (B,)
    starts: Tensor  # (B,)


class Token(NamedTuple):
    """What one block needs of the token beside the hidden state."""

    tokens: Tensor  # (B, 1)
    frequencies: Tensor  # (W/2,) RoPE angle of one position, float32
    round_angles: bool  # the cosines and sines are bfloat16
    embedding: Tensor  # (B, 1, D)
    table: Tensor | None  # (V, G W) E_v
    scale: Tensor | None
    embedding_scale: Tensor | None


def can_fuse(model: Any) -> bool:
    """Whether the kernels fit: a native model of a power-of-two head width, with triton installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    backbone = model.backbone
    if type(backbone) is not Decoder:
        return False
    width = backbone.head_dim
    return width >= 16 and width & (width - 1) == 0 and next(model.parameters()).dtype in (torch.bfloat16, torch.float16, torch.float32)


def fuse(model: Any) -> Any:
    """The model as a RecurrentDecoder for single tokens; same parameters, other kernels."""
    backbone, config = model.backbone, model.backbone.config
    channels = torch.arange(0, backbone.head_dim, 2, dtype=torch.float32, device=backbone.head.weight.device)
    frequencies = 1.0 / (config.rope_base ** (channels / backbone.head_dim))
    rounded = config.rope_dtype == "bfloat16"

    def embed(tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Token, ...]]:
        hidden = rms_norm(backbone.embedding(tokens))
        contexts = []
        for i in range(len(model.blocks)):
            table = backbone.value_embeddings[str(i)].weight if str(i) in backbone.value_embeddings else None
            scales = [None if s is None else s[i : i + 1] for s in (backbone.residual_scales, backbone.embedding_scales)]
            contexts.append(Token(tokens, frequencies, rounded, hidden, table, *scales))
        return hidden, tuple(contexts)

    def logits(hidden: Tensor) -> Tensor:
        head = backbone.head
        return linear(hidden[:, 0], [head.weight[: head.vocab_size]], norm=True, cap=head.softcap, dtype=torch.float32)[0][:, None]

    def project(memory: Tensor) -> tuple[Tensor, Tensor]:
        pair = model.memory_projection
        out = linear(memory[:, 0], [pair.key.weight, pair.value.weight], dtype=memory.dtype)[0]
        key, value = out.chunk(2, dim=-1)
        return key, value

    def stores(state: DecodeState) -> list[Slots]:
        return [Slots(k, v, state.lengths, state.document_starts) for k, v in zip(state.keys, state.values)]

    return SimpleNamespace(
        backbone=SimpleNamespace(embed=embed, logits=logits, config=config, vocab_size=backbone.vocab_size),
        blocks=[FusedBlock(block) for block in model.blocks],
        memory_projection=None if model.memory_projection is None else project,
        injection=model.injection,
        source=model.source,
        receivers=model.receivers,
        recurrence=model.recurrence,
        memory_of=model.memory_of if model.recurrence is not None and model.recurrence.memory_norm == "final" else memory_of,
        stores=stores,
    )


class FusedBlock:
    """A RecurrentBlock for one token a row."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper, self.window = wrapper, wrapper.window

    def __call__(self, hidden: Tensor, memory: MemoryInput | None, context: Token, kv: Slots) -> tuple[Tensor, Tensor, Tensor]:
        wrapper, block = self.wrapper, self.wrapper.block
        x = hidden[:, 0]
        kv_width = kv.key.shape[2] * kv.key.shape[3]
        weights: list[Tensor | None] = [block.query.weight, block.key.weight, block.value.weight, None, None, None, None]
        if wrapper.gate is not None:
            weights[3] = wrapper.gate.weight
        if block.value_gate is not None:
            weights[4] = block.value_gate.weight
        own = wrapper.projection if memory is not None else None
        if own is not None:
            weights[5:7] = own.key.weight, own.value.weight
        projected, x = linear(
            x, weights, norm=True, dtype=torch.float32, scale=context.scale, embedding_scale=context.embedding_scale,
            embedding=context.embedding[:, 0], memory=None if memory is None else memory.state[:, 0], gain=None if memory is None else memory.gain,
        )  # fmt: skip
        stride = 0
        key: torch.Tensor = projected
        value: torch.Tensor = projected
        if own is not None:
            offset = projected.shape[1] - 2 * kv_width
            key, value, stride = projected[:, offset:], projected[:, offset + kv_width :], projected.shape[1]
        elif memory is not None and memory.key is not None and memory.value is not None:
            key, value, stride = memory.key, memory.value, 2 * kv_width
        x = attend(block, projected, key, value, stride, context, kv, x, gated=wrapper.gate is not None, memory=memory is not None)
        inner = linear(x, [block.mlp_in.weight], norm=True, relu2=True, dtype=x.dtype)[0]
        x = linear(inner, [block.mlp_out.weight], residual=x, dtype=x.dtype)[0]
        return x[:, None], kv.key, kv.value


# ------------------------------------------------------------------ launches


def linear(
    x: Tensor, weights: list[Tensor | None], *, dtype: torch.dtype, norm: bool = False, relu2: bool = False, residual: Tensor | None = None,
    cap: float | None = None, scale: Tensor | None = None, embedding: Tensor | None = None, embedding_scale: Tensor | None = None,
    memory: Tensor | None = None, gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows (B, K) through sections of weights side by side: (B, sum of n_i), and the mixed input (B, K)."""
    from lrt import decode_kernels as kernels

    rows, width = x.shape
    x = x.contiguous()
    sections = list(weights) + [None] * (7 - len(weights))
    sizes = [0 if w is None else w.shape[0] for w in sections]
    total = sum(sizes)
    out = x.new_empty(rows, total, dtype=dtype)
    mix = scale is not None or embedding_scale is not None or gain is not None
    mixed = torch.empty_like(x) if mix else x
    block_m, block_n, block_k, warps = tiles(rows, total, width)
    grid = (sum(-(-n // block_n) for n in sizes), -(-rows // block_m))
    kernels.linear_kernel[grid](
        x, _or(embedding, x), _or(memory, x), mixed, _or(scale, x), _or(embedding_scale, x), _or(gain, x),
        *(_or(w, x) for w in sections), _or(residual, x), out, rows, torch.finfo(x.dtype).eps, cap or 1.0, total,
        *sizes, width, *(width if w is None else w.shape[1] for w in sections[3:5]),
        scale is not None, embedding_scale is not None, gain is not None, norm, relu2, residual is not None, cap is not None,
        block_m, block_n, block_k, num_warps=warps,
    )  # fmt: skip
    return out, mixed


def tiles(rows: int, outputs: int, width: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K and warps of a product; one row is a reduction, more use the matrix units."""
    if rows == 1:
        return 1, 4 if outputs <= 2048 else 8 if outputs <= 8192 else 16, min(1024 if width >= 2048 else 512, _power(width)), 4
    block_m = min(64, max(16, _power(rows)))
    return block_m, 16 if outputs <= 8192 else 64, min(128, _power(width)), 4


def splits_of(batch: int, heads: int, slots: int) -> int:
    """Programs among which one head's keys are divided."""
    wanted = max(1, 264 // (batch * heads))
    return min(_power(-(-slots // 128)), 1 << (wanted.bit_length() - 1), 8 if slots <= 2100 else 32)


def attend(
    block: Any, projected: Tensor, key: Tensor, value: Tensor, stride: int, context: Token, kv: Slots, x: Tensor, *, gated: bool, memory: bool
) -> Tensor:
    """Attention and its output projection, added to ``x`` (B, D)."""
    from lrt import decode_kernels as kernels

    rows, slots, groups, width = kv.key.shape
    heads = block.query.weight.shape[0] // width
    splits = splits_of(rows, heads, slots)
    partial = x.new_empty(rows, heads, splits, width, dtype=torch.float32)
    summary = x.new_empty(rows, heads, splits, 2, dtype=torch.float32)
    kernels.attention_kernel[(rows, heads, splits)](
        projected, context.frequencies, key, value, _or(context.table, x), context.tokens,
        kv.key, kv.value, kv.lengths, kv.starts, partial, summary,
        projected.shape[1], stride, torch.finfo(x.dtype).eps, width**-0.5,
        heads, groups, width, slots, splits,
        gated, memory and gated, block.value_gate is not None and context.table is not None, block.qk_norm, context.round_angles,
        min(64, max(16, 8192 // width)), num_warps=4,
    )  # fmt: skip
    weight = block.output.weight
    if rows == 1:
        out = torch.empty_like(x)
        block_n = 8
        grid = (-(-weight.shape[0] // block_n),)
        kernels.output_kernel[grid](partial, summary, weight, x, out, weight.shape[0], heads, width, splits, block_n, num_warps=4)
        return out
    mixed = x.new_empty(rows, heads * width)
    kernels.combine_kernel[(rows * heads,)](partial, summary, mixed, width, splits, num_warps=4)
    return linear(mixed, [weight], residual=x, dtype=x.dtype)[0]


def memory_of(hidden: Tensor) -> Tensor:
    """m (B, 1, D) of the source block's output, in one kernel."""
    from lrt import decode_kernels as kernels

    out = torch.empty_like(hidden)
    width = hidden.shape[-1]
    eps = torch.finfo(torch.promote_types(hidden.dtype, torch.float32)).eps
    kernels.memory_kernel[(hidden.shape[0],)](hidden, out, eps, width, _power(width), num_warps=4)
    return out


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
