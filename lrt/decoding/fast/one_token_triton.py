"""Triton kernels of one decoding step: products of few rows, and attention over a static cache.

A step moves every weight once, so its floor is bytes over bandwidth; what it loses is time in which nothing
is in flight, around the border between two kernels. So each kernel first asks for what the kernel in front
of it does not write (weights, the cache, residuals), and only then waits for that kernel (``_wait``): with
programmatic dependent launch the next kernel starts as soon as every program of this one has stopped waiting,
and its weights arrive while this one computes. By then the kernels before this one have ended, which is why
only the writes of the one in front matter. Imported only where triton is.

Legend: B rows, N outputs, K inputs of a product, H query heads, G key/value heads, W head width, C slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _wait(DEPENDENT: tl.constexpr):
    """Wait for the kernel in front, then let the next one start; before, nothing may be written."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _held(x, DEPENDENT: tl.constexpr):
    """x, which the compiler must not unpack earlier: that would be to wait for it."""
    if DEPENDENT:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)
    return x


@triton.jit
def _prefetch(address):
    """Ask for the lines at these addresses to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


# ------------------------------------------------------------------ the first and the last kernel of a step


@triton.jit(do_not_specialize_on_alignment=["scale", "embedding_scale", "gain"])
def start_kernel(
    tokens, active, lengths, starts, table, frequencies, memory, scale, embedding_scale, gain,
    embedding, x, received, positions, angles, counters,  # written
    eps, separator, cut,
    K: tl.constexpr, W: tl.constexpr, COUNTERS: tl.constexpr,
    SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr, MEMORY: tl.constexpr,
    ROUND: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COUNTERS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Everything that the blocks share, for one row: x_0, the first block's input, the received memory, the place.

    A row at the token ``cut`` sees nothing before it; at ``separator`` it receives zero (-1: no such token).
    """
    if DEPENDENT:
        gdc_launch_dependents()
    b, k = tl.program_id(0), tl.arange(0, BLOCK_K)
    inside = k < K
    token, position, runs = tl.load(tokens + b), tl.load(lengths + b), tl.load(active + b).to(tl.int1)
    e = tl.load(table + token * K + k, mask=inside, other=0.0).to(tl.float32)
    e = (e * tl.rsqrt(tl.sum(e * e, axis=0) / K + eps)).to(x.dtype.element_ty)
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
    cos, sin = tl.cos(angle), tl.sin(angle)
    if ROUND:
        cos, sin = cos.to(tl.bfloat16).to(tl.float32), sin.to(tl.bfloat16).to(tl.float32)
    tl.store(angles + b * (2 * W) + whole, cos)
    tl.store(angles + b * (2 * W) + W + whole, tl.where(whole < W // 2, sin, -sin))
    counter = tl.arange(0, BLOCK_COUNTERS)
    tl.store(counters + b * COUNTERS + counter, tl.zeros((BLOCK_COUNTERS,), tl.int32), mask=counter < COUNTERS)


@triton.jit
def memory_kernel(hidden, memory, active, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr):
    """m = RMSNorm(h) of one row, where it is active."""
    b, k = tl.program_id(0), tl.arange(0, BLOCK_K)
    runs = tl.load(active + b).to(tl.int1)
    _wait(DEPENDENT)
    x = tl.load(hidden + b * K + k, mask=k < K, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    tl.store(memory + b * K + k, x.to(memory.dtype.element_ty), mask=(k < K) & runs)


# ------------------------------------------------------------------ products


@triton.jit
def _section(weights, SIZES: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The matrix, of those side by side, for this program: (matrix, its outputs here, its size and width, first output,
    index)."""
    # Selects, not branches: the compiler keeps track of alignment only through these.
    block = tl.program_id(0)
    weight, size, width, index, before, base = weights[0], SIZES[0], WIDTHS[0], 0, 0, 0
    blocks: tl.constexpr = 0
    outputs: tl.constexpr = 0
    for i in tl.static_range(1, len(SIZES)):
        blocks += (SIZES[i - 1] + BLOCK_N - 1) // BLOCK_N
        outputs += SIZES[i - 1]
        here = block >= blocks
        weight = tl.where(here, weights[i], weight)
        size, width = tl.where(here, SIZES[i], size), tl.where(here, WIDTHS[i], width)
        index, before, base = tl.where(here, i, index), tl.where(here, blocks, before), tl.where(here, outputs, base)
    return weight, (block - before) * BLOCK_N + tl.arange(0, BLOCK_N), size, width, base, index


@triton.jit
def _next_input(
    place, inside, residual, embedding, memory, scale, embedding_scale, gain,
    RESIDUAL: tl.constexpr, SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """(r, a, c): what turns a product p into the output h = p + r and into the next block's input a h + c,
    c = b x_0 + g m."""
    zero = place.to(tl.float32) * 0.0
    r, c, a = zero, zero, 1.0
    if RESIDUAL:
        r = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        a = tl.load(scale).to(tl.float32)
    if EMBED:
        c += tl.load(embedding_scale).to(tl.float32) * tl.load(embedding + place, mask=inside, other=0.0).to(tl.float32)
    if INJECT:
        c += tl.load(gain).to(tl.float32) * tl.load(memory + place, mask=inside, other=0.0).to(tl.float32)
    return r, a, c


@triton.jit
def _write(
    product, r, a, c, place, inside, hidden, out, cap, KEEP: tl.constexpr, RELU2: tl.constexpr, CAP: tl.constexpr
):
    if RELU2:
        product = tl.maximum(product, 0.0)
        product = product * product
    product += r
    if KEEP:
        tl.store(hidden + place, product.to(hidden.dtype.element_ty), mask=inside)
    if CAP:
        e = tl.exp(-2.0 * tl.abs(product / cap))
        product = cap * tl.where(product < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)  # tanh
    tl.store(out + place, (a * product + c).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _first(x):
    """The number in x, or the first of two bfloat16 in an int32: loaded so, they cost one instruction each."""
    if x.dtype == tl.int32:
        return (x << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _second(x):
    return (x & -65536).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["scale", "embedding_scale", "gain"])
def vector_kernel(
    x, memory, weights, residual, embedding, scale, embedding_scale, gain, hidden, out, ahead,
    rows, eps, cap,
    SIZES: tl.constexpr, WIDTHS: tl.constexpr, FED: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    NORM: tl.constexpr, RELU2: tl.constexpr, CAP: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row: out = f(norm(x) W^T), for matrices W side by side; sections FED[0] to FED[1] are fed the memory itself.

    All weights of a program are in flight before it waits. A block of 16 bytes a thread keeps every number in
    the thread that loaded it; K counts int32 where they hold pairs of bfloat16. AHEAD lines of 128 bytes of a
    later kernel's weights are brought into L2.
    """
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PAIRS: tl.constexpr = x.dtype.element_ty == tl.int32
    weight, column, size, width, base, index = _section(weights, SIZES, WIDTHS, BLOCK_N)
    of_memory = (index >= FED[0]) & (index < FED[1])
    tiles = ()
    for i in tl.static_range(CHUNKS):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = (column < size)[:, None] & (k < width)[None, :]
        tile = tl.load(weight + column[:, None] * width + k[None, :], mask=seen, other=0)
        tiles += (tile,)  # type: ignore[assignment]
    place, inside = base + column, column < size
    r, a, c = _next_input(
        place, inside, residual, embedding, memory, scale, embedding_scale, gain, RESIDUAL, SCALE, EMBED, INJECT
    )
    if AHEAD > 0 and DEPENDENT:
        each: tl.constexpr = 128
        for i in range(tl.program_id(0) * each, AHEAD, tl.num_programs(0) * each):
            _prefetch(ahead.to(tl.int64) + 128 * tl.minimum(i + tl.arange(0, each), AHEAD - 1).to(tl.int64))
    _wait(DEPENDENT)
    source = x
    if FED[0] < FED[1]:
        source = tl.where(of_memory, memory, x)
    inputs = ()
    for i in tl.static_range(CHUNKS):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        inputs += (tl.load(source + k, mask=k < K, other=0),)  # type: ignore[assignment]
    tl.debug_barrier()  # or the assembler would have loads wait for weights
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for i in tl.static_range(CHUNKS):
        v = _first(inputs[i])
        products += _first(tiles[i]) * v[None, :]
        squares += v * v
        if PAIRS:
            v = _second(inputs[i])
            products += _second(tiles[i]) * v[None, :]
            squares += v * v
    product = tl.sum(products, axis=1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / (2 * K if PAIRS else K) + eps)
        product *= tl.where(of_memory, 1.0, factor)
    _write(product, r, a, c, place, inside, hidden, out, cap, KEEP, RELU2, CAP)


@triton.jit(do_not_specialize_on_alignment=["scale", "embedding_scale", "gain"])
def matrix_kernel(
    x, memory, weights, residual, embedding, scale, embedding_scale, gain, hidden, out, ahead,
    rows, eps, cap,
    SIZES: tl.constexpr, WIDTHS: tl.constexpr, FED: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    NORM: tl.constexpr, RELU2: tl.constexpr, CAP: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The same for several rows, on the matrix units; the weights come to L2 before the program waits."""
    weight, column, size, width, base, index = _section(weights, SIZES, WIDTHS, BLOCK_N)
    of_memory = (index >= FED[0]) & (index < FED[1])
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = row[:, None] * STRIDE + base + column[None, :]
    inside = (row < rows)[:, None] & (column < size)[None, :]
    if DEPENDENT:
        LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
        for first in tl.static_range(0, K, 8 * LINE):
            line = tl.minimum(first + LINE * tl.arange(0, 8), width - 1)
            _prefetch(weight + tl.minimum(column, size - 1)[:, None] * width + line[None, :])
    r, a, c = _next_input(
        place, inside, residual, embedding, memory, scale, embedding_scale, gain, RESIDUAL, SCALE, EMBED, INJECT
    )
    _wait(DEPENDENT)
    source = x
    if FED[0] < FED[1]:
        source = tl.where(of_memory, memory, x)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(
            weight + column[:, None] * width + k[None, :],
            mask=(column < size)[:, None] & (k < width)[None, :],
            other=0.0,
        )
        v = tl.load(source + row[:, None] * K + k[None, :], mask=(row < rows)[:, None] & (k < K)[None, :], other=0.0)
        if NORM:
            wide = v.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        product = tl.dot(v, tl.trans(w), product, input_precision="ieee")
    if NORM:
        factor = tl.rsqrt(squares / K + eps)
        product *= tl.where(of_memory, 1.0, factor)[:, None]
    _write(product, r, a, c, place, inside, hidden, out, cap, KEEP, RELU2, CAP)


# ------------------------------------------------------------------ attention


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
    cache_key, cache_value, partial, summary, counters, out,
    projected_stride, memory_stride, counters_stride, eps, scale,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
    GATES: tl.constexpr, GATED: tl.constexpr, MEMORY: tl.constexpr, TOKEN: tl.constexpr, QK_NORM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_SPLITS: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
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
    _wait(DEPENDENT)

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
    if TOKEN:
        value += _gate(tl.load(gates + (2 * G if GATED else 0) + g)) * embedded
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
    keys, values = _held(keys, DEPENDENT), _held(values, DEPENDENT)
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
