"""From a block's joint projection to what its attention reads, as one kernel forward and one backward.

Local and remote gates, memory, token values, RoPE and QK-norm are a few operations a number. Written out in torch the
compiler makes several kernels of them, and one in the backward that joins the gradients of queries, keys and values
at less than half of the GPU memory's bandwidth. Here every number is read and written once.

Legend: B batch, P positions, H query heads, G key/value heads, K head width, N columns of the joint projection.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.kernels.attention import HALF
from lrt.rotary import rotate
from lrt.types import Mixed

HAS_TRITON = find_spec("triton") is not None
BLOCK, WARPS = 16, 4  # positions a program: every load is 16 bytes wide, and nothing spills
PADDING = 64


def usable(x: Tensor, head_dim: int) -> bool:
    """Whether the kernels run on such tensors: half precision on a GPU with triton, heads of a power of two;
    not for single tokens."""
    return (
        x.is_cuda
        and x.dtype in HALF
        and x.shape[1] > 1
        and 16 <= head_dim <= 256
        and head_dim & (head_dim - 1) == 0
        and HAS_TRITON
    )


def columns(heads: int, groups: int, width: int, *, local: bool, token: bool) -> int:
    """N: queries, keys, values and gates of one position, up to a multiple of 64, so that rows begin where lines of
    memory do."""
    return (
        -(-((heads + 2 * groups) * width + (2 * groups if local else 0) + (groups if token else 0)) // PADDING)
        * PADDING
    )


def mix(
    joint: Tensor, *, cos: Tensor, sin: Tensor, heads: int, groups: int, local: bool, norm: bool,
    memory_key: Tensor | None = None, memory_value: Tensor | None = None, token_value: Tensor | None = None,
    hand_on: int = 0,
) -> Mixed:  # fmt: skip
    """Finish queries, keys and values.

    Args:
        joint: (B, P, N) queries, keys, values, then the gates before their sigmoid: local and remote (G each, where
            ``local``), token (G, where ``token_value``), then padding; see ``columns``.
        cos, sin: (1 or B, P, 1, K/2).
        heads, groups: H and G.
        local: keys and values are gated.
        norm: QK-norm.
        memory_key, memory_value: (B, P, G, K), gated and added; only with ``local``.
        token_value: (B, P, G K), gated and added to the values.
        hand_on: give the gradients that reach keys and values from elsewhere paths of their own,
            which expect them laid out with this many positions from one to the next; 0: no paths.
    """
    width = 2 * cos.shape[-1]
    query, key, value, *paths = _forward(
        joint, memory_key, memory_value, token_value, cos, sin, heads, groups, width, local, norm, hand_on
    )
    return Mixed(query, key, value, *(paths if hand_on else ()))


def reference(
    joint: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, token_value: Tensor | None, cos: Tensor,
    sin: Tensor, heads: int, groups: int, width: int, local: bool, norm: bool, hand_on: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the kernels compute, in plain torch."""
    token = token_value is not None
    sizes = [
        heads * width,
        groups * width,
        groups * width,
        *([groups] * 2 if local else []),
        *([groups] if token else []),
    ]
    parts = joint.split([*sizes, joint.shape[-1] - sum(sizes)], dim=-1)
    query, key, value = (part.unflatten(-1, (-1, width)) for part in parts[:3])
    gates = [2 * torch.sigmoid(part)[..., None] for part in parts[3:-1]]
    if local:
        key, value = gates[0] * key, gates[0] * value
        if memory_key is not None and memory_value is not None:
            key, value = key + gates[1] * memory_key, value + gates[1] * memory_value
    if token_value is not None:
        value = value + gates[-1] * token_value.unflatten(-1, (-1, width))

    def finish(x: Tensor) -> Tensor:
        rotated = rotate(x, cos, sin)
        return (F.rms_norm(rotated, (width,)) if norm else rotated).to(x.dtype)

    query, key, value = finish(query), finish(key), value.clone()
    return query, key, value, (key.clone() if hand_on else key[:0]), (value.clone() if hand_on else value[:0])


# ------------------------------------------------------------------ the operator
# Opaque to the compiler: it sees one kernel that reads any strides.


@torch.library.custom_op("lrt::mix", mutates_args=())
def _forward(
    joint: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, token_value: Tensor | None, cos: Tensor,
    sin: Tensor, heads: int, groups: int, width: int, local: bool, norm: bool, hand_on: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from lrt.kernels import mixing_triton

    joint = joint.contiguous()
    results = query, key, value, _, _ = _results(joint, heads, groups, width, hand_on)
    grid, sizes, strides, shape = _launch(
        joint, memory_key, memory_value, token_value, cos, sin, heads, groups, width, local, norm
    )
    mixing_triton.forward_kernel[grid](
        joint, *(_or(x, joint) for x in (memory_key, memory_value, token_value)), cos, sin, query, key, value,
        *sizes, *strides, **shape,
    )  # fmt: skip
    return results


@torch.library.custom_op("lrt::mix_backward", mutates_args=())
def _backward(
    d_query: Tensor, d_key: Tensor, d_value: Tensor, d_key_path: Tensor | None, d_value_path: Tensor | None,
    joint: Tensor, memory_key: Tensor | None, memory_value: Tensor | None, token_value: Tensor | None, cos: Tensor,
    sin: Tensor, heads: int, groups: int, width: int, local: bool, norm: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the joint projection, then of memory key, memory value and token value as far as they are there."""
    from lrt.kernels import mixing_triton

    joint = joint.contiguous()
    results = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (joint, memory_key, memory_value, token_value)
        if x is not None
    ]
    rest = iter(results[1:])
    d_memory_key, d_memory_value, d_token_value = (
        joint if x is None else next(rest) for x in (memory_key, memory_value, token_value)
    )
    paths = (d_key if d_key_path is None else d_key_path, d_value if d_value_path is None else d_value_path)
    above = [x if x.stride(-1) == 1 else x.contiguous() for x in (d_query, d_key, d_value, *paths)]
    grid, sizes, strides, shape = _launch(
        joint, memory_key, memory_value, token_value, cos, sin, heads, groups, width, local, norm
    )
    mixing_triton.backward_kernel[grid](
        *above, joint, *(_or(x, joint) for x in (memory_key, memory_value, token_value)), cos, sin,
        results[0], d_memory_key, d_memory_value, d_token_value,
        *sizes, *(step for x in above for step in x.stride()[:3]), *strides, **shape, PADDING=PADDING,
        PATHS=d_key_path is not None,
    )  # fmt: skip
    return results


def _launch(joint, memory_key, memory_value, token_value, cos, sin, heads, groups, width, local, norm):  # type: ignore[no-untyped-def]
    """Grid, then sizes, strides and constants that both kernels take alike."""
    # the stride of a single head may be anything
    for name, x in (("memory_key", memory_key), ("memory_value", memory_value)):
        assert x is None or (x.stride(3) == 1 and (groups == 1 or x.stride(2) == width)), f"{name}: heads side by side"
    assert cos.stride() == sin.stride() and cos.stride(-1) == 1 and (token_value is None or token_value.stride(-1) == 1)
    batch, length, total = joint.shape
    sizes = (batch * length, length, torch.finfo(torch.float32).eps)
    strides = [
        step for x in (memory_key, memory_value, token_value) for step in ((0, 0) if x is None else x.stride()[:2])
    ]
    strides += [0 if len(cos) == 1 else cos.stride(0), cos.stride(1)]
    shape = {"N": total, "H": heads, "G": groups, "W": width, "LOCAL": local, "MEMORY": memory_key is not None}
    shape |= {"TOKEN": token_value is not None, "NORM": norm, "BLOCK": BLOCK, "num_warps": WARPS}
    return (groups * -(-batch * length // BLOCK),), sizes, strides, shape


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _results(
    joint: Tensor, heads: int, groups: int, width: int, hand_on: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, _ = joint.shape
    query, key, value = (joint.new_empty(batch, length, n, width) for n in (heads, groups, groups))
    # Never read nor written: a compiled block copies a gradient that is not laid out as the result that it belongs to.
    position = groups * width
    layout = (length * hand_on * position, hand_on * position, width, 1)
    key_path, value_path = (
        joint.new_empty_strided((batch if hand_on else 0, length, groups, width), layout) for _ in range(2)
    )
    return query, key, value, key_path, value_path


@_forward.register_fake
def _(joint, memory_key, memory_value, token_value, cos, sin, heads, groups, width, local, norm, hand_on):  # type: ignore[no-untyped-def]
    return _results(joint, heads, groups, width, hand_on)


@_backward.register_fake
def _(d_query, d_key, d_value, d_key_path, d_value_path, joint, memory_key, memory_value, token_value, *rest):  # type: ignore[no-untyped-def]
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (joint, memory_key, memory_value, token_value)
        if x is not None
    ]


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6])
    ctx.settings, ctx.hand_on = inputs[6:-1], inputs[-1]


def _differentiate(ctx, d_query, d_key, d_value, *paths):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    results = iter(_backward(d_query, d_key, d_value, *(paths if ctx.hand_on else (None, None)), *saved, *ctx.settings))
    return *(None if x is None else next(results) for x in saved[:4]), *(None,) * 8


_forward.register_autograd(_differentiate, setup_context=_keep)
