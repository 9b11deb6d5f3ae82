"""The nanochat-style decoder: RoPE, QK-norm, relu^2 MLP, value embeddings, x_0 residual, softcap.

Legend: B batch, P positions of the pass, L blocks, D width, H query heads, G key/value heads,
K head width, V vocabulary. Source: docs/method.md, section 5; facts from the official code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from lrt.attention import causal_attention, gradient_spacing
from lrt.config import ModelConfig
from lrt.kernels.mixing import columns, mix, usable
from lrt.loss import Scorer, capped_logits, chunked_cross_entropy
from lrt.recurrence import Gate, plain_mix
from lrt.rotary import rope_tables, rotate
from lrt.tables import Table
from lrt.types import KV, Block, Device, Handed, KVStore, Later, MemoryInput, Mixed, Projection


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters; eps is the machine epsilon of the dtype."""
    return F.rms_norm(x, (x.shape[-1],))


class Context(NamedTuple):
    """What one block needs beside the hidden state; dimension 1 is positions, or 1 to broadcast."""

    cos: Tensor  # (1 or B, P, 1, K/2)
    sin: Tensor
    embedding: Tensor | None  # (B, P, D) x_0
    token_value: Any  # Tensor (B, P, G K) E_v[token], or None; before the block runs perhaps Later
    scale: Tensor | None  # (1, 1, 1) a
    embedding_scale: Tensor | None  # (1, 1, 1) b


class DecoderBlock(nn.Module):
    """One block: attention and MLP, both before a parameter-free RMSNorm.

    Args:
        config: the model's settings.
        layer: zero-based index, which decides window and value embedding.
        device, dtype: of the weights.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        width, kv_width = config.d_model, config.kv_heads * config.head_dim
        hidden = int(config.mlp_ratio * width)
        factory: Table = {"bias": False, "device": device, "dtype": dtype}
        self.head_dim = config.head_dim
        self.window = config.windows()[layer]
        self.qk_norm = config.qk_norm
        self.query = nn.Linear(width, config.heads * config.head_dim, **factory)
        self.key = nn.Linear(width, kv_width, **factory)
        self.value = nn.Linear(width, kv_width, **factory)
        self.output = nn.Linear(config.heads * config.head_dim, width, **factory)
        self.mlp_in = nn.Linear(width, hidden, **factory)
        self.mlp_out = nn.Linear(hidden, width, **factory)
        channels = config.gate_channels or width
        self.value_gate = (
            Gate(channels, config.kv_heads, device=device, dtype=dtype) if config.has_value_embedding(layer) else None
        )

    def enter(self, hidden: Tensor, context: Context) -> Tensor:
        if context.scale is not None:
            hidden = context.scale.to(hidden.dtype) * hidden
        if context.embedding is not None and context.embedding_scale is not None:
            hidden = hidden + context.embedding_scale.to(hidden.dtype) * context.embedding
        return hidden

    def project(self, hidden: Tensor, context: Context) -> Projection:
        normed = rms_norm(hidden)
        return Projection(normed, *self._heads(normed, self.query, self.key, self.value))

    def project_aligned(self, hidden: Tensor, context: Context, aligned: Tensor) -> Projection:
        """``project``, where keys and values read the normed input plus ``aligned`` (B, P, D);
        the norm has no weight."""
        normed = rms_norm(hidden)
        return Projection(
            normed, *self._heads(normed, self.query), *self._heads(normed + aligned, self.key, self.value)
        )

    def align(self) -> None:
        """Nothing to make ready: the norm has no weight."""

    def kv_bias(self) -> tuple[None, None]:
        return None, None

    def _heads(self, x: Tensor, *linears: nn.Linear) -> list[Tensor]:
        """What each linear makes of ``x`` (B, P, D), by head (B, P, heads, K)."""
        if len(linears) > 1 and x.shape[1] > 1 and all(map(_readable, linears)):
            # One product: the input is read once, and its gradient is one product too.
            # Not for single tokens, where copying weights costs.
            joint = F.linear(x, torch.cat([linear.weight for linear in linears]))
            parts: Sequence[Tensor] = joint.split([linear.out_features for linear in linears], dim=-1)
        else:
            parts = [linear(x) for linear in linears]
        return [part.unflatten(-1, (-1, self.head_dim)) for part in parts]

    def can_mix(self, hidden: Tensor) -> bool:
        """Whether ``project_mixed`` runs on such a hidden state."""
        return usable(hidden, self.head_dim) and all(map(_readable, (self.query, self.key, self.value)))

    def project_mixed(
        self, hidden: Tensor, context: Context, *, gate: Gate | None, memory_key: Tensor | None,
        memory_value: Tensor | None, hand_on: int = 0,
    ) -> Mixed:  # fmt: skip
        """``project``, the gates of the memory, and ``finish_kv`` at once: one product and one kernel.

        Args:
            hidden: (B, P, D), after ``enter``.
            context: of these positions.
            gate: the local and remote gates; None: nothing but this block's own keys and values.
            memory_key, memory_value: (B, P, G, K); None = zero.
            hand_on: above 0, later passes read keys and values: give their gradients paths of their own;
                see ``lrt.kernels.mixing.mix``.
        """
        token_value = None if self.value_gate is None else context.token_value
        gates = [g.weight for g in (gate, None if token_value is None else self.value_gate) if g is not None]
        weights = [self.query.weight, self.key.weight, self.value.weight]
        weights += [F.pad(weight, (0, hidden.shape[-1] - weight.shape[1])) for weight in gates]
        heads, groups = (linear.out_features // self.head_dim for linear in (self.query, self.key))
        used = sum(len(weight) for weight in weights)
        total = columns(heads, groups, self.head_dim, local=gate is not None, token=token_value is not None)
        if total > used:
            weights.append(hidden.new_zeros(total - used, hidden.shape[-1]))
        return mix(
            F.linear(rms_norm(hidden), torch.cat(weights)), cos=context.cos, sin=context.sin, heads=heads,
            groups=groups, local=gate is not None, norm=self.qk_norm, memory_key=memory_key, memory_value=memory_value,
            token_value=token_value, hand_on=hand_on,
        )  # fmt: skip

    def finish_kv(self, projection: Projection | Mixed, context: Context) -> KV:
        if isinstance(projection, Mixed):
            return KV(projection.key, projection.value)
        value = projection.value
        if self.value_gate is not None and context.token_value is not None:
            value = value + self.value_gate(projection.normed) * context.token_value.unflatten(-1, value.shape[-2:])
        return KV(self._rotate(projection.key, context), value)

    def attend(
        self, hidden: Tensor, projection: Projection | Mixed, context: Context, kv: KVStore | None
    ) -> tuple[Tensor, Tensor | Handed, Tensor | Handed]:
        key, value = self.finish_kv(projection, context)
        query = projection.query if isinstance(projection, Mixed) else self._rotate(projection.query, context)
        scale = self.head_dim**-0.5
        if kv is None:
            mixed = causal_attention(query, key, value, window=self.window, scale=scale)
        else:
            mixed = kv.attend(query, key, value, window=self.window, scale=scale, softcap=None)
        hidden = hidden + self.output(mixed.flatten(-2))
        hidden = hidden + self.mlp_out(F.relu(self.mlp_in(rms_norm(hidden))).square())
        if isinstance(projection, Mixed) and projection.key_path is not None and projection.value_path is not None:
            return hidden, Handed(key.detach(), projection.key_path), Handed(value.detach(), projection.value_path)
        return hidden, key, value

    def _rotate(self, x: Tensor, context: Context) -> Tensor:
        rotated = rotate(x, context.cos, context.sin)
        if self.qk_norm:
            rotated = rms_norm(rotated.to(x.dtype))
        return rotated.to(x.dtype)

    @torch.no_grad()
    def init_weights(self, *, generator: torch.Generator | None = None) -> None:
        bound = (3 / self.query.in_features) ** 0.5
        for linear in (self.query, self.key, self.value, self.mlp_in):
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        for linear in (self.output, self.mlp_out):
            nn.init.zeros_(linear.weight)
        if self.value_gate is not None:
            self.value_gate.init_weights()


def fused_mix(
    block: Block, hidden: Tensor, memory: MemoryInput | None, context: Context, *, gate: Gate | None,
    kv: KVStore | None, read_later: bool,
) -> Projection | Mixed:  # fmt: skip
    """``plain_mix`` of a native block as one product and one kernel, wherever that runs:
    its ``lrt.recurrence.Mixer``."""
    assert isinstance(block, DecoderBlock)
    if not block.can_mix(hidden):
        return plain_mix(block, hidden, memory, context, gate=gate, kv=kv, read_later=read_later)
    key, value = (None, None) if gate is None or memory is None else (memory.key, memory.value)
    hand_on = gradient_spacing(kv) if read_later else 0
    return block.project_mixed(hidden, context, gate=gate, memory_key=key, memory_value=value, hand_on=hand_on)


def _readable(linear: nn.Module) -> bool:
    """Whether a weight may be read; a linear that something wraps, or that has hooks, must be called."""
    return type(linear) is nn.Linear and not linear._forward_pre_hooks and not linear._forward_hooks


def lookup(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table (V, D) in another dtype."""
    return F.embedding(tokens, weight).to(dtype)


Lookup: TypeAlias = Callable[[Tensor, Tensor, torch.dtype], Tensor]  # (tokens, weight, dtype of the rows) -> rows


class TokenTable(nn.Embedding):
    """An embedding whose rows may come in another dtype than the table's.

    A table in float32 costs no copy in half precision, and its gradient is summed in float32 where it stays.
    """

    def __init__(self, rows: int, width: int, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(rows, width, device=device, dtype=dtype)
        self.output_dtype: torch.dtype | None = None  # None: the table's
        self.lookup: Lookup = lookup

    def read_by(self, lookup: Lookup) -> None:
        """Have rows read by another function than ``lookup``, such as a compiled one."""
        self.lookup = lookup

    def read_as(self, dtype: torch.dtype) -> None:
        """Have rows come in another dtype than the table's."""
        self.output_dtype = dtype

    def forward(self, tokens: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Rows of the tokens (B, P) -> (B, P, D).

        Args:
            anchor: a scalar whose gradient, zero, comes right after the table's; the plan of several GPUs needs one.
        """
        rows = self.lookup(tokens, self.weight, self.output_dtype or self.weight.dtype)
        return rows if anchor is None else _Anchored.apply(rows, anchor)


class _Anchored(torch.autograd.Function):
    """The first argument; the second has a gradient too."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, anchor: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad.new_zeros((), dtype=torch.float32)


class Head(nn.Linear):
    """Untied head with a softcap; rows beyond the vocabulary are padding and never scored.

    Args:
        config: the model's settings.
        loss_chunk: tokens whose logits are held at once by ``loss``; 0 = all.
        device, dtype: of the weight (padded V, D).
    """

    def __init__(
        self, config: ModelConfig, *, loss_chunk: int = 8192, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config.d_model, config.padded_vocab, bias=False, device=device, dtype=dtype)
        self.vocab_size, self.softcap, self.loss_chunk = config.vocab_size, config.softcap, loss_chunk
        self.scorer = Scorer()

    def score_by(self, scorer: Scorer) -> None:
        """Have the chunks of ``loss`` computed by other functions, such as compiled ones."""
        self.scorer = scorer

    def forward(self, normed: Tensor) -> Tensor:
        """(B, P, D) -> logits (B, P, V), in float32 at least."""
        return capped_logits(normed, self.weight[: self.vocab_size], self.softcap)

    def loss(self, normed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of nats and nats of every position, as ``chunked_cross_entropy``."""
        weight = self.weight[: self.vocab_size]
        return chunked_cross_entropy(
            normed, weight, targets, softcap=self.softcap, chunk=self.loss_chunk, scorer=self.scorer
        )


class Decoder(nn.Module):
    """The decoder without its blocks: embeddings, scales and head.

    Args:
        config: the model's settings.
        device, dtype: of the weights.
        loss_chunk: tokens whose logits are held at once; 0 = all.
    """

    def __init__(
        self, config: ModelConfig, *, device: Device = None, dtype: torch.dtype | None = None, loss_chunk: int = 8192
    ) -> None:
        super().__init__()
        self.config = config
        self.width, self.kv_heads, self.head_dim = config.d_model, config.kv_heads, config.head_dim
        self.vocab_size = config.vocab_size
        factory: Table = {"device": device, "dtype": dtype}
        self.embedding = TokenTable(config.padded_vocab, self.width, **factory)
        layers = range(config.n_layers)
        kv_width = self.kv_heads * self.head_dim
        self.value_embeddings = nn.ModuleDict(
            {
                str(i): TokenTable(config.padded_vocab, kv_width, **factory)
                for i in layers
                if config.has_value_embedding(i)
            }
        )
        self.residual_scales = nn.Parameter(torch.empty(config.n_layers, **factory)) if config.residual_scales else None
        self.embedding_scales = (
            nn.Parameter(torch.empty(config.n_layers, **factory)) if config.embedding_residual else None
        )
        self.head = Head(config, loss_chunk=loss_chunk, **factory)

    @property
    def attention_reset(self) -> int | None:
        """Token at which attention is cut; None = none."""
        return self.config.attention_reset

    def make_blocks(self, *, device: Device = None, dtype: torch.dtype | None = None) -> list[DecoderBlock]:
        """The blocks that belong to this decoder, not registered here."""
        return [DecoderBlock(self.config, i, device=device, dtype=dtype) for i in range(self.config.n_layers)]

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Context, ...]]:
        """Hidden state (B, P, D) and one context per block.

        Args:
            tokens: (B, P) ids.
            positions: (P,) or (B, P).
        """
        hidden = rms_norm(self.embedding(tokens))
        exact = torch.promote_types(hidden.dtype, torch.float32)
        table = torch.bfloat16 if self.config.rope_dtype == "bfloat16" else exact
        cos, sin = rope_tables(positions, self.head_dim, base=self.config.rope_base, dtype=table)
        layers = range(self.config.n_layers)
        scales = _per_block(self.residual_scales, self.config.n_layers)
        embedding_scales = _per_block(self.embedding_scales, self.config.n_layers)
        # Another tensor object: a compiled block that receives one tensor twice would be a graph of its own.
        x0 = hidden.view_as(hidden) if self.embedding_scales is not None else None
        tables = {int(i): partial(table, tokens) for i, table in self.value_embeddings.items()}
        token_values = {i: Later(look_up) if torch.is_grad_enabled() else look_up() for i, look_up in tables.items()}
        return hidden, tuple(Context(cos, sin, x0, token_values.get(i), scales[i], embedding_scales[i]) for i in layers)

    def final_norm(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden)

    def score_by(self, scorer: Scorer, *, apart: bool) -> None:
        """As ``Head.score_by``; the head's own call is what a plan gathers, so ``apart`` changes nothing."""
        self.head.score_by(scorer)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, P, V) in float32 at least, of the last block's output."""
        return self.head(rms_norm(hidden))

    def loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of nats, and the nats of every position (B, P), of the last block's output."""
        return self.head.loss(rms_norm(hidden), targets)

    @torch.no_grad()
    def init_weights(self, *, generator: torch.Generator | None = None) -> None:
        bound = (3 / self.width) ** 0.5
        nn.init.normal_(self.embedding.weight, std=1.0, generator=generator)
        nn.init.normal_(self.head.weight, std=0.001, generator=generator)
        for table in self.value_embeddings.parameters():
            nn.init.uniform_(table, -bound, bound, generator=generator)
        if self.residual_scales is not None:
            self.residual_scales.fill_(1.0)
        if self.embedding_scales is not None:
            self.embedding_scales.fill_(0.1)


def _per_block(scales: Tensor | None, n_layers: int) -> tuple[Tensor | None, ...]:
    """One (1, 1, 1) tensor a block, so that a block receives its scale as data."""
    return (None,) * n_layers if scales is None else scales.view(-1, 1, 1, 1).unbind(0)
