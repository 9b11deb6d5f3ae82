"""A fingerprint of a decoder's weights: a memory is not put on another decoder than the one it was trained on.

It reads at most 256 evenly spaced numbers of every tensor, whatever the tensor's size, so it costs milliseconds for a
model of any size and needs no copy. Every tensor is looked at, so training, merging and pruning show; a change of a few
single numbers may not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

SAMPLES = 256  # numbers read of each tensor
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str] | None:
    """Hashes of a decoder's weights: as they are, and as they would be in half precision.

    Args:
        tensors: names and parameters, one after the other; none is kept.

    Returns:
        What ``same_weights`` compares; None where the weights are not there to be read (on the meta device,
        sharded over ranks).
    """
    samples: dict[str, Tensor] = {}
    for name, tensor in (part for whole in tensors for part in parts(*whole)):
        if tensor.device.type == "meta" or hasattr(tensor, "device_mesh"):
            return None
        samples[name] = _sample(tensor)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in samples.values()})
    halves = {
        name: _hash({n: t.to(half) if t.is_floating_point() else t for n, t in samples.items()})
        for name, half in HALVES.items()
    }
    return {"dtypes": " ".join(dtypes), "exact": _hash(samples), **halves}


def same_weights(stored: Mapping[str, str] | None, found: Mapping[str, str] | None) -> bool:
    """Whether two fingerprints may be of the same weights; rounded to half precision they still are.

    bfloat16 and float16 say nothing of each other, nor do whole numbers (quantized weights) of anything else:
    such pairs pass.
    """
    if stored is None or found is None:
        return True
    if stored["dtypes"] == found["dtypes"]:
        return stored["exact"] == found["exact"]
    names = {*stored["dtypes"].split(), *found["dtypes"].split()}
    if not names & {"float32", "float64"} or not all("float" in name for name in names):
        return True
    return any(stored[half] == found[half] for half in HALVES)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are in tensors of its own, as those of torchao's quantized weights are."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "device_mesh")


def parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold the numbers of ``tensor``, and their names: itself where it holds them."""
    if not is_wrapped(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from parts(f"{name}.{inner}", getattr(tensor, inner))


def _sample(tensor: Tensor) -> Tensor:
    """Evenly spaced numbers of a tensor; the step is odd, so that it meets every column of a matrix."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES) | 1][:SAMPLES].cpu()


def _hash(samples: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, sample in sorted(samples.items()):
        digest.update(f"{name}:".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
