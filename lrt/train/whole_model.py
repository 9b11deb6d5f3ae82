"""The trained model as a plain one on every rank, for evaluations that run it position by position."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lrt.model import LatentRecurrentModel
from lrt.train.checkpoint.weights import copy_on_every_rank
from lrt.train.run import Run


@contextlib.contextmanager
def whole_model(run: Run) -> Iterator[LatentRecurrentModel]:
    """The model with the weights of the computation, on every rank's device, in evaluation mode and not compiled, as
    one position at a time is too little, and rows of every length are too many shapes; every rank must call this.

    Args:
        run: whose model it is.
    """
    sharded = run.world.sharded
    model = copy_on_every_rank(run.model, run.recipe, run.world) if sharded else run.runner.refresh()
    training = model.training
    model.eval()
    eager = torch.compiler.set_stance("force_eager") if run.recipe.parallel.compile else contextlib.nullcontext()
    try:
        with eager:
            yield model
    finally:
        model.train(training)
