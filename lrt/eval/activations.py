"""What the memory does inside a model: norms, gates and shares of the last pass over one batch.

Nothing is registered in the model and no forward knows of it: an ordinary pass runs over the model's own blocks
(compiled, sharded or plain), each inside a caller that looks at its arguments afterwards.

Legend: B batch, T row length, P positions of the pass, D width, G key/value heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lrt.loss import IGNORE
from lrt.model import LatentRecurrentModel
from lrt.recurrence import RecurrentBlock, into_residual
from lrt.schedules import Interleaved, Refine, single
from lrt.types import BlockContext, BlockOutput, KVStore, MemoryInput, Schedule, at_least_float32

Statistics = dict[str, dict[str, list[float]]]  # by name: mean, std, min, max, each one number per block


@torch.no_grad()
def activation_statistics(
    model: LatentRecurrentModel, input_ids: Tensor, targets: Tensor | None = None, schedule: Schedule | None = None
) -> Statistics:
    """Statistics of memory, gates and what memory adds, over the positions of a batch that receive memory.

    Args:
        model: a LatentRecurrentModel; under FSDP one whose parameters are gathered and stay so (after ``score`` with
            reshard_after_forward off), and every rank must call this.
        input_ids: (B, T) token ids without padding on the left.
        targets: (B, T); positions of -100 are left out. None = all count.
        schedule: its last loss group is looked at; None = ``model.train_schedule``.

    Returns:
        By name, mean, std, min and max: ``source_norm`` and ``memory_norm`` (L2, before and after the memory's norm,
        one number), and one number a receiving block: ``local_gate``, ``memory_gate``, ``injection_ratio`` (norm of g m
        over that of the residual stream it is added to), ``key_ratio`` and ``value_ratio`` (norm of the gated memory
        part over that of the gated local part, a head). Empty for a model without recurrence.
    """
    if model.recurrence is None:
        return {}
    was_training = model.training
    model.eval()
    try:
        return _observe(model, input_ids, targets, single(schedule or model.train_schedule))
    finally:
        model.train(was_training)


def _observe(model: LatentRecurrentModel, input_ids: Tensor, targets: Tensor | None, schedule: Schedule) -> Statistics:
    if isinstance(schedule, (Interleaved, Refine)):
        schedule = replace(schedule, weights="paper")  # a pass of weight 0 would stop at the source block
    counted = torch.ones_like(input_ids, dtype=torch.bool) if targets is None else targets != IGNORE
    watched = _Watched(model)
    # Unbound, so that the pass runs over the watched blocks; a generator of its own, so that no other draws
    # differently.
    results = type(model).run(
        cast(LatentRecurrentModel, watched), input_ids, schedule, generator=torch.Generator().manual_seed(0)
    )
    last = max(result.plan.group for result in results)
    final = [result for result in results if result.plan.group == last]
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    here = counted[:, torch.cat([places[result.plan.positions] for result in final])]  # in the order of the passes
    tallies: dict[str, list[Tally]] = defaultdict(lambda: [Tally() for _ in model.receivers])
    source, memory = Tally(), Tally()
    memory.add(_norm(torch.cat([m for result in final if (m := result.memory) is not None], dim=1))[here])
    for _, norms, mine in _final_calls(watched.blocks[model.source - 1], here):
        source.add(norms[mine])
    for place, index in enumerate(model.receivers):
        for seen, _, mine in _final_calls(watched.blocks[index], here):
            for name, values in seen.items():
                if name != "received":
                    tallies[name][place].add(values[mine & seen["received"]])
    return {
        name: summaries(parts) for name, parts in {"source_norm": [source], "memory_norm": [memory], **tallies}.items()
    }


# ------------------------------------------------------------------ looking


class _Watched:
    """The model with a caller around each block."""

    def __init__(self, model: LatentRecurrentModel) -> None:
        self._model = model
        self.blocks = [_WatchedBlock(block) for block in model.blocks]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)


def _final_calls(block: _WatchedBlock, here: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """A block's last calls, which together saw every position once, each with its part of ``here`` (B, T).

    A pass is one call of a block, but the true recurrence calls the blocks in its loop once per position.
    """
    stop = here.shape[1]
    for seen, norms in reversed(block.calls):
        if stop == 0:
            return
        start = stop - norms.shape[1]
        yield seen, norms, here[:, start:stop]
        stop = start


class _WatchedBlock:
    """A RecurrentBlock that runs as always; its arguments are looked at afterwards, when FSDP has gathered its
    parameters.

    Attributes:
        calls: of each call, numbers (B, P, ...) by name, and the norm (B, P) of what it returned.
    """

    def __init__(self, block: RecurrentBlock) -> None:
        self._block = block
        self.calls: list[tuple[dict[str, Tensor], Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def __call__(
        self,
        hidden: Tensor,
        memory: MemoryInput | None,
        context: BlockContext,
        kv: KVStore | None,
        keep_kv: bool = True,
    ) -> BlockOutput:
        out: BlockOutput = self._block(hidden, memory, context, kv, keep_kv)
        self.calls.append(({} if memory is None else look(self._block, hidden, memory, context), _norm(out[0])))
        return out


def look(block: RecurrentBlock, hidden: Tensor, memory: MemoryInput, context: BlockContext) -> dict[str, Tensor]:
    """What a RecurrentBlock does with its arguments, computed once more beside it.

    Returns:
        ``received`` bool (B, P), where memory is not zero; ratios (B, P) or (B, P, G); gates (B, P, G).
    """
    seen = {"received": memory.state.ne(0).any(-1)}
    entered = block.block.enter(hidden, context)
    if memory.gain is not None:
        added = into_residual(entered, memory)
        seen["injection_ratio"] = _ratio(added, entered)
        entered = entered + added
    if block.gate is None:
        return seen
    projection = block.block.project(entered, context)
    if memory.aligned is not None:
        both = block.block.project_aligned(entered, context, memory.aligned)
        return {
            **seen,
            "local_gate": block.gate(projection.normed)[..., 0],
            "key_ratio": _ratio(both.key - projection.key, projection.key),
            "value_ratio": _ratio(both.value - projection.value, projection.value),
        }
    local, remote = block.gate(projection.normed).chunk(2, dim=2)
    key, value = block.projection(memory.state) if block.projection is not None else (memory.key, memory.value)
    return {
        **seen,
        "local_gate": local[..., 0],
        "memory_gate": remote[..., 0],
        "key_ratio": _ratio(remote * key, local * projection.key),
        "value_ratio": _ratio(remote * value, local * projection.value),
    }


def _norm(x: Tensor) -> Tensor:
    return at_least_float32(x).norm(dim=-1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    norm = _norm(whole)
    return _norm(part) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


# ------------------------------------------------------------------ summing up


class Tally:
    """Mean, deviation and extremes of numbers that come in parts."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        x = values.double().flatten()
        if x.numel():
            self._parts.append(torch.stack([x.new_tensor(x.numel()), x.mean(), x.var(correction=0), x.min(), x.max()]))

    def result(self) -> tuple[float, float, float, float] | None:
        """Mean, standard deviation, least and most; None where nothing came."""
        if not self._parts:
            return None
        count, means, variances, low, high = torch.stack(self._parts).cpu().unbind(1)
        share = count / count.sum()
        mean = (share * means).sum()
        variance = (share * (variances + (means - mean).square())).sum()
        return float(mean), float(variance.sqrt()), float(low.min()), float(high.max())


def summaries(tallies: Sequence[Tally]) -> dict[str, list[float]]:
    """Mean, std, min and max, each a list of one number a tally (NaN where nothing came), to six digits."""
    rows = [tally.result() or (float("nan"),) * 4 for tally in tallies]
    return {name: [float(f"{row[i]:.6g}") for row in rows] for i, name in enumerate(("mean", "std", "min", "max"))}
