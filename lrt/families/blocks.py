"""A foreign decoder's block in two halves, between which the memory enters; nothing of it is edited.

The block's own modules are called in the order of its own forward, so that without memory every number
is the one it computes itself. Legend: B batch, P positions of the pass, D width, H query heads,
G key/value heads, K head width, R rotated width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrt.attention import causal_attention
from lrt.families.description import Family, Foreign, Geometry, part
from lrt.families.norm_weight import multiplied, weight_offset
from lrt.rotary import rotate
from lrt.types import KV, KVStore, Projection


class Context(NamedTuple):
    """What one block needs beside the hidden state; dimension 1 is positions, or 1 to broadcast."""

    cos: Tensor | None  # (1 or B, P, R)
    sin: Tensor | None
    # (1 or B, 1, T, T), a BlockMask, or None: what the decoder's own attention wants in a pass over all positions
    mask: Foreign


class FamilyBlock(nn.Module):
    """One block of a foreign decoder.

    Args:
        family: where its parts are.
        layer: the decoder's own block.
        geometry: heads of its attention.
    """

    def __init__(self, family: Family, layer: nn.Module, geometry: Geometry) -> None:
        super().__init__()
        self.layer = layer
        attention = part(layer, family.attention)
        home = sys.modules[type(attention).__module__]
        self.family = family
        self.geometry = geometry
        self.window: int | None = None
        self.find_window()
        self.scale = family.scale(attention) if family.scale else getattr(attention, "scaling", geometry.head_dim**-0.5)
        self.score_scale = 1.0 if family.scaled_query else self.scale
        self.softcap = None if family.softcap is None else getattr(attention, family.softcap)
        self.clip = None if family.clip is None else getattr(attention.config, family.clip)
        self.residual_factor = None if family.residual_factor is None else getattr(layer, family.residual_factor)
        self.parallel = family.parallel is not None and family.parallel(layer)
        self.rotates = family.rotates(attention)
        self.rotated = None if family.rotated is None else family.rotated(attention)
        self.rotate: Foreign = family.rotate or getattr(home, "apply_rotary_pos_emb", rotate_heads)
        self.own_attention: Callable[..., Foreign] | None = getattr(home, "eager_attention_forward", None)
        norms = {path: part(layer, path) for path in (family.query_norm, family.key_norm) if path is not None}
        weights = {path: getattr(norm, "weight", None) for path, norm in norms.items()}
        self.weight_offset: float | None = None
        self.norm_whole = {
            path: weight is not None and weight.shape[-1] != geometry.head_dim for path, weight in weights.items()
        }

    @property
    def norm(self) -> Foreign:
        """The norm with a weight that the attention's input passes last; None where there is none."""
        modules = (part(self.layer, path) for path in reversed(self.family.attention_in))
        return next((module for module in modules if getattr(module, "weight", None) is not None), None)

    @property
    def fused(self) -> Foreign:
        """The one projection that makes queries, keys and values; None where there are three."""
        return None if self.family.fused is None else part(self.layer, self.family.fused)

    def find_window(self) -> None:
        """Read the window off the attention."""
        keys = self.family.window(part(self.layer, self.family.attention))
        self.window = None if keys is None else keys - 1

    def enter(self, hidden: Tensor, context: Context) -> Tensor:
        return hidden

    def project(self, hidden: Tensor, context: Context) -> Projection:
        normed = self._through(self.family.attention_in, hidden)
        if self.fused is not None:
            return Projection(normed, *self._split(self.fused(normed)))
        query, key, value = (
            self._heads(name, normed) for name in (self.family.query, self.family.key, self.family.value)
        )
        return Projection(normed, query, key, value)

    def project_aligned(self, hidden: Tensor, context: Context, aligned: Tensor) -> Projection:
        """``project``, where keys and values read the normed input plus w times ``aligned`` (B, P, D),
        w the norm's weight."""
        normed = self._through(self.family.attention_in, hidden)
        moved = normed + self._weighted(aligned).to(normed.dtype)
        if self.fused is None:
            query = self._heads(self.family.query, normed)
            return Projection(normed, query, self._heads(self.family.key, moved), self._heads(self.family.value, moved))
        # Side by side, so that the weights are read once; the module is called, because something may wrap it.
        here, there = self.fused(torch.cat([normed, moved])).chunk(2)
        _, key, value = self._split(there)
        return Projection(normed, self._split(here)[0], key, value)

    def kv_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """The biases of keys and values, each (G, K); None where there is none."""
        if self.fused is not None:
            bias = getattr(self.fused, "bias", None)
            return (None, None) if bias is None else self._split(bias)[1:]
        biases = (getattr(part(self.layer, name), "bias", None) for name in (self.family.key, self.family.value))
        key, value = (None if bias is None else bias.unflatten(-1, (-1, self.geometry.head_dim)) for bias in biases)
        return key, value

    def align(self) -> None:
        """Find out what the norm before the attention multiplies by.

        Raises:
            ValueError: neither its weight nor one plus its weight.
        """
        self.weight_offset = None if self.norm is None else weight_offset(self.norm)
        if self.norm is not None and self.weight_offset is None:
            raise ValueError(
                'recurrence.projection = "aligned" does not fit this block: the norm before the attention, '
                f"{type(self.norm).__name__}, multiplies by neither its weight nor 1 + its weight; "
                'use projection = "separate"'
            )

    def _weighted(self, aligned: Tensor) -> Tensor:
        return aligned if self.norm is None else multiplied(aligned, self.norm, self.weight_offset or 0.0)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        return part(self.layer, name)(x).unflatten(-1, (-1, self.geometry.head_dim))

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.family.split is not None
        return self.family.split(fused, self.geometry)

    def finish_kv(self, projection: Projection, context: Context) -> KV:
        key = self._ready(projection.query, projection.key, context)[1]
        return KV(key.transpose(1, 2), self._clipped(projection.value))

    def attend(
        self, hidden: Tensor, projection: Projection, context: Context, kv: KVStore | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = part(self.layer, self.family.attention)
        query, key = self._ready(projection.query, projection.key, context)
        query = query * self.scale if self.family.scaled_query else query
        value = self._clipped(projection.value)
        sinks = None if self.family.sinks is None else getattr(attention, self.family.sinks)
        if kv is None:
            mixed = self._attention(query, key, value.transpose(1, 2), context.mask, sinks)
        else:
            rows = query.transpose(1, 2), key.transpose(1, 2), value
            mixed = kv.attend(*rows, window=self.window, scale=self.score_scale, softcap=self._softcap(), sinks=sinks)
        update = part(self.layer, self.family.output)(mixed.flatten(-2))
        if self.family.output_dropout is not None:
            update = F.dropout(update, self.family.output_dropout(attention), attention.training)
        update = self._scaled(self._through(self.family.attention_out, update))
        if self.parallel:
            shared = self.family.mlp_in == self.family.attention_in
            normed = projection.normed if shared else self._through(self.family.mlp_in, hidden)
            more = self._mlp(normed)
            hidden = hidden + update + more if self.family.residual_first else more + update + hidden
        else:
            hidden = hidden + update
            hidden = hidden + self._mlp(self._through(self.family.mlp_in, hidden))
        return hidden, key.transpose(1, 2), value

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Foreign, sinks: Tensor | None) -> Tensor:
        """The decoder's own attention over all positions of the pass."""
        if self.own_attention is None:
            rows = (x.transpose(1, 2) for x in (query, key, value))
            return causal_attention(
                *rows, window=self.window, scale=self.score_scale, softcap=self.softcap, sinks=sinks
            )
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention = part(self.layer, self.family.attention)
        chosen = attention.config._attn_implementation
        function = self.own_attention if chosen == "eager" else ALL_ATTENTION_FUNCTIONS[chosen]
        # Only what the decoder passes itself: a scale that is left out may be rounded in another way.
        known = {
            "scaling": 1.0 if self.family.scaled_query else getattr(attention, "scaling", None),
            "sliding_window": None if self.window is None else self.window + 1,
            "softcap": self.softcap,
            "s_aux": sinks,
        }
        more = {name: value for name, value in known.items() if value is not None}
        rate = self.family.dropout(attention) if self.family.dropout else getattr(attention, "attention_dropout", 0.0)
        dropout = rate if attention.training else 0.0
        return function(attention, query, key, value, mask, dropout=dropout, **more)[0]

    def _ready(self, query: Tensor, key: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, P, heads, K) normed and rotated, heads first as the decoder's own attention has them."""
        norms = self.family.query_norm, self.family.key_norm
        if self.family.norm_after_rotation:
            query, key = self._rotate(query.transpose(1, 2), key.transpose(1, 2), context)
            return self._norm(norms[0], query), self._norm(norms[1], key)
        if self.family.norm_heads_first:
            return self._rotate(
                self._norm(norms[0], query.transpose(1, 2)), self._norm(norms[1], key.transpose(1, 2)), context
            )
        return self._rotate(
            self._norm(norms[0], query).transpose(1, 2), self._norm(norms[1], key).transpose(1, 2), context
        )

    def _rotate(self, query: Tensor, key: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, heads, P, K) after RoPE."""
        if context.cos is None or not self.rotates:
            return query, key
        if self.rotated is None:
            return self.rotate(query, key, context.cos, context.sin)
        turned = self.rotate(query[..., : self.rotated], key[..., : self.rotated], context.cos, context.sin)
        return torch.cat((turned[0], query[..., self.rotated :]), dim=-1), torch.cat(
            (turned[1], key[..., self.rotated :]), dim=-1
        )

    def _softcap(self) -> float | None:
        """The cap on scores, which transformers leaves out under sdpa."""
        config = getattr(part(self.layer, self.family.attention), "config", None)
        return None if getattr(config, "_attn_implementation", None) == "sdpa" else self.softcap

    def _norm(self, path: str | None, x: Tensor) -> Tensor:
        if path is not None:
            norm = part(self.layer, path)
            x = norm(x.flatten(-2)).unflatten(-1, x.shape[-2:]) if self.norm_whole[path] else norm(x)
        return self._clipped(x)

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _mlp(self, x: Tensor) -> Tensor:
        for path in self.family.mlp_parts:
            x = part(self.layer, path)(x)
            x = x[0] if isinstance(x, tuple) else x  # a mixture of experts may return its router's choices too
        if self.family.mlp_dropout is not None:
            x = F.dropout(x, self.family.mlp_dropout(self.layer), self.layer.training)
        return self._scaled(self._through(self.family.mlp_out, x))

    def _scaled(self, update: Tensor) -> Tensor:
        return update if self.residual_factor is None else update * self.residual_factor

    def _through(self, paths: tuple[str, ...], x: Tensor) -> Tensor:
        for path in paths:
            x = part(self.layer, path)(x)
        return x


def rotate_heads(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE over the whole head, by halves; for decoders that bring no rotation of their own."""
    half = cos.shape[-1] // 2
    tables = cos[:, None, :, :half], sin[:, None, :, :half]
    return rotate(query, *tables).to(query.dtype), rotate(key, *tables).to(key.dtype)


def on_device(value: Foreign, device: torch.device) -> Foreign:
    """Tensors of nested tuples on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [on_device(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
