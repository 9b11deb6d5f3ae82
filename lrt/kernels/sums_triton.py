"""A Triton kernel that adds up to four gradients of a weight to their sum: each number is read once and written once.

Imported only where triton is; ``lrt.train.distributed.gradient_sums`` launches it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_kernel(total, first, second, third, fourth, size, COUNT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """total (size,) <- COUNT of the gradients, and total itself where ADD."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    kind = total.dtype.element_ty
    value = tl.load(first + at, mask=live, other=0.0).to(kind)
    if COUNT > 1:
        value += tl.load(second + at, mask=live, other=0.0).to(kind)
    if COUNT > 2:
        value += tl.load(third + at, mask=live, other=0.0).to(kind)
    if COUNT > 3:
        value += tl.load(fourth + at, mask=live, other=0.0).to(kind)
    if ADD:
        value += tl.load(total + at, mask=live, other=0.0)
    tl.store(total + at, value, mask=live)
