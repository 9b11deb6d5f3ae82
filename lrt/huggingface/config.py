"""The config of a model, as transformers and its tools read it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lrt.config import ModelConfig
from lrt.serialization.decoders import check_attention
from lrt.tables import ReadTable, Table

SHARED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip

# of every block: an engine that builds a cache by types of its own stops here, where it would drop the memory
LAYER_TYPE = "recurrent_memory"
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
# set after the rest, because newer versions would rewrite or refuse them
LATER = ("rope_parameters", "use_cache", "layer_types")


class LRTConfig(PretrainedConfig):
    """config.json of a saved model, with the attributes that tools read of every decoder.

    Args:
        table: config.json; ``model`` describes a native decoder, ``adapted`` a foreign one.
    """

    model_type = "lrt"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "memory", "groups"]

    def __init__(self, **table: object) -> None:
        known: Table = NO_IDS | {"use_cache": True} | attributes(table) | table
        if "num_hidden_layers" in known:
            known["layer_types"] = [LAYER_TYPE] * known["num_hidden_layers"]
        for name in {"dtype", "torch_dtype"} & known.keys():
            known[name] = dtype_of(known[name])
        later = {name: known.pop(name) for name in LATER if name in known}
        super().__init__(**known)
        for name, value in later.items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: Table, **kwargs: object) -> Any:
        """A config from the table of a folder; the attention that a caller asks for comes in ``kwargs``."""
        check_attention(config_dict, where="an lrt model")
        return super().from_dict(config_dict, **kwargs)

    def validate(self) -> None:
        """As transformers does, but for the type of layers: it is one that no other library knows, on purpose."""
        for validator in getattr(type(self), "__class_validators__", ()):
            if validator.__name__ != "validate_layer_type":
                validator(self)


def dtype_of(given: object) -> torch.dtype | None:
    """A dtype from its name; None and "auto" mean: as saved.

    Raises:
        ValueError: there is no such dtype, or weights cannot train in it.
    """
    if given is None or given == "auto":
        return None
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f'dtype = {given!r}: give a floating-point torch.dtype, its name such as "bfloat16", '
            'or "auto" for the dtype as saved'
        )
    return found


def refuse_changed(config: LRTConfig, stored: ReadTable) -> None:
    """Raises ValueError where one of ``SHARED`` is not what a config.json says of the decoder.

    Token ids may be changed, and so may ``max_position_embeddings``, which tells tools how long rows may be.

    Args:
        config: the changed one.
        stored: the values that have an effect.
    """
    for name in set(SHARED) - {*NO_IDS, "max_position_embeddings"}:
        value = getattr(config, name, None)
        if name in stored and value != stored[name]:
            raise ValueError(
                f"config.{name} = {value!r} would have no effect, it only repeats what config.model or config.adapted "
                f"says ({stored[name]!r}): build a model of another ModelConfig, or change the decoder and lrt.adapt it"
            )


def attributes(table: ReadTable) -> Table:
    """What ``SHARED`` names, of the decoder that a config.json describes."""
    if "model" in table:
        native = ModelConfig(**table["model"])
        values: Table = {
            "hidden_size": native.d_model,
            "num_hidden_layers": native.n_layers,
            "num_attention_heads": native.heads,
            "num_key_value_heads": native.kv_heads,
            "head_dim": native.head_dim,
            "intermediate_size": int(native.mlp_ratio * native.d_model),
            "max_position_embeddings": native.sequence_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": native.rope_base},
            "tie_word_embeddings": False,
        }
        return values
    about = table.get("adapted", {}).get("config")
    if about is None or about.get("model_type") not in CONFIG_MAPPING:
        return {}
    decoder = CONFIG_MAPPING[about["model_type"]].from_dict(dict(about)).get_text_config()
    values = {name: value for name in SHARED if (value := getattr(decoder, name, None)) is not None}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if "rope_parameters" not in values and getattr(decoder, "rope_theta", None) is not None:  # before transformers 5
        values["rope_parameters"] = (
            {"rope_type": "default"}
            | (getattr(decoder, "rope_scaling", None) or {})
            | {"rope_theta": decoder.rope_theta}
        )
    return values
