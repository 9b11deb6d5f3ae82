"""Run a model on a few tokens without holding it: every matrix is read when its module runs, then dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lrt.conversion.official_reference import Mode, Precision
from lrt.model import LatentRecurrentModel
from lrt.schedules import baseline, sequential
from lrt.serialization.tensors import LazyTensor

SMALL = 1 << 22  # elements up to which a tensor is simply loaded


def filled_model(
    model: LatentRecurrentModel, tensors: Mapping[str, LazyTensor], precision: Precision
) -> LatentRecurrentModel:
    """Give a model on the meta device the tensors of a checkpoint.

    Args:
        model: shapes only.
        tensors: its tensors by name.
        precision: how to compute; unless everything is kept, large matrices are read when their module runs.
    """

    def read(name: str) -> Tensor:
        return precision(tensors[name].read())

    for path, module in model.named_modules():
        names = {
            key: f"{path}.{key}" if path else key for key in module._parameters if module._parameters[key] is not None
        }
        large = {
            key: name
            for key, name in names.items()
            if not precision.keep and tensors[name].nbytes > SMALL * tensors[name].dtype.itemsize
        }
        for key in names.keys() - large.keys():
            module._parameters[key] = nn.Parameter(read(names[key]), requires_grad=False)
        if large and isinstance(module, nn.Embedding):
            module.forward = _Rows(tensors[large["weight"]], precision)  # type: ignore[method-assign,assignment]
        elif large:
            module.register_forward_pre_hook(_Fill(large, read))
            module.register_forward_hook(_Drop(list(large)))
    return model.eval()


@torch.no_grad()
def native_logits(model: LatentRecurrentModel, tokens: Tensor, mode: Mode) -> Tensor:
    """Logits (B, T, V) with zero memory, or by true recurrence (token by token)."""
    return model(tokens, schedule=baseline() if mode == "zero" else sequential()).logits


class _Rows:
    """Only the rows of a table that are asked for."""

    def __init__(self, tensor: LazyTensor, precision: Precision) -> None:
        self.tensor, self.precision = tensor, precision

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.precision(self.tensor.read()[tokens])


class _Fill:
    def __init__(self, names: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = names, read

    def __call__(self, module: nn.Module, args: object) -> None:
        for key, name in self.names.items():
            module._parameters[key] = nn.Parameter(self.read(name), requires_grad=False)


class _Drop:
    def __init__(self, keys: list[str]) -> None:
        self.keys = keys

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        for key in self.keys:
            gone = module._parameters[key]
            assert gone is not None
            module._parameters[key] = nn.Parameter(gone.to("meta"), requires_grad=False)
