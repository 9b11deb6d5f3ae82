"""A native model as one decoding step wants it: the same blocks, one token per row, in five kernels per block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrt.backbone import Decoder
from lrt.config import RecurrenceConfig
from lrt.decoding.fast.fused import FusedStep, Heads, Start
from lrt.decoding.fast.launching import EPS, Mix, Token, linear
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes


def can_fuse(model: Decodes) -> bool:
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


def fuse(model: Decodes) -> FusedDecoder:
    """The model's step for single tokens; same parameters, other kernels."""
    return FusedDecoder(model)


class FusedDecoder(FusedStep):
    """A native model's step in hand-written kernels.

    Args:
        model: for which ``can_fuse`` holds.
    """

    def __init__(self, model: Decodes) -> None:
        backbone = model.backbone
        channels = torch.arange(0, backbone.head_dim, 2, dtype=torch.float32, device=backbone.head.weight.device)
        frequencies = 1.0 / (backbone.config.rope_base ** (channels / backbone.head_dim))
        super().__init__(model, frequencies)
        self.config = backbone.config

    def start(self) -> Start:
        embedding = self.plain.backbone.embedding
        dtype = embedding.output_dtype or embedding.weight.dtype
        return Start(embedding.weight, dtype, normed=True, forward=False, rounded=self.config.rope_dtype == "bfloat16")

    @property
    def heads(self) -> int:
        return self.config.heads

    def scales(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        backbone = self.plain.backbone
        residual, embedding = (
            None if scales is None else scales[index : index + 1]
            for scales in (backbone.residual_scales, backbone.embedding_scales)
        )
        return residual, embedding

    def attention(self, index: int, x: Tensor, shared: Any, state: DecodeState, token: Token) -> tuple[Tensor, Any]:
        model, wrapper = self.plain, self.plain.blocks[index]
        block = wrapper.block
        receives = token.memory is not None and index in model.receivers
        projection = wrapper.projection
        if projection is None and receives and shared is None:
            projection = model.memory_projection  # the first receiver projects for all
        fed = (projection.key, projection.value) if receives and projection is not None else ()
        layers = (block.query, block.key, block.value, *fed, wrapper.gate, block.value_gate)
        projected, _ = linear(x, layers, fed=(3, 3 + len(fed)), token=token, norm=True, aligned=True)
        if fed:
            begin, size = sum(layer.weight.shape[0] for layer in layers[:3]), fed[0].weight.shape[0]
            shared = projected[:, begin : begin + size], projected[:, begin + size : begin + 2 * size]
        gates = sum(layer.weight.shape[0] for layer in layers[: 3 + len(fed)])
        heads = Heads(
            self.config.heads, block.head_dim**-0.5, EPS, gated=wrapper.gate is not None, normed=block.qk_norm,
            table=None if block.value_gate is None else model.backbone.value_embeddings[str(index)].weight,
        )  # fmt: skip
        return self.attend(index, heads, projected, gates, shared if receives else None, state, token), shared

    def output(self, index: int, mixed: Tensor, residual: Tensor) -> Tensor:
        block = self.plain.blocks[index].block
        return linear(mixed, [block.output], residual=residual, ahead=block.mlp_in.weight)[0]

    def feed_forward(self, index: int, x: Tensor, token: Token, *, mix: Mix, keep: bool) -> tuple[Tensor, Tensor]:
        block = self.plain.blocks[index].block
        inner, _ = linear(x, [block.mlp_in], norm=True, relu2=True)
        return linear(inner, [block.mlp_out], residual=x, token=token, mix=mix, keep=keep)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) in float32 of the last block's output (B, D)."""
        head = self.plain.backbone.head
        weights = [head.weight[: head.vocab_size]]
        return linear(hidden, weights, norm=True, cap=head.softcap, dtype=torch.float32)[0]
