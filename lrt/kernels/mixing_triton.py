"""Triton kernels between the joint projection of a block and its attention, forward and backward.

One program takes BLOCK positions and one key/value head with the query heads that share it: each number is read once
and written once, and nothing is summed across programs. Imported only where triton is;
``lrt.kernels.mixing`` says what is computed and launches them.

Legend: M positions of all rows, H query heads, G key/value heads, W head width;
    a joint row holds H W queries, G W keys,
G W values, the local and remote gates (G each, where LOCAL), the token gates (G, where TOKEN), and padding up to N.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gate(place, live):
    return 2.0 / (1.0 + tl.exp(-tl.load(place, mask=live, other=0.0).to(tl.float32)))


@triton.jit
def _halves(start, half, live, HALF: tl.constexpr):
    """Both halves of a head, (BLOCK, HALF) each, in float32."""
    place = start[:, None] + half[None, :]
    left = tl.load(place, mask=live[:, None], other=0.0)
    right = tl.load(place + HALF, mask=live[:, None], other=0.0)
    return left.to(tl.float32), right.to(tl.float32)


@triton.jit
def _store(start, half, live, left, right, HALF: tl.constexpr):
    place = start[:, None] + half[None, :]
    kind = start.dtype.element_ty
    tl.store(place, left.to(kind), mask=live[:, None])
    tl.store(place + HALF, right.to(kind), mask=live[:, None])


@triton.jit
def _rotate(left, right, c, s):
    return left * c + right * s, right * c - left * s


@triton.jit
def _inverse_norm(left, right, eps, W: tl.constexpr):
    return tl.rsqrt((tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)) / W + eps)


@triton.jit
def _finish(left, right, c, s, eps, W: tl.constexpr, NORM: tl.constexpr):
    """RoPE, then RMSNorm of a head."""
    left, right = _rotate(left, right, c, s)
    if NORM:
        scale = _inverse_norm(left, right, eps, W)[:, None]
        left, right = left * scale, right * scale
    return left, right


@triton.jit
def _finish_backward(d_left, d_right, left, right, c, s, eps, W: tl.constexpr, NORM: tl.constexpr):
    """The gradient of ``_finish`` at its input."""
    if NORM:
        left, right = _rotate(left, right, c, s)
        scale = _inverse_norm(left, right, eps, W)
        along = (tl.sum(d_left * left, axis=1) + tl.sum(d_right * right, axis=1)) * scale * scale / W
        d_left = (d_left - left * along[:, None]) * scale[:, None]
        d_right = (d_right - right * along[:, None]) * scale[:, None]
    return _rotate(d_left, d_right, c, -s)


@triton.jit
def forward_kernel(
    joint, memory_key, memory_value, token_value, cos, sin, query, key, value,
    rows, length, eps,
    memory_key_b, memory_key_p, memory_value_b, memory_value_p, token_b, token_p, angle_b, angle_p,
    N: tl.constexpr, H: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    LOCAL: tl.constexpr, MEMORY: tl.constexpr, TOKEN: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # of one dimension, since only the first may pass 65,535
    g = program % G  # the heads of some positions one after the other: they lie side by side
    m = (program // G).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = m < rows
    b, p = m // length, m % length
    HALF: tl.constexpr = W // 2
    GATES: tl.constexpr = (H + 2 * G) * W
    half = tl.arange(0, HALF)
    angle = (b * angle_b + p * angle_p)[:, None] + half[None, :]
    c = tl.load(cos + angle, mask=live[:, None], other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=live[:, None], other=0.0).to(tl.float32)
    own = joint + m * N
    for i in tl.static_range(H // G):
        h = g * (H // G) + i
        left, right = _halves(own + h * W, half, live, HALF)
        left, right = _finish(left, right, c, s, eps, W, NORM)
        _store(query + (m * H + h) * W, half, live, left, right, HALF)
    k_left, k_right = _halves(own + (H + g) * W, half, live, HALF)
    v_left, v_right = _halves(own + (H + G + g) * W, half, live, HALF)
    if LOCAL:
        local = _gate(own + GATES + g, live)[:, None]
        k_left, k_right, v_left, v_right = k_left * local, k_right * local, v_left * local, v_right * local
        if MEMORY:
            remote = _gate(own + GATES + G + g, live)[:, None]
            left, right = _halves(memory_key + b * memory_key_b + p * memory_key_p + g * W, half, live, HALF)
            k_left, k_right = k_left + remote * left, k_right + remote * right
            left, right = _halves(memory_value + b * memory_value_b + p * memory_value_p + g * W, half, live, HALF)
            v_left, v_right = v_left + remote * left, v_right + remote * right
    if TOKEN:
        gate = _gate(own + GATES + (2 * G if LOCAL else 0) + g, live)[:, None]
        left, right = _halves(token_value + b * token_b + p * token_p + g * W, half, live, HALF)
        v_left, v_right = v_left + gate * left, v_right + gate * right
    k_left, k_right = _finish(k_left, k_right, c, s, eps, W, NORM)
    out = (m * G + g) * W
    _store(key + out, half, live, k_left, k_right, HALF)
    _store(value + out, half, live, v_left, v_right, HALF)


@triton.jit
def _dot(a_left, b_left, a_right, b_right):
    return tl.sum(a_left * b_left, axis=1) + tl.sum(a_right * b_right, axis=1)


@triton.jit
def _store_gate(place, live, gate, gradient):
    """The gradient of 2 sigmoid at its input."""
    tl.store(place, (gradient * gate * (1.0 - 0.5 * gate)).to(place.dtype.element_ty), mask=live)


@triton.jit
def backward_kernel(
    d_query, d_key, d_value, d_key_path, d_value_path,
    joint, memory_key, memory_value, token_value, cos, sin,
    d_joint, d_memory_key, d_memory_value, d_token_value,
    rows, length, eps,
    query_b, query_p, query_h, key_b, key_p, key_h, value_b, value_p, value_h,
    key_path_b, key_path_p, key_path_h, value_path_b, value_path_p, value_path_h,
    memory_key_b, memory_key_p, memory_value_b, memory_value_p, token_b, token_p, angle_b, angle_p,
    N: tl.constexpr, H: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    LOCAL: tl.constexpr, MEMORY: tl.constexpr, TOKEN: tl.constexpr, NORM: tl.constexpr,
    BLOCK: tl.constexpr, PADDING: tl.constexpr, PATHS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # of one dimension, since only the first may pass 65,535
    g = program % G  # the heads of some positions one after the other: they lie side by side
    m = (program // G).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = m < rows
    b, p = m // length, m % length
    HALF: tl.constexpr = W // 2
    GATES: tl.constexpr = (H + 2 * G) * W
    USED: tl.constexpr = GATES + (2 * G if LOCAL else 0) + (G if TOKEN else 0)
    half = tl.arange(0, HALF)
    angle = (b * angle_b + p * angle_p)[:, None] + half[None, :]
    c = tl.load(cos + angle, mask=live[:, None], other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=live[:, None], other=0.0).to(tl.float32)
    own, d_own = joint + m * N, d_joint + m * N
    for i in tl.static_range(H // G):
        h = g * (H // G) + i
        left, right = _halves(own + h * W, half, live, HALF)
        d_left, d_right = _halves(d_query + b * query_b + p * query_p + h * query_h, half, live, HALF)
        d_left, d_right = _finish_backward(d_left, d_right, left, right, c, s, eps, W, NORM)
        _store(d_own + h * W, half, live, d_left, d_right, HALF)
    out = (m * G + g) * W
    # values
    v_left, v_right = _halves(own + (H + G + g) * W, half, live, HALF)
    d_left, d_right = _halves(d_value + b * value_b + p * value_p + g * value_h, half, live, HALF)
    if PATHS:
        left, right = _halves(d_value_path + b * value_path_b + p * value_path_p + g * value_path_h, half, live, HALF)
        d_left, d_right = d_left + left, d_right + right
    local = tl.zeros((BLOCK,), tl.float32) + 1.0
    remote = local
    d_local, d_remote = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if LOCAL:
        local = _gate(own + GATES + g, live)
        d_local += _dot(d_left, v_left, d_right, v_right)
    if MEMORY:
        remote = _gate(own + GATES + G + g, live)
        left, right = _halves(memory_value + b * memory_value_b + p * memory_value_p + g * W, half, live, HALF)
        d_remote += _dot(d_left, left, d_right, right)
        _store(d_memory_value + out, half, live, d_left * remote[:, None], d_right * remote[:, None], HALF)
    if TOKEN:
        gate = _gate(own + GATES + (2 * G if LOCAL else 0) + g, live)
        left, right = _halves(token_value + b * token_b + p * token_p + g * W, half, live, HALF)
        _store_gate(d_own + GATES + (2 * G if LOCAL else 0) + g, live, gate, _dot(d_left, left, d_right, right))
        _store(d_token_value + out, half, live, d_left * gate[:, None], d_right * gate[:, None], HALF)
    _store(d_own + (H + G + g) * W, half, live, d_left * local[:, None], d_right * local[:, None], HALF)
    # keys
    k_left, k_right = _halves(own + (H + g) * W, half, live, HALF)
    mixed_left, mixed_right = k_left * local[:, None], k_right * local[:, None]
    d_left, d_right = _halves(d_key + b * key_b + p * key_p + g * key_h, half, live, HALF)
    if PATHS:
        left, right = _halves(d_key_path + b * key_path_b + p * key_path_p + g * key_path_h, half, live, HALF)
        d_left, d_right = d_left + left, d_right + right
    if MEMORY:
        left, right = _halves(memory_key + b * memory_key_b + p * memory_key_p + g * W, half, live, HALF)
        mixed_left, mixed_right = mixed_left + remote[:, None] * left, mixed_right + remote[:, None] * right
        d_left, d_right = _finish_backward(d_left, d_right, mixed_left, mixed_right, c, s, eps, W, NORM)
        d_remote += _dot(d_left, left, d_right, right)
        _store(d_memory_key + out, half, live, d_left * remote[:, None], d_right * remote[:, None], HALF)
    else:
        d_left, d_right = _finish_backward(d_left, d_right, mixed_left, mixed_right, c, s, eps, W, NORM)
    _store(d_own + (H + g) * W, half, live, d_left * local[:, None], d_right * local[:, None], HALF)
    if LOCAL:
        d_local += _dot(d_left, k_left, d_right, k_right)
        _store_gate(d_own + GATES + g, live, local, d_local)
        _store_gate(d_own + GATES + G + g, live, remote, d_remote)  # 0 without memory
    if USED < N:
        place = USED + tl.arange(0, PADDING)
        empty = tl.zeros((BLOCK, PADDING), d_joint.dtype.element_ty)
        tl.store(d_own[:, None] + place[None, :], empty, mask=live[:, None] & (place < N)[None, :] & (g == 0))
