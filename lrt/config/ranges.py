"""What types cannot say of a recipe, as tables: the range of each number, the keys a choice leaves unused; no torch."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args, get_origin, get_type_hints

from lrt.tables import ReadTable, Table

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from lrt.config.model import RecurrenceConfig
    from lrt.config.settings import Recipe

LARGEST = 1 << 62  # of whole numbers: products with few others still are numbers of a machine


class Range(NamedTuple):
    """Numbers that a key may be."""

    least: float
    most: float = math.inf
    above: bool = False  # least itself is refused
    below: bool = False  # most itself is refused
    also: float | None = None  # a number outside that means something
    note: str = ""  # what a special value means

    def holds(self, value: float) -> bool:
        if value == self.also:
            return True
        if isinstance(value, int) and value > LARGEST:
            return False
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most) and value < math.inf

    def says(self, *, whole: bool) -> str:
        low = f"above {self.least}" if self.above else f"of {self.least} or more"
        high = "" if self.most == math.inf else f", below {self.most}" if self.below else f", at most {self.most}"
        return f"use a {'whole ' if whole else ''}number {low}{high}{f' ({self.note})' if self.note else ''}"


FROM_1, FROM_0, POSITIVE, SHARE, DECAY = Range(1), Range(0), Range(0, above=True), Range(0, 1), Range(0, 1, below=True)
SEED = Range(0, 2**32 - 1)
MOST_LAYERS = 10_000  # a file that names more would only keep a machine busy
SIZE = Range(1, 1 << 20)  # products of such numbers are still numbers of elements
AT_THE_END = Range(0, note="0 = only at the end")

RANGES: dict[str, dict[str, Range]] = {
    "run": {"seed": SEED},
    "model": {
        "n_layers": Range(1, MOST_LAYERS),
        "width": SIZE,
        "n_heads": SIZE,
        "n_kv_heads": SIZE,
        "vocab_size": Range(1, 1 << 24),
        "vocab_multiple": SIZE,
        "sequence_length": Range(1, (1 << 31) - 1),
        "mlp_ratio": Range(0, 1 << 10, above=True),
        "softcap": POSITIVE,
        "rope_base": POSITIVE,
        "gate_channels": FROM_1,
        "attention_reset": FROM_0,
    },
    "recurrence": {"source_layer": POSITIVE, "gate_channels": FROM_1, "blocks": FROM_1, "separator": FROM_0},
    "schedule": {
        "subsets": FROM_1,
        "sweeps": FROM_1,
        "passes": FROM_1,
        "chunks": FROM_1,
        "weights": FROM_0,
        "ramp": FROM_0,
        "settle": FROM_0,
    },
    "data": {"workers": FROM_0, "buffer_documents": FROM_1, "shuffle_seed": SEED},
    "optimizer": {  # a rate of 0 freezes
        "matrix_lr": FROM_0,
        "momentum": DECAY,
        "momentum_start": DECAY,
        "momentum_warmup_steps": FROM_0,
        "second_moment": DECAY,
        "weight_decay": FROM_0,
        "embedding_lr": FROM_0,
        "head_lr": FROM_0,
        "scale_lr": FROM_0,
        "injection_lr": FROM_0,
        "betas": DECAY,
        "eps": POSITIVE,
        "reference_batch_tokens": FROM_1,
        "rate_scale": FROM_0,
        "adamw_lr": FROM_0,
        "adamw_memory_lr": FROM_0,
        "memory_map_scale": FROM_0,
        "memory_gate_scale": FROM_0,
        "memory_gain_scale": FROM_0,
    },
    "training": {
        "steps": FROM_0,
        "tokens": FROM_1,
        "tokens_per_parameter": Range(0, 1e9, above=True),
        "compute": FROM_1,
        "batch_tokens": Range(1, 1 << 36),
        "micro_batch": FROM_1,
        "warmup_steps": FROM_0,
        "warmdown_fraction": SHARE,
        "final_lr_fraction": SHARE,
        "clip_norm": POSITIVE,
        "max_skipped": FROM_1,
    },
    "parallel": {
        "replicate": FROM_1,
        "shard": Range(1, also=-1, note="-1 = all that remain"),
        "timeout_minutes": Range(0, 525600, above=True),
        "loss_chunk": Range(0, note="0 = all"),
        "host_threads": FROM_1,
    },
    "checkpoint": {"every": AT_THE_END, "keep_last": FROM_1, "keep_every": Range(0, note="0 = none")},
    "metrics": {"every": FROM_1, "profile_start": FROM_1, "profile_steps": FROM_1},
    "evaluation": {
        "every": AT_THE_END,
        "tokens": FROM_1,
        "batch": Range(1, 1 << 16),
        "buckets": FROM_1,
        "sample_tokens": FROM_0,
        "core_items": FROM_1,
    },
    "tuning": {"problems": FROM_0, "answer_tokens": FROM_1, "lora_rank": FROM_0, "lora_alpha": POSITIVE},
}
# Of tables inside a section: phases and members of a mixture, which have the keys of [schedule] too,
# and sources of data.
ITEM_RANGES = {"until": Range(0, 1, above=True), "share": Range(0, 1, above=True), "weight": Range(0, 1e9, above=True)}
SHARES_SUM_WITHIN = 1e-6  # of 1

MUON = ("matrix_lr", "momentum", "momentum_start", "momentum_warmup_steps", "second_moment", "weight_decay")
MUON_SIDE = ("embedding_lr", "head_lr", "scale_lr", "injection_lr")
# A choice, and the keys that only some of its values use.
USED: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("schedule", "kind"): {
        "baseline": (),
        "interleaved": ("subsets", "sweeps", "order", "kv_refresh", "weights", "cut_gradient", "ramp"),
        "refine": ("passes", "weights", "cut_gradient", "settle", "ramp"),
        "chunked": ("chunks", "ramp"),
        "sequential": ("ramp",),
        "mixture": ("mix", "ramp"),
    },
    ("optimizer", "kind"): {"muon": (*MUON, *MUON_SIDE), "adamw": ("adamw_lr", "adamw_memory_lr")},
    ("training", "lr_schedule"): {"warmdown": ("warmdown_fraction",), "wsd": ("warmdown_fraction",), "cosine": ()},
}
HORIZON = ("steps", "tokens", "tokens_per_parameter", "compute")  # of training: exactly one


def raise_all(errors: list[str]) -> None:
    """Raises ValueError with every error in one message, if there is one."""
    if errors:
        raise ValueError("; ".join(errors))


def choice_errors(section: str, c: object) -> list[str]:
    """Settings that name none of their choices; in a recipe the reader says so, in code only this does."""
    hints = get_type_hints(type(c))
    choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    wrong = [name for name, allowed in choices.items() if getattr(c, name) not in allowed]
    return [f"{section}.{name} = {getattr(c, name)!r}: use one of {', '.join(choices[name])}" for name in wrong]


def number_types(hint: object) -> set[type]:
    """``int`` and ``float``, as far as a value of this type may hold them."""
    if get_origin(hint) is Literal:
        return set()
    args = get_args(hint)
    return set().union(*map(number_types, args)) if args else {kind for kind in (int, float) if hint is kind}


def range_errors(section: str, cls: type, values: ReadTable) -> list[str]:
    """Numbers of a section that are outside of their range, or none at all.

    Args:
        section: of the recipe, or a table inside it, such as schedule.phases[0].
        cls: its dataclass.
        values: by key; keys that are missing are right.
    """
    errors = []
    ranges = RANGES[root_of(section)]
    for key, hint in get_type_hints(cls).items():
        if item_class(hint) is not None:
            for index, item in enumerate(values.get(key) or ()):
                errors += (
                    range_errors(f"{section}.{key}[{index}]", type(item), vars(item)) if is_dataclass(item) else []
                )
        kinds = number_types(hint)
        if not kinds or key not in values:
            continue
        value, options = values[key], get_args(hint)
        words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
        if value is None and type(None) in options or isinstance(value, str) and value in words:
            continue
        allowed = ranges[key] if key in ranges else ITEM_RANGES[key]
        several = isinstance(value, (tuple, list))
        if not all(_is_number(item, kinds) and allowed.holds(item) for item in (value if several else (value,))):
            if any(isinstance(item, int) and item > LARGEST for item in (value if several else (value,))):
                allowed = allowed._replace(most=min(allowed.most, LARGEST))
            none = ', or "none"' if type(None) in options else ""
            errors.append(
                f"{section}.{key} = {list(value) if several else value!r}: "
                f"{allowed.says(whole=float not in kinds)}{none}"
            )
    return errors


def root_of(section: str) -> str:
    """The section of the recipe in which a table such as schedule.phases[0] stands."""
    return section.partition(".")[0]


def item_class(hint: object) -> type | None:
    """The dataclass of which a value of this type holds several; None where it holds none."""
    if is_dataclass(hint):
        return hint if isinstance(hint, type) else None
    found = (item_class(arg) for arg in get_args(hint))
    return next((cls for cls in found if cls is not None), None)


def _is_number(value: object, kinds: set[type]) -> bool:
    return isinstance(value, (int, float) if float in kinds else int) and not isinstance(value, bool)


def unused_keys(section: str, choice: str, chosen: object) -> set[str]:
    """Keys of a section that this value of ``choice`` does not use, but another would."""
    uses = USED[root_of(section), choice]
    return (
        {key for keys in uses.values() for key in keys} - set(uses[chosen])
        if isinstance(chosen, str) and chosen in uses
        else set()
    )


def unused_errors(section: str, values: DataclassInstance) -> list[str]:
    """Keys that differ from their default and have no effect, since a choice of the same section leaves them unused."""
    errors = []
    for where, choice in USED:
        if where != root_of(section):
            continue
        chosen, uses = getattr(values, choice), USED[where, choice]
        unused = unused_keys(section, choice, chosen)
        for f in fields(values):
            value = getattr(values, f.name)
            if f.name in unused and value != f.default:
                users = " or ".join(kind for kind, keys in uses.items() if f.name in keys)
                errors.append(
                    f"{section}.{f.name} = {value!r} has no effect with {section}.{choice} = {chosen!r}: "
                    f"leave it out, or use {users}"
                )
    return errors


def entry_errors(c: RecurrenceConfig) -> list[str]:
    """Ways for memory to enter that are unknown, or do not go together."""
    errors = []
    if not isinstance(c.residual, bool) and c.residual != "projected":
        errors.append(f"recurrence.residual = {c.residual!r}: use true, false or projected")
    aligned = 'recurrence.projection = "aligned"'
    if c.projection == "aligned" and c.sharing == "layerwise":
        errors.append(
            f'{aligned} is one map that all blocks share, so sharing = "layerwise" does not fit: leave it out, '
            'or use "separate"'
        )
    if c.projection == "aligned" and not c.kv_projection:
        errors.append(
            f"{aligned} has no effect with recurrence.kv_projection = false: "
            "it brings memory into keys and values; leave one out"
        )
    return errors


def memory_rate_errors(r: Recipe) -> list[str]:
    """Rates of parts that the recurrence of a recipe does not have; the twin without any may keep its recipe's."""
    c = r.recurrence
    if c is None:
        return []
    missing = {
        "memory_map_scale": None
        if c.kv_projection or c.residual == "projected"
        else "recurrence.kv_projection = false and a scalar residual",
        "memory_gate_scale": None if c.kv_projection else "recurrence.kv_projection = false",
        "memory_gain_scale": None if c.residual else "recurrence.residual = false",
    }
    return [
        f"optimizer.{key} = {getattr(r.optimizer, key)!r} has no effect with {why}: leave it out"
        for key, why in missing.items()
        if why is not None and getattr(r.optimizer, key) != 1
    ]


def without_replaced(below: ReadTable, above: ReadTable, *, section: str) -> Table:
    """What a section inherits: not the horizon where another is given above, nor what belonged to a choice that is made
    anew."""
    replaced: set[str] = set()
    if section == "training" and any(above.get(key, "none") != "none" for key in HORIZON):
        replaced.update(HORIZON)
    if section == "schedule":
        if above.get("phases", "none") != "none":
            return {}
        if "kind" in above:
            replaced.add("phases")
    if section == "data" and ("train" in above) != ("sources" in above):
        replaced.add("sources" if "train" in above else "train")
    for where, choice in USED:
        if where == section:
            replaced |= unused_keys(section, choice, above.get(choice))
    return {key: value for key, value in below.items() if key not in replaced}
