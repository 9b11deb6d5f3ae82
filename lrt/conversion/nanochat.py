"""NanoChatForCausalLM of transformers as a native model: the same decoder under other names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lrt.config import ModelConfig, ScheduleConfig
from lrt.conversion.checkpoints import TOKENIZER_HELP, Checkpoint, expected_shapes, no_step, read_official
from lrt.conversion.official import config_of
from lrt.conversion.official_reference import Logits, Precision
from lrt.conversion.tokenizers import read_files, without_hub_files
from lrt.serialization.decoders import open_config, open_decoder
from lrt.serialization.renewal import config_file
from lrt.serialization.tensors import check_shapes, open_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_TYPE = "nanochat"
OUTSIDE = {"backbone.embedding.weight": "model.embed_tokens.weight", "backbone.head.weight": "lm_head.weight"}
INSIDE = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "output": "self_attn.o_proj",
    "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2",
}  # fmt: skip
NORM = "its norms add the smallest step of the dtype, as nanochat itself does, where this config adds rms_norm_eps = {}"


def read_any(path: Path, *, step: int | None = None) -> Checkpoint:
    """A model of nanochat: its own checkpoint, or a folder of transformers.

    Raises:
        ValueError: neither, or one that a native model cannot express.
    """
    return (
        read_folder(path, step=step) if config_file(path).is_file() else read_official(path, step=step, kind="nanochat")
    )


def read_folder(path: Path, *, step: int | None = None) -> Checkpoint:
    """A NanoChatForCausalLM folder; it is compared with what transformers makes of it.

    Raises:
        ValueError: another model, settings that a native model has not, or tensors that do not fit.
    """
    no_step(step, "nanochat")
    theirs = open_config(path)
    config = config_of(_native(theirs, path), None, ScheduleConfig(kind="baseline"))
    names = dict(OUTSIDE)
    for index in range(theirs.num_hidden_layers):
        names |= {
            f"blocks.{index}.block.{ours}.weight": f"model.layers.{index}.{name}.weight"
            for ours, name in INSIDE.items()
        }
    shapes, found = expected_shapes(config), open_folder(path)
    check_shapes(str(path), found, {names[name]: shape for name, shape in shapes.items()})
    files = without_hub_files(read_files(path))
    notes = (NORM.format(theirs.rms_norm_eps), *(() if files else (TOKENIZER_HELP,)))
    return Checkpoint(
        "nanochat",
        path,
        config,
        {name: found[names[name]] for name in shapes},
        partial(_reading, path),
        files,
        notes=notes,
    )


def _native(theirs: PreTrainedConfig, path: Path) -> ModelConfig:
    """The settings of a native model that computes the same."""
    if theirs.model_type != MODEL_TYPE:
        raise ValueError(
            f'{path} is a "{theirs.model_type}" of transformers, not a "{MODEL_TYPE}": '
            "lrt.adapt makes it recurrent as it is"
        )
    rope = dict(theirs.rope_parameters or {})
    only = {
        "hidden_act": (theirs.hidden_act, "relu2"),
        "attention_bias": (theirs.attention_bias, False),
        "attention_dropout": (float(theirs.attention_dropout), 0.0),
        "tie_word_embeddings": (theirs.tie_word_embeddings, False),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for name, (found, possible) in only.items():
        if found != possible:
            raise ValueError(
                f"{path}: {name} = {found!r}, but a native model has {possible!r} alone: "
                "lrt.adapt makes this one recurrent as it is"
            )
    return ModelConfig(
        n_layers=theirs.num_hidden_layers,
        width=theirs.hidden_size,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        vocab_size=theirs.vocab_size,
        vocab_multiple=64 if theirs.vocab_size % 64 == 0 else 1,
        sequence_length=theirs.max_position_embeddings,
        mlp_ratio=theirs.intermediate_size / theirs.hidden_size,
        window_pattern="L",
        value_embeddings="none",
        embedding_residual=False,
        residual_scales=False,
        softcap=theirs.final_logit_softcapping,
        rope_base=rope["rope_theta"],
    )


def _reading(path: Path, precision: Precision) -> Logits:
    """The answers of transformers; both modes are one where there is no memory."""
    decoder = open_decoder(path, dtype="auto").eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.data = precision(parameter.data)
    for module in decoder.modules():
        if hasattr(module, "eps"):
            module.eps = torch.finfo(torch.float32).eps
    return lambda tokens, mode: decoder(tokens, use_cache=False).logits
