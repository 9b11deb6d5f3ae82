"""From the passes of a schedule to what a call returns: losses by group, and the newest of every position in order.

Legend: B batch, T row length, P positions of a pass, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrt.arguments import Rows
from lrt.kernels.attention import natural_order
from lrt.loss import IGNORE, group_losses, weighted_loss
from lrt.passes import PassResult
from lrt.types import Backbone, Output


def outcome(
    backbone: Backbone,
    results: Sequence[PassResult],
    rows: Rows,
    *,
    weights: Sequence[float],
    valid_targets: Tensor | None,
    return_logits: bool | None,
    logits_to_keep: int | Tensor,
    output_hidden_states: bool,
) -> Output:
    """Score and restore what the passes computed.

    Args:
        backbone: has the head and its loss.
        results: of all passes of a schedule.
        rows: that they ran over.
        weights: of the loss groups.
        valid_targets, return_logits, logits_to_keep, output_hidden_states: as in ``LatentRecurrentModel.forward``.
    """
    groups = by_group(results, len(weights))
    final, places = groups[-1]
    logits = None
    if return_logits or (return_logits is None and rows.targets is None):
        logits = backbone.logits(columns(rows.restore(in_order(final, places)), logits_to_keep))
    hidden = None
    if output_hidden_states or logits is None and rows.targets is None:
        hidden = rows.restore(in_order(backbone.final_norm(final), places))
    memory = last_memory(results, len(weights) - 1)
    loss: Tensor | None = None
    losses: tuple[Tensor, ...] = ()
    if rows.targets is not None:
        targets = rows.targets
        count = (targets != IGNORE).sum() if valid_targets is None else valid_targets
        sums = [backbone.loss(h, targets[:, p])[0] if w > 0 else h.new_zeros(()) for (h, p), w in zip(groups, weights)]
        means = group_losses(sums, count)
        loss = weighted_loss(means, weights)
        losses = tuple(mean.detach() for mean in means)
    states: tuple[Tensor, ...] = ()
    if output_hidden_states:
        assert hidden is not None
        states = (*(rows.restore(in_order(x, places)) for x in block_inputs(results, len(weights) - 1)), hidden)
    return Output(loss, logits, None if memory is None else rows.restore(memory), losses, hidden, states)


def by_group(results: Sequence[PassResult], groups: int) -> list[tuple[Tensor, Tensor]]:
    """Per loss group: outputs (B, P, D) of its passes side by side, and their positions (P,)."""
    merged = []
    for group in range(groups):
        members = [r for r in results if r.plan.group == group]
        length = max(r.plan.stop for r in members)
        places = torch.arange(length, device=members[0].hidden.device)
        hidden = members[0].hidden if len(members) == 1 else torch.cat([r.hidden for r in members], dim=1)
        merged.append((hidden, torch.cat([places[r.plan.positions] for r in members])))
    return merged


def block_inputs(results: Sequence[PassResult], group: int) -> list[Tensor]:
    """Inputs (B, P, D) of every block in the passes of a loss group, in the order of ``by_group``."""
    members = [r.inputs for r in results if r.plan.group == group]
    return list(members[0]) if len(members) == 1 else [torch.cat(parts, dim=1) for parts in zip(*members)]


def last_memory(results: Sequence[PassResult], group: int) -> Tensor | None:
    """m[t] (B, T, D) of the positions of a loss group; None for a model without recurrence."""
    members = sorted((r for r in results if r.plan.group == group), key=lambda r: r.plan.start)
    parts = [r.memory for r in members if r.memory is not None]
    if not parts:
        return None
    return natural_order(parts) if len(parts) == members[0].plan.step else torch.cat(parts, dim=1)


def in_order(values: Tensor, positions: Tensor) -> Tensor:
    """Sort dimension 1 of ``values`` (B, P, ...) by ``positions`` (P,), each of 0..P-1 once."""
    return values if len(positions) == 1 else values.index_select(1, torch.argsort(positions))


def columns(values: Tensor, keep: int | Tensor) -> Tensor:
    """The last ``keep`` columns of (B, T, ...), or those that a tensor names; 0 = all.

    Raises:
        ValueError: a negative number.
    """
    if isinstance(keep, Tensor):
        return values[:, keep]
    if keep < 0:
        raise ValueError(
            f"logits_to_keep = {keep}: give how many last columns to keep, 0 for all, or a tensor of columns"
        )
    return values[:, -keep:]
