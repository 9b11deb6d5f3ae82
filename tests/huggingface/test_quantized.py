"""Weights that are tensors around tensors, as torchao quantizes them: they have no numbers of their own to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_decoders import make, stir
from torch import Tensor, nn

import lrt
from lrt.decoding.state import fingerprint

TOKENS = torch.arange(8)[None]


class Int8(Tensor):
    """A matrix as whole numbers and one scale a row; it knows nothing but products, as torchao's tensors do."""

    whole: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls: Any, whole: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, whole.shape, dtype=scale.dtype, device=whole.device, requires_grad=False
        )

    def __init__(self, whole: Tensor, scale: Tensor) -> None:
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self) -> Any:
        return ["whole", "scale"], None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            return function(args[0], args[1].whole * args[1].scale, *args[2:], **kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        raise NotImplementedError(f"{function} of an Int8")


def by_hand(decoder: Any) -> None:
    for module in [m for block in decoder.model.layers for m in block.modules() if isinstance(m, nn.Linear)]:
        scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
        module.weight = nn.Parameter(
            Int8((module.weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False
        )


def by_torchao(decoder: Any) -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    quantization.quantize_(decoder, quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("quantize", [by_hand, pytest.param(by_torchao, marks=pytest.mark.slow)])
def test_a_memory_on_a_quantized_decoder(tmp_path: Path, quantize: Any) -> None:
    """Fingerprints of folders and of sessions died on such weights."""

    def decoder(seed: int) -> Any:
        found = make("llama", seed=seed, dtype=torch.float32)
        quantize(found)
        return found

    model = stir(lrt.adapt(decoder(0)))
    lrt.save(model, tmp_path / "memory", adapter_only=True)
    again = lrt.load(tmp_path / "memory", base=decoder(0))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)
    assert fingerprint(again) == fingerprint(model) != fingerprint(stir(lrt.adapt(decoder(1))))
    with pytest.raises(ValueError, match="with other weights than this one"):
        lrt.load(tmp_path / "memory", base=decoder(1))
    with pytest.raises(ValueError, match="the decoder is quantized: save with adapter_only=True"):
        lrt.save(model, tmp_path / "whole")
