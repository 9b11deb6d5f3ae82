"""``adapt``: any decoder becomes recurrent, unchanged at step 0. ``release`` gives it back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn

from lrt.config import RecurrenceConfig, TuningConfig
from lrt.engine.compiled import is_compiled
from lrt.families import take_apart
from lrt.families.blocks import on_device
from lrt.families.description import Family
from lrt.huggingface.registration import hugging_face_model
from lrt.lora import with_lora
from lrt.model import LatentRecurrentModel
from lrt.tables import ReadTable
from lrt.types import KV, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_adapted: WeakKeyDictionary[nn.Module, ReferenceType[LatentRecurrentModel]] = WeakKeyDictionary()


def adapt(
    model: nn.Module,
    config: RecurrenceConfig | None = None,
    *,
    family: Family | None = None,
    train_schedule: Schedule | None = None,
) -> LatentRecurrentModel:
    """Make a decoder recurrent; its logits under ``baseline()`` stay bit for bit what they were.

    The decoder's modules are shared, and none is edited. A few tokens run through both models first, and what they
    compute must agree.

    Args:
        model: a Hugging Face causal language model (PEFT-wrapped or not), a native model without recurrence, or any
            stack of decoder blocks that ``family`` describes.
        config: how memory enters; None = shared projections that start at zero.
        family: where the decoder's parts are; None = recognised by its structure and by what it computes.
        train_schedule: schedule of training mode; None = interleaved(2).

    Returns:
        The recurrent model; for a Hugging Face decoder it is a PreTrainedModel too.

    Raises:
        ValueError: a model that cannot be adapted, with what was found and what to do.
    """
    config = config or RecurrenceConfig(init="identity")
    if isinstance(model, LatentRecurrentModel):
        return _adapt_native(model, config, train_schedule)
    _refuse(model)
    decoder = unwrapped(model)
    backbone, blocks = take_apart(decoder, family)
    known = getattr(decoder, "config", None)
    if known is not None and hasattr(decoder, "generation_config"):
        face = hugging_face_model()
        adapted: LatentRecurrentModel = face.around(
            cast("PreTrainedModel", decoder), backbone, blocks, config, train_schedule=train_schedule
        )
    else:
        adapted = LatentRecurrentModel(backbone, blocks, config, train_schedule=train_schedule)
    adapted.original = (model,)
    modes = {module: module.training for module in decoder.modules()}
    for module in adapted.modules():
        module.training = modes.get(module, model.training)
    _spread(adapted)
    if next(decoder.parameters()).device.type != "meta":
        adapted.init_memory()
    _adapted[decoder] = ref(adapted)
    return adapted


def release(model: LatentRecurrentModel) -> nn.Module:
    """The decoder that ``adapt`` was given, without memory; its own parameters are as they are now.

    Args:
        model: from ``adapt``; do not use it afterwards.

    Raises:
        ValueError: not an adapted model.
    """
    original = getattr(model, "original", None)
    if not isinstance(model, LatentRecurrentModel) or original is None:
        raise ValueError(
            f"lrt.release got a {type(model).__name__} that lrt.adapt did not make: there is no decoder to give back"
        )
    decoder = original[0]
    inside = unwrapped(decoder)
    _adapted.pop(inside, None)
    modes = {module: module.training for module in model.modules()}
    decoder.train(model.training)
    for module in decoder.modules():
        module.training = modes.get(module, module.training)
    return decoder


def without_memory(model: LatentRecurrentModel) -> LatentRecurrentModel:
    """The decoder inside an adapted model, unchanged: the plain twin that trains and is scored on the same tokens."""
    plain = LatentRecurrentModel(model.backbone, [block.block for block in model.blocks], None)
    plain.original = model.original
    return plain


def with_lora_inside(model: LatentRecurrentModel, tuning: TuningConfig, *, seed: int) -> LatentRecurrentModel:
    """An adapted model with LoRA in its decoder and its memory as it is.

    Args:
        model: around a decoder without LoRA; not to be used afterwards.
        tuning: rank, share and places of the adapters.
        seed: of their initial values.

    Raises:
        ValueError: as ``lrt.lora.with_lora``.
    """
    memory, recurrence = {name: p.detach() for name, p in model.memory_parameters().items()}, model.recurrence
    again = adapt(with_lora(release(model), tuning, seed=seed), recurrence)
    with torch.no_grad():
        for name, parameter in again.memory_parameters().items():
            parameter.copy_(memory[name])
    return again


def _adapt_native(
    model: LatentRecurrentModel, config: RecurrenceConfig, train_schedule: Schedule | None
) -> LatentRecurrentModel:
    if model.recurrence is not None:
        raise ValueError("this model is recurrent already: train it as it is, or lrt.release(model) first")
    _refuse_adapted(model)
    adapted = LatentRecurrentModel(
        model.backbone, [block.block for block in model.blocks], config, train_schedule=train_schedule
    )
    adapted.original = (model,)
    adapted.train(model.training)
    if next(model.parameters()).device.type != "meta":
        adapted.init_memory()
    _adapted[model] = ref(adapted)
    return adapted


def _spread(model: LatentRecurrentModel) -> None:
    """Let the blocks of a decoder on several devices fetch what they are handed; outside, all is on the embedding's."""
    devices = [next(block.block.parameters()).device for block in model.blocks]
    home = model.backbone.embedding.weight.device
    if {*devices, home} == {home}:
        return
    for block, device in zip(model.blocks, devices):
        block.register_forward_pre_hook(lambda module, args, device=device: on_device(args, device))
        block.__dict__["refresh"] = partial(_refresh_on, block.refresh, device)
    for module in (model.memory_projection, model.injection):
        if module is not None:
            module.register_forward_pre_hook(lambda module, args: on_device(args, next(module.parameters()).device))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: (out[0].to(home), *out[1:]))


def _refresh_on(refresh: Callable[..., KV], device: torch.device, *args: object) -> KV:
    return refresh(*on_device(args, device))


@runtime_checkable
class Wrapped(Protocol):
    """A PEFT model around a decoder."""

    peft_config: ReadTable

    def get_base_model(self) -> nn.Module: ...


def unwrapped(model: nn.Module) -> nn.Module:
    """The decoder inside a PEFT model; the model itself otherwise."""
    return model.get_base_model() if isinstance(model, Wrapped) else model


def _refuse(model: nn.Module) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"lrt.adapt got {model!r} of type {kind}: pass a model, such as AutoModelForCausalLM.from_pretrained(...)"
        )
    if kind == "OptimizedModule" or is_compiled(model):
        raise ValueError(
            "this model is compiled: adapt the plain model (torch.compile keeps it as model._orig_mod) and "
            "compile the adapted one's blocks"
        )
    if kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel") or kind.startswith("FSDP"):
        raise ValueError(f"this model is wrapped in {kind}: adapt the plain model first, then wrap the adapted one")
    peft = getattr(model, "peft_config", None)
    for name, adapter in (peft if isinstance(peft, dict) else {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"PEFT adapter {name!r} learns a prompt through past keys and values, "
                "which the memory replaces: use LoRA, or unload it"
            )
    decoder = unwrapped(model)
    _refuse_adapted(decoder)
    if len({p.device.type == "meta" for p in decoder.parameters()}) == 2:
        raise ValueError(
            "some weights are offloaded (on the meta device): load the decoder with a device_map of real devices only"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
        raise ValueError(
            "gradient checkpointing of transformers is on: it drops the cache inside a block and knows nothing of the "
            "memory. Call model.gradient_checkpointing_disable(), adapt, "
            "and then checkpoint the adapted model's blocks (docs/adapt.md; "
            'in a recipe parallel.activation_checkpointing = "block")'
        )


def _refuse_adapted(decoder: nn.Module) -> None:
    known = _adapted.get(decoder)
    if known is not None and known() is not None:
        raise ValueError(
            "this decoder is adapted already: use the model that lrt.adapt returned, or lrt.release it first"
        )
