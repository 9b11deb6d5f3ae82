"""What the positions of a stretch see where rows begin at different lengths, or attention is cut.

Legend: B batch, P positions of the stretch, p of a pass, M earlier keys in view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrt.attention import causal_mask
from lrt.decoding.state import slot_positions


def ragged_mask(
    places: Tensor, where: slice, *, earlier: int, window: int | None, start: Tensor | None, straight: bool,
    document_starts: Tensor | None,
) -> Tensor:  # fmt: skip
    """Which of the M earlier slots and of the stretch's own positions each query sees, (1 or B, 1, p, M + P).

    Args:
        places: (P,) positions of the stretch, from 0 on.
        where: those of the queries.
        earlier: M.
        window: tokens seen before the current one; None = all.
        start: (B,) tokens consumed before the stretch; None = no row has any.
        straight: all rows begin at one position, so that earlier keys lie in natural order.
        document_starts: (B, P) first position that each position sees; None = attention is not cut.
    """
    queries = places[where]
    mask = causal_mask(queries, places, window=window)
    if document_starts is not None:
        begin = document_starts[:, None, where, None]
        first = places if start is None else start[:, None, None, None] + places
        mask = mask & (first >= begin)
    if start is not None:
        if straight:  # unwrapped: the newest key lies last
            held = (start[:, None] - earlier + torch.arange(earlier, device=queries.device))[:, None, None]
        else:
            held = slot_positions(start - 1, earlier)[:, None, None]
        distance = (start[:, None] + queries)[:, None, :, None] - held
        seen = held >= 0
        if window is not None:
            seen = seen & (distance <= window)
        seen = seen.expand(-1, -1, len(queries), -1)
        if document_starts is not None:
            seen = seen & (held >= document_starts[:, None, where, None])
        mask = torch.cat([seen, mask.expand(len(seen), -1, -1, -1)], dim=-1)
    return mask
