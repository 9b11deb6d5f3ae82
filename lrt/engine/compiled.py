"""How one pass is computed around compiled blocks: gradients summed once, none of what nobody reads, few graphs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lrt.attention import Mask
from lrt.engine.plain import Engine, Entries, Stores, dtype_of
from lrt.forward import Row, run_blocks
from lrt.kernels.attention import block_mask, usable
from lrt.kernels.gradients import Branched, branch_compiled, fan_out
from lrt.tables import Table
from lrt.types import PassOutput, RecurrentDecoder

CHUNK_GRAPHS = 8  # chunks of a row that are compiled, each for itself; more run eagerly, which a CUDA graph hides


def is_compiled(module: object) -> bool:
    """Whether ``module.compile()`` was called: torch's private ``_compiled_call_impl``, as 2.11 and 2.13 set it."""
    return getattr(module, "_compiled_call_impl", None) is not None


def engine_of(model: RecurrentDecoder, *, keep_inputs: bool = False) -> Engine:
    """The engine for a model as it is now; one with twins stands in for compiled blocks."""
    fast = model.twins is not None or all(map(is_compiled, model.blocks))
    return (CompiledEngine if fast else Engine)(model, keep_inputs=keep_inputs)


class TrimmedEntries(Entries):
    """Entries that a pass reads one step late without their last position, where the backward then pads nothing."""

    def __init__(self, known: Branched) -> None:
        super().__init__(known)
        self._shorter = list(known.shorter)

    def __setitem__(self, residue: int, fresh: Tensor) -> None:
        self._all[residue] = self._shorter[residue] = fresh

    def read_by(self, residue: int, mask: Mask) -> tuple[Tensor, ...]:
        """Of later residues all but the last entry, unless a mask says what is seen."""
        both = enumerate(zip(self._all, self._shorter))
        return tuple(whole if mask is not None or g <= residue else shorter for g, (whole, shorter) in both)


class CompiledEngine(Engine):
    """Computes the passes of a model whose blocks are compiled; on a GPU its sums of gradients are compiled too."""

    branch = staticmethod(branch_compiled)
    entries = TrimmedEntries

    def compute(
        self, row: Row, received: Tensor | None, stores: Stores, *, index: int, stop: int | None, keep_kv: bool,
        keep_inputs: bool,
    ) -> PassOutput:  # fmt: skip
        # Contiguous, as the inputs of the later blocks are: the first block would otherwise be a graph of its own.
        hidden = row.hidden.contiguous()
        return run_blocks(
            self._decoder(index), hidden, row.contexts, received, stores=stores, start=row.start, stop=stop,
            keep_kv=keep_kv, keep_inputs=keep_inputs, share=fan_out,
        )  # fmt: skip

    def masks(self, row: Row, *, groups: int, residue: int) -> Sequence[Mask]:
        """Block masks where FlexAttention is the fastest; eager, it would hold all scores."""
        device, length, blocks = row.hidden.device, row.length, self.model.blocks
        if not usable(device=device, dtype=dtype_of(row), head_dim=self.model.backbone.head_dim):
            return super().masks(row, groups=groups, residue=residue)
        distinct = {block.window for block in blocks}
        seen = {window: None if window is None or window >= length - 1 else window for window in distinct}
        place: Table = {"length": length, "groups": groups, "residue": residue, "device": device}
        masks = {window: block_mask(window=seen[window], documents=row.documents, **place) for window in distinct}
        return [masks[block.window] for block in blocks]

    def chunkwise(self, count: int) -> AbstractContextManager[object]:
        """A chunk that autograd follows sees more keys than the last, so it is a graph of its own: few are compiled."""
        few = count <= CHUNK_GRAPHS or not torch.is_grad_enabled()
        return super().chunkwise(count) if few else torch.compiler.set_stance("force_eager")

    def _decoder(self, index: int) -> RecurrentDecoder:
        """What runs a pass: the model, or the twin that keeps its gradients apart."""
        twins = self.model.twins
        return self.model if twins is None or not torch.is_grad_enabled() else twins(self.model, index)
