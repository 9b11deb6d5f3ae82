"""PEFT's adapters beside the memory: the memory trains and travels with them, and a folder of ours can hold both.

PEFT freezes every parameter that is not its own. A memory that starts at zero would then stay there,
so the modules of the memory join ``modules_to_save`` of the first adapter that is put in, as a classifier's head does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lrt.config import TuningConfig
from lrt.tables import ReadTable, Table

# What a folder says of a LoRA adapter; a config with anything else set is refused when it is saved,
# and a folder's is when it is read.
FIELDS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "use_dora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "task_type",
)  # fmt: skip
# What decides how an adapter starts, or where it came from: nothing once it holds values.
BEGINNINGS = (
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "init_lora_weights", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size",
)  # fmt: skip
MERGE = "merge it into the decoder first (merge_and_unload)"


@runtime_checkable
class Layer(Protocol):
    """A module of PEFT around one of the model's own."""

    def get_base_layer(self) -> nn.Module: ...


def with_lora(decoder: nn.Module, tuning: TuningConfig, *, seed: int) -> nn.Module:
    """A decoder whose own weights are frozen beside LoRA adapters that train.

    Args:
        decoder: of Hugging Face.
        tuning: rank, share and places of the adapters.
        seed: of their initial values.

    Raises:
        ValueError: PEFT is not installed, or a named matrix is not there.
    """
    try:
        import peft
    except ImportError:
        raise ValueError('tuning.lora_rank needs PEFT: pip install -e ".[peft]" in a checkout of lrt') from None
    targets = list(tuning.lora_targets) or "all-linear"
    config = peft.LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,  # type: ignore[arg-type]
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        return peft.get_peft_model(decoder, config)
    except ValueError as error:
        raise ValueError(f"tuning.lora_targets = {list(tuning.lora_targets)}: {' '.join(str(error).split())}") from None
    finally:
        torch.set_rng_state(state)


def train_memory_beside(model: nn.Module, memory: Mapping[str, nn.Module], adapters: ReadTable) -> None:
    """Let the memory train, and be saved, with adapters that were just put into ``model``.

    Args:
        model: where PEFT has put its layers.
        memory: modules of the memory by name.
        adapters: PEFT's configs by name; one with ``modules_to_save=[]`` keeps the memory as it is,
            one for inference too.

    Raises:
        ValueError: a layer in the place of the native head, which computes its loss itself.
    """
    head = getattr(getattr(model, "backbone", None), "head", None)
    if isinstance(head, Layer) and hasattr(head.get_base_layer(), "loss"):
        raise ValueError(
            "LoRA cannot stand in for the native head, which computes its own loss: LoraConfig(..., "
            'exclude_modules=["backbone.head"])'
        )
    for adapter, config in adapters.items():
        chosen = getattr(config, "modules_to_save", ())
        if chosen is not None and len(chosen) == 0 or getattr(config, "inference_mode", False):
            continue
        missing = [name for name in memory if name not in (chosen or ())]
        config.modules_to_save = [*(chosen or ()), *missing]
        for name in missing:
            _wrap(model, name, adapter)


def _wrap(model: nn.Module, name: str, adapter: str) -> None:
    from peft.utils import ModulesToSaveWrapper

    parent, _, last = name.rpartition(".")
    module = model.get_submodule(name)
    if isinstance(module, ModulesToSaveWrapper):
        module.update(adapter)
    else:
        _without_layers(module)
        module = ModulesToSaveWrapper(module, adapter)
        setattr(model.get_submodule(parent), last, module)
    module.set_adapter(adapter)


def _without_layers(module: nn.Module) -> None:
    """Take PEFT's layers out of a module that trains as a whole; "all-linear" has put some into the memory's
    projection."""
    for name, child in list(module.named_children()):
        if isinstance(child, Layer):
            setattr(module, name, child.get_base_layer())
        else:
            _without_layers(child)


# ------------------------------------------------------------------ folders


def describe_adapter(model: nn.Module, decoder: nn.Module | None) -> Table | None:
    """What config.json says of the PEFT adapter in a model; None where there is none.

    Args:
        model: the recurrent model, into which the adapter was put last (``on`` is "model") ...
        decoder: ... or what ``lrt.adapt`` was given, with the adapter in it ("decoder").

    Raises:
        ValueError: several adapters, one that is not LoRA, one that is merged, or a setting that a folder does not
            hold.
    """
    parts: tuple[tuple[str, Table], ...] = (
        ("model", getattr(model, "peft_config", None) or {}),
        ("decoder", getattr(decoder, "peft_config", None) or {}),
    )
    found = [(on, name, config) for on, adapters in parts for name, config in adapters.items()]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"this model holds {len(found)} PEFT adapters, and a folder one: "
            "delete the others, or merge them (merge_and_unload)"
        )
    on, name, config = found[0]
    given, kind = config.to_dict(), str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"PEFT adapter {name!r} is {kind}, and a folder holds LoRA alone: {MERGE}")
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError(
            f"PEFT adapter {name!r} is merged into the decoder's weights for now: unmerge_adapter() it, or {MERGE}"
        )
    usual = type(config)().to_dict()
    odd = sorted(k for k, v in given.items() if k not in (*FIELDS, *BEGINNINGS) and v != usual.get(k))
    if odd:
        raise ValueError(f"PEFT adapter {name!r} sets {', '.join(odd)}, which a folder does not hold: {MERGE}")
    fields = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in given.items() if k in FIELDS}
    return {"on": on, "name": name, "lora": {k: v for k, v in fields.items() if v is not None}}


def put_adapter(part: nn.Module, table: ReadTable) -> nn.Module:
    """``part`` with the adapter that a config.json describes, its values not filled in.

    Args:
        part: the decoder or the recurrent model, as ``table["on"]`` says.
        table: of ``describe_adapter``.

    Returns:
        A decoder wrapped by PEFT; a recurrent model is changed in place.

    Raises:
        ValueError: PEFT is not installed, or the table is not one of ours.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("this folder holds a LoRA adapter: pip install peft") from None
    fields = table.get("lora")
    if not isinstance(fields, dict) or not fields.keys() <= {*FIELDS}:
        raise ValueError(
            f"config.json describes an adapter with {sorted(fields or ())}: "
            f"lrt reads {', '.join(FIELDS)}, so it was changed"
        )
    config = peft.LoraConfig(**fields)
    if table.get("on") == "decoder":
        return peft.get_peft_model(part, config, adapter_name=str(table.get("name")))
    return peft.inject_adapter_in_model(config, part, adapter_name=str(table.get("name")))


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that PEFT added to a model."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
    except ImportError:
        return set()
    added = set()
    layer: Any = BaseTunerLayer  # a mixin of modules
    for place, module in model.named_modules():
        if isinstance(module, (layer, ModulesToSaveWrapper)):
            inside = "base_layer." if isinstance(module, layer) else "original_module."
            added |= {
                f"{place}.{name}"
                for name, _ in module.named_parameters(remove_duplicate=False)
                if not name.startswith(inside)
            }
    return added


def plain_name(name: str) -> str:
    """The name that a parameter has without PEFT around its module."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
