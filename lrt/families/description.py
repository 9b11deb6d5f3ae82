"""``Family``: where the parts of a decoder are, as data. A new family is one such description.

Paths are attribute names joined by dots: those of the decoder from the decoder, those of a block from
the block. A tuple of paths is applied in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor, nn


class Geometry(NamedTuple):
    """Heads of the attention: query heads, key/value heads, width of one."""

    heads: int
    kv_heads: int
    head_dim: int


def no_window(attention: nn.Module) -> int | None:
    return None


def window_of(attention: nn.Module) -> int | None:
    """Keys that a sliding attention sees, the current one included; None = all.

    A block says it itself, or (Mistral, Phi-3) leaves it to its config.
    """
    return getattr(attention, "sliding_window", getattr(getattr(attention, "config", None), "sliding_window", None))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A plain stack of decoder blocks, described.

    Attributes:
        name: what errors and saved folders call it.
        embedding, layers, final_norm, head: of the decoder: token embedding, list of blocks, norm before the head, head.
        position_embedding: learned absolute positions, added to the tokens'.
        embedding_out: applied to the embedded tokens (dropout).
        rotary: module (hidden, position ids) -> (cos, sin), each (B, T, rotated width).
        local_rotary: another one for blocks with a sliding window.
        embedding_scale: (decoder, embedded tokens) -> scaled.
        logit_softcap: config key of c in c tanh(z / c) over the logits.
        attention, mlp: of a block.
        attention_in, attention_out: applied to the attention's input, and to its output before the residual is added.
        mlp_in, mlp_out: the same for the MLP.
        parallel: block -> whether attention and MLP read the same input.
        query, key, value: projections of a block; unused when ``fused`` is given.
        fused: one projection that makes all three; ``split`` takes it apart.
        split: (output, Geometry) -> query, key, value, each (B, P, heads, K).
        output: projection back to the width.
        query_norm, key_norm: norms of queries and keys before RoPE, over a head or over the whole projection.
        rotate: (query, key, cos, sin), each (B, heads, P, K) and (B, P, R) -> query, key; None = the decoder's own.
        window: attention -> keys that it sees, itself included.
        scale: attention -> factor of the scores; None = its ``scaling``, or head width ** -0.5.
        softcap: attribute of the attention: c of c tanh(score / c).
        dropout: attention -> rate on attention weights in training.
        heads, kv_heads, head_dim: None = from the decoder's config.
    """

    name: str
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str | None = "model.norm"
    head: str = "lm_head"
    position_embedding: str | None = None
    embedding_out: tuple[str, ...] = ()
    rotary: str | None = None
    local_rotary: str | None = None
    embedding_scale: Callable[[Any, Tensor], Tensor] | None = None
    logit_softcap: str | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_in: tuple[str, ...] = ()
    attention_out: tuple[str, ...] = ()
    mlp_in: tuple[str, ...] = ()
    mlp_out: tuple[str, ...] = ()
    parallel: Callable[[nn.Module], bool] | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    fused: str | None = None
    split: Callable[[Tensor, Geometry], tuple[Tensor, Tensor, Tensor]] | None = None
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    rotate: Callable[..., tuple[Tensor, Tensor]] | None = None
    window: Callable[[nn.Module], int | None] = no_window
    scale: Callable[[nn.Module], float] | None = None
    softcap: str | None = None
    dropout: Callable[[nn.Module], float] | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    def decoder_parts(self) -> tuple[str, ...]:
        """Paths that the decoder must have."""
        single = (self.embedding, self.layers, self.final_norm, self.head, self.position_embedding, self.rotary, self.local_rotary)
        return tuple(p for p in (*single, *self.embedding_out) if p is not None)

    def block_parts(self) -> tuple[str, ...]:
        """Paths that every block must have."""
        projections = (self.query, self.key, self.value) if self.fused is None else (self.fused,)
        single = (self.attention, self.mlp, self.output, self.query_norm, self.key_norm, *projections)
        return tuple(p for p in (*single, *self.attention_in, *self.attention_out, *self.mlp_in, *self.mlp_out) if p is not None)

    def geometry(self, decoder: nn.Module) -> Geometry:
        """Heads of the decoder, from the description or its config.

        Raises:
            ValueError: neither says it.
        """
        config = getattr(decoder, "config", None)
        heads = self.heads or getattr(config, "num_attention_heads", None)
        if heads is None:
            raise ValueError(
                f"family {self.name!r} does not say how many heads, and {type(decoder).__name__} has no config: pass heads= to lrt.Family"
            )
        width = part(decoder, self.embedding).weight.shape[1]
        kv_heads = self.kv_heads or getattr(config, "num_key_value_heads", None) or heads
        return Geometry(heads, kv_heads, self.head_dim or getattr(config, "head_dim", None) or width // heads)


def part(root: Any, path: str) -> Any:
    """The attribute at ``path``; None where there is none."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def missing_parts(family: Family, decoder: nn.Module) -> list[str]:
    """What ``family`` names and the decoder lacks, or has beyond it; empty when it fits."""
    wrong = [f"no {path}" for path in family.decoder_parts() if part(decoder, path) is None]
    layers = part(decoder, family.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return [*wrong, f"{family.layers} is no list of blocks"]
    for index, layer in enumerate(layers):
        found = [f"{family.layers}.{index}: no {path}" for path in family.block_parts() if part(layer, path) is None]
        attention = part(layer, family.attention)
        extra = [*_unnamed(layer, family, prefix=""), *(_unnamed(attention, family, prefix=f"{family.attention}.") if attention is not None else [])]
        found += [f"{family.layers}.{index}: {name} is not part of this family" for name in extra]
        if found:
            return wrong + found
    return wrong


def _unnamed(module: nn.Module, family: Family, *, prefix: str) -> list[str]:
    """Children with parameters that the description does not mention."""
    named = {path.removeprefix(prefix).split(".")[0] for path in family.block_parts() if path.startswith(prefix)}
    return [prefix + name for name, child in module.named_children() if name not in named and next(child.parameters(), None) is not None]


def describe_fields() -> str:
    """Names of what a user can say about a decoder."""
    return ", ".join(f.name for f in fields(Family))
