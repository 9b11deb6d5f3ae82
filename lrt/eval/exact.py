"""How mode ``decode`` is scored: exactly by the steps of generation, or by parallel sweeps until the memory settles.

Without either, ``lrt.eval.evaluate_bpb`` runs the model's sequential schedule, exact too.

Legend: B batch, T row length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrt.decoding import step as decoding
from lrt.decoding.fast.acceleration import Accelerated, accelerate
from lrt.decoding.fast.one_token import can_fuse
from lrt.decoding.prefill import Prefill
from lrt.decoding.scoring import score
from lrt.eval.bpb import Decode
from lrt.loss import IGNORE
from lrt.model import LatentRecurrentModel


def exact_steps(decoder: LatentRecurrentModel | Accelerated, *, runner: decoding.Runner = decoding.graphed) -> Decode:
    """Exact scores by the step of generation, one token of every row at a time.

    Args:
        decoder: a model in evaluation mode, or an accelerated one.
        runner: how a step runs; as one CUDA graph, because block by block the processor would be the limit.
    """

    def nats(tokens: Tensor, targets: Tensor) -> Tensor:
        # what still runs as modules is one position, too little to compile
        with torch.compiler.set_stance("force_eager"):
            return score(decoder, tokens, targets, runner=runner)[0]

    return nats


def fastest_exact(model: LatentRecurrentModel) -> Decode | None:
    """The fastest exact scores of a model on its device; None = its own sequential schedule.

    On a GPU a native model steps in fused kernels, where triton is installed, and any other as it is;
    both as CUDA graphs.
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

    def __init__(self, model: LatentRecurrentModel, method: Prefill) -> None:
        self._model = accelerate(model) if next(model.parameters()).device.type == "cuda" else model
        self._method = method
        self._counts = torch.zeros(2, dtype=torch.int64)  # rows, and those that did not converge

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        nats, report = score(self._model, tokens, targets, prefill=self._method)
        held = (targets != IGNORE).any(1).tolist()  # a batch may be filled with rows that hold nothing
        self._counts += torch.tensor([sum(held), sum(one and not done for one, done in zip(held, report.converged))])
        return nats

    def describe(self, *, total: Callable[[Tensor], Tensor]) -> str:
        """The method, and how many of the rows that hold a target did not converge.

        Args:
            total: sums a tensor of the CPU over processes.
        """
        rows, missed = total(self._counts.clone()).tolist()
        return f"{self._method}, {missed} of {rows} rows not converged"
