"""A native model as one decoding step wants it: the same blocks, one token a row, in five kernels a block.

``fuse`` gives a decoder that does a whole step (``absorb``) and makes logits. Parameters stay where they
are; nothing is copied or packed, so an update is seen at once.

Legend: B rows, D width, L blocks, H query heads, G key/value heads, W head width, C slots of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.backbone import Decoder
from lrt.config import RecurrenceConfig
from lrt.decoding.state import DecodeState
from lrt.decoding.step import attention_cut_of, keep_memory, separator_of
from lrt.forward import Row

EPS = torch.finfo(torch.float32).eps  # of every norm, in half precision too


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


# ------------------------------------------------------------------ choices


class Tile(NamedTuple):
    """Work of one program of a product: outputs, inputs a turn, warps, turns in flight."""

    outputs: int
    inputs: int
    warps: int
    stages: int = 1


class Share(NamedTuple):
    """How attention is divided: slots a turn, warps, turns in flight, programs wanted in all,
    registers a thread at most."""

    slots: int
    warps: int
    stages: int
    programs: int
    registers: int | None = None


# Each table: up to these numbers, this choice; the first line that fits counts.
# Swept on one NVIDIA H200 at context 1024 in
# whole steps: 1, 8 and 64 rows of 20 blocks of 1280, 8 rows of 12 blocks of 768 (docs/log.md, 9 and 14).
ANY = 1 << 40
VECTOR_OUTPUTS = ((ANY, 2047, 4), (ANY, ANY, 2))  # one row: outputs, inputs -> outputs of a program
MATRIX_TILES = (  # rows, outputs, inputs
    (16, 2047, 2047, Tile(16, 128, 2, 5)),
    (16, 2047, ANY, Tile(16, 64, 2, 6)),
    (16, 16384, 1023, Tile(32, 128, 4, 3)),
    (16, ANY, ANY, Tile(64, 64, 4, 4)),
    (ANY, 2047, ANY, Tile(16, 128, 4, 3)),
    (ANY, 16384, ANY, Tile(32, 128, 4, 3)),
    (ANY, ANY, ANY, Tile(64, 64, 4, 4)),
)
SHARES = (  # rows x heads, slots of the cache
    (32, ANY, Share(64, 4, 1, 264)),
    (ANY, 4096, Share(32, 4, 2, 660, 96)),
    (ANY, ANY, Share(32, 4, 3, 660, 96)),
)
HELD = 40  # weights of one output that a thread holds: more warps otherwise
AHEAD = 1 << 24  # bytes of the MLP's weights that the output projection of a single row brings to L2


def tile_of(rows: int, outputs: int, width: int) -> Tile:
    """The tile of a product of (rows, width) with (outputs, width).

    One row is a sum in which every thread keeps the numbers that it loads, 8 of each 256 inputs a warp; more
    rows are a matrix product.
    """
    if rows == 1:
        wanted = next(choice for n, k, choice in VECTOR_OUTPUTS if outputs <= n and width <= k)
        warps = min(8, _power(-(-width // (32 * HELD))))
        held = -(-width // (256 * warps)) * 8
        return Tile(min(wanted, _power(-(-wanted * HELD // held))), 256 * warps, warps)
    tile = next(tile for r, n, k, tile in MATRIX_TILES if rows <= r and outputs <= n and width <= k)
    return tile._replace(inputs=max(16, min(tile.inputs, _power(width))))


def share_of(pairs: int, slots: int, width: int) -> tuple[int, Share]:
    """Programs that divide the slots of each of ``pairs`` (row, head) among them, and how each goes about it."""
    share = next(share for n, most, share in SHARES if pairs <= n and slots <= most)
    share = share._replace(slots=min(128, max(16, share.slots * 128 // width)))
    return max(1, min(-(-(slots - 1) // share.slots), share.programs // pairs, 64)), share


# ------------------------------------------------------------------ the step


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
            launch(
                "memory_kernel",
                (len(x),),
                source,
                state.memory,
                active,
                EPS,
                K=width,
                BLOCK_K=_power(width),
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
        launch(
            "start_kernel", (rows,), tokens, active, state.lengths, state.document_starts, table, self.frequencies, _or(state.memory, x),
            *(_or(s, x) for s in mix), embedding, x, received, token.positions, token.angles, token.counters,
            EPS, -1 if separator is None else separator, -1 if cut is None else cut,
            K=width, W=head_width, COUNTERS=counters, SCALE=mix.scale is not None, EMBED=mix.embedding_scale is not None,
            INJECT=mix.gain is not None, MEMORY=remembers, ROUND=self.config.rope_dtype == "bfloat16",
            BLOCK_K=_power(width), BLOCK_COUNTERS=_power(counters), num_warps=4, first=True,
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
        launch(
            "attention_kernel", (heads, splits, rows), projected, memory_key, memory_value, table, token.tokens,
            token.positions, token.starts, token.angles, keys, values, partial, summary, token.counters[:, index], out,
            projected.stride(0), memory_key.stride(0), token.counters.stride(0), EPS, width**-0.5 / math.log(2),
            H=heads, G=groups, W=width, C=slots, SPLITS=splits, GATES=gates,
            GATED=wrapper.gate is not None, MEMORY=memory is not None and wrapper.gate is not None, TOKEN=embedded,
            QK_NORM=wrapper.block.qk_norm, ROWS=max(1, min(share.slots, 256 * share.warps // width)), BLOCK_C=share.slots,
            BLOCK_SPLITS=_power(splits), STAGES=share.stages, num_warps=share.warps, registers=share.registers,
        )  # fmt: skip
        return out


# ------------------------------------------------------------------ launches


def linear(
    x: Tensor, layers: Sequence[Any], *, fed: tuple[int, int] = (0, 0), token: Token | None = None, mix: Mix = Mix(), norm: bool = False,
    relu2: bool = False, residual: Tensor | None = None, cap: float | None = None, keep: bool = False, dtype: torch.dtype | None = None,
    aligned: bool = False, ahead: Tensor | None = None,
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

    Returns:
        (B, N) result or next input, N the sum of n_i, and h when asked for.
    """
    weights = tuple(getattr(layer, "weight", layer) for layer in layers if layer is not None)
    embedding, memory = (None, None) if token is None else (token.embedding, token.memory)
    sizes, widths = tuple(w.shape[0] for w in weights), tuple(w.shape[1] for w in weights)
    (rows, width), outputs = x.shape, sum(sizes)
    stride = -(-outputs // 16) * 16 if aligned else outputs
    out = x.new_empty(rows, stride, dtype=dtype or x.dtype)[:, :outputs]
    hidden = x.new_empty(rows, outputs) if keep else out
    tile, block, name, pack = tile_of(rows, outputs, width), 1, "vector_kernel", 1
    if rows > 1:
        block, name = min(64, max(16, _power(rows))), "matrix_kernel"
    elif x.dtype == torch.bfloat16 and all(k % 2 == 0 for k in (width, *widths)):
        pack = 2  # pairs of numbers as one int32
        x, weights = x.view(torch.int32), tuple(w.view(torch.int32) for w in weights)
        memory = memory.view(torch.int32) if fed[0] < fed[1] and memory is not None else memory
    lines = 0 if ahead is None or rows > 1 else min(AHEAD, ahead.nbytes) // 128
    launch(
        name, (sum(-(-n // tile.outputs) for n in sizes), -(-rows // block)),
        x, _or(memory, x), weights, _or(residual, x), _or(embedding, x), *(_or(s, x) for s in mix), hidden, out, _or(ahead, x),
        rows, EPS, cap or 1.0, SIZES=sizes, WIDTHS=tuple(k // pack for k in widths), FED=fed, K=width // pack, STRIDE=stride,
        NORM=norm, RELU2=relu2, CAP=cap is not None, RESIDUAL=residual is not None, KEEP=keep,
        SCALE=mix.scale is not None, EMBED=mix.embedding_scale is not None, INJECT=mix.gain is not None, AHEAD=lines,
        BLOCK_M=block, BLOCK_N=tile.outputs, BLOCK_K=tile.inputs // pack, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, hidden


def launch(
    name: str, grid: tuple[int, ...], *args: Any, first: bool = False, registers: int | None = None, **settings: Any
) -> None:
    """Run a kernel behind the one in front; the ``first`` of a step waits for whatever came before."""
    from lrt.decoding.fast import one_token_triton

    device = args[0].device
    dependent = device.type == "cuda" and _overlaps(device)
    if dependent and not first:
        settings["launch_pdl"] = True
    if dependent and registers is not None:
        settings["maxnreg"] = registers
    getattr(one_token_triton, name)[grid](*args, DEPENDENT=dependent, **settings)


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front has ended: NVIDIA GPUs from Hopper on."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
