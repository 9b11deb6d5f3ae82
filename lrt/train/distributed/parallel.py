"""The parallel plan: mesh, activation checkpointing, compilation, sharding, mixed precision.

PyTorch's own engine in torchtitan's order (AC, then compile each block, then ``fully_shard``). A training
step runs the blocks several times before one backward pass, so by default gathered parameters stay until
the step's end: one gather per parameter and step, however many passes the schedule has.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import cast

import torch
import torch._functorch.config
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lrt.backbone import Head, TokenTable, lookup
from lrt.config import ParallelConfig
from lrt.loss import Scorer
from lrt.model import LatentRecurrentModel
from lrt.recurrence import RecurrentBlock
from lrt.tables import Table
from lrt.train.distributed.world import World
from lrt.train.horizon import shards_of
from lrt.types import Schedule

# These return views; nothing here writes into them, which is what FSDP warns of.
_VIEWS = r"FSDP2-wrapped module \(FSDP(KVProjection|RecurrentBlock|AlignedBlock|TokenTable)\) returned a view tensor"
warnings.filterwarnings("ignore", message=_VIEWS)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRAPHS = 64  # compiled variants of a block: windows x with or without memory x kinds of store x dtypes
WRAPPED = "_checkpoint_wrapped_module."  # what activation checkpointing puts into parameter names


def parallelize(
    model: LatentRecurrentModel, config: ParallelConfig, world: World, *, mesh: DeviceMesh | None = None
) -> None:
    """Turn a model into its parallel form, in place; parameters may be on the meta device.

    Args:
        model: a LatentRecurrentModel.
        config: section ``parallel`` of the recipe.
        world: the processes.
        mesh: replicas x shards, or shards alone; None = made here.

    Raises:
        ValueError: replicate x shard is not the number of processes.
    """
    if config.activation_checkpointing != "none":
        for index, block in enumerate(model.blocks):
            wrapped = checkpointed(block, selective=config.activation_checkpointing == "selective")
            model.blocks[index] = cast(RecurrentBlock, wrapped)
    if config.compile:
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        # Torch 2.13's default. Before, gradients in FlexAttention's order were copied on their way into a block
        # (lrt.attention.gradient_spacing).
        if not getattr(torch._functorch.config, "guess_tangent_strides_as_outputs", True):
            torch._functorch.config.guess_tangent_strides_as_outputs = True
        compile_blocks(model)
        scorer = Scorer._make(torch.compile(function, dynamic=False) for function in Scorer())
        model.backbone.score_by(scorer, apart=world.sharded and not _is_tied(model))
        if world.device.type == "cuda":  # a table's gradient is then summed by atomics, not sorted
            compiled_lookup = torch.compile(lookup, dynamic=False)
            for table in token_tables(model):
                table.read_by(compiled_lookup)
    if not world.sharded:
        return
    mesh = make_mesh(config, world) if mesh is None else mesh
    # RoPE tables must stay float32 and token ids integers, so inputs are cast nowhere:
    # they are in the right dtype already.
    precision = MixedPrecisionPolicy(DTYPES[config.param_dtype], DTYPES[config.reduce_dtype], cast_forward_inputs=False)
    shard = partial(
        fully_shard, mesh=mesh, mp_policy=precision, reshard_after_forward=config.reshard == "after_forward"
    )
    backbone = model.backbone
    ends = () if _is_tied(model) else (backbone.embedding, backbone.head)
    for part in (*ends, *backbone.value_embeddings.values(), *model.blocks, model.memory_projection):
        if part is not None:
            shard(part)
    for table in backbone.value_embeddings.values():
        table.register_forward_pre_hook(_anchored, prepend=True, with_kwargs=True)
    # The rest: scales and gains. They stay: FSDP finds no tensors in the model's output (torch 2.11),
    # so nothing would gather them again.
    shard(model, reshard_after_forward=False)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)  # the loss is already divided by the valid targets of all ranks
        module.set_force_sum_reduction_for_comms(True)
        if config.reshard == "after_step":
            module.set_reshard_after_backward(False)
    register_fsdp_forward_method(model, "score")
    if isinstance(backbone.head, Head):
        register_fsdp_forward_method(backbone.head, "loss")
    for block in model.blocks:
        register_fsdp_forward_method(block, "refresh")


def _is_tied(model: LatentRecurrentModel) -> bool:
    """Whether head and embedding are one parameter, as those of an adapted decoder may be;
    it then stays with the root."""
    return bool(model.backbone.head.weight is model.backbone.embedding.weight)


def compile_blocks(model: LatentRecurrentModel) -> None:
    """Compile every block; blocks of one kind share their graphs."""
    for block in model.blocks:  # dynamic=False: a second pass length is a second graph, not one graph for any length
        block.compile(fullgraph=True, dynamic=False)


def _anchored(table: TokenTable, args: tuple[Tensor, ...], kwargs: Table) -> tuple[tuple[Tensor, ...], Table]:
    """Give a token table an input that FSDP can wait for.

    FSDP reduces a module's gradients when those of its inputs have come. Tokens have none, so all tables would be
    reduced at the end of the backward, while nothing else is left to compute.
    """
    if torch.is_grad_enabled() and table.weight.requires_grad:
        kwargs = {**kwargs, "anchor": torch.zeros((), device=args[0].device, requires_grad=True)}
    return args, kwargs


def reduce_gradients(model: LatentRecurrentModel, schedule: Schedule, *, now: bool) -> None:
    """Say whether the coming backward of a sharded model reduces gradients; otherwise they are added up where they are.

    Where gathered parameters stay until the step's end, so do gradients: they are reduced in the last micro-batch (of
    blocks with several passes in two parts, what the micro-batches before left going ahead). ``reshard =
    "after_forward"`` needs less GPU memory and always reduces.
    """
    cast(FSDPModule, model).set_requires_gradient_sync(now)
    if not now and schedule.token_compute == 1 and model.memory_projection is not None:
        # perhaps no pass calls it, and FSDP keeps gradients only of what has been gathered
        cast(FSDPModule, model.memory_projection).unshard()


def make_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """Replicas x shards; one dimension where there is one replica.

    Raises:
        ValueError: they do not multiply to the number of processes.
    """
    shard = shards_of(config, world.size)
    if config.replicate == 1:
        return init_device_mesh(world.device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (config.replicate, shard), mesh_dim_names=("replicate", "shard"))


def checkpointed(block: nn.Module, *, selective: bool) -> nn.Module:
    """A block whose activations are computed again in the backward pass.

    Args:
        block: memory, positions and stored keys are its arguments, so computing it again sees the same values.
        selective: keep the results of matrix products and attention, recompute only the cheap rest.
    """
    options: Table = {"preserve_rng_state": draws(block)}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)
    return checkpoint_wrapper(block, **options)


def draws(block: nn.Module) -> bool:
    """Whether a block drops numbers in training: by a module, or by a rate that its attention reads,
    such as ``attention_dropout``."""
    modules = list(block.modules())
    rates = (
        value
        for module in modules
        for name, value in vars(module).items()
        if "dropout" in name and isinstance(value, float)
    )
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules) or any(rate > 0 for rate in rates)


_aten = torch.ops.aten
EXPENSIVE = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._flash_attention_forward.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def _keep_expensive(context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def token_tables(model: nn.Module) -> list[TokenTable]:
    return [module for module in model.modules() if isinstance(module, TokenTable)]


def free_gathered(model: nn.Module) -> None:
    """Drop gathered parameters; under ``reshard = "after_step"`` only this makes ``p.grad`` appear."""
    for module in fsdp_modules(model):
        module.reshard()


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters under the names that the plain model gives them."""
    return [(name.replace(WRAPPED, ""), parameter) for name, parameter in model.named_parameters()]
