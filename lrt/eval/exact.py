"""How mode ``decode`` is scored: exactly by the steps of generation, or by parallel sweeps until the memory settles.

Without either, ``lrt.eval.evaluate_bpb`` runs the model's sequential schedule, exact too.

Legend: B batch, T row length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import accelerate
from lrt.decoding.fast.one_token import can_fuse
from lrt.decoding.prefill import Prefill
from lrt.decoding.scoring import score
from lrt.eval.bpb import Decode


def exact_steps(decoder: Any, *, runner: decoding.Runner = decoding.graphed) -> Decode:
    """Exact scores by the step of generation, one token of every row at a time.

    Args:
        decoder: a model in evaluation mode, or an accelerated one.
        runner: how a step runs; as one CUDA graph, because block by block the processor would be the limit.
    """

    def nats(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):  # what still runs as modules is one position, too little to compile
            return score(decoder, tokens, targets, runner=runner)[0]

    return nats


def fastest_exact(model: Any) -> Decode | None:
    """The fastest exact scores of a model on its device; None = its own sequential schedule.

    On a GPU a native model steps in fused kernels, where triton is installed, and any other as it is; both as CUDA graphs.
    """
    if next(model.parameters()).device.type != "cuda":
        return None
    return exact_steps(accelerate(model) if can_fuse(model) else model)


class ByPrefill:
    """Scores by a parallel prefill: approximate, and therefore named with the score.

    Args:
        model: in evaluation mode, on its device.
        method: from ``lrt.prefill.fixed_point`` or ``lrt.prefill.refine``.
    """

    def __init__(self, model: Any, method: Prefill) -> None:
        self._model = accelerate(model) if next(model.parameters()).device.type == "cuda" else model
        self._method = method
        self._rows = self._missed = 0

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        nats, report = score(self._model, tokens, targets, prefill=self._method)
        self._rows += len(tokens)
        self._missed += report.converged.count(False)
        return nats

    def __str__(self) -> str:
        return f"{self._method}, {self._missed} of {self._rows} rows not converged"
