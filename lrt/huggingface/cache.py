"""The cache that carries the memory through ``generate`` of transformers."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lrt.decoding.state import DecodeState
from lrt.model import LatentRecurrentModel

SMALLEST_CAPACITY = 64  # tokens of a fresh cache; it doubles when full


class RecurrentCache(Cache):
    """Keys, values and the memory of every row, as ``generate`` of transformers passes them around.

    Rows are kept without their padding: row b has consumed as many tokens as its mask has ones.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: DecodeState | None = None
        self.columns = 0  # tokens seen, padding included: what transformers calls the sequence length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def room(self, model: LatentRecurrentModel, batch: int, tokens: int) -> DecodeState:
        """The state with room for ``tokens`` more, which it then counts as seen."""
        if self.state is not None and self.state.batch != batch:
            raise ValueError(
                f"this cache holds {self.state.batch} rows, but {batch} came: "
                "start with a fresh cache, or select rows of this one"
            )
        self.columns += tokens
        if self.state is None:
            self.state = DecodeState.empty(model, batch=batch, capacity=max(SMALLEST_CAPACITY, self.columns))
        elif self.columns > self.state.capacity:
            larger = DecodeState.empty(model, batch=self.state.batch, capacity=2 * self.columns)
            larger.put(range(self.state.batch), self.state)
            self.state = larger
        return self.state

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.fork(repeats)

    def reset(self) -> None:
        self.state, self.columns = None, 0

    def crop(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(
            "this cache cannot be cut back: the memory of an earlier token is gone once a later one is decoded, "
            "so assisted and prompt-lookup decoding are not possible; use greedy, sampling or beams, "
            "or lrt.DecodeState with keep_at"
        )

    def update(self, *_: object, **__: object) -> NoReturn:
        raise ValueError("RecurrentCache carries the memory of an lrt model and works with no other model")

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # a recurrent state that counts its tokens: what was seen is to be cut off the next input

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.keys)


def check_positions(position_ids: Tensor | None, seen: Tensor, real: Tensor) -> None:
    """Positions that do not count on from what a cache holds; read on the CPU only, where that waits for nothing."""
    if position_ids is None or position_ids.device.type != "cpu":
        return
    if bool(((position_ids != seen[:, None].cpu() + real.to(torch.int64).cumsum(1) - 1) & real).any()):
        raise ValueError(
            "position_ids do not count on from what the cache holds: "
            "leave them out, it counts the real tokens of every row"
        )
