"""The checkpoint of a run at its present step."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from lrt.train.checkpoint.resuming import random_state
from lrt.train.checkpoint.weights import not_finite
from lrt.train.distributed.parallel import named_parameters
from lrt.train.monitor.faults import NonFiniteError, NotSavedError
from lrt.train.optim.groups import MuonAdamW
from lrt.train.run import Run


def tensors_of(model: nn.Module, optimizer: MuonAdamW) -> dict[str, Tensor]:
    """Everything that is sharded or the same on all ranks, aliasing the live tensors."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in named_parameters(model)}
    return {**tensors, **{f"optimizer.{name}": tensor for name, tensor in optimizer.named_state().items()}}


def save(run: Run) -> None:
    """Begin to write the checkpoint of this step, unless it is there; every rank must call this.

    Raises:
        NonFiniteError: the weights or the optimizer's state hold numbers that are none.
    """
    if run.state.step == run.manager.last_saved:
        return
    tensors = tensors_of(run.model, run.optimizer)
    bad = not_finite(tensors, run.world)
    if bad:
        raise NonFiniteError(
            f"step {run.state.step}: {bad} not finite, so no checkpoint of it is written and nothing is "
            "exported. The checkpoints before are whole: "
            f"go on from one of them with lower learning rates (training.branch_from), or look at the data"
        )
    run.manager.save(
        run.state.step,
        tensors=tensors,
        rank_state={"loader": run.loader.state_dict(), "random": random_state(run.world.device)},
        meta={**dataclasses.asdict(run.state), "planned_steps": run.horizon.steps},
        prune=not run.guard.skipping,
    )


def save_last(run: Run) -> None:
    """Write the checkpoint at the end of a run, and wait for it.

    Raises:
        NonFiniteError: as ``save``.
        NotSavedError: it could not be written.
    """
    save(run)
    run.manager.wait()
    if run.manager.last_saved != run.state.step:
        raise NotSavedError(
            f"the checkpoint at the end (step {run.state.step}) could not be written: "
            "make room and give the same command, which goes on from the newest"
        )
