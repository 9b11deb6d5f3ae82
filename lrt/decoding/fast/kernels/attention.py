"""Triton kernel of one decoding step: attention over a static cache, which takes the fresh key and value.

Legend: B rows, H query heads, G key/value heads, W head width, C slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lrt.decoding.fast.kernels.waiting import held, wait


@triton.jit
def _gate(x):
    return 2.0 / (1.0 + tl.exp(-x.to(tl.float32)))


@triton.jit
def _rotated(x, partner, cos, sin, eps, W: tl.constexpr, QK_NORM: tl.constexpr, dtype: tl.constexpr):
    """A head, once a row of (ROWS, W), turned by its position, and normed;
    ``partner`` is it with its halves exchanged."""
    x = (x * cos + partner * sin).to(dtype).to(tl.float32)
    if QK_NORM:
        x = (x * tl.rsqrt(tl.sum(x * x, axis=1) / W + eps)[:, None]).to(dtype).to(tl.float32)
    return x


@triton.jit
def _cached(cache_key, cache_value, entry, last, oldest, row, C: tl.constexpr, G: tl.constexpr, W: tl.constexpr):
    """Keys and values of entries (before ``last``), counted from the ring's oldest one."""
    slot = oldest + entry
    slot = tl.where(slot >= C, slot - C, slot)
    place = row + slot[:, :, None].to(tl.int64) * (G * W) + tl.arange(0, W)[None, None, :]
    seen = (entry < last)[:, :, None]
    return tl.load(cache_key + place, mask=seen, other=0.0), tl.load(cache_value + place, mask=seen, other=0.0)


@triton.jit
def _scores(q, keys, entry, last):
    scores = tl.sum(keys.to(tl.float32) * q[:, None, :], axis=2)
    return tl.where(entry < last, scores, float("-inf"))


@triton.jit
def attention_kernel(
    projected, memory_key, memory_value, table, tokens, positions, starts, angles,
    cache_key, cache_value, partial, summary, counters, out, query_weight, key_weight, key_bias, value_bias,
    projected_stride, memory_stride, counters_stride, eps, scale,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
    GATES: tl.constexpr, GATED: tl.constexpr, MEMORY: tl.constexpr, TOKEN: tl.constexpr, QK_NORM: tl.constexpr,
    HEAD_NORM: tl.constexpr, KV_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One head of one row over a share of its slots; share 0 also makes the fresh key and value, and keeps them.

    The share that is done last puts all together. A block of slots is (ROWS, BLOCK_C / ROWS), and what there is once
    a head stands ROWS times, so that every thread has its part at hand. ``scale`` is that of the scores, over ln 2.
    """
    h, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = h // (H // G)
    dtype: tl.constexpr = cache_key.dtype.element_ty
    line = tl.arange(0, ROWS)
    whole = line[:, None] * 0 + tl.arange(0, W)[None, :]
    partner = line[:, None] * 0 + ((tl.arange(0, W) + W // 2) % W)[None, :]
    block = line[:, None] + tl.arange(0, BLOCK_C // ROWS)[None, :] * ROWS
    position = tl.load(positions + b)
    begin = tl.maximum(tl.load(starts + b).to(tl.int32), tl.maximum(position - (C - 1), 0))
    older, oldest = tl.maximum(position - begin, 0), begin % C
    each = tl.cdiv(older, SPLITS)
    first = split * each
    last = tl.minimum(first + each, older)
    row = b.to(tl.int64) * (C * G * W) + g * W
    keys, values = _cached(cache_key, cache_value, first + block, last, oldest, row, C, G, W)
    cos, sin = tl.load(angles + b * (2 * W) + whole), tl.load(angles + b * (2 * W) + W + whole)
    makes = ((line >= 0) & (split == 0))[:, None]  # the fresh key and value
    embedded = tl.zeros((ROWS, W), tl.float32)
    if TOKEN:
        embedded = tl.load(table + (tl.load(tokens + b) * G + g) * W + whole, mask=makes, other=0.0).to(tl.float32)
    wait(DEPENDENT)

    own = projected + b * projected_stride
    q, k, v, gates = own + h * W, own + (H + g) * W, own + (H + G + g) * W, own + GATES
    query, opposite = tl.load(q + whole).to(tl.float32), tl.load(q + partner).to(tl.float32)
    key, other = (
        tl.load(k + whole, mask=makes, other=0.0).to(tl.float32),
        tl.load(k + partner, mask=makes, other=0.0).to(tl.float32),
    )
    value = tl.load(v + whole, mask=makes, other=0.0).to(tl.float32)
    if MEMORY:
        mk, mv = memory_key + b * memory_stride + g * W, memory_value + b * memory_stride + g * W
        far, opposite_far = tl.load(mk + whole, mask=makes, other=0.0), tl.load(mk + partner, mask=makes, other=0.0)
        far_value = tl.load(mv + whole, mask=makes, other=0.0)
    if GATED:
        local = _gate(tl.load(gates + g))
        key, other, value = key * local, other * local, value * local
    if MEMORY:
        remote = _gate(tl.load(gates + G + g))
        key, other, value = key + remote * far, other + remote * opposite_far, value + remote * far_value
    if KV_BIAS:  # what no gate multiplies
        key += tl.load(key_bias + g * W + whole, mask=makes, other=0.0).to(tl.float32)
        other += tl.load(key_bias + g * W + partner, mask=makes, other=0.0).to(tl.float32)
        value += tl.load(value_bias + g * W + whole, mask=makes, other=0.0).to(tl.float32)
    if TOKEN:
        value += _gate(tl.load(gates + (2 * G if GATED else 0) + g)) * embedded
    if HEAD_NORM:
        by = tl.rsqrt(tl.sum(query * query, axis=1) / W + eps)[:, None]
        query *= by * tl.load(query_weight + whole).to(tl.float32)
        opposite *= by * tl.load(query_weight + partner).to(tl.float32)
        by = tl.rsqrt(tl.sum(key * key, axis=1) / W + eps)[:, None]
        key *= by * tl.load(key_weight + whole).to(tl.float32)
        other *= by * tl.load(key_weight + partner).to(tl.float32)
    query = _rotated(query, opposite, cos, sin, eps, W, QK_NORM, dtype) * scale
    fresh = tl.full((ROWS,), float("-inf"), tl.float32)
    if split == 0:
        key = _rotated(key, other, cos, sin, eps, W, QK_NORM, dtype)
        fresh = tl.sum(query * key, axis=1)
        place = row + (position % C).to(tl.int64) * (G * W) + whole
        keeps = ((line == 0) & (h % (H // G) == 0))[:, None]
        tl.store(cache_key + place, key.to(dtype), mask=keeps)
        tl.store(cache_value + place, value.to(dtype), mask=keeps)

    # Every slot of a block keeps a softmax of its own, so that the loop exchanges nothing but scores.
    keys, values = held(keys, DEPENDENT), held(values, DEPENDENT)
    top = _scores(query, keys, first + block, last)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = values.to(tl.float32)
    for at in tl.range(first + BLOCK_C, last, BLOCK_C, num_stages=STAGES):
        keys, values = _cached(cache_key, cache_value, at + block, last, oldest, row, C, G, W)
        scores = _scores(query, keys, at + block, last)
        new_top = tl.maximum(top, scores)  # finite: the first block was full
        weight, keep = tl.exp2(scores - new_top), tl.exp2(top - new_top)
        total = total * keep + weight
        acc = acc * keep[:, :, None] + weight[:, :, None] * values.to(tl.float32)
        top = new_top
    peak = tl.max(tl.maximum(tl.max(top, axis=1), fresh), axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    weight, mine = tl.exp2(top - safe), tl.exp2(fresh - safe) / ROWS
    mass = tl.sum(tl.sum(total * weight, axis=1) + mine, axis=0)
    mixed = tl.sum(tl.sum(acc * weight[:, :, None], axis=1) + mine[:, None] * value.to(dtype).to(tl.float32), axis=0)
    head, whole = b * H + h, tl.arange(0, W)
    if SPLITS == 1:
        tl.store(out + head * W + whole, (mixed / mass).to(out.dtype.element_ty))
    else:
        tl.store(partial + (head * SPLITS + split) * W + whole, mixed)
        tl.store(summary + (head * SPLITS + split) * 2, peak)
        tl.store(summary + (head * SPLITS + split) * 2 + 1, mass)
        tl.debug_barrier()
        if tl.atomic_add(counters + b * counters_stride + h, 1, sem="acq_rel") == SPLITS - 1:
            part = tl.arange(0, BLOCK_SPLITS)
            index = head * SPLITS + part
            peaks = tl.load(summary + index * 2, mask=part < SPLITS, other=float("-inf"), cache_modifier=".cg")
            masses = tl.load(summary + index * 2 + 1, mask=part < SPLITS, other=0.0, cache_modifier=".cg")
            parts = tl.load(
                partial + index[:, None] * W + whole[None, :],
                mask=(part < SPLITS)[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            weights = tl.exp2(peaks - tl.max(peaks, axis=0))
            mixed = tl.sum(parts * weights[:, None], axis=0) / tl.sum(masses * weights, axis=0)
            tl.store(out + head * W + whole, mixed.to(out.dtype.element_ty))
