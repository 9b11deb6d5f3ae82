"""Prefill of short prompts as CUDA graphs: a ``Span`` whose passes are recorded once a shape, then replayed.

Launched one by one, the kernels of a pass over 2,048 tokens take the processor several times longer than the
GPU. A graph launches them at once, but is good for one shape: prompts are padded to the next of a few lengths
(causality makes that harmless), and the first prompt of a shape runs without a graph, so that one that comes
once does not pay for recording. Every sweep is one graph over all residues; a flag for each position says
whether its result counts, so exact positions and frozen rows keep their values.

Legend: B batch, P positions, S groups.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrt.decoding.one_position import attention_cut_of
from lrt.decoding.prefill_passes import Span
from lrt.decoding.state import DecodeState
from lrt.decoding.which_model import Decodes
from lrt.kernels.attention import usable

SHAPES = 8  # kept at most; each holds its keys, values and activations
POSITIONS = 16384  # of all rows together; above that launches no longer count


class Recorder:
    """Recorded spans of one model by shape, the least recently used forgotten.

    Args:
        model: a RecurrentDecoder whose blocks are not compiled.
        record: capture graphs (CUDA); False runs the same passes as they are.
    """

    def __init__(self, model: Decodes, *, record: bool = True) -> None:
        self.model, self.record = model, record
        self.pool: Any = torch.cuda.graph_pool_handle() if record else None
        self.shapes: OrderedDict[Any, RecordedSpan] = OrderedDict()

    @torch.inference_mode(False)  # what is kept must be good for calls inside inference mode and outside
    @torch.no_grad()
    def span(self, state: DecodeState, tokens: Tensor, counts: Tensor, *, kind: Any) -> Span | None:
        """A span for prompts that begin a state; None where recording would not pay or is not possible.

        Args:
            state: of rows that have consumed nothing, or None is returned.
            tokens: (B, P).
            counts: (B,) real tokens of each row.
            kind: spans of different kinds run different passes: groups of a sweep, "refine" or "plain".
        """
        batch, length = len(tokens), padded(tokens.shape[1])
        head_dim = self.model.backbone.head_dim
        if batch * length > POSITIONS or attention_cut_of(self.model) is not None or bool(state.lengths.any()):
            return None
        if self.record and not usable(device=tokens.device, dtype=state.keys[0].dtype, head_dim=head_dim):
            return None
        # Weights that moved, or changed their dtype, are other weights.
        key = (batch, length, kind, next(self.model.parameters()).data_ptr(), state.keys[0].dtype)
        if key not in self.shapes:
            self.shapes[key] = RecordedSpan(
                self.model, state.memory, batch=batch, length=length, device=tokens.device, pool=self.pool
            )
            if len(self.shapes) > SHAPES:
                self.shapes.popitem(last=False)
        self.shapes.move_to_end(key)
        self.shapes[key].load(tokens, counts)
        return self.shapes[key]


def padded(length: int) -> int:
    """The length that prompts of this one are padded to: eight steps an octave, at least 64."""
    step = max(64, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


class RecordedSpan(Span):
    """A span on static tensors; one prompt at a time.

    Args:
        model: a RecurrentDecoder.
        memory: (B, D) of an empty state; None without recurrence.
        batch: B.
        length: P.
        device: of the tensors.
        pool: of the graphs' memory; None = run without graphs.
    """

    def __init__(
        self, model: Decodes, memory: Tensor | None, *, batch: int, length: int, device: torch.device, pool: Any
    ) -> None:
        integers: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self._begin(model, torch.zeros(batch, length, **integers), torch.zeros(batch, **integers))
        self._nothing = None if memory is None else torch.zeros_like(memory)
        self._certain = torch.zeros(1, **integers)  # positions up to this one are exact
        self._rows = torch.ones(batch, dtype=torch.bool, device=device)  # still swept
        self._pool = pool
        self._graphs: dict[str, tuple[Any, Any]] = {}
        self._warm: set[str] = set()
        self._live_rows: list[int] = []

    def load(self, tokens: Tensor, counts: Tensor) -> None:
        """Take new prompts."""
        self.tokens.zero_()
        self.tokens[:, : tokens.shape[1]].copy_(tokens)
        self.counts.copy_(counts)
        self.ran, self._live_rows = [], list(range(len(tokens)))
        self._rows.fill_(True)

    # -------------------------------------------------------------- passes

    def round(self, rows: list[int], *, groups: int, number: int, longest: int) -> list[float]:
        self._certain.fill_(number * groups)
        if rows != self._live_rows:
            self._live_rows = rows
            self._rows.copy_(torch.tensor([row in rows for row in range(len(self.counts))]))
        residual = self._run(f"round {groups}", lambda: self._round(groups)).tolist()
        self._count(self.tokens.numel(), self.entry, self.model.source, received=True)
        return [residual[row] for row in rows]

    def _first(self) -> None:
        self._embed(self._nothing, None)
        super()._first()
        # here, once: what sweeps write must not be made again by a replay
        self._open(range(self.entry, self.model.source))

    def _whole(self) -> Tensor:
        self._embed(None, None)
        return super()._whole()

    def _round(self, groups: int) -> Tensor:
        keep = (self.places > self._certain) & self._rows[:, None]
        changes = []
        for residue in [*range(1, groups), 0]:  # as if it began one after the positions that are exact
            where = slice(residue, self.length, groups)
            changes.append(self.sweep(where, keep[:, where]))
        return torch.stack(changes).amax(0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, name: str, action: Callable[[], Any]) -> Any:
        """Run a pass the first time, record it the second, replay it from then on."""
        begins = name in ("first", "whole")  # makes the tensors that the other passes write
        if name in self._graphs:
            graph, result = self._graphs[name]
        elif self._pool is None or name not in self._warm or not (begins or "first" in self._graphs):
            self._warm.add(name)
            return action()
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = action()
            self._graphs[name] = graph, result
        graph.replay()
        return result
