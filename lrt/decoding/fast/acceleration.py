"""A model as decoding wants it on a GPU: fused kernels for single tokens, recorded or compiled passes for prompts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lrt.backbone import Decoder
from lrt.decoding.fast import one_token
from lrt.decoding.fast.prefill_graphs import Recorder


class Accelerated:
    """A model that decodes faster; everything else about it is the model's own.

    Args:
        model: a RecurrentDecoder.
        one_token: the decoder that runs single tokens.
        blocks: the blocks that run passes over many positions.
        compiled: makes a function of tensors faster.
        recorded: whether passes over short prompts become CUDA graphs; on the CPU they run the same way,
            without a graph.
    """

    def __init__(
        self, model: Any, *, one_token: Any, blocks: Any, compiled: Callable[[Any], Any], recorded: bool = False
    ) -> None:
        self.plain, self.one_token, self.blocks, self.compiled = model, one_token, blocks, compiled
        self.recorder = Recorder(self, record=next(model.parameters()).is_cuda) if recorded else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["plain"], name)


def accelerate(model: Any, *, backend: str = "inductor") -> Accelerated:
    """Make a model fast at decoding and prefill, to be used in its place; compiling takes place at the first calls.

    On CUDA a native model's single tokens run in hand-written kernels (``lrt.decoding.fast.one_token``),
    where triton is
    installed, and its passes over short prompts as CUDA graphs (``lrt.decoding.fast.prefill_graphs``);
    other models' blocks are compiled, one graph for all blocks of a kind. Parameters are shared with the model,
    so an update is seen
    at once.

    Args:
        model: a LatentRecurrentModel in evaluation, on its device and in its dtype.
        backend: of torch.compile.

    Raises:
        ValueError: the model is accelerated already.
    """
    if isinstance(model, Accelerated):
        raise ValueError("this model is accelerated already: accelerate the model itself, once")
    on_gpu = next(model.parameters()).device.type == "cuda"
    decoder = (
        one_token.fuse(model) if on_gpu and one_token.can_fuse(model) else compiled_decoder(model, backend=backend)
    )
    recorded = on_gpu and type(model.backbone) is Decoder
    blocks = list(model.blocks) if recorded else compiled_blocks(model, dynamic=True, backend=backend)
    return Accelerated(
        model,
        one_token=decoder,
        blocks=blocks,
        compiled=torch.compile(dynamic=False, backend=backend),
        recorded=recorded,
    )


def compiled_decoder(model: Any, *, backend: str) -> Any:
    """A RecurrentDecoder whose blocks are compiled for static shapes."""
    names = ("backbone", "memory_projection", "injection", "source", "receivers", "recurrence", "memory_of")
    return SimpleNamespace(
        blocks=compiled_blocks(model, dynamic=False, backend=backend), **{name: getattr(model, name) for name in names}
    )


def compiled_blocks(model: Any, *, dynamic: bool, backend: str) -> list[CompiledBlock]:
    """The model's blocks behind one compiled function; blocks of the same kind share a graph."""
    # Kinds of block, of store and of memory make more graphs than the default limit of 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    function = torch.compile(_run, dynamic=dynamic, backend=backend)
    return [CompiledBlock(block, function) for block in model.blocks]


class CompiledBlock:
    """A RecurrentBlock called through a compiled function."""

    compiled = True

    def __init__(self, block: Any, function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        self.block, self.window, self.gate, self.projection = block, block.window, block.gate, block.projection
        self._function = function

    def __call__(self, hidden: Tensor, memory: Any, context: Any, kv: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._function(self.block, hidden, memory, context, kv)


def _run(block: Any, hidden: Tensor, memory: Any, context: Any, kv: Any) -> tuple[Tensor, Tensor, Tensor]:
    return block(hidden, memory, context, kv)
