"""What the memory does inside a trained model, and whether its recurrence is settled (docs/evaluate.md, Diagnose).

Legend: B batch, T row length, L blocks, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrt.data.held_out import HeldOut
from lrt.decoding.state import DecodeState
from lrt.decoding.step import decode_one_token
from lrt.engine import Engine
from lrt.eval.activations import activation_statistics
from lrt.eval.parameters import recurrence_statistics
from lrt.forward import Row, memory_inputs
from lrt.model import LatentRecurrentModel
from lrt.passes import PassResult
from lrt.recurrence import reset_memory, shift_right
from lrt.schedules import Interleaved, Refine, baseline, sequential, single
from lrt.tables import Table
from lrt.types import BlockOutput, KVStore, MemoryInput, Schedule, at_least_float32

PARTS = ("keys and values", "residual")
SWEEPS = 8
BUCKETS = 16
EXACT = 1e-3  # relative error of the memory up to which a position counts as exact
UNSETTLED = 0.1  # relative change in a sweep above which the memory has not settled
Report = Table


@torch.no_grad()
def diagnose(
    model: LatentRecurrentModel,
    batch: HeldOut,
    *,
    separator: int,
    sweeps: int = SWEEPS,
    decode_tokens: int = 5000,
    decode_rows: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] = lambda part: None,
) -> Report:
    """Everything that ``tools/diagnose.py`` reports.

    Args:
        model: a recurrent model in evaluation mode.
        batch: held-out rows (``lrt.data.held_out.HeldOut``), two or more, because memory is also taken from another
            row.
        separator: token with which decoding starts.
        sweeps: refinements over whose course the memory is watched.
        decode_tokens: drawn tokens over which the memory's drift is watched; 0 = none.
        decode_rows: rows that are drawn.
        seed: of the draws.
        progress: called with the name of each part before it runs.

    Returns:
        Plain values: ``loss`` of changed memories, ``parameters``, ``activations``, ``sweeps``, ``positions``,
        ``residues``, ``drift``, and ``findings`` in words.

    Raises:
        ValueError: the model has no memory, or there is only one row.
    """
    if model.recurrence is None:
        raise ValueError("the model has no memory, so there is nothing to diagnose: give a model with recurrence")
    if len(batch.input_ids) < 2:
        raise ValueError(
            "one row of text: memory is also taken from another row; give text for two rows or more, or shorter rows"
        )
    device = next(model.parameters()).device
    tokens, targets = batch.input_ids.to(device), batch.targets.to(device)
    sizes = torch.where(batch.documents.to(device) >= 0, batch.sizes.to(device), 0)
    scored = batch.documents.to(device) >= 0
    progress("true recurrence")
    exact = model.run(tokens, sequential())
    memory = torch.cat(memories_of(exact), dim=1)
    report: Report = {"rows": len(tokens), "tokens_a_row": tokens.shape[1]}
    progress("changed memories")
    report["loss"] = changed_memories(model, tokens, targets, scored, int(sizes.sum()), memory)
    report["parameters"] = recurrence_statistics(model)
    report["activations"] = activation_statistics(model, tokens, targets)
    progress("sweeps")
    report["sweeps"] = watch_sweeps(model, tokens, memory, count=sweeps)
    progress("positions")
    report |= by_position(model, tokens, targets, scored, sizes)
    if decode_tokens:
        progress("drift")
        report["drift"] = watch_drift(model, separator=separator, tokens=decode_tokens, rows=decode_rows, seed=seed)
    report["findings"] = findings(report)
    return report


# ------------------------------------------------------------------ the loss with another memory


def changed_memories(
    model: LatentRecurrentModel, tokens: Tensor, targets: Tensor, scored: Tensor, size: int, memory: Tensor
) -> Report:
    """Bits per byte that are lost when one block's memory is changed, all else being as in decoding.

    Every position is fed the true memory of the position before, so one parallel forward is decoding;
    then the memory that one block receives, in one of its parts, is another one.

    Args:
        memory: (B, T, D) of true recurrence.
        size: bytes of the scored targets.

    Returns:
        ``intact`` bits per byte, and by change the loss of ``all`` blocks at once, and of each block by part.
    """
    with_keys = model.recurrence is not None and model.recurrence.kv_projection
    row = model.row(tokens)
    received = reset_memory(shift_right(memory), row.starts)

    def bits(changed: Mapping[int, Mapping[str, Tensor]]) -> float:
        hidden = Engine(_Changed(model, changed)).run(row, received, keep_kv=False).hidden
        return float(model.backbone.loss(hidden, targets)[1][scored].double().sum()) / size / math.log(2)

    report: Report = {"intact": bits({}), "blocks": [index + 1 for index in model.receivers]}
    for name, other in _others(memory, row).items():
        everywhere = {index: dict.fromkeys(PARTS, other) for index in model.receivers}
        report[name] = {"all": bits(everywhere) - report["intact"]}
        for part in PARTS:
            if part == "residual" and model.injection is None or part != "residual" and not with_keys:
                continue
            report[name][part] = [bits({index: {part: other}}) - report["intact"] for index in model.receivers]
    return report


def _others(memory: Tensor, row: Row) -> dict[str, Tensor]:
    """Memories to receive in place of the true one, (B, T, D)."""
    mean = memory.mean((0, 1), keepdim=True).expand_as(memory)
    found = {
        "zeroed": torch.zeros_like(memory),
        "of another row": shift_right(memory.roll(1, dims=0)),
        "frozen at the first": memory[:, :1].expand_as(memory),
        "replaced by the mean": mean,
    }
    return {name: reset_memory(other, row.starts) for name, other in found.items()}


class _Changed:
    """A model some of whose blocks receive another memory."""

    def __init__(self, model: LatentRecurrentModel, changed: Mapping[int, Mapping[str, Tensor]]) -> None:
        self._model = model
        self.blocks = [
            _ChangedBlock(model, i, changed[i]) if i in changed else block for i, block in enumerate(model.blocks)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)


class _ChangedBlock:
    """A block that receives another memory in some of its parts: what one part reads, the other does not see."""

    def __init__(self, model: LatentRecurrentModel, index: int, changed: Mapping[str, Tensor]) -> None:
        self._model, self._index, self._changed = model, index, changed
        self._block = model.blocks[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def __call__(
        self, hidden: Tensor, memory: MemoryInput | None, context: object, kv: KVStore | None, keep_kv: bool = True
    ) -> BlockOutput:
        assert memory is not None
        states = {part: self._changed.get(part, memory.state) for part in PARTS}
        into_keys, residual = (memory_inputs(self._model, states[part])[self._index] for part in PARTS)
        assert into_keys is not None and residual is not None
        block, own = self._block, self._block.projection
        if own is not None:  # it would read the state that the residual gets
            block = copy.copy(block)
            block._modules = {**block._modules, "projection": _Given(own(states[PARTS[0]]))}
        mixed = residual._replace(key=into_keys.key, value=into_keys.value, aligned=into_keys.aligned)
        out: BlockOutput = block(hidden, mixed, context, kv, keep_kv)
        return out


class _Given(nn.Module):
    """A projection that has been made."""

    def __init__(self, made: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self._made = made

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
        return self._made


# ------------------------------------------------------------------ sweeps


def watch_sweeps(model: LatentRecurrentModel, tokens: Tensor, memory: Tensor, *, count: int) -> Report:
    """How the memory settles over full refinements.

    Args:
        memory: (B, T, D) of true recurrence.
        count: refinements.

    Returns:
        One number a refinement: ``change`` to the pass before and ``change_over_two`` to the one before that (the mean
        over positions; a memory that jumps between two states changes much in one sweep and little in two), the largest
        change, the mean ``error`` to true recurrence, and the ``exact_prefix`` of the worst row.
    """
    results = model.run(tokens, Refine(count))
    passes = [at_least_float32(memory) for memory in memories_of(results)]
    truth = at_least_float32(memory)
    report: Report = {name: [] for name in ("change", "largest_change", "change_over_two", "error", "exact_prefix")}
    for number in range(1, len(passes)):
        change = _relative(passes[number], passes[number - 1])
        error = _relative(passes[number], truth)
        report["change"].append(float(change.mean()))
        report["largest_change"].append(float(change.max()))
        report["change_over_two"].append(
            float(_relative(passes[number], passes[number - 2]).mean()) if number > 1 else None
        )
        report["error"].append(float(error.mean()))
        report["exact_prefix"].append(int((error <= EXACT).long().cumprod(1).sum(1).min()))
    return report


def memories_of(results: Sequence[PassResult]) -> list[Tensor]:
    """The memory of every pass that has one."""
    return [result.memory for result in results if result.memory is not None]


def _relative(new: Tensor, old: Tensor) -> Tensor:
    norm = new.norm(dim=-1)
    return (new - old).norm(dim=-1) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


# ------------------------------------------------------------------ positions


def by_position(model: LatentRecurrentModel, tokens: Tensor, targets: Tensor, scored: Tensor, sizes: Tensor) -> Report:
    """Bits per byte in every memory mode by position in the row, and by residue class of the position.

    The classes are those of the training schedule's subsets, and two where it has none: a memory that jumps between two
    states from token to token shows in ``decode`` and not in ``parallel``.
    """
    schedule = single(model.train_schedule)
    if isinstance(schedule, (Interleaved, Refine)):
        schedule = replace(schedule, weights="paper")
    nats = {mode: model.score(tokens, targets, plan)[-1] for mode, plan in _modes(schedule).items()}
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device)
    classes = min(schedule.subsets, length) if isinstance(schedule, Interleaved) and schedule.subsets > 1 else 2
    count = min(BUCKETS, length)
    return {
        "positions": {mode: _by_class(x, sizes, scored, places * count // length, count) for mode, x in nats.items()},
        "residues": {mode: _by_class(x, sizes, scored, places % classes, classes) for mode, x in nats.items()},
    }


def _modes(schedule: Schedule) -> dict[str, Schedule]:
    return {"zero": baseline(), "parallel": schedule, "decode": sequential()}


def _by_class(nats: Tensor, sizes: Tensor, scored: Tensor, of_position: Tensor, count: int) -> list[float | None]:
    found: list[float | None] = []
    for number in range(count):
        here = scored & (of_position == number)
        size = int(sizes[here].sum())
        found.append(float(nats[here].double().sum()) / size / math.log(2) if size else None)
    return found


# ------------------------------------------------------------------ drift


class _Source:
    """A model whose source block's output is looked at."""

    def __init__(self, model: LatentRecurrentModel) -> None:
        self._model = model
        self.norms: list[Tensor] = []
        self.blocks = [self._looked_at if i + 1 == model.source else block for i, block in enumerate(model.blocks)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def _looked_at(self, *arguments: object) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self._model.blocks[self._model.source - 1](*arguments)
        self.norms.append(at_least_float32(out[0][:, 0]).square().mean(-1).sqrt())
        return out


def watch_drift(model: LatentRecurrentModel, *, separator: int, tokens: int, rows: int, seed: int) -> Report:
    """RMS of the source block's output, and the angle of the memory to those one and two tokens before,
    while tokens are drawn.

    Returns:
        One number per token, the mean over rows: ``rms``, and in degrees ``angle`` and ``angle_over_two``.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    state = DecodeState.empty(model, batch=rows, capacity=tokens)
    watched = _Source(model)
    active = torch.ones(rows, dtype=torch.bool, device=device)
    current = torch.full((rows,), separator, dtype=torch.int64, device=device)
    memories: list[Tensor] = []
    for _ in range(tokens):
        logits = decode_one_token(cast(LatentRecurrentModel, watched), state, current, active)
        assert state.memory is not None
        memories.append(at_least_float32(state.memory).clone())
        logits[:, separator] = -math.inf  # one long document: a separator would begin another memory
        current = torch.multinomial(torch.softmax(logits.float(), dim=-1), 1, generator=generator)[:, 0]
    every = torch.stack(memories, dim=1)
    return {
        "rms": torch.stack(watched.norms, dim=1).mean(0).tolist(),
        "angle": _angles(every, 1),
        "angle_over_two": _angles(every, 2),
    }


def _angles(memories: Tensor, apart: int) -> list[float]:
    cosine = torch.nn.functional.cosine_similarity(memories[:, apart:], memories[:, :-apart], dim=-1)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))).mean(0).tolist()


# ------------------------------------------------------------------ in words


def findings(report: Report) -> list[str]:
    """What the numbers say, most important first."""
    loss, sweeps = report["loss"], report["sweeps"]
    worth = loss["zeroed"]["all"]
    found = [
        f"zeroing the memory costs {worth:+.4f} bits per byte, taking another row's "
        f"{loss['of another row']['all']:+.4f}"
    ]
    change, over_two = sweeps["change"][-1], sweeps["change_over_two"][-1]
    if two_states(report):
        found.append(
            f"the memory jumps between two states: after {len(sweeps['change'])} sweeps it still changes by "
            f"{change:.2f} in one sweep but by {over_two:.2f} in two; train on settled memory "
            "(recipes/settle_memory.toml), or weight the initialization"
        )
    elif sweeps["largest_change"][-1] > UNSETTLED:
        largest = sweeps["largest_change"][-1]
        swept = len(sweeps["change"])
        found.append(
            f"the memory has not settled after {swept} sweeps: its largest change is {largest:.2f} "
            "(recipes/settle_memory.toml)"
        )
    gaps = [
        d - p
        for p, d in zip(report["residues"]["parallel"], report["residues"]["decode"])
        if p is not None and d is not None
    ]
    found.append(
        "decode minus parallel by residue class: " + " ".join(f"{gap:+.4f}" for gap in gaps) + " bits per byte"
    )
    return found


def two_states(report: Report) -> bool:
    """Whether the memory changes much in one sweep and little in two."""
    change, over_two = report["sweeps"]["change"][-1], report["sweeps"]["change_over_two"][-1]
    return over_two is not None and change > UNSETTLED and over_two < 0.5 * change
