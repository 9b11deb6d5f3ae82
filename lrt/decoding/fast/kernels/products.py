"""Triton kernels of one decoding step: products of few rows.

Legend: B rows, N outputs, K inputs of a product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lrt.decoding.fast.kernels.waiting import held, prefetch, wait


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
def _pair(weights, SIZES: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr):
    """As ``_section`` for two matrices whose outputs alternate: that of the gate, then its partner."""
    n = tl.arange(0, BLOCK_N)
    weight = tl.where(n % 2 == 1, weights[1], weights[0])
    return weight, tl.program_id(0) * (BLOCK_N // 2) + n // 2, SIZES[0], WIDTHS[0]


@triton.jit
def _bias(biases, column, size, BIASED: tl.constexpr, SIZES: tl.constexpr, BLOCK_N: tl.constexpr, PAIR: tl.constexpr):
    """The bias of this program's outputs; zero where their matrix has none."""
    if PAIR > 0:
        bias = tl.where(tl.arange(0, BLOCK_N) % 2 == 1, biases[1], biases[0]) + column
        found = tl.load(bias, mask=column < size, other=0.0).to(tl.float32)
    else:
        home, has = biases[0], BIASED[0]
        blocks: tl.constexpr = 0
        for i in tl.static_range(1, len(SIZES)):
            blocks += (SIZES[i - 1] + BLOCK_N - 1) // BLOCK_N
            here = tl.program_id(0) >= blocks
            home, has = tl.where(here, biases[i], home), tl.where(here, BIASED[i], has)
        found = tl.load(home + column, mask=column < size, other=0.0).to(tl.float32) * has
    return found


@triton.jit
def _gated(gate, up, PAIR: tl.constexpr):
    """SiLU (1), or GELU by its tanh (2), of the gate, times its partner."""
    if PAIR == 2:
        bent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        bent = gate
    return up * gate / (1.0 + tl.exp(-bent))


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
    x, memory, weights, residual, embedding, scale, embedding_scale, gain, hidden, out, ahead, norm_weight, biases,
    rows, eps, cap,
    SIZES: tl.constexpr, WIDTHS: tl.constexpr, FED: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    NORM: tl.constexpr, RELU2: tl.constexpr, CAP: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr, AHEAD: tl.constexpr,
    WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BIASED: tl.constexpr, PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row: out = f(norm(x) W^T + b), for matrices W side by side; sections FED[0] to FED[1] are fed the memory
    itself, or (ADDED) the normed row plus it; what a norm gives is multiplied by its weight (WEIGHTED).

    All weights of a program are in flight before it waits. A block of 16 bytes a thread keeps every number in
    the thread that loaded it; K counts int32 where they hold pairs of bfloat16. AHEAD lines of 128 bytes of a
    later kernel's weights are brought into L2.
    """
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PAIRS: tl.constexpr = x.dtype.element_ty == tl.int32
    OUT: tl.constexpr = BLOCK_N // 2 if PAIR > 0 else BLOCK_N
    if PAIR > 0:
        weight, column, size, width = _pair(weights, SIZES, WIDTHS, BLOCK_N)
        base, index = 0, 0
    else:
        weight, column, size, width, base, index = _section(weights, SIZES, WIDTHS, BLOCK_N)
    of_memory = (index >= FED[0]) & (index < FED[1])
    lines = weight + column * width
    tiles = ()
    for i in tl.static_range(CHUNKS):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = (column < size)[:, None] & (k < width)[None, :]
        tile = tl.load(lines[:, None] + k[None, :], mask=seen, other=0)
        tiles += (tile,)  # type: ignore[assignment]
    weights_of_norm = ()
    if WEIGHTED:
        for i in tl.static_range(CHUNKS):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            weights_of_norm += (tl.load(norm_weight + k, mask=k < K, other=0),)  # type: ignore[assignment]
    plus = 0.0
    if len(BIASED) > 0:
        plus = _bias(biases, column, size, BIASED, SIZES, BLOCK_N, PAIR)
    mine = tl.program_id(0) * OUT + tl.arange(0, OUT) if PAIR > 0 else column
    place, inside = base + mine, mine < size
    r, a, c = _next_input(
        place, inside, residual, embedding, memory, scale, embedding_scale, gain, RESIDUAL, SCALE, EMBED, INJECT
    )
    if AHEAD > 0 and DEPENDENT:
        each: tl.constexpr = 128
        for i in range(tl.program_id(0) * each, AHEAD, tl.num_programs(0) * each):
            prefetch(ahead.to(tl.int64) + 128 * tl.minimum(i + tl.arange(0, each), AHEAD - 1).to(tl.int64))
    wait(DEPENDENT)
    source = x
    if FED[0] < FED[1] and not ADDED:
        source = tl.where(of_memory, memory, x)
    inputs = ()
    for i in tl.static_range(CHUNKS):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        inputs += (tl.load(source + k, mask=k < K, other=0),)  # type: ignore[assignment]
    more = ()
    if ADDED:
        for i in tl.static_range(CHUNKS):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            more += (tl.load(memory + k, mask=k < tl.where(of_memory, K, 0), other=0),)  # type: ignore[assignment]
    tl.debug_barrier()  # or the assembler would have loads wait for weights
    factor = 1.0
    if ADDED:  # the sum needs the norm itself
        known = tl.zeros((BLOCK_K,), tl.float32)
        for i in tl.static_range(CHUNKS):
            v = _first(inputs[i])
            known += v * v
            if PAIRS:
                v = _second(inputs[i])
                known += v * v
        factor = tl.rsqrt(tl.sum(known, axis=0) / (2 * K if PAIRS else K) + eps)  # type: ignore[assignment]
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for i in tl.static_range(CHUNKS):
        v = _first(inputs[i])
        squares += v * v
        if ADDED:
            v = v * factor + _first(more[i])
        if WEIGHTED:
            v = v * _first(weights_of_norm[i])
        products += _first(tiles[i]) * v[None, :]
        if PAIRS:
            v = _second(inputs[i])
            squares += v * v
            if ADDED:
                v = v * factor + _second(more[i])
            if WEIGHTED:
                v = v * _second(weights_of_norm[i])
            products += _second(tiles[i]) * v[None, :]
    product = tl.sum(products, axis=1)
    if NORM and not ADDED:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / (2 * K if PAIRS else K) + eps)
        product *= tl.where(of_memory, 1.0, factor)
    product += plus
    if PAIR > 0:
        gate, up = tl.split(tl.reshape(product, (OUT, 2)))
        product = _gated(gate, up, PAIR)
    _write(product, r, a, c, place, inside, hidden, out, cap, KEEP, RELU2, CAP)


@triton.jit(do_not_specialize_on_alignment=["scale", "embedding_scale", "gain"])
def matrix_kernel(
    x, memory, weights, residual, embedding, scale, embedding_scale, gain, hidden, out, ahead, norm_weight, biases,
    rows, eps, cap,
    SIZES: tl.constexpr, WIDTHS: tl.constexpr, FED: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    NORM: tl.constexpr, RELU2: tl.constexpr, CAP: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr, AHEAD: tl.constexpr,
    WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BIASED: tl.constexpr, PAIR: tl.constexpr,
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
            prefetch(weight + tl.minimum(column, size - 1)[:, None] * width + line[None, :])
    r, a, c = _next_input(
        place, inside, residual, embedding, memory, scale, embedding_scale, gain, RESIDUAL, SCALE, EMBED, INJECT
    )
    wait(DEPENDENT)
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


@triton.jit(do_not_specialize_on_alignment=["scale", "embedding_scale", "gain"])
def few_kernel(
    x, memory, weights, residual, embedding, scale, embedding_scale, gain, hidden, out, ahead, norm_weight, biases,
    rows, eps, cap,
    SIZES: tl.constexpr, WIDTHS: tl.constexpr, FED: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    NORM: tl.constexpr, RELU2: tl.constexpr, CAP: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    SCALE: tl.constexpr, EMBED: tl.constexpr, INJECT: tl.constexpr, AHEAD: tl.constexpr,
    WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BIASED: tl.constexpr, PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The same for few rows: a warp multiplies inputs of its own, PARTS warps take turns of PARTS BLOCK_K inputs.

    The weights of EARLY turns are in flight before the program waits. A weight is the left side of its product,
    so that BLOCK_M may be 8.
    """
    TURNS: tl.constexpr = (K + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K)
    AT_ONCE: tl.constexpr = BLOCK_M <= 16 and TURNS <= EARLY
    OUT: tl.constexpr = BLOCK_N // 2 if PAIR > 0 else BLOCK_N
    if PAIR > 0:
        weight, column, size, width = _pair(weights, SIZES, WIDTHS, BLOCK_N)
        base, index = 0, 0
    else:
        weight, column, size, width, base, index = _section(weights, SIZES, WIDTHS, BLOCK_N)
    of_memory = (index >= FED[0]) & (index < FED[1])
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.arange(0, PARTS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    lines, real = (weight + column * width)[None, :, None], (column < size)[None, :, None]
    tiles = ()
    for i in tl.static_range(min(TURNS, EARLY)):
        k = part + i * (PARTS * BLOCK_K)
        tiles += (tl.load(lines + k, mask=real & (k < width), other=0.0),)  # type: ignore[assignment]
    plus = 0.0
    if len(BIASED) > 0:
        plus = _bias(biases, column, size, BIASED, SIZES, BLOCK_N, PAIR)[:, None]
    mine = tl.program_id(0) * OUT + tl.arange(0, OUT) if PAIR > 0 else column
    place, inside = base + mine[:, None] + row[None, :] * STRIDE, (mine < size)[:, None] & (row < rows)[None, :]
    r, a, c = _next_input(
        place, inside, residual, embedding, memory, scale, embedding_scale, gain, RESIDUAL, SCALE, EMBED, INJECT
    )
    wait(DEPENDENT)
    source = x
    if FED[0] < FED[1] and not ADDED:
        source = tl.where(of_memory, memory, x)
    given, asked = source + row[None, :, None] * K, (row < rows)[None, :, None]
    inputs = ()
    if AT_ONCE:
        for i in tl.static_range(TURNS):
            k = part + i * (PARTS * BLOCK_K)
            inputs += (tl.load(given + k, mask=asked & (k < K), other=0.0),)  # type: ignore[assignment]
        tl.debug_barrier()  # or the assembler would have loads wait for weights
    products = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    more = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)  # of what is added to the normed rows
    squares = tl.zeros((PARTS, BLOCK_M), tl.float32)
    for i in tl.static_range(TURNS):
        if AT_ONCE:
            v = inputs[i]  # type: ignore[var-annotated]
        else:
            k = part + i * (PARTS * BLOCK_K)
            v = tl.load(given + k, mask=asked & (k < K), other=0.0)
            if i + EARLY < TURNS:
                k += EARLY * (PARTS * BLOCK_K)
                tiles += (tl.load(lines + k, mask=real & (k < width), other=0.0),)  # type: ignore[assignment]
        if NORM:
            wide = v.to(tl.float32)  # type: ignore[var-annotated]
            squares += tl.sum(wide * wide, axis=2)
        n = part + i * (PARTS * BLOCK_K)
        if WEIGHTED:
            by = tl.load(norm_weight + n, mask=n < K, other=0.0).to(tl.float32)
            v = (v.to(tl.float32) * by).to(v.dtype)
        w = tiles[i]  # type: ignore[var-annotated]
        if i < EARLY:
            w = held(w, DEPENDENT)
        products = tl.dot(w, tl.permute(v, (0, 2, 1)), products, input_precision="ieee")
        if ADDED:
            u = tl.load(memory + row[None, :, None] * K + n, mask=asked & (n < tl.where(of_memory, K, 0)), other=0.0)
            if WEIGHTED:
                u = (u.to(tl.float32) * by).to(u.dtype)
            more = tl.dot(w, tl.permute(u, (0, 2, 1)), more, input_precision="ieee")
    product = tl.sum(products, axis=0)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        if ADDED:
            product *= factor[None, :]
        else:
            product *= tl.where(of_memory, 1.0, factor)[None, :]
    if ADDED:
        product += tl.sum(more, axis=0)
    product += plus
    if PAIR > 0:
        gate, up = tl.split(tl.permute(tl.reshape(product, (OUT, 2, BLOCK_M)), (0, 2, 1)))
        product = _gated(gate, up, PAIR)
    _write(product, r, a, c, place, inside, hidden, out, cap, KEEP, RELU2, CAP)
