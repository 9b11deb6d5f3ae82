"""Folders of adapted models: the decoder's own config, its tensors under our names, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt.adaptation import adapt, release, unwrapped
from lrt.config import RecurrenceConfig
from lrt.model import LatentRecurrentModel
from lrt.serialization.decoders import causal_class, check_table, config_from_table, transformers
from lrt.serialization.tensors import LazyTensor, check_shapes
from lrt.types import Schedule


def decoder_of(model: LatentRecurrentModel) -> Any:
    """The decoder that was adapted, without a PEFT wrapper around it."""
    assert model.original is not None
    return unwrapped(model.original[0])


def is_foreign(model: LatentRecurrentModel) -> bool:
    """Whether it adapts a decoder that is not native."""
    return model.original is not None and not isinstance(model.original[0], LatentRecurrentModel)


def without_ties(model: LatentRecurrentModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` without the second name of a tied parameter."""
    first = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: t for name, t in tensors.items() if name in first or name not in every}


def refuse_whole(model: LatentRecurrentModel) -> None:
    """Raises ValueError when a folder could not hold all of an adapted model."""
    decoder = decoder_of(model)
    if model.original is not None and decoder is not model.original[0]:
        raise ValueError(
            "this model is wrapped by PEFT: save the memory with lrt.save(model, folder, adapter_only=True) and the adapter with its own "
            "save_pretrained, or merge it (merge_and_unload) before lrt.adapt"
        )
    if not hasattr(decoder, "generation_config"):
        raise ValueError(f"lrt cannot build a {type(decoder).__name__} from a folder: save with adapter_only=True, load with base= and family=")
    if getattr(decoder.config, "quantization_config", None) is not None:
        raise ValueError("the decoder is quantized: save with adapter_only=True, or model.dequantize() before lrt.adapt")


def describe_decoder(decoder: Any) -> dict[str, Any]:
    """What config.json says about an adapted decoder."""
    config = getattr(decoder, "config", None)
    if config is None:
        return {"adapted": {"architecture": type(decoder).__name__}}
    table = json.loads(config.to_json_string(use_diff=False))
    about = {
        "architecture": type(decoder).__name__,
        "name": getattr(config, "name_or_path", ""),
        "attention": getattr(config, "_attn_implementation", None),
        "config": table,
    }
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    return {"adapted": about} | {key: getattr(config, key) for key in shared if hasattr(config, key)}


def skeleton(config: Mapping[str, Any], train_schedule: Schedule) -> LatentRecurrentModel:
    """The adapted model that a config.json describes, on the current default device, not initialized.

    Raises:
        ValueError: this version of transformers has no such decoder.
    """
    about = config["adapted"]
    table = about.get("config")
    kind, architecture = about.get("architecture"), causal_class(about.get("architecture"))
    if architecture is None or not isinstance(table, dict):
        version = transformers().__version__
        raise ValueError(f"transformers {version} has no causal language model {kind}: install the version that the model was saved with")
    check_table(table, where=f"the {kind} in config.json")
    decoder = architecture(config_from_table(table))
    return adapt(decoder, RecurrenceConfig(**config["recurrence"]), train_schedule=train_schedule)


def load_whole(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], *, train_schedule: Schedule, dtype: Any, device: Any
) -> LatentRecurrentModel:
    """Build the decoder from its config and tensors, adapt it, fill in the memory."""
    with torch.device("meta"):
        shape = skeleton(config, train_schedule)
    check_shapes(str(folder), tensors, {n: tuple(t.shape) for n, t in without_ties(shape, shape.state_dict()).items()})
    foreign = decoder_of(shape)
    theirs = {id(t): name for name, t in reversed(list(foreign.state_dict(keep_vars=True).items()))}
    ours = {name: theirs[id(t)] for name, t in shape.state_dict(keep_vars=True).items() if id(t) in theirs}
    state = {ours[name]: t.own() for name, t in tensors.items() if name in ours}
    # The backend is not part of a Hugging Face config; flash attention may be missing on this machine, the others are not.
    backend = config["adapted"].get("attention")
    more = {"attn_implementation": backend} if backend in ("eager", "sdpa", "flex_attention") else {}
    kind = dtype or getattr(torch, config["torch_dtype"])
    decoder = type(foreign).from_pretrained(None, config=foreign.config, state_dict=state, dtype=kind, **more)
    model = adapt(decoder.to(device), RecurrenceConfig(**config["recurrence"]), train_schedule=train_schedule)
    for name, parameter in model.named_parameters():
        if name not in ours or dtype is None and parameter.dtype != tensors[name].dtype:
            parameter.data = tensors[name].own(device=parameter.device, dtype=dtype)
    return model.eval()


def load_adapter(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], base: Any, *, family: Any, train_schedule: Schedule
) -> LatentRecurrentModel:
    """Adapt ``base`` and fill in the memory that was trained on it."""
    if base is None:
        architecture = config.get("adapted", {}).get("architecture", "native decoder")
        raise ValueError(f"{folder} holds only the memory of a {architecture}: pass base=, the decoder it was trained on")
    model = adapt(base, RecurrenceConfig(**config["recurrence"]), family=family, train_schedule=train_schedule)
    parameters = model.memory_parameters()
    try:
        check_shapes(str(folder), tensors, {name: tuple(p.shape) for name, p in parameters.items()})
    except ValueError as error:
        release(model)
        raise ValueError(f"the memory in {folder} was trained on another decoder than this {type(base).__name__}: {error}") from None
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name].read())
    return model.eval()


def model_card(config: Mapping[str, Any]) -> str:
    """README.md of a saved folder, with the front matter that the hub reads."""
    about = config.get("adapted") or {"architecture": "native lrt decoder"}
    name = about.get("name") or ""
    front = ["library_name: lrt", "pipeline_tag: text-generation", "tags:", "- latent-recurrent-transformer", "- arxiv:2605.26797"]
    base = [f"base_model: {name}"] if name and not Path(name).exists() else []
    load = 'lrt.load("FOLDER", base=decoder)' if config.get("adapter_only") else 'AutoModelForCausalLM.from_pretrained("FOLDER")'
    what = "The memory parameters of a" if config.get("adapter_only") else "A"
    return "\n".join(
        [
            "---", *front, *base, "---", "", "# Latent Recurrent Transformer", "",
            f"{what} Latent Recurrent Transformer (arXiv 2605.26797) around: {about['architecture']}{f' ({name})' if base else ''}.",
            "Every position also receives the state that an upper-middle block computed at the position before it.", "",
            "```python", "import lrt", "from transformers import AutoModelForCausalLM", "", f"model = {load}", "```", "",
            "Recurrence:", "", "```json", json.dumps(config["recurrence"], indent=2), "```", "",
        ]
    )  # fmt: skip
