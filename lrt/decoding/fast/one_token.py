"""A native model as one decoding step wants it: the same blocks, one token per row, in five kernels per block.

``fuse`` gives a decoder that does a whole step (``absorb``) and makes logits. Parameters stay where they
are; nothing is copied or packed, so an update is seen at once.

Legend: B rows, D width, L blocks, H query heads, G key/value heads, W head width, C slots of a cache.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lrt.backbone import Decoder
from lrt.config import RecurrenceConfig
from lrt.decoding.fast import launching
from lrt.decoding.fast.launching import EPS, Mix, Token, either, linear
from lrt.decoding.fast.tiles import power, share_of
from lrt.decoding.state import DecodeState
from lrt.decoding.step import attention_cut_of, keep_memory, separator_of
from lrt.forward import Row


def can_fuse(model: Any) -> bool:
    """Whether the kernels fit: a native model of a power-of-two head width with projections of the memory's own,
    and triton installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    backbone = model.backbone
    if type(backbone) is not Decoder or not _knows(model.recurrence):
        return False
    width = backbone.head_dim
    return (
        width >= 16
        and width & (width - 1) == 0
        and next(model.parameters()).dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def _knows(recurrence: RecurrenceConfig | None) -> bool:
    """Whether the kernels compute this recurrence; of an aligned projection and a projected residual they know
    nothing."""
    return recurrence is None or recurrence.projection == "separate" and recurrence.residual != "projected"


def fuse(model: Any) -> FusedDecoder:
    """The model's step for single tokens; same parameters, other kernels."""
    return FusedDecoder(model)


class FusedDecoder:
    """A native model's step in hand-written kernels.

    Args:
        model: for which ``can_fuse`` holds.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.backbone = model, self
        self.config, self.vocab_size = model.backbone.config, model.backbone.vocab_size
        channels = torch.arange(
            0, model.backbone.head_dim, 2, dtype=torch.float32, device=model.backbone.head.weight.device
        )
        self.frequencies = 1.0 / (self.config.rope_base ** (channels / model.backbone.head_dim))

    @torch.no_grad()
    def absorb(
        self, state: DecodeState, tokens: Tensor, active: Tensor, *, row: Row | None = None, stop: int | None = None
    ) -> Tensor:
        """Let active rows consume a token; as ``lrt.decoding.step.absorb``."""
        model, start = self.model, 0 if row is None else row.start
        stop = len(model.blocks) if stop is None else stop
        x, token = self._start(state, tokens, active)
        if row is not None and start:
            x = self._enter(start, row.hidden[:, 0], token)
        shared, source = None, x
        for i, wrapper in islice(enumerate(model.blocks), start, stop):
            receives = token.memory is not None and i in model.receivers
            projection = wrapper.projection
            if projection is None and receives and shared is None:
                projection = model.memory_projection  # the first receiver projects for all
            fed = (projection.key, projection.value) if receives and projection is not None else ()
            layers = (
                wrapper.block.query,
                wrapper.block.key,
                wrapper.block.value,
                *fed,
                wrapper.gate,
                wrapper.block.value_gate,
            )
            projected, _ = linear(x, layers, fed=(3, 3 + len(fed)), token=token, norm=True, aligned=True)
            if fed:
                begin, size = sum(layer.weight.shape[0] for layer in layers[:3]), fed[0].weight.shape[0]
                shared = projected[:, begin : begin + size], projected[:, begin + size : begin + 2 * size]
            gates = sum(layer.weight.shape[0] for layer in layers[: 3 + len(fed)])
            mixed = self._attend(i, projected, gates, shared if receives else None, state, token)
            x, _ = linear(mixed, [wrapper.block.output], residual=x, ahead=wrapper.block.mlp_in.weight)
            inner, _ = linear(x, [wrapper.block.mlp_in], norm=True, relu2=True)
            last = i + 1 == stop
            keep = not last and token.memory is not None and i + 1 == model.source
            x, hidden = linear(
                inner,
                [wrapper.block.mlp_out],
                residual=x,
                token=token,
                mix=Mix() if last else self._mix(i + 1, token),
                keep=keep,
            )
            source = hidden if keep else source if i + 1 != model.source else x
        if state.memory is not None and token.memory is not None:
            width = x.shape[1]
            launching.launch(
                "memory_kernel",
                (len(x),),
                source,
                state.memory,
                active,
                EPS,
                K=width,
                BLOCK_K=power(width),
                num_warps=4,
            )
            keep_memory(state)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, 1, V) in float32 of the last block's output (B, 1, D)."""
        head = self.model.backbone.head
        return linear(hidden[:, 0], [head.weight[: head.vocab_size]], norm=True, cap=head.softcap, dtype=torch.float32)[
            0
        ][:, None]

    def _enter(self, index: int, hidden: Tensor, token: Token) -> Tensor:
        """The input of block ``index`` from the output (B, D) of the block before, which was not computed here."""
        scale, embedding_scale, gain = (None if s is None else s.to(hidden.dtype) for s in self._mix(index, token))
        if scale is not None:
            hidden = scale * hidden
        if embedding_scale is not None:
            hidden = hidden + embedding_scale * token.embedding
        return hidden if gain is None or token.memory is None else hidden + gain * token.memory

    def _mix(self, index: int, token: Token) -> Mix:
        model, backbone = self.model, self.model.backbone
        scales = [
            None if s is None else s[index : index + 1] for s in (backbone.residual_scales, backbone.embedding_scales)
        ]
        if token.memory is None or model.injection is None or index not in model.receivers:
            return Mix(*scales)
        place = model.receivers.index(index)
        return Mix(scales[0], scales[1], model.injection.gains[place : place + 1])

    def _start(self, state: DecodeState, tokens: Tensor, active: Tensor) -> tuple[Tensor, Token]:
        """The first block's input, and what the blocks share; advances the lengths."""
        backbone, table = self.model.backbone, self.model.backbone.embedding.weight
        rows, width, head_width = len(tokens), table.shape[1], backbone.head_dim
        heads = -(-self.config.heads // 4) * 4  # a block's counters begin at 16 bytes
        x, embedding, received = (table.new_empty(rows, width, dtype=backbone.embedding.output_dtype) for _ in range(3))
        remembers = state.memory is not None and self.model.recurrence is not None
        token = Token(
            tokens, embedding, received if remembers else None, tokens.new_empty(rows, dtype=torch.int32),
            table.new_empty(rows, 2, head_width, dtype=torch.float32), tokens.new_empty(rows, len(self.model.blocks), heads, dtype=torch.int32),
            state.document_starts,
        )  # fmt: skip
        mix, separator, cut = self._mix(0, token), separator_of(self.model), attention_cut_of(self.model)
        counters = token.counters[0].numel()
        launching.launch(
            "start_kernel", (rows,), tokens, active, state.lengths, state.document_starts, table, self.frequencies, either(state.memory, x),
            *(either(s, x) for s in mix), embedding, x, received, token.positions, token.angles, token.counters,
            EPS, -1 if separator is None else separator, -1 if cut is None else cut,
            K=width, W=head_width, COUNTERS=counters, SCALE=mix.scale is not None, EMBED=mix.embedding_scale is not None,
            INJECT=mix.gain is not None, MEMORY=remembers, ROUND=self.config.rope_dtype == "bfloat16",
            BLOCK_K=power(width), BLOCK_COUNTERS=power(counters), num_warps=4, first=True,
        )  # fmt: skip
        return x, token

    def _attend(
        self,
        index: int,
        projected: Tensor,
        gates: int,
        memory: tuple[Tensor, Tensor] | None,
        state: DecodeState,
        token: Token,
    ) -> Tensor:
        """Attention (B, H W) of block ``index``, whose cache takes the fresh key and value.

        Args:
            index: of the block.
            projected: (B, N) query, key and value, from column ``gates`` on gates.
            gates: see there.
            memory: keys and values (B, G W) of the received memory.
            state: its caches.
            token: what the blocks share.
        """
        wrapper, keys, values = self.model.blocks[index], state.keys[index], state.values[index]
        rows, slots, groups, width = keys.shape
        heads = self.config.heads
        splits, share = share_of(rows * heads, slots, width)
        out = keys.new_empty(rows, heads * width)
        partial, summary = (keys.new_empty(rows * heads * splits, n, dtype=torch.float32) for n in (width, 2))
        embedded = wrapper.block.value_gate is not None
        table = self.model.backbone.value_embeddings[str(index)].weight if embedded else out
        memory_key, memory_value = (projected, projected) if memory is None else memory
        launching.launch(
            "attention_kernel", (heads, splits, rows), projected, memory_key, memory_value, table, token.tokens,
            token.positions, token.starts, token.angles, keys, values, partial, summary, token.counters[:, index], out,
            projected.stride(0), memory_key.stride(0), token.counters.stride(0), EPS, width**-0.5 / math.log(2),
            H=heads, G=groups, W=width, C=slots, SPLITS=splits, GATES=gates,
            GATED=wrapper.gate is not None, MEMORY=memory is not None and wrapper.gate is not None, TOKEN=embedded,
            QK_NORM=wrapper.block.qk_norm, ROWS=max(1, min(share.slots, 256 * share.warps // width)), BLOCK_C=share.slots,
            BLOCK_SPLITS=power(splits), STAGES=share.stages, num_warps=share.warps, registers=share.registers,
        )  # fmt: skip
        return out
