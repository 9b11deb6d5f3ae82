"""Masks by position, and attention over the kinds of key/value store.

Layout of queries, keys and values: (B, P, heads, K). Legend: B batch, P positions of the pass,
N keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.kernels.attention import flex_groups, merged_attention, usable
from lrt.types import KVStore

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask | None"

# ------------------------------------------------------------------ masks


def causal_mask(queries: Tensor, keys: Tensor, *, window: int | None = None, query_documents: Tensor | None = None,
                key_documents: Tensor | None = None) -> Tensor:  # fmt: skip
    """Which key each query may see, by position.

    Args:
        queries, keys: (P,) and (N,) positions.
        window: tokens seen before the current one; None = all.
        query_documents, key_documents: (B, P) and (B, N) document numbers; attention stays inside a document.

    Returns:
        bool (1 or B, 1, P, N).
    """
    distance = queries[:, None] - keys[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance <= window)
    allowed = allowed[None, None]
    if query_documents is not None and key_documents is not None:
        allowed = allowed & (query_documents[:, :, None] == key_documents[:, None, :])[:, None]
    return allowed


# ------------------------------------------------------------------ attention


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention under a boolean mask (1 or B, 1, P, N); None = every key is seen. Sinks are scores (H,)
    without a value."""
    if softcap is None and sinks is None:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)
    weights = attention_weights(query, key, mask, scale=scale, softcap=softcap, sinks=sinks)
    return (
        weights.to(value.dtype) @ value.transpose(1, 2).repeat_interleave(query.shape[2] // value.shape[2], dim=1)
    ).transpose(1, 2)


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights (B, H, P, N) of ``masked_attention``, in float32 at least; with sinks a row sums to less than one."""
    scores = (
        query.transpose(1, 2) @ key.permute(0, 2, 3, 1).repeat_interleave(query.shape[2] // key.shape[2], dim=1)
    ) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., : key.shape[1]]


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Plain causal attention of a pass over its own, contiguous positions."""
    length = query.shape[1]
    if window is not None and window >= length - 1:
        window = None
    plain = softcap is None and sinks is None
    if plain and usable(device=query.device, dtype=query.dtype, head_dim=query.shape[-1]):
        return merged_attention(query, (key,), (value,), residue=0, window=window, scale=scale)
    if plain and window is None:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)
    places = torch.arange(length, device=query.device)
    return masked_attention(
        query, key, value, causal_mask(places, places, window=window), scale=scale, softcap=softcap, sinks=sinks
    )


def grouped_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, residue: int, window: int | None, scale: float,
    softcap: float | None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the positions t = residue (mod S) over all positions up to t, keys grouped by t mod S;
    see ``lrt.kernels.attention``."""
    if len(keys) == 1:
        return causal_attention(query, keys[0], values[0], window=window, scale=scale, softcap=softcap, sinks=sinks)
    plain = softcap is None and sinks is None
    if plain and usable(device=query.device, dtype=query.dtype, head_dim=query.shape[-1]):
        if window is not None and window >= sum(key.shape[1] for key in keys) - 1:
            window = None
        return merged_attention(query, keys, values, residue=residue, window=window, scale=scale)
    at_query = torch.arange(query.shape[1], device=query.device) * len(keys) + residue
    at_key = torch.cat([torch.arange(key.shape[1], device=query.device) * len(keys) + g for g, key in enumerate(keys)])
    mask = causal_mask(at_query, at_key, window=window)
    return masked_attention(
        query, torch.cat(list(keys), 1), torch.cat(list(values), 1), mask, scale=scale, softcap=softcap, sinks=sinks
    )


# ------------------------------------------------------------------ key/value stores


class Buffer(NamedTuple):
    """Training store: keys and values of other positions, in groups; nothing is written in place.

    The fresh keys take the place of group ``slot`` (or follow the last one). ``mask`` is built once per pass and
    window: a boolean one over the groups' concatenation; a block mask over the positions' natural order, where
    group g holds the positions g, g + S, ...; None for the same groups where the kernel needs no mask.
    """

    keys: tuple[Tensor, ...]  # (B, n_g, G, K) each
    values: tuple[Tensor, ...]
    slot: int
    mask: Mask  # boolean: (1 or B, 1, P, N)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        keys = (*self.keys[: self.slot], key, *self.keys[self.slot + 1 :])
        values = (*self.values[: self.slot], value, *self.values[self.slot + 1 :])
        if self.mask is None:
            return grouped_attention(
                query, keys, values, residue=self.slot, window=window, scale=scale, softcap=softcap, sinks=sinks
            )
        if isinstance(self.mask, Tensor):
            merged = torch.cat(keys, dim=1), torch.cat(values, dim=1)
            return masked_attention(query, *merged, self.mask, scale=scale, softcap=softcap, sinks=sinks)
        return flex_groups(query, keys, values, self.mask, scale=scale, softcap=softcap, sinks=sinks)


def gradient_spacing(store: KVStore | None) -> int:
    """How many positions lie between those of a pass in the gradient of its keys that comes from later passes.

    FlexAttention reads keys in natural order. With two groups in turn one later pass reads them, and its gradient comes
    as it is; with more, or from other kernels, gradients come added up, side by side.
    A gradient that comes otherwise is copied.
    """
    natural = (
        isinstance(store, Buffer)
        and len(store.keys) == 2
        and store.mask is not None
        and not isinstance(store.mask, Tensor)
    )
    return 2 if natural else 1


class Cache(NamedTuple):
    """Decoding store: static tensors written in place at the pass's slots."""

    key: Tensor  # (B, N, G, K)
    value: Tensor
    slots: Tensor  # (P,) or (B, P) where the fresh keys go
    mask: Tensor  # bool (1 or B, 1, P, N)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if self.slots.ndim == 1:
            self.key.index_copy_(1, self.slots, key)
            self.value.index_copy_(1, self.slots, value)
        else:
            index = self.slots[:, :, None, None].expand_as(key)
            self.key.scatter_(1, index, key)
            self.value.scatter_(1, index, value)
        return masked_attention(query, self.key, self.value, self.mask, scale=scale, softcap=softcap, sinks=sinks)


class Strided(NamedTuple):
    """Prefill store: keys and values of all positions in natural order; the pass's are written in place,
    ``step`` apart."""

    key: Tensor  # (B, N, G, K)
    value: Tensor
    first: int  # index of the first query
    step: int
    keep: Tensor | None = None  # bool (B, P): only these are written; None = all
    mask: Tensor | None = None  # bool (1 or B, 1, P, N); None = every key up to the query's own

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        end = self.first + (query.shape[1] - 1) * self.step + 1
        for mine, fresh in ((self.key, key), (self.value, value)):
            place = mine[:, self.first : end : self.step]
            if self.keep is None:
                place.copy_(fresh)
            else:
                torch.where(self.keep[:, :, None, None], fresh, place, out=place)
        mask = self.mask
        if mask is None and (softcap is not None or sinks is not None):
            places = torch.arange(self.key.shape[1], device=query.device)
            mask = causal_mask(places[self.first : end : self.step], places, window=window)
        if mask is not None:
            return masked_attention(query, self.key, self.value, mask, scale=scale, softcap=softcap, sinks=sinks)
        if window is not None and window >= end - 1:
            window = None
        keys, values = ([x[:, group : end : self.step] for group in range(self.step)] for x in (self.key, self.value))
        return merged_attention(query, keys, values, residue=self.first, window=window, scale=scale)
