"""Folders of adapted models: the decoder's own config, its tensors under our names, and the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lrt.adaptation import adapt, release, unwrapped
from lrt.config import RecurrenceConfig
from lrt.families.description import Family
from lrt.lora import adapter_names, plain_name, put_adapter
from lrt.model import LatentRecurrentModel
from lrt.serialization.decoders import (
    ATTENTIONS,
    causal_class,
    check_table,
    config_from_table,
    in_one_line,
    transformers,
)
from lrt.serialization.fingerprint import fingerprint, is_wrapped, same_weights
from lrt.serialization.tensors import LazyTensor, check_shapes
from lrt.tables import ReadTable, Table
from lrt.types import Device, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_of(model: LatentRecurrentModel) -> nn.Module:
    """The decoder that was adapted, without a PEFT wrapper around it."""
    assert model.original is not None
    return unwrapped(model.original[0])


def pretrained(model: LatentRecurrentModel) -> PreTrainedModel:
    """The decoder that was adapted, where it is one of transformers."""
    return cast("PreTrainedModel", decoder_of(model))


def is_foreign(model: LatentRecurrentModel) -> bool:
    """Whether it adapts a decoder that is not native."""
    return model.original is not None and not isinstance(model.original[0], LatentRecurrentModel)


def without_ties(model: LatentRecurrentModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` without the second name of a tied parameter."""
    first = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: t for name, t in tensors.items() if name in first or name not in every}


def decoder_tensors(model: LatentRecurrentModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``tensors`` that are the decoder's own, under the names that they have without memory and without
    PEFT."""
    added = {*model.memory_parameters(), *adapter_names(model)}
    return {plain_name(name): t for name, t in without_ties(model, tensors).items() if name not in added}


def needs_base(config: ReadTable) -> bool:
    """Whether the decoder of a whole folder is one that lrt cannot build, a decoder of one's own."""
    about = config.get("adapted")
    return about is not None and (
        not isinstance(about.get("config"), dict) or causal_class(about.get("architecture")) is None
    )


def refuse_whole(model: LatentRecurrentModel) -> None:
    """Raises ValueError when a folder could not hold all of an adapted model."""
    decoder = decoder_of(model)
    if getattr(getattr(decoder, "config", None), "quantization_config", None) is not None or any(
        map(is_wrapped, decoder.parameters())
    ):
        raise ValueError(
            "the decoder is quantized: save with adapter_only=True, or model.dequantize() before lrt.adapt"
        )
    embeddings = getattr(decoder, "get_input_embeddings", lambda: None)()
    rows = getattr(getattr(embeddings, "weight", None), "shape", (model.vocab_size,))[0]
    if rows != model.vocab_size:
        raise ValueError(
            f"the decoder's embeddings were resized after lrt.adapt, to {rows} from {model.vocab_size}: "
            f"lrt.release(model), resize them, and adapt again"
        )


def describe_decoder(decoder: nn.Module) -> Table:
    """What config.json says about an adapted decoder."""
    config = getattr(decoder, "config", None)
    if config is None or not hasattr(decoder, "generation_config"):
        return {"adapted": {"architecture": type(decoder).__name__}}
    table = json.loads(config.to_json_string(use_diff=False))
    about = {
        "architecture": type(decoder).__name__,
        "name": getattr(config, "name_or_path", ""),
        "attention": getattr(config, "_attn_implementation", None),
        "config": table,
    }
    shared = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_position_embeddings",
    )
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # for tools that apply the head themselves
    inner = config.get_text_config()
    return {"adapted": about} | {
        k: getattr(c, k) for c, keys in ((config, shared), (inner, scales)) for k in keys if hasattr(c, k)
    }


def skeleton(config: ReadTable, train_schedule: Schedule) -> LatentRecurrentModel:
    """The adapted model that a config.json describes, on the current default device, not initialized.

    Raises:
        ValueError: this version of transformers has no such decoder.
    """
    about = config["adapted"]
    if "config" not in about:
        raise ValueError(
            f"lrt cannot build a {about.get('architecture')} from a folder: "
            "pass base=, such a decoder, and family= as for lrt.adapt"
        )
    table = about.get("config")
    kind, architecture = about.get("architecture"), causal_class(about.get("architecture"))
    if architecture is None or not isinstance(table, dict):
        version = transformers().__version__
        raise ValueError(
            f"transformers {version} has no causal language model {kind}: "
            "install the version that the model was saved with"
        )
    check_table(table, where=f"the {kind} in config.json")
    return in_one_line(
        f"the {kind} in config.json",
        table,
        lambda: _adapt_as(architecture(config_from_table(table)), config, train_schedule=train_schedule),
        what="a decoder with memory",
    )


def _adapt_as(
    decoder: nn.Module, config: ReadTable, *, train_schedule: Schedule, family: Family | None = None
) -> LatentRecurrentModel:
    """A decoder with the memory and the PEFT adapter that a config.json describes, their values not filled in."""
    adapter = config.get("adapter")
    if adapter and adapter.get("on") == "decoder":
        decoder = put_adapter(decoder, adapter)
    model = adapt(decoder, RecurrenceConfig(**config["recurrence"]), family=family, train_schedule=train_schedule)
    if adapter and adapter.get("on") != "decoder":
        put_adapter(model, adapter)
    return model


def load_whole(
    folder: str | Path,
    config: ReadTable,
    tensors: Mapping[str, LazyTensor],
    *,
    train_schedule: Schedule,
    dtype: torch.dtype | None,
    device: Device,
) -> LatentRecurrentModel:
    """Build the decoder from its config and tensors, adapt it, fill in the memory."""
    with torch.device("meta"):
        shape = skeleton(config, train_schedule)
    check_shapes(str(folder), tensors, {n: tuple(t.shape) for n, t in without_ties(shape, shape.state_dict()).items()})
    foreign = pretrained(shape)
    theirs = {id(t): plain_name(name) for name, t in reversed(list(foreign.state_dict(keep_vars=True).items()))}
    added = {*shape.memory_parameters(), *adapter_names(shape)}
    ours = {
        name: theirs[id(t)]
        for name, t in shape.state_dict(keep_vars=True).items()
        if id(t) in theirs and name not in added
    }
    state = {ours[name]: t.own() for name, t in tensors.items() if name in ours}
    # The backend is not part of a Hugging Face config; flash attention may be missing on this machine,
    # the others are not.
    backend = config["adapted"].get("attention")
    more: Table = {"attn_implementation": backend} if backend in ATTENTIONS else {}
    kind = dtype or getattr(torch, config["torch_dtype"])
    more |= {"config": foreign.config, "state_dict": state, "dtype": kind}
    decoder: nn.Module = in_one_line(
        str(folder), config["adapted"]["config"], lambda: type(foreign).from_pretrained(None, **more)
    )
    model = _adapt_as(decoder.to(device), config, train_schedule=train_schedule)
    for name, parameter in model.named_parameters():
        if name not in ours or dtype is None and parameter.dtype != tensors[name].dtype:
            parameter.data = tensors[name].own(device=parameter.device, dtype=dtype)
    return model.eval()


def load_into(
    base: nn.Module | None,
    folder: str | Path,
    config: ReadTable,
    tensors: Mapping[str, LazyTensor],
    *,
    family: Family | None,
    train_schedule: Schedule,
) -> LatentRecurrentModel:
    """Adapt ``base`` and fill in what the folder holds: the memory that was trained on it,
    or a whole model of its kind.

    Raises:
        ValueError: none was given, it is another decoder, or one of other weights than the memory was trained on.
    """
    kind = config.get("adapted", {}).get("architecture", "native decoder")
    alone = config.get("adapter_only", False)
    if base is None:
        raise ValueError(f"{folder} holds only the memory of a {kind}: pass base=, the decoder it was trained on")
    adapter = None if getattr(base, "peft_config", None) else config.get("adapter")
    model = adapt(base, RecurrenceConfig(**config["recurrence"]), family=family, train_schedule=train_schedule)
    try:
        if adapter is None:
            wanted = _fitting(model, folder, tensors, alone=alone)
        if alone and not same_weights(
            config.get("base_fingerprint"), fingerprint(decoder_tensors(model, model.state_dict()).items())
        ):
            raise ValueError(
                f"the memory in {folder} was trained on a {kind} with other weights than this one: "
                "pass the decoder that it was trained on. If the decoder was trained too, "
                "its weights are not in this folder (adapter_only=True): load them into base first, "
                "or lrt.save the whole model, and lrt.load that"
            )
    except ValueError:
        release(model)
        raise
    if adapter is not None:
        release(model)
        model = _adapt_as(base, config, family=family, train_schedule=train_schedule)
        wanted = _fitting(model, folder, tensors, alone=alone)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name].read())
    return model.eval()


def _fitting(
    model: LatentRecurrentModel, folder: str | Path, tensors: Mapping[str, LazyTensor], *, alone: bool
) -> dict[str, Tensor]:
    """What a folder fills in a model; its memory and its adapter alone, or everything."""
    added = {*model.memory_parameters(), *adapter_names(model)}
    every = without_ties(model, model.state_dict(keep_vars=True))
    wanted = {name: t for name, t in every.items() if name in added} if alone else every
    try:
        check_shapes(str(folder), tensors, {name: tuple(t.shape) for name, t in wanted.items()})
    except ValueError as error:
        decoder = type(decoder_of(model)).__name__
        raise ValueError(
            f"the memory in {folder} was trained on another decoder than this {decoder}: {error}"
        ) from None
    return wanted


def model_card(config: ReadTable) -> str:
    """README.md of a saved folder, with the front matter that the hub reads and the call that loads it."""
    about = config.get("adapted") or {"architecture": "native lrt decoder"}
    kind = str(about.get("architecture"))
    # a name from a folder may hold any markup
    if "adapted" in config and not (kind.isidentifier() and len(kind) <= 100):
        kind = "decoder"
    name = about.get("name") or ""
    named = bool(re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name)) and not Path(name).exists()
    front = [
        "library_name: lrt",
        "pipeline_tag: text-generation",
        "tags:",
        "- latent-recurrent-transformer",
        "- arxiv:2605.26797",
    ]
    alone = config.get("adapter_only", False)
    what = "The memory parameters of a" if alone else "A"
    return "\n".join(
        [
            "---", *front, *([f"base_model: {name}"] if named else []), "---", "", "# Latent Recurrent Transformer", "",
            f"{what} Latent Recurrent Transformer (arXiv 2605.26797) around: {kind}{f' ({name})' if named else ''}.",
            "Every position also receives the state that an upper-middle block computed at the position before it.", "",
            *(["The decoder's own weights are not in this folder; `lrt.load` checks that the base has those of "
                "the training.", ""] if alone else []),
            "```python", *_loading(config, kind=kind, name=name if named else "DECODER"), "```", "",
            "Recurrence:", "", "```json", json.dumps(config["recurrence"], indent=2), "```", "",
        ]
    )  # fmt: skip


def _loading(config: ReadTable, *, kind: str, name: str) -> list[str]:
    """The lines that load a folder."""
    about, alone = config.get("adapted"), config.get("adapter_only", False)
    if about is not None and "config" not in about:
        weights = "the weights that the memory was trained on" if alone else "any weights, the folder's replace them"
        return [
            "import lrt", "",
            f"decoder = {kind}(...)          # with {weights}",
            "family = lrt.Family(...)          # as for lrt.adapt",
            'model = lrt.load("FOLDER", base=decoder, family=family)',
        ]  # fmt: skip
    if not alone:
        return [
            "import lrt",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        ]
    if about is None:
        return ["import lrt", "", 'model = lrt.load("FOLDER", base=lrt.load("DECODER"))']
    return [
        "import lrt", "from transformers import AutoModelForCausalLM", "",
        f'decoder = AutoModelForCausalLM.from_pretrained("{name}")', 'model = lrt.load("FOLDER", base=decoder)',
    ]  # fmt: skip
