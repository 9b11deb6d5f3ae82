"""Kernels of a decoding step from Python: products of few rows, and how one kernel starts behind another.

Legend: B rows, N outputs, K inputs of a product, D width, L blocks, H query heads, W head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.decoding.fast import tiles
from lrt.decoding.fast.tiles import AHEAD, power, tile_of

EPS = torch.finfo(torch.float32).eps  # of every norm, in half precision too


class Mix(NamedTuple):
    """How a block's input is made: a h + b x_0 + g m; None leaves a term out (a = 1)."""

    scale: Tensor | None = None
    embedding_scale: Tensor | None = None
    gain: Tensor | None = None


class Token(NamedTuple):
    """What the blocks share during a step."""

    tokens: Tensor  # (B,)
    embedding: Tensor  # (B, D) x_0
    memory: Tensor | None  # (B, D) received m
    positions: Tensor  # (B,) int32
    angles: Tensor  # (B, 2, W) cosines and sines
    counters: Tensor  # (B, L, H) shares of the attention that are done
    starts: Tensor  # (B,)


def linear(
    x: Tensor, layers: Sequence[Any], *, fed: tuple[int, int] = (0, 0), token: Token | None = None, mix: Mix = Mix(),
    norm: bool = False, relu2: bool = False, residual: Tensor | None = None, cap: float | None = None,
    keep: bool = False, dtype: torch.dtype | None = None, aligned: bool = False, ahead: Tensor | None = None,
    norm_weight: Tensor | None = None, eps: float = EPS, added: Tensor | None = None,
    biases: Sequence[Tensor | None] = (), gated: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows (B, K) through matrices side by side.

    Args:
        x: (B, K).
        layers: modules with a weight (n_i, k_i), k_i <= K, or weights; None counts as no rows.
        fed: the layers from the first to before the second are fed by the received memory, not normed.
        token: of the step, where memory or x_0 take part.
        mix: makes the next block's input of the result h.
        norm: x is normed before.
        relu2: the result is squared where positive.
        residual: (B, N) added to the result.
        cap: of the logits.
        keep: also return h itself.
        dtype: of the result; None = that of x.
        aligned: the result's rows begin at multiples of 16 numbers.
        ahead: weights of a later product, which may be brought to L2.
        norm_weight: (K,) what the norm multiplies by; None = nothing.
        eps: of the norm.
        added: (B, K) what the layers ``fed`` read beside the normed x, in place of the memory.
        biases: one a layer that counts, None among them; () = none.
        gated: 1 or 2: the two layers are a gate, through SiLU or GELU's tanh, and its partner; at most 32 rows.

    Returns:
        (B, N) result or next input, N the sum of n_i (of a gate and its partner n), and h when asked for.
    """
    weights = tuple(getattr(layer, "weight", layer) for layer in layers if layer is not None)
    embedding, memory = (None, None) if token is None else (token.embedding, token.memory)
    memory = memory if added is None else added
    sizes, widths = tuple(w.shape[0] for w in weights), tuple(w.shape[1] for w in weights)
    (rows, width), outputs = x.shape, sizes[0] if gated else sum(sizes)
    stride = -(-outputs // 16) * 16 if aligned else outputs
    out = x.new_empty(rows, stride, dtype=dtype or x.dtype)[:, :outputs]
    hidden = x.new_empty(rows, outputs) if keep else out
    tile, block, name, pack = tile_of(rows, sum(sizes), width), 1, "vector_kernel", 1
    more: dict[str, Any] = {}
    given: tuple[Tensor, ...] = (x,)
    if any(bias is not None for bias in biases):
        given = tuple(weight if bias is None else bias for bias, weight in zip(biases, weights))
        more["BIASED"] = tuple(int(bias is not None) for bias in biases)
    foreign = gated or norm_weight is not None or given[0] is not x
    assert rows <= tiles.MOST or not foreign
    if rows > 1 and (foreign or rows <= tiles.FEW and x.dtype != torch.float32):
        tile, block, name = tiles.few_of(rows, sum(sizes), width), max(8, power(rows)), "few_kernel"
        more |= {"PARTS": tile.warps, "EARLY": tile.stages}
    elif rows > 1:
        block, name = min(64, max(16, power(rows))), "matrix_kernel"
    elif x.dtype == torch.bfloat16 and all(k % 2 == 0 for k in (width, *widths)):
        pack = 2  # pairs of numbers as one int32
        x, weights = x.view(torch.int32), tuple(w.view(torch.int32) for w in weights)
        norm_weight = None if norm_weight is None else norm_weight.view(torch.int32)
        memory = memory.view(torch.int32) if fed[0] < fed[1] and memory is not None else memory
    lines = 0 if ahead is None or rows > 1 else min(AHEAD, ahead.nbytes) // 128
    each = tile.outputs // 2 if gated else tile.outputs
    launch(
        name, (sum(-(-n // each) for n in (sizes[:1] if gated else sizes)), -(-rows // block)),
        x, either(memory, x), weights, either(residual, x), either(embedding, x), *(either(s, x) for s in mix), hidden,
        out, either(ahead, x), either(norm_weight, x), given, rows, eps, cap or 1.0,
        SIZES=sizes, WIDTHS=tuple(k // pack for k in widths), FED=fed, K=width // pack, STRIDE=stride,
        NORM=norm, RELU2=relu2, CAP=cap is not None, RESIDUAL=residual is not None, KEEP=keep,
        SCALE=mix.scale is not None, EMBED=mix.embedding_scale is not None, INJECT=mix.gain is not None, AHEAD=lines,
        WEIGHTED=norm_weight is not None, ADDED=added is not None, PAIR=gated, BLOCK_M=block, BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs // pack, num_warps=tile.warps, num_stages=tile.stages, **({"BIASED": ()} | more),
    )  # fmt: skip
    return out, hidden


def launch(
    name: str, grid: tuple[int, ...], *args: Any, first: bool = False, registers: int | None = None, **settings: Any
) -> None:
    """Run a kernel behind the one in front; the ``first`` of a step waits for whatever came before."""
    from lrt.decoding.fast import kernels

    device = args[0].device
    dependent = device.type == "cuda" and _overlaps(device)
    if dependent and not first:
        settings["launch_pdl"] = True
    if dependent and registers is not None:
        settings["maxnreg"] = registers
    getattr(kernels, name)[grid](*args, DEPENDENT=dependent, **settings)


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front has ended: NVIDIA GPUs from Hopper on."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def either(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x
