"""A Llama-style adapted decoder as one decoding step wants it: one token per row, in five kernels per block.

Not measured on a GPU yet, so ``accelerate`` does not choose it: pass it as ``one_token``. Legend: B rows, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lrt.decoding.fast.family_parts import parts_of, unlike
from lrt.decoding.fast.fused import FusedStep, Heads, Start
from lrt.decoding.fast.launching import EPS, Mix, Token, linear
from lrt.decoding.fast.tiles import MOST
from lrt.decoding.state import DecodeState
from lrt.decoding.step import Stepper
from lrt.decoding.which_model import Decodes
from lrt.forward import Row


class FusedFamily(FusedStep):
    """An adapted decoder's step in hand-written kernels.

    Args:
        model: an adapted model whose blocks are Llama's.
        many: steps of more than 32 rows.

    Raises:
        ValueError: the kernels do not compute this model, with what they lack.
    """

    def __init__(self, model: Decodes, *, many: Stepper) -> None:
        lacking = unlike(model)
        if lacking is not None:
            raise ValueError(f"the kernels of a decoding step do not compute this model: {lacking}")
        rotary = model.backbone.rotary
        super().__init__(model, rotary.inv_freq.float())
        self.many, self.stretched = many, float(getattr(rotary, "attention_scaling", 1.0))
        found = [parts_of(wrapper.block) for wrapper in model.blocks]
        self.parts = [parts for parts in found if parts is not None]

    def step(
        self, state: DecodeState, tokens: Tensor, active: Tensor, *, row: Row | None = None, stop: int | None = None
    ) -> Tensor:
        if len(tokens) > MOST:
            return self.many.step(state, tokens, active, row=row, stop=stop)
        return super().step(state, tokens, active, row=row, stop=stop)

    def start(self) -> Start:
        backbone = self.plain.backbone
        table = backbone.embedding.weight
        factor = 1.0 if backbone.embedding_factor is None else float(backbone.embedding_factor)
        given = {"factor": factor, "stretch": self.stretched}
        return Start(table, table.dtype, normed=False, forward=True, rounded=False, **given)

    @property
    def heads(self) -> int:
        return self.plain.blocks[0].block.geometry.heads

    def share(self, token: Token) -> Any:
        """A m of an aligned projection, or U_k m and U_v m of a shared one."""
        projection = self.plain.memory_projection
        if token.memory is None or projection is None:
            return None
        if self._aligned:
            return linear(token.memory, [projection.map])[0]
        key, value = cast(nn.Linear, projection.key), cast(nn.Linear, projection.value)
        made, _ = linear(token.memory, [key, value], aligned=True)
        return made.split([key.out_features, value.out_features], dim=1)

    @property
    def _aligned(self) -> bool:
        recurrence = self.plain.recurrence
        return recurrence is not None and recurrence.projection == "aligned"

    def attention(self, index: int, x: Tensor, shared: Any, state: DecodeState, token: Token) -> tuple[Tensor, Any]:
        wrapper, parts = self.plain.blocks[index], self.parts[index]
        receives = token.memory is not None and index in self.plain.receivers
        gated, aligned = wrapper.gate is not None, self._aligned and wrapper.gate is not None
        three = (parts.query, parts.key, parts.value)
        # Of an aligned projection no gate multiplies the biases of keys and values: the attention adds them.
        later = aligned and parts.key.bias is not None
        biases = [parts.query.bias, None if later else parts.key.bias, None if later else parts.value.bias]
        added = shared if aligned and receives else None
        projected, _ = linear(
            x, (*three, wrapper.gate), norm=True, norm_weight=parts.entry.module.weight, eps=parts.entry.eps,
            aligned=True, fed=(0, 0) if added is None else (1, 3), added=added,
            biases=(*biases, *([None] if gated else [])),
        )  # fmt: skip
        memory = None
        if receives and gated and not aligned:
            memory = shared
            if wrapper.projection is not None:
                own = wrapper.projection
                assert token.memory is not None
                made, _ = linear(token.memory, [own.key, own.value], aligned=True)
                memory = made.split([own.key.out_features, own.value.out_features], dim=1)
        norms = parts.head_norms
        heads = Heads(
            self.heads, wrapper.block.scale, EPS if norms is None else norms[0].eps, gated=gated,
            weights=None if norms is None else (norms[0].module.weight, norms[1].module.weight),
            biases=(parts.key.bias, parts.value.bias) if later else (None, None),
        )  # fmt: skip
        gates = sum(layer.weight.shape[0] for layer in three)
        return self.attend(index, heads, projected, gates, memory, state, token), shared

    def output(self, index: int, mixed: Tensor, residual: Tensor) -> Tensor:
        parts = self.parts[index]
        return linear(mixed, [parts.output], residual=residual, biases=[parts.output.bias], ahead=parts.gate.weight)[0]

    def feed_forward(self, index: int, x: Tensor, token: Token, *, mix: Mix, keep: bool) -> tuple[Tensor, Tensor]:
        parts, norm = self.parts[index], self.parts[index].middle
        inner, _ = linear(
            x, [parts.gate, parts.up], norm=True, norm_weight=norm.module.weight, eps=norm.eps, gated=parts.activation,
            biases=[parts.gate.bias, parts.up.bias],
        )  # fmt: skip
        biases = [parts.down.bias]
        return linear(inner, [parts.down], residual=x, token=token, mix=mix, keep=keep, biases=biases)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        return self.plain.backbone.logits(hidden[:, None])[:, 0]
