"""The settings of a model, the decoder's and the recurrence's, as frozen dataclasses; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lrt.config.ranges import choice_errors, entry_errors, raise_all, range_errors


@dataclass(frozen=True, kw_only=True)
class RecurrenceConfig:
    """How the previous token's latent state enters the decoder (docs/method.md, section 1)."""

    sharing: Literal["shared", "layerwise"] = "shared"  # one pair of memory projections, or one per block
    # projections of the memory's own, or one map into the space that each block's own projections read
    projection: Literal["separate", "aligned"] = "separate"
    # block whose output is the memory: 1..L, a fraction of L, None = round(2L/3) or the first receiver
    source_layer: int | float | None = None
    kv_projection: bool = True  # memory enters keys and values
    # memory is added to the block's input; projected: a map of it, as large as that input
    residual: bool | Literal["projected"] = True
    gate_channels: int | None = None  # channels that the gates read; None = all
    blocks: tuple[int, ...] | None = None  # blocks that receive memory, 1..L; None = all
    memory_norm: Literal["rms", "final"] = "rms"  # parameter-free RMSNorm, or the backbone's own final norm
    separator: int | None = None  # token id at which the received memory is zero
    # initial values: paper is for training from scratch; identity leaves a pretrained model unchanged
    init: Literal["paper", "identity"] = "paper"

    def __post_init__(self) -> None:
        if self.blocks is not None:
            object.__setattr__(
                self, "blocks", tuple(self.blocks) if isinstance(self.blocks, (list, tuple)) else (self.blocks,)
            )
        raise_all(_recurrence_errors(self))

    def source_index(self, n_layers: int) -> int:
        """Number of the source block, 1..n_layers.

        Raises:
            ValueError: the block does not exist in a model of ``n_layers`` blocks, or lies below every block that
                receives memory.
        """
        source, first = self.source_layer, 1 + min(self.block_indices(n_layers))
        if source is None:
            return max(round(2 * n_layers / 3), first)
        number = min(n_layers, max(1, round(source * n_layers))) if isinstance(source, float) else source
        if not 1 <= number <= n_layers:
            raise ValueError(
                f"recurrence.source_layer = {source}, but the model has {n_layers} blocks: "
                f"use 1..{n_layers}, or a fraction such as 0.67"
            )
        if number < first:
            raise ValueError(
                f"recurrence.source_layer = {source}, block {number}, lies below the first block that receives memory, "
                f"{first} (recurrence.blocks): what it computes would never depend on memory, "
                f"which is no recurrence. Use a source of {first}..{n_layers}, leave it out, "
                "or let memory enter a lower block"
            )
        return number

    def block_indices(self, n_layers: int) -> tuple[int, ...]:
        """Zero-based indices of the blocks that receive memory.

        Raises:
            ValueError: a listed block does not exist in a model of ``n_layers`` blocks.
        """
        if self.blocks is None:
            return tuple(range(n_layers))
        bad = [b for b in self.blocks if not 1 <= b <= n_layers]
        if bad:
            raise ValueError(
                f"recurrence.blocks = {list(self.blocks)}: {bad} not in the model, which has {n_layers} "
                f"blocks: use numbers 1..{n_layers}"
            )
        return tuple(sorted({b - 1 for b in self.blocks}))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The nanochat-style decoder (docs/method.md, section 5)."""

    n_layers: int = 12  # L, decoder blocks
    width: int | None = None  # D; None = 64 per layer
    n_heads: int | None = None  # query heads; None = heads of width 128
    n_kv_heads: int | None = None  # key/value heads (GQA); None = n_heads
    vocab_size: int = 32768  # tokens that the model knows
    vocab_multiple: int = 64  # rows of the embeddings are padded to a multiple of this
    sequence_length: int = 2048  # T of training; a short window sees T/2 tokens back
    mlp_ratio: float = 4.0  # width of the MLP, times D
    window_pattern: str = "SSSL"  # S short, L long, tiled over the blocks; the last is always long
    value_embeddings: Literal["all", "alternating", "none"] = "all"  # blocks whose values get a vector per token
    embedding_residual: bool = True  # every block begins with x <- a x + b x_0
    residual_scales: bool = True  # the a of x <- a x + b x_0 is learned
    qk_norm: bool = True  # RMSNorm of queries and keys, after RoPE
    softcap: float | None = 15.0  # logits <- c tanh(logits / c); "none" switches it off
    rope_base: float = 10000.0  # base of the rotary frequencies
    rope_dtype: Literal["float32", "bfloat16"] = "float32"  # of the rotary tables; bfloat16 as the official ones
    gate_channels: int | None = None  # channels that the value-embedding gate reads; None = all
    attention_reset: int | None = None  # token id of the separator at which attention is cut; None = never

    @property
    def d_model(self) -> int:
        return self.width if self.width is not None else 64 * self.n_layers

    @property
    def heads(self) -> int:
        return self.n_heads if self.n_heads is not None else max(1, self.d_model // 128)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    def windows(self) -> tuple[int | None, ...]:
        """Tokens that each block sees before the current one; None = all."""
        short = self.sequence_length // 2
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layers)]
        return tuple(short if kind == "S" and i < self.n_layers - 1 else None for i, kind in enumerate(pattern))

    def has_value_embedding(self, layer: int) -> bool:
        """Whether block ``layer`` (zero-based) adds a token-indexed value embedding."""
        if self.value_embeddings == "alternating":
            return layer % 2 == (self.n_layers - 1) % 2
        return self.value_embeddings == "all"

    def __post_init__(self) -> None:
        raise_all(_model_errors(self))


def _recurrence_errors(c: RecurrenceConfig) -> list[str]:
    errors = choice_errors("recurrence", c)
    source = c.source_layer
    if isinstance(source, bool) or not isinstance(source, (int, float, type(None))):
        errors.append(
            f"recurrence.source_layer = {source!r}: use a block number 1..L, a fraction such as 0.67, or leave it out"
        )
    elif isinstance(source, float) and not 0 < source < 1:
        errors.append(
            f"recurrence.source_layer = {source}: a fraction lies between 0 and 1; "
            "a block number is a whole number 1..L"
        )
    elif isinstance(source, int) and source < 1:
        errors.append(f"recurrence.source_layer = {source}: blocks are numbered from 1")
    errors += entry_errors(c)
    if not c.kv_projection and not c.residual:
        errors.append(
            "recurrence.kv_projection and recurrence.residual are both false, so memory could not enter: switch one on"
        )
    if c.blocks is not None and len(c.blocks) == 0:
        errors.append("recurrence.blocks = []: name at least one block by its number 1..L, or leave it out for all")
    others = {key: value for key, value in vars(c).items() if key != "source_layer"}
    return errors + range_errors("recurrence", RecurrenceConfig, others)


def _model_errors(c: ModelConfig) -> list[str]:
    errors = choice_errors("model", c) + range_errors("model", ModelConfig, vars(c))
    if errors:
        return errors
    if c.d_model % c.heads:
        errors.append(
            f"model.width = {c.d_model} is not a multiple of n_heads = {c.heads}: choose n_heads that divides the width"
        )
    elif c.head_dim % 2:
        errors.append(f"model.width / n_heads = {c.head_dim} is odd, but RoPE rotates pairs: choose an even head width")
    if c.heads % c.kv_heads:
        errors.append(f"model.n_kv_heads = {c.kv_heads} does not divide n_heads = {c.heads}: choose a divisor")
    if not c.window_pattern or set(c.window_pattern) - set("SL"):
        errors.append(f"model.window_pattern = {c.window_pattern!r}: use letters S (short) and L (long), such as SSSL")
    if c.gate_channels is not None and c.gate_channels > c.d_model:
        errors.append(
            f"model.gate_channels = {c.gate_channels} is more than the width {c.d_model}: use at most {c.d_model}"
        )
    return errors
