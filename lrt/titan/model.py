"""What torchtitan trains: a model that knows its schedule, the loss over its groups, our plan under its settings.

No torchtitan here: jobs and parallel dimensions are read by attribute.

Legend: B batch, T row length, P positions of a group, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from lrt.accounting import count_parameters
from lrt.backbone import Decoder
from lrt.config import ParallelConfig, Recipe
from lrt.model import LatentRecurrentModel, build
from lrt.outcome import by_group
from lrt.recurrence import RecurrentBlock
from lrt.schedules import from_config, single
from lrt.serialization.description import config_of
from lrt.tables import Table
from lrt.titan.settings import NATIVE, Theirs
from lrt.train.checkpoint.weights import fill, named_tensors
from lrt.train.distributed.parallel import checkpointed, free_gathered, named_parameters, parallelize
from lrt.train.distributed.world import World
from lrt.train.entrance import open_entrance
from lrt.train.horizon import mean_flops
from lrt.train.optim.groups import MEMORY_GROUPS, is_memory
from lrt.train.timetable import plan_timetable
from lrt.types import Backbone, Block, Device

DESCRIPTION = "lrt_titan.json"  # in the job's dump folder: which model its checkpoints hold


Predicted = tuple[Any, ...]  # what scores a hidden state, then the groups of ``Trainee.forward``


class Trainee(LatentRecurrentModel):
    """A recurrent model as torchtitan calls it: tokens in, a plain tuple out.

    Args:
        backbone: embeddings and head.
        blocks: the decoder's blocks, in order.
        recipe: recurrence, schedule, seed and steps of the job.
        whole: device -> the same model, whole and initialized.
    """

    def __init__(
        self,
        backbone: Backbone,
        blocks: Sequence[Block],
        recipe: Recipe,
        *,
        whole: Callable[[torch.device], LatentRecurrentModel],
    ) -> None:
        trained = from_config(recipe.schedule) if recipe.recurrence is not None else None
        super().__init__(backbone, blocks, recipe.recurrence, train_schedule=trained)
        self.recipe = recipe
        self.timetable = plan_timetable(recipe, steps=recipe.training.steps or 0)
        last = single(self.timetable.stretches[-1].schedule)
        self.scored = replace(last, weights="paper") if hasattr(last, "weights") else last  # type: ignore[type-var]
        # optimizer steps done; the learning rates' scheduler counts them, across restarts too
        self.step: Callable[[], int] = int
        self._whole = whole

    def forward(self, tokens: Tensor) -> Predicted:  # type: ignore[override]
        """Run the schedule of the present step.

        Args:
            tokens: (B, T) ids.

        Returns:
            What scores a hidden state, then for every loss group of weight above 0: its hidden state (B, P, D), its
            positions (P,), and its share of the loss. In evaluation mode only the last group, by the last phase's
            schedule.
        """
        step = self.step()
        schedule = self.timetable.schedule(step) if self.training else self.scored
        generator = torch.Generator().manual_seed(self.timetable.seed_of(step))
        with torch.autocast(tokens.device.type, enabled=False):  # the plan decides what is computed in which dtype
            results = self.run(tokens, schedule, generator=generator)
        weights = schedule.group_weights(tokens.shape[1])
        groups = [
            (*group, weight / sum(weights))
            for group, weight in zip(by_group(results, len(weights)), weights)
            if weight > 0
        ]
        if not self.training:
            groups = [(*groups[-1][:2], 1.0)]
        return self.backbone.loss, *groups

    def get_attention_masks(self, **_: object) -> NoReturn:
        """Raises TypeError, which is how torchtitan's validator learns that a model makes its masks itself."""
        raise TypeError("blocks make their masks themselves")

    @torch.no_grad()
    def init_weights(self, buffer_device: Device = None) -> None:  # type: ignore[override]
        """Initialize every parameter from the job's seed: the same values on any number of ranks."""
        fill(self, named_tensors(self._whole(next(self.parameters()).device)))

    @property
    def rests(self) -> bool:
        """Whether the present step belongs to a phase without memory, so that the memory's parameters rest."""
        return self.recurrence is not None and self.timetable.at(self.step()).plain


def native(recipe: Recipe) -> Trainee:
    """The native decoder of a job, on the current default device."""
    decoder = Decoder(recipe.model, loss_chunk=recipe.parallel.loss_chunk)
    return Trainee(decoder, decoder.make_blocks(), recipe, whole=lambda device: build(recipe, device=device))


def grouped_loss(predicted: Predicted, labels: Tensor) -> Tensor:
    """Nats of all valid labels, the weighted mean over the groups of ``Trainee.forward``, the head applied in chunks.

    Args:
        predicted: of the model.
        labels: (B, T), already shifted; -100 is ignored.
    """
    score, *groups = predicted
    with torch.autocast(labels.device.type, enabled=False):
        return torch.stack([score(hidden, labels[:, places])[0] * share for hidden, places, share in groups]).sum()


def parameters_and_flops(model: Trainee, recipe: Recipe) -> tuple[int, int]:
    """Parameters, and FLOPs a token of the mean training step, every pass counted."""
    return count_parameters(model).total, round(mean_flops(recipe, model))


# ------------------------------------------------------------------ the plan


def parallel_form(model: Trainee, dims: Theirs, job: Theirs) -> Trainee:
    """Our parallel plan under torchtitan's settings: activation checkpointing, compile per block, FSDP2 or HSDP.

    FSDP also holds a model on one rank where it computes in another dtype than float32: its masters stay float32.

    Args:
        model: on the meta device.
        dims: torchtitan's ParallelDims.
        job: its JobConfig.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank == 0:
        describe(model, job)
    if job.checkpoint.create_seed_checkpoint:
        return model
    _checkpoint(model, job.activation_checkpoint)
    shard = dims.world_size // dims.dp_replicate
    config = ParallelConfig(
        replicate=dims.dp_replicate,
        shard=shard,
        compile=job.compile.enable,
        param_dtype=job.training.mixed_precision_param,
        reduce_dtype=job.training.mixed_precision_reduce,
        reshard="after_forward" if job.parallelism.fsdp_reshard_after_forward == "always" else "after_step",
    )
    device = torch.device(dims.world_mesh.device_type)
    sharded = dims.world_size > 1 or config.param_dtype != "float32"
    names = [name for name, size in (("dp_replicate", dims.dp_replicate), ("fsdp", shard)) if size > 1]
    mesh = dims.get_mesh(names) if "fsdp" in names else None
    parallelize(model, config, World(rank, dims.world_size, device, sharded), mesh=mesh)
    model.register_forward_hook(_finish_after_backward)
    return model


def _checkpoint(model: Trainee, config: Theirs) -> None:
    """Activation checkpointing as torchtitan names it: every block or every n-th, whole or all but products."""
    if config.mode == "none":
        return
    by_operation = config.mode == "selective" and config.selective_ac_option == "op"
    every = 1 if config.mode == "full" or by_operation else _every(config.selective_ac_option)
    for index in range(every - 1, len(model.blocks), every):
        wrapped = checkpointed(model.blocks[index], selective=by_operation)
        model.blocks[index] = cast(RecurrentBlock, wrapped)


def _every(option: str) -> int:
    if not str(option).isdigit() or int(option) < 1:
        raise ValueError(
            f'activation_checkpoint.selective_ac_option = {option!r}: use "op", or a whole number n for every '
            "n-th block"
        )
    return int(option)


def _finish_after_backward(model: Trainee, inputs: object, predicted: Predicted) -> None:
    """Have the backward pass end with ``_finish``; torchtitan reads gradients right after it."""
    hidden = predicted[1][0]
    if hidden.requires_grad:
        queue = Variable._execution_engine.queue_callback
        finish = partial(_finish, model)
        # FSDP's own last word is queued while the backward runs: a callback that queues another comes after it.
        hidden.register_hook(lambda grad: queue(lambda: queue(finish)))


def _finish(model: Trainee) -> None:
    """Free gathered parameters, so that gradients appear, and let the memory rest in a phase without it."""
    free_gathered(model)
    if model.rests:
        for parameter in model.memory_parameters().values():
            parameter.grad = None


# ------------------------------------------------------------------ the optimizer


@torch.no_grad()
def with_state(optimizers: Theirs, model: Trainee) -> Theirs:
    """The optimizers, with a state for every parameter where some rest at first: a checkpoint must hold all of them.

    Args:
        optimizers: torchtitan's container, new.
        model: its model.
    """
    if model.recurrence is None or not any(stretch.plain for stretch in model.timetable.stretches):
        return optimizers
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # by nothing: it makes the state
        optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            optimizer.state[parameter]["step"].zero_()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
    return optimizers


def with_entrance(optimizers: Theirs, model: Trainee) -> Theirs:
    """The optimizers, beside which memory comes in over the steps of ``schedule.ramp``, as in our trainer.

    Args:
        optimizers: torchtitan's container, new; where it has one group, the memory gets a group of its own.
        model: its model, whose memory is set to zero.
    """
    entrance = open_entrance(model.timetable, named_parameters(model))
    if entrance is None:
        return optimizers
    for optimizer in optimizers:
        if len(optimizer.param_groups) == 1:
            _split(optimizer, [parameter for name, parameter in named_parameters(model) if is_memory(name)])
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group["name"] in MEMORY_GROUPS]

    def scale(*_: object) -> None:  # the scheduler sets every rate anew after the step
        for group in groups:
            group["lr"] *= entrance.share(model.step())

    optimizers.register_step_pre_hook(scale)
    optimizers.register_step_post_hook(lambda *_: entrance.advance(model.step()))
    return optimizers


def _split(optimizer: torch.optim.Optimizer, memory: Sequence[nn.Parameter]) -> None:
    """Give the memory's parameters a group of their own, with the settings of the only one."""
    (group,) = optimizer.param_groups
    taken = {id(parameter) for parameter in memory}
    settings = {key: value for key, value in group.items() if key not in ("params", "name")}
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
    group["name"] = "backbone"
    optimizer.add_param_group({**settings, "params": list(memory), "name": "memory"})


# ------------------------------------------------------------------ what a checkpoint holds


def describe(model: Trainee, job: Theirs) -> None:
    """Write into the job's dump folder which model its checkpoints hold, so that they can be converted."""
    about: Table = {
        "format": 1,
        "name": job.model.name,
        "flavor": job.model.flavor,
        "tokenizer": job.model.hf_assets_path,
    }
    if job.model.name == NATIVE:
        about["config"] = config_of(model)
    else:
        about |= {"decoder": model.backbone.about(), "config": config_of(model, decoder=model.backbone)}
    path = Path(job.job.dump_folder) / DESCRIPTION
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
