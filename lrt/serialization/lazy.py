"""Cutting, stacking and casting tensors that are not read yet: a conversion holds one shard, not a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lrt.serialization.tensors import LazyTensor


def rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows start..stop of a tensor."""
    return LazyTensor((stop - start, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[start:stop].clone())


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors one below the other."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([p.read() for p in parts]))


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The tensor in another dtype."""
    return LazyTensor(tensor.shape, dtype, lambda: tensor.read().to(dtype))


def common_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """The narrowest dtype that holds every tensor exactly."""
    dtype = None
    for tensor in tensors.values():
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype or torch.float32
