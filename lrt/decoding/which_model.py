"""Which model a state belongs to: what stands in a model's place, the shape of its keys, a digest of its weights."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch

from lrt.forward import run_blocks
from lrt.model import LatentRecurrentModel
from lrt.serialization.fingerprint import parts
from lrt.types import PassOutput

# what decodes: a model, or what stands in its place
Decodes: TypeAlias = "LatentRecurrentModel | StandIn"


class StandIn:
    """A decoder in the place of another one; whatever it does not say itself is that one's.

    Args:
        plain: the other one.
    """

    def __init__(self, plain: Decodes) -> None:
        self.plain = plain

    @property
    def itself(self) -> LatentRecurrentModel:
        """The decoder whose keys and memory this one has."""
        return itself(self.plain)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["plain"], name)


def itself(model: Decodes) -> LatentRecurrentModel:
    """The decoder whose keys and memory a model or its stand-in has."""
    return model.itself if isinstance(model, StandIn) else model


_probed: WeakKeyDictionary[LatentRecurrentModel, tuple[object, PassOutput]] = WeakKeyDictionary()


@torch.no_grad()
def probe(model: Decodes) -> PassOutput:
    """One position through a model, or what it stands for, which says the shape and dtype of its keys; once."""
    model = itself(model)
    parameter = next(model.parameters())
    about = (parameter.device, parameter.dtype, model.source)
    if model not in _probed or _probed[model][0] != about:
        token = torch.zeros(1, 1, dtype=torch.int64, device=parameter.device)
        hidden, contexts = model.backbone.embed(token, token)
        _probed[model] = (about, run_blocks(model, hidden, contexts, None))
    return _probed[model][1]


_known: WeakKeyDictionary[Decodes, tuple[object, str]] = WeakKeyDictionary()


@torch.no_grad()
def fingerprint(model: Decodes) -> str:
    """A digest of the model's settings and of every weight; equal on every device, recomputed after an update.

    An update that torch does not count (through ``.data``, or of weights made in inference mode) is not seen:
    the digest of before stays, so states made before such an update must be made again.
    """
    whole_tensors = ((n, p.to_local() if hasattr(p, "to_local") else p) for n, p in model.named_parameters())
    parameters = [part for whole in whole_tensors for part in parts(*whole)]
    version = tuple((p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for _, p in parameters)
    if model in _known and _known[model][0] == version:
        return _known[model][1]
    config = getattr(model.backbone, "config", None)
    # of a native model: RoPE base, softcap and the like
    settings = config if dataclasses.is_dataclass(config) else None
    digest = hashlib.sha256(repr((model.recurrence, settings, [block.window for block in model.blocks])).encode())
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        bits = parameter.detach().flatten().view(whole[parameter.element_size()])
        stride = max(1, bits.numel() // 64)
        # Sums of the bit patterns are integers: the order of summation, and so the device, does not matter.
        sums.append(torch.cat([bits.sum(dtype=torch.int64)[None], bits[::stride].to(torch.int64)]))
    digest.update(torch.cat([part.to(sums[0].device) for part in sums]).cpu().numpy().tobytes())
    _known[model] = (version, digest.hexdigest())
    return _known[model][1]


def check_fingerprint(made_by: str, model: Decodes) -> None:
    """Raises ValueError when a state was made by another model than ``model``."""
    found = fingerprint(model)
    if found != made_by:
        raise ValueError(
            f"this state belongs to another model (fingerprint {made_by[:12]}, the model's is {found[:12]}): "
            "use the weights and dtype it was made with, or prefill the prompt again"
        )
