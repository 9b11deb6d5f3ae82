"""One decoding step in hand-written kernels: the order of things, whatever the blocks are.

Parameters stay where they are; nothing is copied or packed, so an update is seen at once. Legend: B rows, D width,
L blocks, H query heads, G key/value heads, W head width, C slots of a cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.decoding.fast import launching
from lrt.decoding.fast.launching import EPS, Mix, Token, either
from lrt.decoding.fast.tiles import power, share_of
from lrt.decoding.one_position import attention_cut_of, keep_memory, separator_of
from lrt.decoding.state import DecodeState
from lrt.decoding.step import Stepper
from lrt.decoding.which_model import Decodes
from lrt.forward import Row


class Start(NamedTuple):
    """What the first kernel of a step is told about a decoder."""

    table: Tensor  # (V, D) of embedded tokens
    dtype: torch.dtype  # of the residual stream
    normed: bool  # embedded tokens are normed
    forward: bool  # a head turns as transformers has it
    rounded: bool  # cosines and sines are rounded to bfloat16
    factor: float = 1.0  # on embedded tokens, where they are not normed
    stretch: float = 1.0  # on cosines and sines


class Heads(NamedTuple):
    """What the attention of one block needs beside its projection."""

    heads: int  # H
    scale: float  # of the scores
    eps: float  # of the norms of heads
    gated: bool  # gates follow the projections
    normed: bool = False  # queries and keys are normed after they are turned, without a weight
    weights: tuple[Tensor, Tensor] | None = None  # (W,) each: queries and keys are normed before they are turned
    biases: tuple[Tensor | None, Tensor | None] = (None, None)  # of keys and values, which no gate multiplies
    table: Tensor | None = None  # (V, G W) values of tokens


class FusedStep(Stepper, ABC):
    """A step over the blocks of a model; a subclass says what each part of a block is.

    Args:
        model: a RecurrentDecoder.
        frequencies: (W / 2,) of RoPE, float32.
    """

    def __init__(self, model: Decodes, frequencies: Tensor) -> None:
        super().__init__(model)
        self.frequencies = frequencies

    # -------------------------------------------------------------- what a subclass says

    @property
    @abstractmethod
    def heads(self) -> int:
        """H."""

    @abstractmethod
    def start(self) -> Start:
        """What the first kernel is told."""

    @abstractmethod
    def attention(self, index: int, x: Tensor, shared: Any, state: DecodeState, token: Token) -> tuple[Tensor, Any]:
        """Attention (B, H W) of a block's input, and what blocks share of the received memory."""

    @abstractmethod
    def output(self, index: int, mixed: Tensor, residual: Tensor) -> Tensor:
        """The residual stream after the attention (B, D)."""

    @abstractmethod
    def feed_forward(self, index: int, x: Tensor, token: Token, *, mix: Mix, keep: bool) -> tuple[Tensor, Tensor]:
        """The next block's input (B, D), and where asked for the output h as it is."""

    def scales(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """What multiplies the residual stream and the embedded tokens at a block's entry; None = 1 and 0."""
        return None, None

    def share(self, token: Token) -> Any:
        """What is made of the received memory once for all blocks."""
        return None

    # -------------------------------------------------------------- the step

    @torch.no_grad()
    def step(
        self, state: DecodeState, tokens: Tensor, active: Tensor, *, row: Row | None = None, stop: int | None = None
    ) -> Tensor:
        model, start = self.plain, 0 if row is None else row.start
        stop = len(model.blocks) if stop is None else stop
        x, token = self._begin(state, tokens, active)
        if row is not None and start:
            x = self._enter(start, row.hidden[:, 0], token)
        shared, source = self.share(token), x
        for i in range(start, stop):
            mixed, shared = self.attention(i, x, shared, state, token)
            x = self.output(i, mixed, x)
            last = i + 1 == stop
            keep = not last and token.memory is not None and i + 1 == model.source
            mix = Mix() if last else self._mix(i + 1, token)
            x, hidden = self.feed_forward(i, x, token, mix=mix, keep=keep)
            source = hidden if keep else source if i + 1 != model.source else x
        if state.memory is not None and token.memory is not None:
            width = x.shape[1]
            given = source, state.memory, active, EPS
            launching.launch("memory_kernel", (len(x),), *given, K=width, BLOCK_K=power(width), num_warps=4)
            keep_memory(state)
        return x

    def _enter(self, index: int, hidden: Tensor, token: Token) -> Tensor:
        """The input of block ``index`` from the output (B, D) of the block before, which was not computed here."""
        scale, embedding_scale, gain = (None if s is None else s.to(hidden.dtype) for s in self._mix(index, token))
        if scale is not None:
            hidden = scale * hidden
        if embedding_scale is not None:
            hidden = hidden + embedding_scale * token.embedding
        return hidden if gain is None or token.memory is None else hidden + gain * token.memory

    def _mix(self, index: int, token: Token) -> Mix:
        model, scales = self.plain, self.scales(index)
        if token.memory is None or model.injection is None or index not in model.receivers:
            return Mix(*scales)
        place = model.receivers.index(index)
        return Mix(*scales, model.injection.gains[place : place + 1])

    def _begin(self, state: DecodeState, tokens: Tensor, active: Tensor) -> tuple[Tensor, Token]:
        """The first block's input, and what the blocks share; advances the lengths."""
        table, dtype, normed, forward, rounded, factor, stretch = self.start()
        rows, width, head_width = len(tokens), table.shape[1], 2 * len(self.frequencies)
        heads = -(-self.heads // 4) * 4  # a block's counters begin at 16 bytes
        x, embedding, received = (table.new_empty(rows, width, dtype=dtype) for _ in range(3))
        remembers = state.memory is not None and self.plain.recurrence is not None
        token = Token(
            tokens, embedding, received if remembers else None, tokens.new_empty(rows, dtype=torch.int32),
            table.new_empty(rows, 2, head_width, dtype=torch.float32),
            tokens.new_empty(rows, len(self.plain.blocks), heads, dtype=torch.int32), state.document_starts,
        )  # fmt: skip
        mix, separator, cut = self._mix(0, token), separator_of(self.plain), attention_cut_of(self.plain)
        counters = token.counters[0].numel()
        launching.launch(
            "start_kernel", (rows,), tokens, active, state.lengths, state.document_starts, table, self.frequencies,
            either(state.memory, x), *(either(s, x) for s in mix), embedding, x, received, token.positions,
            token.angles, token.counters, EPS, -1 if separator is None else separator, -1 if cut is None else cut,
            factor, stretch, K=width, W=head_width, COUNTERS=counters, SCALE=mix.scale is not None,
            EMBED=mix.embedding_scale is not None, INJECT=mix.gain is not None, MEMORY=remembers, NORM=normed,
            FORWARD=forward, ROUND=rounded, BLOCK_K=power(width), BLOCK_COUNTERS=power(counters), num_warps=4,
            first=True,
        )  # fmt: skip
        return x, token

    def attend(
        self, index: int, heads: Heads, projected: Tensor, gates: int, memory: tuple[Tensor, Tensor] | None,
        state: DecodeState, token: Token
    ) -> Tensor:  # fmt: skip
        """Attention (B, H W) of block ``index``, whose cache takes the fresh key and value.

        Args:
            index: of the block.
            heads: of its attention.
            projected: (B, N) query, key and value, from column ``gates`` on gates.
            gates: see there.
            memory: keys and values (B, G W) of the received memory.
            state: its caches.
            token: what the blocks share.
        """
        keys, values = state.keys[index], state.values[index]
        rows, slots, groups, width = keys.shape
        splits, share = share_of(rows * heads.heads, slots, width)
        out = keys.new_empty(rows, heads.heads * width)
        partial, summary = (keys.new_empty(rows * heads.heads * splits, n, dtype=torch.float32) for n in (width, 2))
        memory_key, memory_value = (projected, projected) if memory is None else memory
        weights = (out, out) if heads.weights is None else heads.weights
        key_bias, value_bias = (either(bias, out) for bias in heads.biases)
        launching.launch(
            "attention_kernel", (heads.heads, splits, rows), projected, memory_key, memory_value,
            either(heads.table, out), token.tokens, token.positions, token.starts, token.angles, keys, values, partial,
            summary, token.counters[:, index], out, *weights, key_bias, value_bias,
            projected.stride(0), memory_key.stride(0), token.counters.stride(0), heads.eps, heads.scale / math.log(2),
            H=heads.heads, G=groups, W=width, C=slots, SPLITS=splits, GATES=gates,
            GATED=heads.gated, MEMORY=memory is not None and heads.gated, TOKEN=heads.table is not None,
            QK_NORM=heads.normed, HEAD_NORM=heads.weights is not None, KV_BIAS=heads.biases[0] is not None,
            ROWS=max(1, min(share.slots, 256 * share.warps // width)), BLOCK_C=share.slots,
            BLOCK_SPLITS=power(splits), STAGES=share.stages, num_warps=share.warps, registers=share.registers,
        )  # fmt: skip
        return out
