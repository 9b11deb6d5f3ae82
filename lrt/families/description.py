"""``Family``: where the parts of a decoder are, as data. A new family is one such description.

Paths are attribute names joined by dots: those of the decoder from the decoder, those of a block from
the block. A tuple of paths is applied in order.
"""

from __future__ import annotations

import sys
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

    A window that is only written in a config is none: code that never builds a sliding mask has no windows, and
    ``layer_types``, where the config has it, names the blocks that slide.
    """
    home = sys.modules[type(attention).__module__]
    if hasattr(home, "create_causal_mask") and not hasattr(home, "create_sliding_window_causal_mask"):
        return None
    config = getattr(attention, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
    if kinds is not None and index is not None and kinds[index] != "sliding_attention":
        return None
    keys = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return keys or None  # zero says that there is none


def rotates(attention: nn.Module) -> bool:
    return True


# A module, a config or a value of a decoder that is not ours: only its description knows what it has.
Foreign = Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """A plain stack of decoder blocks, described.

    Attributes:
        name: what errors and saved folders call it.
        embedding, layers, final_norm, head: of the decoder: token embedding, list of blocks, norm before the head,
            head.
        beside: of the decoder: modules that text does not pass through, such as a vision tower.
        position_embedding: learned absolute positions, added to the tokens'.
        position_offset: row of that table for position 0.
        embedding_out: applied to the embedded tokens (dropout, a norm).
        embedding_scale: (embedding, embedded tokens) -> scaled.
        embedding_factor: config key of a factor on the embedded tokens.
        embedding_dropout: config key of a dropout rate on them that is no module.
        rotary: module (hidden, position ids) -> (cos, sin), each (B, T, rotated width).
        local_rotary: another one for blocks with a sliding window.
        logit_factor, logit_divisor: config keys of a factor and of a divisor of the logits.
        logit_softcap: config key of c in c tanh(z / c) over the logits.
        attention, mlp: of a block; an MLP may be several modules in order.
        attention_in, attention_out: applied to the attention's input, and to its output before the residual is added.
        output_dropout: attention -> rate of a dropout on its output that is no module.
        mlp_in, mlp_out: as ``attention_in`` and ``attention_out``, of the MLP.
        mlp_dropout: block -> as ``output_dropout``, of the MLP.
        residual_factor: attribute of a block: factor on what attention and MLP add to the residual.
        parallel: block -> whether attention and MLP read the same input.
        residual_first: where they do, the sum begins with the residual; otherwise it ends with it.
        query, key, value: projections of a block; unused when ``fused`` is given.
        fused: one projection that makes all three; ``split`` takes it apart.
        split: (output, Geometry) -> query, key, value, each (B, P, heads, K).
        clip: config key of a bound on the absolute value of queries, keys and values, after their norms.
        output: projection back to the width.
        query_norm, key_norm: norms of queries and keys, per head or over the whole projection.
        norm_after_rotation: they come after RoPE; otherwise before.
        norm_heads_first: they take (B, heads, P, K); otherwise (B, P, heads, K).
        rotates: attention -> whether queries and keys rotate in this block.
        rotated: attention -> leading channels of a head that rotate; None = the rotation itself knows.
        rotate: (query, key, cos, sin), each (B, heads, P, K) and (B, P, R) -> query, key; None = the decoder's own.
        window: attention -> keys that it sees, itself included.
        scale: attention -> factor of the scores; None = its ``scaling``, or head width ** -0.5.
        scaled_query: the factor is put on the queries; otherwise on the scores, which rounds in another way.
        softcap: attribute of the attention: c of c tanh(score / c).
        sinks: attribute of the attention: one score per head (H,) that joins the softmax and has no value.
        dropout: attention -> rate on attention weights in training.
        heads, kv_heads, head_dim: None = from the decoder's config or attention.
    """

    name: str
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str | None = "model.norm"
    head: str = "lm_head"
    beside: tuple[str, ...] = ()
    position_embedding: str | None = None
    position_offset: int = 0
    embedding_out: tuple[str, ...] = ()
    embedding_scale: Callable[[Foreign, Tensor], Tensor] | None = None
    embedding_factor: str | None = None
    embedding_dropout: str | None = None
    rotary: str | None = None
    local_rotary: str | None = None
    logit_factor: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    attention: str = "self_attn"
    mlp: str | tuple[str, ...] = "mlp"
    attention_in: tuple[str, ...] = ()
    attention_out: tuple[str, ...] = ()
    output_dropout: Callable[[nn.Module], float] | None = None
    mlp_in: tuple[str, ...] = ()
    mlp_out: tuple[str, ...] = ()
    mlp_dropout: Callable[[nn.Module], float] | None = None
    residual_factor: str | None = None
    parallel: Callable[[nn.Module], bool] | None = None
    residual_first: bool = False
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    fused: str | None = None
    split: Callable[[Tensor, Geometry], tuple[Tensor, Tensor, Tensor]] | None = None
    clip: str | None = None
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    norm_after_rotation: bool = False
    norm_heads_first: bool = False
    rotates: Callable[[nn.Module], bool] = rotates
    rotated: Callable[[nn.Module], int] | None = None
    rotate: Callable[..., tuple[Tensor, Tensor]] | None = None
    window: Callable[[nn.Module], int | None] = no_window
    scale: Callable[[nn.Module], float] | None = None
    scaled_query: bool = False
    softcap: str | None = None
    sinks: str | None = None
    dropout: Callable[[nn.Module], float] | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    @property
    def mlp_parts(self) -> tuple[str, ...]:
        return (self.mlp,) if isinstance(self.mlp, str) else self.mlp

    def decoder_parts(self) -> dict[str, str]:
        """Paths that the decoder must have, and the field that names each."""
        names = (
            "embedding",
            "layers",
            "final_norm",
            "head",
            "position_embedding",
            "rotary",
            "local_rotary",
            "embedding_out",
            "beside",
        )
        return self._paths(names)

    def block_parts(self) -> dict[str, str]:
        """Paths that every block must have, and the field that names each."""
        projections = ("query", "key", "value") if self.fused is None else ("fused",)
        around = ("attention_in", "attention_out", "mlp_in", "mlp_out")
        return self._paths(("attention", "mlp", "output", "query_norm", "key_norm", *projections, *around))

    def _paths(self, names: tuple[str, ...]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in names:
            value = getattr(self, name)
            for path in value if isinstance(value, tuple) else (value,):
                if path is not None:
                    found.setdefault(path, name)
        return found

    def geometry(self, decoder: nn.Module) -> Geometry:
        """Heads of the decoder, from the description, its attention or its config.

        Raises:
            ValueError: none of them says it.
        """
        config = text_config(decoder)
        heads = self.heads or getattr(config, "num_attention_heads", None)
        if heads is None:
            raise ValueError(
                f"family {self.name!r} does not say how many heads, and {type(decoder).__name__} has no "
                "config: pass heads= to lrt.Family"
            )
        attention = part(part(decoder, self.layers)[0], self.attention)
        width = part(decoder, self.embedding).weight.shape[1]
        kv_heads = self.kv_heads or getattr(config, "num_key_value_heads", None) or heads
        head_dim = (
            self.head_dim or getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or width // heads
        )
        return Geometry(heads, kv_heads, head_dim)


def text_config(decoder: Foreign) -> Foreign:
    """Config of a decoder, or of the text part of one that also sees or hears; None where there is none."""
    config: Foreign = getattr(decoder, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def part(root: Foreign, path: str) -> Foreign:
    """The attribute at ``path``; None where there is none."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def missing_parts(family: Family, decoder: nn.Module) -> list[str]:
    """What ``family`` names and the decoder lacks, or has beyond it; empty when it fits."""
    wrong = [f"no {path} ({field})" for path, field in family.decoder_parts().items() if part(decoder, path) is None]
    layers = part(decoder, family.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return [*wrong, f"{family.layers} is no list of blocks (layers)"]
    for index, layer in enumerate(layers):
        here = f"{family.layers}.{index}"
        found = [
            f"{here}: no {path} ({field})" for path, field in family.block_parts().items() if part(layer, path) is None
        ]
        attention = part(layer, family.attention)
        extra = _unnamed(layer, family.block_parts(), prefix="")
        if attention is not None:
            mentioned = {
                **family.block_parts(),
                **({} if family.sinks is None else {f"{family.attention}.{family.sinks}": "sinks"}),
            }
            extra += _unnamed(attention, mentioned, prefix=f"{family.attention}.")
        found += [f"{here}.{name} is not part of this family ({_field_for(name)})" for name in extra]
        if found:
            return wrong + found
    return wrong


def _unnamed(module: nn.Module, mentioned: dict[str, str], *, prefix: str) -> list[str]:
    """Children with parameters, and parameters of its own, that the description does not mention."""
    named = {path.removeprefix(prefix).split(".")[0] for path in mentioned if path.startswith(prefix)}
    children = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    return [prefix + name for name in (*children, *own) if name not in named]


def _field_for(name: str) -> str:
    """Which field would take in a module of this name."""
    for words, field in (
        (
            ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"),
            "query_norm, key_norm",
        ),
        (("sinks",), "sinks"),
        (("norm", "ln_"), "attention_in, attention_out, mlp_in or mlp_out"),
        (("fc", "up", "down", "gate"), "mlp"),
    ):
        if any(word in name for word in words):
            return field
    return "no field of lrt.Family takes it in"


def describe_fields() -> str:
    """Names of what a user can say about a decoder."""
    return ", ".join(f.name for f in fields(Family))
