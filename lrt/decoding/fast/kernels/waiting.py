"""How Triton kernels of one decoding step overlap.

A step moves every weight once, so its floor is bytes over bandwidth; what it loses is time in which nothing
is in flight, around the border between two kernels. So each kernel first asks for what the kernel in front
of it does not write (weights, the cache, residuals), and only then waits for that kernel (``wait``): with
programmatic dependent launch the next kernel starts as soon as every program of this one has stopped waiting,
and its weights arrive while this one computes. By then the kernels before this one have ended, which is why
only the writes of the one in front matter. Imported only where triton is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Wait for the kernel in front, then let the next one start; before, nothing may be written."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def held(x, DEPENDENT: tl.constexpr):
    """x, which the compiler must not unpack earlier: that would be to wait for it."""
    if DEPENDENT:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)
    return x


@triton.jit
def prefetch(address):
    """Ask for the lines at these addresses to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
