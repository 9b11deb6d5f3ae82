"""A model as decoding wants it on a GPU: fused kernels for single tokens, recorded or compiled passes for prompts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from lrt.backbone import Decoder
from lrt.decoding.compiled_block import CompiledBlock
from lrt.decoding.fast.one_token import can_fuse, fuse
from lrt.decoding.fast.prefill_graphs import Recorder
from lrt.decoding.prefill_passes import Span
from lrt.decoding.state import DecodeState
from lrt.decoding.step import Stepper, stepper_of
from lrt.decoding.which_model import Decodes
from lrt.forward import Row
from lrt.model import LatentRecurrentModel
from lrt.types import BlockContext, KVStore, MemoryInput


class Accelerated(Stepper):
    """A model that decodes faster; everything else about it is the model's own.

    Args:
        model: a RecurrentDecoder.
        one_token: what runs single tokens, a Stepper or a model.
        blocks: the blocks that run passes over many positions.
        compiled: makes a function of tensors faster.
        recorded: whether passes over short prompts become CUDA graphs; on the CPU they run the same way,
            without a graph.
    """

    def __init__(
        self, model: Decodes, *, one_token: Any, blocks: Any, compiled: Callable[[Any], Any], recorded: bool = False
    ) -> None:
        super().__init__(model)
        self.one_token, self.blocks, self.compiled = stepper_of(one_token), blocks, compiled
        self.recorder = Recorder(self, record=next(model.parameters()).is_cuda) if recorded else None

    def step(
        self, state: DecodeState, tokens: Tensor, active: Tensor, *, row: Row | None = None, stop: int | None = None
    ) -> Tensor:
        return self.one_token.step(state, tokens, active, row=row, stop=stop)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.one_token.logits(hidden)

    def stretch(self, state: DecodeState, tokens: Tensor, counts: Tensor, *, kind: Any) -> Span:
        """Recorded passes where they fit; otherwise those of the blocks."""
        span = None if self.recorder is None else self.recorder.span(state, tokens, counts, kind=kind)
        return super().stretch(state, tokens, counts, kind=kind) if span is None else span

    def quick(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.compiled(function)


def accelerate(model: Decodes, *, backend: str = "inductor", one_token: Stepper | None = None) -> Accelerated:
    """Make a model fast at decoding and prefill, to be used in its place; compiling takes place at the first calls.

    On CUDA a native model's single tokens run in hand-written kernels (``lrt.decoding.fast.one_token``), where triton
    is installed, and its passes over short prompts as CUDA graphs (``lrt.decoding.fast.prefill_graphs``); other models'
    blocks are compiled, one graph for all blocks of a kind. Parameters are shared with the model, so an update is seen
    at once.

    Args:
        model: a LatentRecurrentModel in evaluation, on its device and in its dtype.
        backend: of torch.compile.
        one_token: what runs single tokens; None = the kernels or the compiled blocks.

    Raises:
        ValueError: the model is accelerated already.
    """
    if isinstance(model, Accelerated):
        raise ValueError("this model is accelerated already: accelerate the model itself, once")
    on_gpu = next(model.parameters()).device.type == "cuda"
    if one_token is None:
        one_token = fuse(model) if on_gpu and can_fuse(model) else compiled_decoder(model, backend=backend)
    recorded = on_gpu and type(model.backbone) is Decoder
    blocks = list(model.blocks) if recorded else compiled_blocks(model, dynamic=True, backend=backend)
    compiled = torch.compile(dynamic=False, backend=backend)
    return Accelerated(model, one_token=one_token, blocks=blocks, compiled=compiled, recorded=recorded)


def compiled_decoder(model: Decodes, *, backend: str) -> Stepper:
    """A model whose blocks are compiled for static shapes."""
    names = ("backbone", "memory_projection", "injection", "source", "receivers", "recurrence", "memory_of")
    parts = {name: getattr(model, name) for name in names}
    compiled = SimpleNamespace(blocks=compiled_blocks(model, dynamic=False, backend=backend), **parts)
    return Stepper(cast(LatentRecurrentModel, compiled))


def compiled_blocks(model: Decodes, *, dynamic: bool, backend: str) -> list[CompiledBlock]:
    """The model's blocks behind one compiled function; blocks of the same kind share a graph."""
    # Kinds of block, of store and of memory make more graphs than the default limit of 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    function = torch.compile(_run, dynamic=dynamic, backend=backend)
    return [CompiledBlock(block, function) for block in model.blocks]


def _run(
    block: Any, hidden: Tensor, memory: MemoryInput | None, context: BlockContext, kv: KVStore | None
) -> tuple[Tensor, Tensor, Tensor]:
    return block(hidden, memory, context, kv)
