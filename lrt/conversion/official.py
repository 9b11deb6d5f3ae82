"""The official LRT and nanochat layouts as one table of names, read in both directions.

Source: github.com/OoDBag/Latent_recurrent_transformer, commits e0d0f6e and a133a67; facts only. Legend: L blocks,
G key/value heads, D width, c channels that the gates read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lrt.config import ModelConfig, RecurrenceConfig, ScheduleConfig
from lrt.model import build_model
from lrt.schedules import describe, from_config
from lrt.serialization import model_from_config, native_config
from lrt.serialization.lazy import rows, stacked
from lrt.serialization.tensors import LazyTensor, check_shapes
from lrt.tables import ReadTable, Table

LINEARS = {
    "attn.c_q": "query", "attn.c_k": "key", "attn.c_v": "value", "attn.c_proj": "output", "mlp.c_fc": "mlp_in",
    "mlp.c_proj": "mlp_out",
}  # fmt: skip
NANOCHAT_KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
# What the official code computes whatever its config says.
FIXED = {"mlp_ratio": 4.0, "qk_norm": True, "softcap": 15.0, "rope_base": 10000.0, "attention_reset": None}


# ------------------------------------------------------------------ tensors


def name_table(config: ModelConfig, *, recurrent: bool) -> dict[str, tuple[str, ...]]:
    """Official name -> our names; several of ours stand one below the other in one official tensor."""
    table: dict[str, tuple[str, ...]] = {}
    table |= {"transformer.wte.weight": ("backbone.embedding.weight",), "lm_head.weight": ("backbone.head.weight",)}
    if config.residual_scales:
        table["resid_lambdas"] = ("backbone.residual_scales",)
    if config.embedding_residual:
        table["x0_lambdas"] = ("backbone.embedding_scales",)
    if recurrent:
        table["interleaved_lambdas"] = ("injection.gains",)
    for i in range(config.n_layers):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        table |= {f"{theirs}.{a}.weight": (f"{ours}.block.{b}.weight",) for a, b in LINEARS.items()}
        token_gate, token_value = f"{ours}.block.value_gate.weight", f"backbone.value_embeddings.{i}.weight"
        if recurrent:  # rows of the triple gate: local, memory (both in our ``gate``), token
            table[f"{theirs}.attn.triple_gate.weight"] = (f"{ours}.gate.weight", token_gate)
            table[f"interleaved_projections.{i}.W_v.weight"] = (f"{ours}.projection.value.weight",)
            table[f"interleaved_key_projections.{i}.W_v.weight"] = (f"{ours}.projection.key.weight",)
            table[f"interleaved_init_value_embeds.{i}.weight"] = (token_value,)
        elif config.has_value_embedding(i):
            table[f"{theirs}.attn.ve_gate.weight"] = (token_gate,)
            table[f"value_embeds.{i}.weight"] = (token_value,)
    return table


def native_tensors(config: ReadTable, official: Mapping[str, LazyTensor], *, where: str) -> dict[str, LazyTensor]:
    """Our tensors from official ones.

    Args:
        config: our config.json, from ``native_from_official``.
        official: the tensors of the checkpoint by official name.
        where: what to call the checkpoint in errors.

    Raises:
        ValueError: tensors are missing, unexpected, or have another shape.
    """
    model, table = _shapes_and_table(config)
    check_shapes(where, official, {theirs: _stacked_shape([model[n] for n in ours]) for theirs, ours in table.items()})
    tensors = {}
    for theirs, ours in table.items():
        start = 0
        for name in ours:
            stop = start + model[name][0]
            tensors[name] = official[theirs] if len(ours) == 1 else rows(official[theirs], start, stop)
            start = stop
    return {name: tensors[name] for name in model}


def official_tensors(config: ReadTable, native: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Official tensors from ours, in the order of a table of names."""
    _, table = _shapes_and_table(config)
    return {theirs: stacked([native[name] for name in ours]) for theirs, ours in table.items()}


def _shapes_and_table(config: ReadTable) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, ...]]]:
    model = model_from_config(dict(config), device="meta")
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    return shapes, name_table(model.backbone.config, recurrent=model.recurrence is not None)


def _stacked_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(s[0] for s in shapes), *shapes[0][1:])


# ------------------------------------------------------------------ config, from official


def native_from_official(meta: ReadTable, official: Mapping[str, LazyTensor], *, where: str) -> Table:
    """Our config.json of an official checkpoint.

    The layout is read from the tensors; the config decides only what tensors cannot say.

    Args:
        meta: ``model_config`` of the official meta file.
        official: tensors by official name.
        where: what to call the checkpoint in errors.

    Raises:
        ValueError: a key is missing, or the values make no model.
    """
    missing = [key for key in NANOCHAT_KEYS if key not in meta and key != "window_pattern"]
    if missing:
        raise ValueError(
            f"{where}: model_config lacks {', '.join(missing)}: this is not the meta file of a nanochat or LRT "
            "checkpoint"
        )
    gates = {
        n: t.shape[1]
        for n, t in official.items()
        if n.endswith((".triple_gate.weight", ".ve_gate.weight")) and len(t.shape) == 2
    }
    recurrent = any(".triple_gate." in n for n in official)
    channels = next(iter(gates.values()), meta.get("ve_gate_channels", 32) or meta["n_embd"])
    width, layers = meta["n_embd"], meta["n_layer"]
    gate_channels = None if channels == width else channels
    with_embedding = sum(n.startswith("value_embeds.") for n in official)
    model = ModelConfig(
        n_layers=layers,
        width=width,
        n_heads=meta["n_head"],
        n_kv_heads=meta["n_kv_head"],
        vocab_size=meta["vocab_size"],
        vocab_multiple=64,
        sequence_length=meta["sequence_len"],
        window_pattern=meta.get("window_pattern", "L"),
        value_embeddings="all"
        if recurrent or with_embedding == layers
        else "alternating"
        if with_embedding
        else "none",
        residual_scales="resid_lambdas" in official,
        embedding_residual="x0_lambdas" in official,
        gate_channels=gate_channels,
        rope_dtype="bfloat16",
        **FIXED,  # type: ignore[arg-type]
    )
    recurrence = None
    if recurrent:
        recurrence = RecurrenceConfig(sharing="layerwise", source_layer=layers, gate_channels=gate_channels)
    return config_of(model, recurrence, schedule_from_official(meta) if recurrent else ScheduleConfig(kind="baseline"))


def config_of(model: ModelConfig, recurrence: RecurrenceConfig | None, schedule: ScheduleConfig) -> Table:
    """config.json of a native model that is not built."""
    shell = build_model(model, recurrence, device="meta")
    shell.train_schedule = from_config(schedule)
    return native_config(shell)


def schedule_from_official(meta: ReadTable) -> ScheduleConfig:
    """The training schedule that an official config describes."""
    if meta.get("use_multi_refine"):
        weights = meta.get("multi_refine_loss_weights")
        return ScheduleConfig(
            kind="refine",
            passes=meta.get("multi_refine_num_passes", 1),
            weights=tuple(weights) if weights else "paper",
            cut_gradient=bool(meta.get("multi_refine_detach", False)),
        )
    subsets = meta.get("interleaved_num_passes", 2)
    return ScheduleConfig(
        kind="interleaved", subsets=subsets, kv_refresh=bool(meta.get("interleaved_kv_refresh", False)) and subsets > 1
    )


# ------------------------------------------------------------------ config, to official


def official_from_native(config: ReadTable, *, nanochat: bool = False) -> tuple[Table, list[str]]:
    """``model_config`` of the official meta file.

    Args:
        config: our config.json.
        nanochat: write for plain nanochat, which knows seven keys and no recurrence.

    Returns:
        The official config, and notes on what it cannot say.

    Raises:
        ValueError: the official code cannot express this model; every reason is named.
    """
    if "model" not in config:
        raise ValueError(
            f"this model adapts a {config['adapted']['architecture']}, which the official layout cannot "
            "express: use hf or adapter"
        )
    model, recurrence = ModelConfig(**config["model"]), config["recurrence"]
    kind = "nanochat" if nanochat else "official"
    reasons = [
        f"model.{k} = {config['model'][k]!r} (it has {v!r})" for k, v in FIXED.items() if config["model"][k] != v
    ]
    if model.padded_vocab != -(-model.vocab_size // 64) * 64:
        reasons.append(f"model.vocab_multiple = {model.vocab_multiple} (it pads to 64)")
    reasons += _recurrence_reasons(model, recurrence, nanochat=nanochat)
    if nanochat and recurrence is None:
        theirs = replace(
            model,
            value_embeddings="alternating",
            gate_channels=min(32, model.d_model),
            residual_scales=True,
            embedding_residual=True,
        )
        same = {
            "value_embeddings": _embedded(theirs) == _embedded(model),
            "gate_channels": _channels(theirs) == _channels(model),
        }
        same |= {key: getattr(model, key) for key in ("residual_scales", "embedding_residual")}
        reasons += [
            f"model.{k} = {getattr(model, k)!r} (it has {getattr(theirs, k)!r})"
            for k, equal in same.items()
            if not equal
        ]
    if reasons:
        raise ValueError(
            f"the {kind} layout cannot express this model: {'; '.join(reasons)}. Convert to lrt or hf instead"
        )
    notes = []
    if model.rope_dtype != "bfloat16":
        notes.append(
            "the official code rounds its rotary tables to bfloat16, this model does not (model.rope_dtype): "
            "logits move by about 1e-2"
        )
    out: Table = {
        "sequence_len": model.sequence_length, "vocab_size": model.vocab_size, "n_layer": model.n_layers,
        "n_head": model.heads, "n_kv_head": model.kv_heads, "n_embd": model.d_model,
        "window_pattern": model.window_pattern,
    }  # fmt: skip
    if nanochat:
        return out, notes
    channels = model.gate_channels if recurrence is None else recurrence["gate_channels"]
    out |= {
        "use_value_embeds": model.value_embeddings != "none",
        "ve_every_layer": model.value_embeddings == "all" and recurrence is None,
        "use_x0_residual": model.embedding_residual, "use_resid_lambdas": model.residual_scales,
        "ve_gate_channels": 0 if channels in (None, model.d_model) else channels,
        "use_interleaved": recurrence is not None,
    }  # fmt: skip
    if not (model.residual_scales and model.embedding_residual):
        notes.append("the official code saves models without residual scales, but cannot load them (its own defect)")
    if recurrence is not None:
        schedule, schedule_notes = _official_schedule(config["schedule"])
        out |= schedule
        notes += schedule_notes
    return out, notes


def _recurrence_reasons(model: ModelConfig, recurrence: ReadTable | None, *, nanochat: bool) -> list[str]:
    if recurrence is None:
        return []
    if nanochat:
        return ["it has recurrence (nanochat has none)"]
    parsed = RecurrenceConfig(**recurrence)
    wanted: Table = {
        "sharing": "layerwise",
        "projection": "separate",
        "kv_projection": True,
        "residual": True,
        "separator": None,
    }
    reasons = [
        f"recurrence.{k} = {getattr(parsed, k)!r} (it has {v!r})" for k, v in wanted.items() if getattr(parsed, k) != v
    ]
    if parsed.source_index(model.n_layers) != model.n_layers:
        reasons.append(
            f"recurrence.source_layer = {parsed.source_layer!r} (its source is the last block, {model.n_layers})"
        )
    if parsed.block_indices(model.n_layers) != tuple(range(model.n_layers)):
        reasons.append(f"recurrence.blocks = {recurrence['blocks']} (all its blocks receive memory)")
    if model.value_embeddings != "all":
        reasons.append(
            f"model.value_embeddings = {model.value_embeddings!r} (its recurrent models have them at every block)"
        )
    if (parsed.gate_channels or model.d_model) != _channels(model):
        both = f"recurrence.gate_channels = {parsed.gate_channels}, model.gate_channels = {model.gate_channels}"
        reasons.append(f"{both} (its three gates read the same channels)")
    return reasons


def _channels(model: ModelConfig) -> int:
    return model.gate_channels or model.d_model


def _embedded(model: ModelConfig) -> list[bool]:
    return [model.has_value_embedding(i) for i in range(model.n_layers)]


def _official_schedule(table: ReadTable) -> tuple[Table, list[str]]:
    """The schedule's official keys, and what of it they cannot say."""
    schedule = ScheduleConfig(**table)
    keys: Table = {"interleaved_num_passes": 2, "interleaved_kv_refresh": False}
    notes = []
    if schedule.kind == "refine":
        if schedule.passes == 1 and schedule.cut_gradient:
            schedule = replace(schedule, cut_gradient=True)  # before one pass the initialization is all that there is
        weights = None if schedule.weights == "paper" else list(schedule.weights)
        keys |= {"use_interleaved": False, "use_multi_refine": True, "multi_refine_num_passes": schedule.passes}
        keys |= {"multi_refine_detach": schedule.cut_gradient is True, "multi_refine_loss_weights": weights}
        notes = ["use_multi_refine is known to the official code from commit a133a67 on"]
    elif schedule.kind == "interleaved":
        keys = {"interleaved_num_passes": schedule.subsets, "interleaved_kv_refresh": schedule.kv_refresh}
    back = from_config(schedule_from_official(keys))
    if back != from_config(schedule):
        notes.append(f"the training schedule {dict(table)} has no official name: written as {describe(back)}")
    return keys, notes
