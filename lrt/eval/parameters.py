"""What the parameters of the recurrence have become."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lrt.model import LatentRecurrentModel


@torch.no_grad()
def recurrence_statistics(model: LatentRecurrentModel) -> dict[str, list[float]]:
    """What the parameters have become: gains g, size of gates and projections, one number a receiving block;
    a and b, one per block.

    Gates are 1 while their weights are 0, so the root mean square of the weights tells how far they have moved.
    Every rank must call this.
    """
    if model.recurrence is None:
        return {}
    found: dict[str, list[float]] = {}
    injection, shared = model.injection, model.memory_projection
    if injection is not None:
        found["gains"] = _whole(injection.gains).tolist()
        if model.recurrence.residual == "projected":
            found["residual_map_rms"] = [_rms(injection.get_parameter("map.weight"))]
    blocks = [model.blocks[index] for index in model.receivers]
    gates = [block.gate for block in blocks if block.gate is not None]
    if gates:
        found["gate_rms"] = [_rms(gate.weight) for gate in gates]
    own = [block.projection for block in blocks if block.projection is not None]
    pairs = own if shared is None else [shared]
    if model.recurrence.projection == "aligned":
        found["map_rms"] = [_rms(pair.get_parameter("map.weight")) for pair in pairs]
    elif pairs:
        for name in ("key", "value"):
            found[f"{name}_projection_rms"] = [_rms(pair.get_parameter(f"{name}.weight")) for pair in pairs]
    return found | _scales(model)


def _scales(model: LatentRecurrentModel) -> dict[str, list[float]]:
    """a and b of the native backbone."""
    known = {name: getattr(model.backbone, name, None) for name in ("residual_scales", "embedding_scales")}
    return {name: _whole(scales).tolist() for name, scales in known.items() if scales is not None}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _rms(tensor: Tensor) -> float:
    return float(_whole(tensor).float().square().mean().sqrt())
