"""Decoders of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrt


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (4, 4)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention, self.between = nn.LayerNorm(16), Attention(), nn.LayerNorm(16)
        self.feed = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.feed(self.between(x))


class Plain(nn.Module):
    """A decoder without any library: learned positions, heads of width 4."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.tokens, self.places = nn.Embedding(61, 16), nn.Embedding(64, 16)
        self.stack = nn.ModuleList([Layer() for _ in range(3)])
        self.last, self.out = nn.LayerNorm(16), nn.Linear(16, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.stack:
            x = layer(x)
        return self.out(self.last(x)) * self.scale


PLAIN = lrt.Family(
    name="plain", embedding="tokens", position_embedding="places", layers="stack", final_norm="last", head="out",
    heads=4, attention="attention", query="attention.wq", key="attention.wk", value="attention.wv",
    output="attention.wo", attention_in=("before",), mlp="feed", mlp_in=("between",),
)  # fmt: skip


def plain(**more: Any) -> Plain:
    torch.manual_seed(0)
    return Plain(**more).double()
