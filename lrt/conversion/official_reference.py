"""A faithful, independent reading of the official layout: its tensors in, logits out, by its own names.

It shares no code with the model and knows nothing of the converter's name table, so a conversion that agrees
with it is right for a reason. Plain rather than fast; facts from github.com/OoDBag/Latent_recurrent_transformer.
Legend: B batch, P positions of a forward, D width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.serialization.tensors import LazyTensor
from lrt.tables import ReadTable

Mode = Literal["zero", "decode"]
Logits = Callable[[Tensor, Mode], Tensor]  # tokens (B, T) -> logits (B, T, V)


class Precision(NamedTuple):
    """How a checkpoint is run for a comparison."""

    compute: torch.dtype = torch.float32
    rounded: torch.dtype | None = None  # the weights are rounded to it first; None = as stored
    keep: bool = True  # hold every matrix in memory once it is read

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.rounded or tensor.dtype).to(self.compute)


Cache = dict[int, tuple[Tensor, Tensor]]  # block -> keys and values (B, N, G, K)


class OfficialReading:
    """An official checkpoint that can be run on a few tokens, with one matrix in memory where ``precision`` says so.

    Args:
        config: ``model_config`` of the official meta file.
        tensors: official names.
        precision: how to compute.
    """

    def __init__(self, config: ReadTable, tensors: Mapping[str, LazyTensor], precision: Precision) -> None:
        self.tensors, self.precision = tensors, precision
        self.layers, self.heads, self.kv_heads = config["n_layer"], config["n_head"], config["n_kv_head"]
        self.width, self.length, self.vocab_size = config["n_embd"], config["sequence_len"], config["vocab_size"]
        self.pattern = config.get("window_pattern", "L")
        self.kept: dict[str, Tensor] = {}

    def logits(self, tokens: Tensor, mode: Mode) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), with zero memory or by true recurrence."""
        cache: Cache = {}
        if mode == "zero":
            return self._forward(tokens, 0, None, cache)[0]
        steps, memory = [], None
        for t in range(tokens.shape[1]):
            logits, memory = self._forward(tokens[:, t : t + 1], t, memory, cache)
            steps.append(logits)
        return torch.cat(steps, dim=1)

    def _matrix(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        read = self.precision(self.tensors[name].read())
        if self.precision.keep:
            self.kept[name] = read
        return read

    def _rows(self, name: str, tokens: Tensor) -> Tensor:
        return self.precision(self.tensors[name].read()[tokens])

    def _scale(self, name: str, block: int) -> float | None:
        return self._matrix(name)[block].item() if name in self.tensors else None

    def _forward(self, tokens: Tensor, start: int, memory: Tensor | None, cache: Cache) -> tuple[Tensor, Tensor]:
        """Logits and h_final of tokens (B, P) at positions start.., with m[t-1] (B, P, D); None = zero."""
        x = x0 = _norm(self._rows("transformer.wte.weight", tokens))
        for i in range(self.layers):
            block = f"transformer.h.{i}."
            if (a := self._scale("resid_lambdas", i)) is not None:
                x = a * x
            if (b := self._scale("x0_lambdas", i)) is not None:
                x = x + b * x0
            if memory is not None and (g := self._scale("interleaved_lambdas", i)) is not None:
                x = x + g * memory
            x = x + self._attention(i, block + "attn.", _norm(x), tokens, start, memory, cache)
            inner = F.relu(F.linear(_norm(x), self._matrix(block + "mlp.c_fc.weight"))).square()
            x = x + F.linear(inner, self._matrix(block + "mlp.c_proj.weight"))
        state = _norm(x)
        return 15 * torch.tanh(F.linear(state, self._matrix("lm_head.weight"))[..., : self.vocab_size] / 15), state

    def _attention(
        self, i: int, attn: str, n: Tensor, tokens: Tensor, start: int, memory: Tensor | None, cache: Cache
    ) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.width // self.heads))

        q, k, v = (heads(F.linear(n, self._matrix(f"{attn}c_{part}.weight"))) for part in "qkv")
        if attn + "triple_gate.weight" in self.tensors:
            local, remote, token = self._gates(attn + "triple_gate.weight", n).chunk(3, dim=2)
            k, v = local * k, local * v
            if memory is not None:
                k = k + remote * heads(F.linear(memory, self._matrix(f"interleaved_key_projections.{i}.W_v.weight")))
                v = v + remote * heads(F.linear(memory, self._matrix(f"interleaved_projections.{i}.W_v.weight")))
            v = v + token * heads(self._rows(f"interleaved_init_value_embeds.{i}.weight", tokens))
        elif attn + "ve_gate.weight" in self.tensors:
            v = v + self._gates(attn + "ve_gate.weight", n) * heads(self._rows(f"value_embeds.{i}.weight", tokens))
        places = torch.arange(start, start + n.shape[1])
        q, k = _norm(_rotate(q, places)), _norm(_rotate(k, places))
        if i in cache:
            k, v = torch.cat([cache[i][0], k], dim=1), torch.cat([cache[i][1], v], dim=1)
        cache[i] = k, v
        back = places[:, None] - torch.arange(start + n.shape[1])
        short = self.pattern[i % len(self.pattern)] == "S" and i < self.layers - 1
        seen = (back >= 0) & (back <= (self.length // 2 if short else self.length))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=self.heads != self.kv_heads)
        return F.linear(mixed.transpose(1, 2).flatten(-2), self._matrix(attn + "c_proj.weight"))

    def _gates(self, name: str, n: Tensor) -> Tensor:
        weight = self._matrix(name)
        return 2 * torch.sigmoid(F.linear(n[..., : weight.shape[1]], weight))[..., None]


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions as the official code has them: halves, minus the usual angle, tables rounded to bfloat16."""
    half = x.shape[-1] // 2
    angles = torch.outer(places.float(), 1.0 / (10000 ** (torch.arange(0, x.shape[-1], 2).float() / x.shape[-1])))
    cos, sin = (f(angles).bfloat16().to(x.dtype)[None, :, None, :] for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
