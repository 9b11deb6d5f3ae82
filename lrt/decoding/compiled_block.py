"""A block that is called through a compiled function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lrt.types import BlockContext, KVStore, MemoryInput


class CompiledBlock:
    """A RecurrentBlock called through a compiled function.

    Args:
        block: the RecurrentBlock.
        function: (block, hidden, memory, context, store) -> what the block returns.
    """

    def __init__(self, block: Any, function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        self.block, self.window, self.gate, self.projection = block, block.window, block.gate, block.projection
        self._function = function

    def __call__(
        self, hidden: Tensor, memory: MemoryInput | None, context: BlockContext, kv: KVStore | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._function(self.block, hidden, memory, context, kv)
