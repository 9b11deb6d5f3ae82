"""Attention weights of decoding, for those who ask to see them; kernels that are fast never hold them.

Legend: B batch, S tokens seen, H query heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrt.attention import Cache, attention_weights
from lrt.decoding.one_position import masked_caches
from lrt.decoding.state import DecodeState, slot_positions


def watched(state: DecodeState, seen: list[Tensor], *, columns: int) -> list[Cache]:
    """The stores of one step, which also note the weights (B, H, 1, S) of every block.

    Args:
        state: its rows, before the step.
        seen: the weights are added to it, block by block.
        columns: S.
    """

    class Watched(Cache):
        def attend(self, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **how: Any) -> Tensor:
            out = super().attend(query, key, value, window=window, **how)
            weights = attention_weights(query, self.key, self.mask, **how).to(query.dtype)
            positions = slot_positions(state.lengths, self.key.shape[1]).to(weights.device)
            blank = weights.new_zeros(*weights.shape[:-1], columns)
            seen.append(
                blank.scatter_add_(-1, positions.clamp(0, columns - 1)[:, None, None].expand_as(weights), weights)
            )
            return out

    return [Watched(*store) for store in masked_caches(state)]
