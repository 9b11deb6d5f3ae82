"""Attention on the fastest kernel at hand, over keys that lie in groups.

A subset pass recomputes the positions t = residue (mod S). Sort positions into S groups by t mod S: group g
holds t = g, g + S, g + 2S, ... In these index spaces (t = index * S + group) a query of group r sees the key j
of group g when j <= i (g <= r) or j <= i - 1 (g > r). So every pair of groups is an ordinary causal attention,
or one shifted by a single step, which stock kernels compute. Each call returns its part of the output and the
log of the softmax denominator; together they give the attention over all keys. The backward hands every
kernel the merged output and the merged denominator: then the probabilities it recomputes are those of the whole
row, and its gradients are exact, not approximate.

Groups may be strided views (key[:, g::S]), so nothing is gathered, and writing a pass back is replacing one
entry of a tuple. A pass over all positions is the case S = 1.

Which kernel was fastest where is measured in docs/attention.md.

Legend: B batch, T positions, n_g positions of group g, H query heads, G key/value heads, K head width, S groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.types import at_least_float32

if TYPE_CHECKING:  # FlexAttention brings the compiler along, a second of every start, so it is imported where it runs
    from torch.nn.attention.flex_attention import BlockMask

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
BLOCK = 128  # FlexAttention skips blocks of this many queries and keys
# Of FlexAttention's forward on Hopper, heads of 128: 9 % less time than its own choice (docs/log.md, 16).
# Its backward has no better.
TILES: Any = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}


class Reach(NamedTuple):
    """Which keys of one group a query sees: key j for query i when 0 <= i - j - shift <= left."""

    shift: int
    left: int | None  # None: no limit


def reach(*, group: int, groups: int, residue: int, window: int | None) -> Reach | None:
    """Translate "keys at most ``window`` positions back" into the index space of one group; None: it sees nothing."""
    shift = -((residue - group) // groups)  # 0 or 1, and below 0 for queries that begin later than their group
    if window is None:
        return Reach(shift, None)
    left = (window - residue + group) // groups - shift  # t_q - t_k = (i - j) * S + residue - group <= window
    return Reach(shift, left) if left >= 0 else None


# ------------------------------------------------------------------ kernels
# forward -> (part of the output, log denominator (B, H, n)), backward -> (dq, dk, dv);
# query (B, n, H, K), key and value (B, n - shift, G, K).


class Flash:
    """FlashAttention 2 as torch ships it: windows, strides, shared key heads, half precision, Ampere and newer."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, seen: Reach, scale: float) -> tuple[Tensor, Tensor]:
        # With fewer keys than queries the kernel aligns the causal mask at the END, which is just the shift we need:
        # no query has to be cut off. The first query then sees nothing; the kernel reports +inf for it and writes 0.
        out, lse, *_ = aten._flash_attention_forward(
            query, key, value, None, None, query.shape[1], key.shape[1], 0.0, True, False,
            scale=scale, window_size_left=-1 if seen.left is None else seen.left, window_size_right=0,
        )  # fmt: skip
        return out, torch.where(lse == float("inf"), float("-inf"), lse) if seen.shift else lse

    @staticmethod
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, seen: Reach, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device)
        return aten._flash_attention_backward(
            grad, query, key, value, out, lse, None, None, query.shape[1], key.shape[1], 0.0, True,
            no_dropout, torch.empty(0, device=query.device),
            scale=scale, window_size_left=-1 if seen.left is None else seen.left, window_size_right=0,
        )  # fmt: skip


class CuDNN:
    """cuDNN's attention: the fastest on Hopper, but without windows; its causal mask aligns at the START."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, seen: Reach, scale: float) -> tuple[Tensor, Tensor]:
        shift = seen.shift
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            query[:, shift:].transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            True,
            0.0,
            True,
            False,
            scale=scale,
        )
        out, lse = out.transpose(1, 2), lse.reshape(lse.shape[:3])
        if shift:  # the first query saw nothing
            out = F.pad(out, (0, 0, 0, 0, shift, 0))
            lse = F.pad(lse, (shift, 0), value=float("-inf"))
        return out, lse

    @staticmethod
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, seen: Reach, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _cudnn_backward(grad, query, key, value, out, lse, seen.shift, scale)
        return F.pad(dq, (0, 0, 0, 0, seen.shift, 0)) if seen.shift else dq, dk, dv


@torch.library.custom_op("lrt::cudnn_attention_backward", mutates_args=())
def _cudnn_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, shift: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Opaque to the compiler on purpose: cuDNN refuses denominators (B, H, n, 1) whose last stride is not 1, and
    # inductor (torch 2.11) is free to choose another stride for a dimension of one element.
    length = key.shape[1]
    no_dropout = torch.empty((), dtype=torch.int64, device=query.device)
    grad, query, out = (x[:, shift:].transpose(1, 2) for x in (grad, query, out))
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key.transpose(1, 2), value.transpose(1, 2), out, lse[:, :, shift:].contiguous().unsqueeze(-1),
        no_dropout, no_dropout, None, None, None, length, length, 0.0, True, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


@_cudnn_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, shift: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (query[:, shift:], key, value))
    return dq, dk, dv


def usable(*, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels of this file run on such tensors; elsewhere attention takes a dense mask."""
    if device.type != "cuda" or dtype not in HALF or head_dim % 8 or head_dim > 256:
        return False
    return _generation(device.index) >= 8


def _kernel(query: Tensor, window: int | None) -> Any:
    hopper = _generation(query.device.index) == 9
    return CuDNN if hopper and window is None and query.shape[-1] <= 128 else Flash


def _generation(index: int) -> int:
    """Major compute capability: 8 Ampere, 9 Hopper; a number, because dynamo (torch 2.11) cannot compare tuples."""
    return torch.cuda.get_device_capability(index)[0]


# torch.compiler.assume_constant_result, without importing the compiler
_generation._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ------------------------------------------------------------------ groups, merged


def merged_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    residue: int,
    window: int | None,
    scale: float,
    kernel: Any = None,
) -> Tensor:
    """Attention of the positions t = residue (mod S) over all positions up to t, keys grouped by t mod S.

    Args:
        query: (B, n_residue, H, K), already rotated and normalized.
        keys, values: S tensors each, entry g of shape (B, n_g, G, K), n_g = ceil((T - g) / S), or one less where no
            query sees the last; strided views are fine (last dimension contiguous). H must be a multiple of G.
        residue: which group the queries are, 0 .. S-1; S or more: the position of the first query.
        window: a query sees keys at most this many positions back (and itself); None: all.
        scale: factor on the scores.
        kernel: with ``forward`` and ``backward`` as ``Flash`` has them; None: the fastest at hand.

    Returns:
        (B, n_residue, H, K), differentiable in query and in every key and value.
    """
    if kernel is None:
        # which aligns at the end, wherever queries begin
        kernel = _kernel(query, window) if residue < len(keys) else Flash
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, *keys, *values)):
        return _Merged.apply(kernel, residue, window, scale, query, *keys, *values)
    # Not through _Merged: dynamo (torch 2.11) loses the tensors behind * where nothing requires a gradient.
    return _attend(kernel, residue, window, scale, query, keys, values)[0]


class _Merged(torch.autograd.Function):
    """Attention of one group's queries over all groups; see the top of the file."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Any, residue: int, window: int | None, scale: float, query: Tensor, *keys_values: Tensor
    ) -> Tensor:
        groups = len(keys_values) // 2
        out, lse = _attend(kernel, residue, window, scale, query, keys_values[:groups], keys_values[groups:])
        ctx.save_for_backward(query, *keys_values, out, lse)
        ctx.kernel, ctx.residue, ctx.window, ctx.scale = kernel, residue, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, *keys_values, out, lse = ctx.saved_tensors
        groups, length = len(keys_values) // 2, query.shape[1]
        keys, values = keys_values[:groups], keys_values[groups:]
        grad = grad.contiguous()
        d_query, d_keys, d_values = [], [], []
        for group in range(groups):
            key, value = keys[group], values[group]
            seen = reach(group=group, groups=groups, residue=ctx.residue, window=ctx.window)
            if seen is None or length <= seen.shift:
                d_keys.append(torch.zeros_like(key))
                d_values.append(torch.zeros_like(value))
                continue
            used = length - seen.shift
            dq, dk, dv = ctx.kernel.backward(grad, query, key[:, :used], value[:, :used], out, lse, seen, ctx.scale)
            unseen = key.shape[1] - used  # keys after the last query
            d_query.append(dq)
            d_keys.append(F.pad(dk, (0, 0, 0, 0, 0, unseen)) if unseen else dk)
            d_values.append(F.pad(dv, (0, 0, 0, 0, 0, unseen)) if unseen else dv)
        # One rounding, not one for each group.
        dq = d_query[0]
        if len(d_query) > 1:
            dq = reduce(torch.add, [at_least_float32(part) for part in d_query]).to(query.dtype)
        return None, None, None, None, dq, *d_keys, *d_values


def _attend(
    kernel: Any,
    residue: int,
    window: int | None,
    scale: float,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Output (B, n, H, K) and log denominator (B, H, n) over all groups."""
    length = query.shape[1]
    parts = []
    for group, (key, value) in enumerate(zip(keys, values)):
        seen = reach(group=group, groups=len(keys), residue=residue, window=window)
        if seen is not None and length > seen.shift:
            used = length - seen.shift
            parts.append(kernel.forward(query, key[:, :used], value[:, :used], seen, scale))
    return _merge(parts)


def _merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine partial outputs (B, n, H, K) by their log denominators (B, H, n)."""
    if len(parts) == 1:
        return parts[0]
    lse = reduce(torch.logaddexp, [part_lse for _, part_lse in parts])
    shares = [torch.exp(part_lse - lse).transpose(1, 2).unsqueeze(-1) for _, part_lse in parts]
    out = reduce(torch.add, [at_least_float32(part) * share for (part, _), share in zip(parts, shares)])
    return out.to(parts[0][0].dtype), lse


# ------------------------------------------------------------------ groups, put back into natural order


def flex_groups(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: BlockMask, *, scale: float,
    softcap: float | None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """FlexAttention of ``query`` (B, P, H, K) over groups as in ``merged_attention``;
    fast only where it is compiled."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    tiled = (
        query.is_cuda and query.shape[-1] == 128 and query.shape[1] >= BLOCK and _generation(query.device.index) == 9
    )
    out: Any = flex_attention(  # type: ignore[call-overload]
        query.transpose(1, 2), natural_order(keys).transpose(1, 2), natural_order(values).transpose(1, 2),
        score_mod=None if softcap is None else capped, block_mask=mask, scale=scale,
        enable_gqa=query.shape[2] != keys[0].shape[2], kernel_options=TILES if tiled else None,
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is not None:  # one more score in the denominator
        out, more = out
        out = out * torch.sigmoid(more.lse - sinks.view(-1, 1)).to(out.dtype)[..., None]
    return out.transpose(1, 2)


def natural_order(groups: Sequence[Tensor]) -> Tensor:
    """(B, n_g, ...) for each g -> (B, T, ...) with group g at positions g, g + S, ..."""
    if len(groups) == 1:
        return groups[0]
    shortest = groups[-1].shape[1]
    whole = torch.stack([x[:, :shortest] for x in groups], dim=2).flatten(1, 2)
    rest = [x[:, shortest:] for x in groups if x.shape[1] > shortest]  # S does not divide T
    return torch.cat([whole, *rest], dim=1) if rest else whole


def takes_mask(*, length: int, groups: int, window: int | None) -> bool:
    """Whether FlexAttention is faster than ``merged_attention``: with a window, or from four groups on that fill its
    blocks."""
    return window is not None or (groups >= 4 and length % (BLOCK * groups) == 0)


def block_mask(
    *, length: int, groups: int, residue: int, window: int | None, documents: Tensor | None, device: torch.device
) -> BlockMask | None:
    """The block mask for queries t = residue (mod S) over all keys, or None where ``merged_attention`` is faster.

    FlexAttention wins where there is a window, and from four groups on if the groups fill its blocks; cuDNN, which
    also keeps no copy of keys and values, wins otherwise. Only FlexAttention knows documents.

    Args:
        length: T.
        groups: S.
        residue: of the queries.
        window: positions back that a query sees; None: all.
        documents: (B, T) document numbers; attention stays inside a document. None: one document.
        device: of the tensors.
    """
    if documents is not None:
        seen = _visible(
            groups=groups, residue=torch.full((), residue, device=device), window=window, documents=documents
        )
        queries = len(range(residue, length, groups))
        return _compiled_block_mask()(seen, documents.shape[0], None, queries, length, device=str(device))
    return _static_block_mask(length, groups, residue, window, device)


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)  # eager, it would hold a mask of all pairs


@cache  # captured graphs read masks: none may be dropped
# an evaluation inside inference mode may come first, and a backward cannot use what was made there
@torch.inference_mode(False)
def _static_block_mask(
    length: int, groups: int, residue: int, window: int | None, device: torch.device
) -> BlockMask | None:
    if not takes_mask(length=length, groups=groups, window=window):
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    # The residue is data, not a constant: then all residues share one compiled graph.
    seen = _visible(groups=groups, residue=torch.tensor(residue, device=device), window=window, documents=None)
    return create_block_mask(seen, None, None, len(range(residue, length, groups)), length, device=str(device))


def _visible(*, groups: int, residue: Tensor, window: int | None, documents: Tensor | None) -> Callable[..., Tensor]:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query * groups + residue
        allowed = place >= key
        if window is not None:
            allowed = allowed & (place - key <= window)
        if documents is not None:
            allowed = allowed & (documents[batch, place] == documents[batch, key])
        return allowed

    return seen
