"""Triton kernels of a native decoding step that come first and last: what all blocks share, and the memory.

Legend: B rows, K width, W head width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from lrt.decoding.fast.kernels.waiting import wait


@triton.jit(do_not_specialize_on_alignment=["scale", "embedding_scale", "gain"])
def start_kernel(
    tokens, active, lengths, starts, table, frequencies, memory, scale, embedding_scale, gain,
    embedding, x, received, positions, angles, counters,  # written
    eps, separator, cut, factor, stretch,
    K: tl.constexpr, W: tl.constexpr, COUNTERS: tl.constexpr,
    SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr, MEMORY: tl.constexpr,
    NORM: tl.constexpr, FORWARD: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_COUNTERS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Everything that the blocks share, for one row: x_0, the first block's input, the received memory, the place.

    Embedded tokens are normed, or multiplied by ``factor``; cosines and sines are multiplied by ``stretch``, and a head
    turns FORWARD as transformers has it. A row at the token ``cut`` sees nothing before it; at ``separator`` it
    receives zero (-1: no such token).
    """
    if DEPENDENT:
        gdc_launch_dependents()
    b, k = tl.program_id(0), tl.arange(0, BLOCK_K)
    inside = k < K
    token, position, runs = tl.load(tokens + b), tl.load(lengths + b), tl.load(active + b).to(tl.int1)
    e = tl.load(table + token * K + k, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        e = e * tl.rsqrt(tl.sum(e * e, axis=0) / K + eps)
    else:
        e = e * factor
    e = e.to(x.dtype.element_ty)
    tl.store(embedding + b * K + k, e, mask=inside)
    e = e.to(tl.float32)
    mixed = e
    if SCALE:
        mixed *= tl.load(scale).to(tl.float32)
    if EMBED:
        mixed += tl.load(embedding_scale).to(tl.float32) * e
    if MEMORY:
        m = tl.load(memory + b * K + k, mask=inside & (token != separator), other=0.0)
        tl.store(received + b * K + k, m, mask=inside)
        if INJECT:
            mixed += tl.load(gain).to(tl.float32) * m.to(tl.float32)
    tl.store(x + b * K + k, mixed.to(x.dtype.element_ty), mask=inside)

    tl.store(positions + b, position.to(tl.int32))
    tl.store(lengths + b, position + runs.to(tl.int64))
    tl.store(starts + b, position, mask=runs & (token == cut))
    whole = tl.arange(0, W)
    angle = position.to(tl.float32) * tl.load(frequencies + whole % (W // 2))
    cos, sin = stretch * tl.cos(angle), stretch * tl.sin(angle)
    if ROUND:
        cos, sin = cos.to(tl.bfloat16).to(tl.float32), sin.to(tl.bfloat16).to(tl.float32)
    tl.store(angles + b * (2 * W) + whole, cos)
    tl.store(angles + b * (2 * W) + W + whole, tl.where((whole < W // 2) == FORWARD, -sin, sin))
    counter = tl.arange(0, BLOCK_COUNTERS)
    tl.store(counters + b * COUNTERS + counter, tl.zeros((BLOCK_COUNTERS,), tl.int32), mask=counter < COUNTERS)


@triton.jit
def memory_kernel(hidden, memory, active, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr):
    """m = RMSNorm(h) of one row, where it is active."""
    b, k = tl.program_id(0), tl.arange(0, BLOCK_K)
    runs = tl.load(active + b).to(tl.int1)
    wait(DEPENDENT)
    x = tl.load(hidden + b * K + k, mask=k < K, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    tl.store(memory + b * K + k, x.to(memory.dtype.element_ty), mask=(k < K) & runs)
