"""Triton kernels of one decoding step: skinny matrix products and split attention over a static cache.

A step at batch 1 moves each weight once, so its floor is bytes over bandwidth; what is left is the time
between kernels. Five kernels a block keep that small: (mix, norm, all projections and gates), split
attention, its output projection, and the two halves of the MLP. Imported only where triton is.

Legend: B rows, N outputs, K inputs of a product, H query heads, G key/value heads, W head width, C slots.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gate(x):
    return 2.0 / (1.0 + tl.exp(-x))


@triton.jit
def linear_kernel(
    hidden, embedding, memory, mixed, scale, embedding_scale, gain,  # inputs (B, K); mixed is written
    weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6,  # sections of rows (n_i, K); 3 and 4 have (n_i, CHANNELS)
    residual, out, rows, eps, cap,
    out_stride,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, N5: tl.constexpr, N6: tl.constexpr,
    K: tl.constexpr, CHANNELS_3: tl.constexpr, CHANNELS_4: tl.constexpr,
    SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr, NORM: tl.constexpr,
    RELU2: tl.constexpr, RESIDUAL: tl.constexpr, CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = f(norm(a h + b x0 + g m) W^T); sections 5 and 6 are fed the memory itself."""
    B0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    B1: tl.constexpr = B0 + (N1 + BLOCK_N - 1) // BLOCK_N
    B2: tl.constexpr = B1 + (N2 + BLOCK_N - 1) // BLOCK_N
    B3: tl.constexpr = B2 + (N3 + BLOCK_N - 1) // BLOCK_N
    B4: tl.constexpr = B3 + (N4 + BLOCK_N - 1) // BLOCK_N
    B5: tl.constexpr = B4 + (N5 + BLOCK_N - 1) // BLOCK_N
    MIX: tl.constexpr = SCALE or EMBED or INJECT
    block = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Selects, not branches: the compiler keeps track of alignment only through these.
    weight, first, size, base = weight_0, 0, N0, 0
    weight = tl.where(block >= B0, weight_1, weight)
    weight = tl.where(block >= B1, weight_2, weight)
    weight = tl.where(block >= B2, weight_3, weight)
    weight = tl.where(block >= B3, weight_4, weight)
    weight = tl.where(block >= B4, weight_5, weight)
    weight = tl.where(block >= B5, weight_6, weight)
    first = tl.where(block >= B1, tl.where(block >= B2, B2, B1), tl.where(block >= B0, B0, 0))
    first = tl.where(block >= B3, tl.where(block >= B4, tl.where(block >= B5, B5, B4), B3), first)
    size = tl.where(block >= B1, tl.where(block >= B2, N3, N2), tl.where(block >= B0, N1, N0))
    size = tl.where(block >= B3, tl.where(block >= B4, tl.where(block >= B5, N6, N5), N4), size)
    base = tl.where(block >= B1, tl.where(block >= B2, N0 + N1 + N2, N0 + N1), tl.where(block >= B0, N0, 0))
    late = tl.where(block >= B4, tl.where(block >= B5, N0 + N1 + N2 + N3 + N4 + N5, N0 + N1 + N2 + N3 + N4), N0 + N1 + N2 + N3)
    base = tl.where(block >= B3, late, base)
    width = tl.where((block >= B2) & (block < B3), CHANNELS_3, tl.where((block >= B3) & (block < B4), CHANNELS_4, K))
    if K % 16 == 0 and CHANNELS_3 % 16 == 0 and CHANNELS_4 % 16 == 0:
        width = tl.multiple_of(width, 16)
    of_memory = block >= B4
    column = (block - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    dtype = hidden.dtype.element_ty
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (k < K)[None, :]
        place = row[:, None] * K + k[None, :]
        w = tl.load(weight + column[:, None] * width + k[None, :], mask=(column < size)[:, None] & (k < width)[None, :], other=0.0)
        x = tl.load(hidden + place, mask=inside, other=0.0)
        if MIX:
            x = x.to(tl.float32)
            if SCALE:
                x = x * tl.load(scale).to(tl.float32)
            if EMBED:
                x = x + tl.load(embedding_scale).to(tl.float32) * tl.load(embedding + place, mask=inside, other=0.0).to(tl.float32)
            if INJECT:
                x = x + tl.load(gain).to(tl.float32) * tl.load(memory + place, mask=inside, other=0.0).to(tl.float32)
            x = x.to(dtype)
            tl.store(mixed + place, x, mask=inside & (block == 0))
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        if N5 > 0:
            x = tl.where(of_memory, tl.load(memory + place, mask=inside & of_memory, other=0.0), x)
        if BLOCK_M < 16:
            acc += tl.sum(x.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], axis=2)
        else:
            acc += tl.dot(x, tl.trans(w), input_precision="ieee")
    if NORM:
        factor = tl.rsqrt(squares / K + eps)
        if N5 > 0:
            factor = tl.where(of_memory, 1.0, factor)
        acc = acc * factor[:, None]
    if RELU2:
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    inside = (row < rows)[:, None] & (column < size)[None, :]
    place = row[:, None] * out_stride + base + column[None, :]
    if RESIDUAL:
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        ratio = acc / cap
        e = tl.exp(-2.0 * tl.abs(ratio))
        acc = cap * tl.where(ratio < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotated(left, right, cos, sin, eps, W: tl.constexpr, QK_NORM: tl.constexpr, dtype: tl.constexpr):
    a, b = left * cos + right * sin, right * cos - left * sin
    a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    if QK_NORM:
        factor = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / W + eps)
        a, b = a * factor, b * factor
    return a.to(dtype), b.to(dtype)


@triton.jit
def attention_kernel(
    projected, frequencies, memory_key, memory_value, table, tokens,
    cache_key, cache_value, lengths, starts, partial, summary,
    projected_stride, memory_stride, eps, softmax_scale,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
    GATED: tl.constexpr, MEMORY: tl.constexpr, TOKEN: tl.constexpr, QK_NORM: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Fresh key and value into the cache, and one split of the attention of one head over the slots in use."""
    b, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = h // (H // G)
    HALF: tl.constexpr = W // 2
    dtype: tl.constexpr = cache_key.dtype.element_ty
    half, whole = tl.arange(0, HALF), tl.arange(0, W)
    position = tl.load(lengths + b)
    begin = tl.load(starts + b)
    angle = position.to(tl.float32) * tl.load(frequencies + half)
    c, s = tl.cos(angle), tl.sin(angle)
    if ROUND:
        c, s = c.to(tl.bfloat16).to(tl.float32), s.to(tl.bfloat16).to(tl.float32)
    own = projected + b * projected_stride
    q = own + h * W
    q_left, q_right = _rotated(tl.load(q + half), tl.load(q + HALF + half), c, s, eps, W, QK_NORM, dtype)
    k = own + H * W + g * W
    k_left, k_right, value = tl.load(k + half), tl.load(k + HALF + half), tl.load(k + G * W + whole)
    gates = own + (H + 2 * G) * W
    if GATED:
        local = _gate(tl.load(gates + g))
        k_left, k_right, value = k_left * local, k_right * local, value * local
        if MEMORY:
            remote = _gate(tl.load(gates + G + g))
            mk, mv = memory_key + b * memory_stride + g * W, memory_value + b * memory_stride + g * W
            k_left += remote * tl.load(mk + half).to(tl.float32)
            k_right += remote * tl.load(mk + HALF + half).to(tl.float32)
            value += remote * tl.load(mv + whole).to(tl.float32)
    if TOKEN:
        gate = _gate(tl.load(gates + (2 * G if GATED else 0) + g))
        value += gate * tl.load(table + tl.load(tokens + b) * (G * W) + g * W + whole).to(tl.float32)
    k_left, k_right = _rotated(k_left, k_right, c, s, eps, W, QK_NORM, dtype)
    value = value.to(dtype)
    slot = position % C
    row = b.to(tl.int64) * (C * G * W) + g * W
    if (split == 0) & (h % (H // G) == 0):
        place = row + slot * (G * W)
        tl.store(cache_key + place + half, k_left)
        tl.store(cache_key + place + HALF + half, k_right)
        tl.store(cache_value + place + whole, value)
    used = tl.minimum(position + 1, C)
    each = tl.cdiv(tl.cdiv(used, SPLITS), BLOCK_C) * BLOCK_C
    first = split * each
    last = tl.minimum(first + each, used)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((W,), tl.float32)
    ql, qr = q_left.to(tl.float32) * softmax_scale, q_right.to(tl.float32) * softmax_scale
    for at in range(first, last, BLOCK_C):
        slots = at + tl.arange(0, BLOCK_C)
        held = position - (position - slots + C) % C
        seen = (slots < last) & (held >= begin)
        place = row + slots[:, None].to(tl.int64) * (G * W)
        fresh = (slots == slot)[:, None]
        kl = tl.load(cache_key + place + half[None, :], mask=seen[:, None], other=0.0)
        kr = tl.load(cache_key + place + HALF + half[None, :], mask=seen[:, None], other=0.0)
        v = tl.load(cache_value + place + whole[None, :], mask=seen[:, None], other=0.0)
        # Another program may be writing this slot just now; its content is known here.
        kl, kr = tl.where(fresh, k_left[None, :], kl), tl.where(fresh, k_right[None, :], kr)
        v = tl.where(fresh, value[None, :], v)
        scores = tl.sum(kl.to(tl.float32) * ql[None, :], axis=1) + tl.sum(kr.to(tl.float32) * qr[None, :], axis=1)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - safe)
        keep = tl.exp(top - safe)
        total = total * keep + tl.sum(weights, axis=0)
        acc = acc * keep + tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
        top = new_top
    index = (b * H + h) * SPLITS + split
    tl.store(partial + index * W + whole, acc)
    tl.store(summary + index * 2, top)
    tl.store(summary + index * 2 + 1, total)


@triton.jit
def _combined(partial, summary, index, W: tl.constexpr, SPLITS: tl.constexpr):
    """The attention output (W,) of one row and head, from its splits."""
    split, whole = tl.arange(0, SPLITS), tl.arange(0, W)
    tops = tl.load(summary + (index * SPLITS + split) * 2)
    totals = tl.load(summary + (index * SPLITS + split) * 2 + 1)
    weights = tl.exp(tops - tl.max(tops, axis=0))
    parts = tl.load(partial + (index * SPLITS + split)[:, None] * W + whole[None, :])
    return tl.sum(parts * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)


@triton.jit
def combine_kernel(partial, summary, out, W: tl.constexpr, SPLITS: tl.constexpr):
    """Attention output (B, H W) from its splits."""
    index = tl.program_id(0)
    tl.store(out + index * W + tl.arange(0, W), _combined(partial, summary, index, W, SPLITS).to(out.dtype.element_ty))


@triton.jit
def output_kernel(partial, summary, weight, residual, out, N, H: tl.constexpr, W: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """For one row: combine the splits, project, add the residual."""
    column, whole = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, W)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for h in range(H):
        w = tl.load(weight + column[:, None] * (H * W) + h * W + whole[None, :], mask=(column < N)[:, None], other=0.0)
        mixed = _combined(partial, summary, h, W, SPLITS).to(out.dtype.element_ty)
        acc += tl.sum(w.to(tl.float32) * mixed.to(tl.float32)[None, :], axis=1)
    acc += tl.load(residual + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out + column, acc.to(out.dtype.element_ty), mask=column < N)


@triton.jit
def memory_kernel(hidden, out, eps, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """m = RMSNorm(h) of one row."""
    k = tl.arange(0, BLOCK_K)
    x = tl.load(hidden + tl.program_id(0) * K + k, mask=k < K, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    tl.store(out + tl.program_id(0) * K + k, x.to(out.dtype.element_ty), mask=k < K)
