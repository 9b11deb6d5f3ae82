"""torchtitan's Llama 3 with memory: its blocks in two halves, between which the memory enters; none is edited.

The modules come from torchtitan and are called as its own forward calls them, so that without memory every number is
the one it computes itself; no torchtitan is imported here.

Legend: B batch, P positions of the pass, D width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrt.attention import causal_attention
from lrt.backbone import Head, TokenTable
from lrt.config import ModelConfig, Recipe
from lrt.families.description import Geometry
from lrt.families.norm_weight import multiplied
from lrt.loss import Scorer
from lrt.model import LatentRecurrentModel
from lrt.tables import Table
from lrt.titan.model import Trainee
from lrt.titan.settings import Theirs
from lrt.types import KV, KVStore, Projection


class Context(NamedTuple):
    """What one block needs beside the hidden state."""

    cos: Tensor  # (1 or B, P, 1, K/2), float32
    sin: Tensor


def rotate_pairs(x: Tensor, context: Context) -> Tensor:
    """Rotate neighbouring channels of x (B, P, heads, K) in float32, as a complex product does; result in x's dtype."""
    left, right = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([left * context.cos - right * context.sin, left * context.sin + right * context.cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class LlamaBlock(nn.Module):
    """A block of torchtitan's Llama 3.

    Args:
        layer: torchtitan's own TransformerBlock.
    """

    window: int | None = None

    def __init__(self, layer: Theirs) -> None:
        super().__init__()
        self.layer: Theirs = layer
        attention = layer.attention
        self.geometry = Geometry(attention.n_heads, attention.n_kv_heads, attention.head_dim)

    def enter(self, hidden: Tensor, context: Context) -> Tensor:
        return hidden

    def project(self, hidden: Tensor, context: Context) -> Projection:
        normed, attention = self.layer.attention_norm(hidden), self.layer.attention
        return Projection(
            normed, *(self._heads(linear, normed) for linear in (attention.wq, attention.wk, attention.wv))
        )

    def project_aligned(self, hidden: Tensor, context: Context, aligned: Tensor) -> Projection:
        """``project``, where keys and values read the normed input plus w ``aligned``, w the norm's weight."""
        normed, attention = self.layer.attention_norm(hidden), self.layer.attention
        moved = normed + multiplied(aligned, self.layer.attention_norm, 0.0).to(normed.dtype)
        key, value = (self._heads(linear, moved) for linear in (attention.wk, attention.wv))
        return Projection(normed, self._heads(attention.wq, normed), key, value)

    def align(self) -> None:
        """Nothing to find out: the norm multiplies by its weight."""

    def kv_bias(self) -> tuple[None, None]:
        return None, None

    def finish_kv(self, projection: Projection, context: Context) -> KV:
        return KV(rotate_pairs(projection.key, context), projection.value)

    def attend(
        self, hidden: Tensor, projection: Projection, context: Context, kv: KVStore | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.finish_kv(projection, context)
        query, scale = rotate_pairs(projection.query, context), self.geometry.head_dim**-0.5
        if kv is None:
            mixed = causal_attention(query, key, value, window=None, scale=scale)
        else:
            mixed = kv.attend(query, key, value, window=None, scale=scale, softcap=None)
        hidden = hidden + self.layer.attention.wo(mixed.flatten(-2))
        return hidden + self.layer.feed_forward(self.layer.ffn_norm(hidden)), key, value

    def _heads(self, linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (-1, self.geometry.head_dim))


class LlamaBackbone(nn.Module):
    """torchtitan's Llama 3 without its blocks.

    Args:
        transformer: torchtitan's own; its embedding and its head become ours, of the same shapes.
        config: its sizes as our [model].
        loss_chunk: tokens whose logits are held at once.
    """

    def __init__(self, transformer: Theirs, config: ModelConfig, *, loss_chunk: int) -> None:
        super().__init__()
        args = transformer.model_args
        self._args = args
        self.config = config
        self.width, self.vocab_size = config.d_model, config.vocab_size
        self.kv_heads, self.head_dim = config.kv_heads, config.head_dim
        self.embedding = TokenTable(args.vocab_size, args.dim, device="meta")
        self.norm = transformer.norm
        self.head = Head(config, loss_chunk=loss_chunk, device="meta")
        self.value_embeddings = nn.ModuleDict()  # none; plans ask for them
        self.embedding.weight, self.head.weight = transformer.tok_embeddings.weight, transformer.output.weight
        self.turns: Tensor  # (longest row, K/2, 2), cosines and sines as torchtitan computes them
        self.register_buffer("turns", torch.view_as_real(transformer.freqs_cis), persistent=False)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Context, ...]]:
        """Hidden state (B, P, D) and one context per block, for tokens (B, P) at positions (P,) or (B, P)."""
        hidden = self.embedding(tokens)
        turns = self.turns[positions]
        turns = (turns[None] if positions.ndim == 1 else turns)[:, :, None]
        context = Context(turns[..., 0], turns[..., 1])
        return hidden, (context,) * self.config.n_layers

    def final_norm(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def score_by(self, scorer: Scorer, *, apart: bool) -> None:
        """As ``lrt.backbone.Decoder.score_by``."""
        self.head.score_by(scorer)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, P, V) in float32 at least, of the last block's output."""
        return self.head(self.norm(hidden))

    def loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of nats, and the nats of every position (B, P), of the last block's output."""
        return self.head.loss(self.norm(hidden), targets)

    def about(self) -> Table:
        """Its sizes under torchtitan's names."""
        return dataclasses.asdict(self._args)


def llama3(recipe: Recipe, make: Callable[[], Theirs]) -> Trainee:
    """torchtitan's Llama 3 with the recurrence of a job, on the current default device.

    Args:
        recipe: of the job; ``model`` holds the sizes of the Transformer.
        make: torchtitan's Transformer of those sizes, on the default device.
    """

    def parts() -> tuple[Theirs, LlamaBackbone, list[LlamaBlock]]:
        transformer = make()
        backbone = LlamaBackbone(transformer, recipe.model, loss_chunk=recipe.parallel.loss_chunk)
        return transformer, backbone, [LlamaBlock(layer) for layer in transformer.layers.values()]

    def whole(device: torch.device) -> LatentRecurrentModel:
        """torchtitan initializes from the global random numbers, which stay as they were."""
        with (
            torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type),
            torch.device(device),
        ):
            torch.manual_seed(recipe.run.seed)
            transformer, backbone, blocks = parts()
            transformer.init_weights()
            backbone.turns = torch.view_as_real(transformer.freqs_cis)
            model = LatentRecurrentModel(backbone, blocks, recipe.recurrence)
            model.init_memory(generator=torch.Generator(device=device).manual_seed(recipe.run.seed))
        return model

    return Trainee(*parts()[1:], recipe, whole=whole)


# ------------------------------------------------------------------ names

_ENDS = {"backbone.embedding.": "tok_embeddings.", "backbone.norm.": "norm.", "backbone.head.": "output."}


def titan_name(name: str) -> str | None:
    """torchtitan's name of a parameter of the decoder; None for one of the memory."""
    for own, theirs in _ENDS.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    first, index, kind, *rest = name.split(".")
    return ".".join(["layers", index, *rest[1:]]) if (first, kind) == ("blocks", "block") else None


def own_name(name: str) -> str:
    """Our name of a parameter of torchtitan's Transformer."""
    for own, theirs in _ENDS.items():
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    _, index, rest = name.split(".", 2)
    return f"blocks.{index}.block.layer.{rest}"
