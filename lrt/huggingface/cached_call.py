"""A call with a cache: its tokens are decoded one after the other, exactly.

Legend: B batch, P new tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrt.arguments import alignment
from lrt.decoding.lengths import lengthen
from lrt.decoding.one_position import consume
from lrt.huggingface.attentions import watched
from lrt.huggingface.cache import RecurrentCache, check_positions
from lrt.huggingface.output import LRTOutput
from lrt.model import LatentRecurrentModel
from lrt.outcome import columns


@torch.no_grad()
def decode_columns(
    model: LatentRecurrentModel, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None,
    cache: RecurrentCache, *, logits_to_keep: int | Tensor, output_hidden_states: bool, attentions: bool,
) -> LRTOutput:  # fmt: skip
    """Consume tokens (B, P) one after the other; padding on either side is skipped row by row.

    Args:
        model: decodes them.
        input_ids: (B, P).
        attention_mask: (B, at least P), 0 marks padding; its last P columns count.
        position_ids: (B, P), compared with the cache's own count.
        cache: holds the state before, and the one after.
        logits_to_keep, output_hidden_states: as in ``LRTForCausalLM.forward``.
        attentions: return the attention weights too.

    Raises:
        ValueError: a mask of another shape, or positions that do not follow the cache's.
    """
    batch, new = input_ids.shape
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -new:]
    if real.ndim != 2:
        raise ValueError(
            f"attention_mask has {real.ndim} dimensions: with a cache pass the (batch, tokens) mask of padding"
        )
    forth, inside, back = alignment(real)
    state = cache.room(model, batch, new)
    lengthen(model, state, state.lengths + real.sum(1))
    check_positions(position_ids, state.lengths, real.bool())
    tokens, steps = input_ids.gather(1, forth), []
    weights: list[Tensor] = []
    for t in range(new):
        stores = watched(state, weights, columns=cache.columns) if attentions else None
        if output_hidden_states or attentions:
            out = consume(model, state, tokens[:, t], inside[:, t], stores=stores, keep_inputs=output_hidden_states)
            steps.append((*out.inputs, out.hidden))
        else:
            steps.append((consume(model, state, tokens[:, t], inside[:, t]).hidden,))
    # Columns of padding repeat the row's last token, so that logits[:, -1] are the next token's on either side.
    places = torch.minimum(back.expand(batch, -1), inside.to(torch.int64).cumsum(1).argmax(1, keepdim=True))
    *inputs, hidden = (
        x.gather(1, places[..., None].expand_as(x)) for x in (torch.cat(parts, dim=1) for parts in zip(*steps))
    )
    layers = (
        [torch.cat(weights[index :: len(model.blocks)], dim=2) for index in range(len(model.blocks))]
        if attentions
        else []
    )
    return LRTOutput(
        logits=model.backbone.logits(columns(hidden, logits_to_keep)),
        memory=None if state.memory is None else state.memory[:, None].clone(),
        cache=cache,
        hidden_states=(*inputs, model.backbone.final_norm(hidden)) if output_hidden_states else None,
        attentions=tuple(x.gather(2, places.to(x.device)[:, None, :, None].expand_as(x)) for x in layers) or None,
    )
