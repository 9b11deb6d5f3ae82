"""Rotary positions.

Legend: B batch, P positions of the pass, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def rope_tables(positions: Tensor, head_dim: int, *, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles.

    Args:
        positions: (P,) or (B, P) token positions.
        head_dim: K.
        base: RoPE base.
        dtype: float32, or bfloat16 to reproduce the official tables.

    Returns:
        cos, sin: (1 or B, P, 1, K/2). The angles are computed in float32, in float64 when dtype is.
    """
    exact = torch.promote_types(dtype, torch.float32)
    channels = torch.arange(0, head_dim, 2, dtype=exact, device=positions.device)
    angles = positions.to(exact)[..., None] * (1.0 / (base ** (channels / head_dim)))
    if angles.ndim == 2:
        angles = angles[None]
    return angles.cos().to(dtype)[:, :, None], angles.sin().to(dtype)[:, :, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension of x (B, P, heads, K); result in the wider dtype of x and the tables."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1)


@contextmanager
def kept_frequencies(*modules: nn.Module | None) -> Iterator[None]:
    """Keep the frequencies of RoPE in float32 while modules are cast, as they are where transformers loads in half
    precision.

    Rounded to bfloat16 a frequency is off by up to 0.4 %, which after a few hundred tokens is another angle.

    Args:
        modules: buffers named ``inv_freq`` in them stay exact on the device they are moved to; None is skipped.
    """
    inside = [m for module in modules if module is not None for m in module.modules()]
    before = [(m, name, b) for m in inside for name, b in m.named_buffers(recurse=False) if name.endswith("inv_freq")]
    yield
    for module, name, exact in before:
        cast = getattr(module, name)
        if cast.dtype.itemsize < min(4, exact.dtype.itemsize):
            setattr(module, name, exact.to(device=cast.device, dtype=torch.float32))
