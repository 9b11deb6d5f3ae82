"""A foreign decoder without its blocks: embeddings in, logits and losses out.

Legend: B batch, P positions of the pass, T row length, D width, V vocabulary, R rotated width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrt.families.blocks import Context, FamilyBlock
from lrt.families.description import Family, Foreign, part, text_config
from lrt.families.rotary import length_rotary
from lrt.loss import Scorer, chunked_cross_entropy
from lrt.rotary import kept_frequencies


class FamilyDecoder(nn.Module):
    """Embeddings, final norm and head of a foreign decoder, which it shares with it.

    Args:
        family: where its parts are.
        decoder: the model; not registered here, so every parameter has one name.
        blocks: its blocks, whose windows and rotations the contexts serve.
    """

    def __init__(self, family: Family, decoder: nn.Module, blocks: list[FamilyBlock]) -> None:
        super().__init__()
        self.family = family
        self.config = text_config(decoder)
        self.windows = tuple(block.window for block in blocks)
        self.kv_heads, self.head_dim = blocks[0].geometry.kv_heads, blocks[0].geometry.head_dim
        self.embedding = part(decoder, family.embedding)
        self.position_embedding = _optional(decoder, family.position_embedding)
        self.embedding_out = nn.ModuleList([part(decoder, path) for path in family.embedding_out])
        self.rotary = _optional(decoder, family.rotary)
        self.local_rotary = _optional(decoder, family.local_rotary)
        self.by_length = length_rotary(self.rotary)
        self.norm = _optional(decoder, family.final_norm)
        self.head = part(decoder, family.head)
        # kept, so that it is saved and loaded with the rest
        self.beside = nn.ModuleList([part(decoder, path) for path in family.beside])
        self.width = self.embedding.weight.shape[1]
        self.vocab_size = self.embedding.weight.shape[0]
        self.value_embeddings = nn.ModuleDict()  # none; the native decoder has some, and plans ask for them
        self.softcap = self._setting(family.logit_softcap)
        self.logit_factor, self.logit_divisor = self._setting(family.logit_factor), self._setting(family.logit_divisor)
        self.embedding_factor = self._setting(family.embedding_factor)
        self.embedding_dropout = self._setting(family.embedding_dropout) or 0.0
        self._unmasked: set[tuple[object, ...]] = set()
        self.loss_chunk = 0  # tokens whose logits are held at once by ``loss``; 0 = all, as the decoder itself does
        self.attention_reset: int | None = None  # token of packed rows at which attention is cut; None = never
        self.scorer: Scorer | None = None  # None = the loss as the decoder itself computes it

    def score_by(self, scorer: Scorer, *, apart: bool) -> None:
        """Have the chunks of ``loss`` computed by other functions, such as compiled ones, where logits are one product.

        Args:
            scorer: the functions.
            apart: the head's weight is sharded by itself, so that only its own call gathers it: then nothing changes.
        """
        if self.is_linear and not apart:
            self.scorer = scorer

    def pack(self, *, loss_chunk: int, attention_reset: int | None) -> None:
        """Say how rows are trained on: tokens whose logits are held at once (0 = all), and the token of packed rows at
        which attention is cut (None = never)."""
        self.loss_chunk, self.attention_reset = loss_chunk, attention_reset

    @property
    def is_linear(self) -> bool:
        """Whether logits are one product with the head's weight, capped or not: what a ``scorer`` computes."""
        plain = type(self.head) is nn.Linear and self.head.bias is None
        return plain and self.logit_factor is None and self.logit_divisor is None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Foreign:
        with kept_frequencies(self.rotary, self.local_rotary):
            return super()._apply(fn, recurse)

    def embed(
        self, tokens: Tensor, positions: Tensor, reach: Tensor | None = None
    ) -> tuple[Tensor, tuple[Context, ...]]:
        """Hidden state (B, P, D) and one context per block.

        Args:
            tokens: (B, P) ids.
            positions: (P,) or (B, P).
            reach: (B, 1 or P) tokens of the row or document in the end, for a rotation that depends on them;
                None = few.
        """
        device = self.embedding.weight.device
        tokens, positions = tokens.to(device), (positions[None] if positions.ndim == 1 else positions).to(device)
        hidden = self.embedding(tokens)
        if self.family.embedding_scale is not None:
            hidden = self.family.embedding_scale(self.embedding, hidden)
        if self.embedding_factor is not None:
            hidden = hidden * self.embedding_factor
        if self.position_embedding is not None:
            offset = self.family.position_offset
            _check_positions(positions, self.position_embedding, offset)
            hidden = hidden + F.embedding(positions + offset, self.position_embedding.weight)
        hidden = F.dropout(hidden, self.embedding_dropout, self.training)
        for module in self.embedding_out:
            hidden = module(hidden)
        tables = {window: self._tables(hidden, positions, window, reach) for window in set(self.windows)}
        masks = {window: self._mask(hidden, window) for window in set(self.windows)}
        return hidden, tuple(Context(*tables[window], masks[window]) for window in self.windows)

    def final_norm(self, hidden: Tensor) -> Tensor:
        weight = None if self.norm is None else next(self.norm.parameters(), None)
        if self.norm is None or weight is None:
            return hidden if self.norm is None else self.norm(hidden)
        return self.norm(hidden.to(weight.device)).to(hidden.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, P, V) of the last block's output, in the dtype of the head."""
        logits = self.head(self.final_norm(hidden).to(self.head.weight.device)).to(hidden.device)
        logits = logits if self.logit_factor is None else logits * self.logit_factor
        logits = logits if self.logit_divisor is None else logits / self.logit_divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of nats, and the nats of every position (B, P), in float32 as transformers does it."""
        if self.scorer is not None:
            normed, goals = self.final_norm(hidden), targets.to(hidden.device)
            return chunked_cross_entropy(
                normed, self.head.weight, goals, softcap=self.softcap, chunk=self.loss_chunk, scorer=self.scorer
            )
        flat, goals = hidden.flatten(0, 1), targets.to(hidden.device).flatten()
        size = self.loss_chunk or max(1, len(goals))
        if size >= len(goals):
            total, each = self._nats(flat, goals)
        else:
            parts = [
                checkpoint(self._nats, h, t, use_reentrant=False, preserve_rng_state=False)
                for h, t in zip(flat.split(size), goals.split(size))
            ]
            total, each = torch.stack([p[0] for p in parts]).sum(), torch.cat([p[1] for p in parts])
        return total, each.detach().view(targets.shape)

    def _nats(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.log_softmax(self.logits(hidden[None])[0].float(), dim=1)
        return F.nll_loss(scores, targets, reduction="sum"), F.nll_loss(scores.detach(), targets, reduction="none")

    def _setting(self, key: str | None) -> Foreign:
        """What the decoder's config says under ``key``."""
        return None if key is None else getattr(self.config, key)

    def _tables(
        self, hidden: Tensor, positions: Tensor, window: int | None, reach: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.rotary is None:
            return None, None
        if self.by_length is not None:
            return self.by_length(self.rotary, hidden, positions, reach)
        if window is not None and self.local_rotary is not None:
            return self.local_rotary(hidden, positions)
        if "layer_type" in inspect.signature(self.rotary.forward).parameters:
            return self.rotary(hidden, positions, "full_attention" if window is None else "sliding_attention")
        return self.rotary(hidden, positions)

    def _mask(self, hidden: Tensor, window: int | None) -> Foreign:
        """The mask that the decoder's own attention takes in a pass over all positions."""
        implementation = getattr(self.config, "_attn_implementation", None)
        if implementation is None or (implementation, hidden.shape[1], window) in self._unmasked:
            return None
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        create: Callable[..., Foreign] = create_causal_mask if window is None else create_sliding_window_causal_mask
        places = torch.arange(hidden.shape[1], device=hidden.device)
        given = {"config": self.config, "inputs_embeds": hidden, "input_embeds": hidden, "cache_position": places}
        given |= {"cache": None, "past_key_values": None}  # its name since transformers 5.24, and before
        accepted = inspect.signature(create).parameters
        mask = create(attention_mask=None, **{k: v for k, v in given.items() if k in accepted})
        # remembered: while a CUDA graph is captured, transformers makes the mask that it otherwise leaves out
        if mask is None:
            self._unmasked.add((implementation, hidden.shape[1], window))
        return mask


def _check_positions(positions: Tensor, learned: Foreign, offset: int) -> None:
    """Learned positions end somewhere; read on the CPU only, where that waits for nothing."""
    known = learned.weight.shape[0] - offset
    if (
        positions.shape[1] > known
        or positions.device.type == "cpu"
        and positions.numel()
        and int(positions.max()) >= known
    ):
        raise ValueError(
            f"position {int(positions.max())}, but this decoder's learned positions end at {known}: use shorter rows"
        )


def _optional(decoder: nn.Module, path: str | None) -> Foreign:
    return None if path is None else part(decoder, path)
