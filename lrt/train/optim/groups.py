"""One optimizer for all parameters: Muon for matrices, AdamW for the rest, and the table that says which is which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lrt.config import OptimizerConfig, Recipe
from lrt.tables import Table
from lrt.train.optim.muon import (
    Direction,
    Parts,
    direction,
    gradient_of,
    layout_of,
    local,
    muon_step,
    second_moment_like,
)
from lrt.train.optim.rates import Rates

# ------------------------------------------------------------------ the table of parameter groups


class Group(NamedTuple):
    """One row of the table: which parameters, which rule, which rate."""

    name: str
    pattern: str  # of the whole parameter name
    kind: str  # "muon" | "adamw"
    lr: str  # key of [optimizer]
    by_width: bool = False  # rate times (D / 768)^-0.5
    scale: str | None = None  # key of [optimizer], a factor of the rate
    betas: tuple[float, float] | None = None  # None = optimizer.betas


# Spec section 5. Weight decay is Muon's alone; all rates are times rate_scale sqrt(batch_tokens /
# reference_batch_tokens).
NATIVE: tuple[Group, ...] = (
    Group("matrices", r"blocks\.\d+\.block\..*\.weight", "muon", "matrix_lr"),  # the token value's gate too
    Group(
        "memory_matrices", r"(blocks\.\d+\.projection\..*|memory_projection\.(key|value|map)|injection\.map)\.weight",
        "muon", "matrix_lr", scale="memory_map_scale",
    ),
    Group("memory_gates", r"blocks\.\d+\.gate\.weight", "muon", "matrix_lr", scale="memory_gate_scale"),
    Group("embeddings", r"backbone\.(embedding|value_embeddings\.\d+)\.weight", "adamw", "embedding_lr", by_width=True),
    Group("head", r"backbone\.head\.weight", "adamw", "head_lr", by_width=True),
    Group("residual_scales", r"backbone\.residual_scales", "adamw", "scale_lr"),
    Group("embedding_scales", r"backbone\.embedding_scales", "adamw", "injection_lr", betas=(0.96, 0.95)),
    Group("gains", r"injection\.gains", "adamw", "injection_lr", scale="memory_gain_scale"),
)  # fmt: skip
# the last where AdamW has everything at one rate
MEMORY_GROUPS = ("memory_matrices", "memory_gates", "gains", "memory")
# what exists only because of the recurrence
MEMORY = r"(memory_projection|injection|blocks\.\d+\.(gate|projection))\..*"


def rate_of(group: Table, rates: Rates) -> float:
    """The learning rate of a group at a step."""
    return group["base_lr"] * rates.lr_scale * (rates.memory_scale if group["name"] in MEMORY_GROUPS else 1.0)


def is_memory(name: str) -> bool:
    """Whether a parameter belongs to the recurrence rather than to the backbone."""
    return re.fullmatch(MEMORY, name) is not None


def group_of(name: str, parameter: Tensor, table: Sequence[Group] = NATIVE) -> Group:
    """The row of the table that a parameter belongs to.

    Raises:
        ValueError: no row matches, several rows match, or Muon would get something else than a matrix.
    """
    rows = [row for row in table if re.fullmatch(row.pattern, name)]
    if len(rows) != 1:
        names = ", ".join(row.name for row in rows) or "none"
        raise ValueError(
            f"parameter {name!r} of shape {tuple(parameter.shape)} matches {names} of the optimizer's groups "
            f"({', '.join(row.name for row in table)}): add it to the table in lrt/train/optim/groups.py, "
            'or set optimizer.kind = "adamw"'
        )
    if rows[0].kind == "muon" and parameter.ndim != 2:
        raise ValueError(
            f"parameter {name!r} has shape {tuple(parameter.shape)}, but Muon takes matrices: "
            "give it an adamw row in the table"
        )
    return rows[0]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], recipe: Recipe) -> list[Table]:
    """The optimizer's groups with every setting in plain numbers.

    Args:
        named: parameter names as in the model's state dict; frozen ones are left out.
        recipe: ``optimizer``, ``training.batch_tokens``, ``model.width`` and ``model.n_layers`` are read.
    """
    config = recipe.optimizer
    scale = config.rate_scale * (recipe.training.batch_tokens / config.reference_batch_tokens) ** 0.5
    width = (recipe.model.d_model / 768) ** -0.5
    trained = [(name, p) for name, p in named if p.requires_grad]
    if config.kind == "adamw":
        return _adamw_groups(trained, config, scale)
    members: dict[str, list[tuple[str, nn.Parameter]]] = {row.name: [] for row in NATIVE}
    for name, parameter in trained:
        members[group_of(name, parameter).name].append((name, parameter))
    return [
        {
            "name": row.name,
            "kind": row.kind,
            "params": members[row.name],
            "lr": getattr(config, row.lr)
            * scale
            * (width if row.by_width else 1.0)
            * (getattr(config, row.scale) if row.scale else 1.0),
            "betas": (config.momentum, config.second_moment) if row.kind == "muon" else row.betas or config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay * (12 / recipe.model.n_layers) ** 2 if row.kind == "muon" else 0.0,
        }
        for row in NATIVE
        if members[row.name]
    ]


def _adamw_groups(trained: Sequence[tuple[str, nn.Parameter]], config: OptimizerConfig, scale: float) -> list[Table]:
    memory_lr = config.adamw_lr if config.adamw_memory_lr is None else config.adamw_memory_lr
    common = {"kind": "adamw", "betas": config.betas, "eps": config.eps, "weight_decay": 0.0}
    backbone = [(name, p) for name, p in trained if not is_memory(name)]
    memory = [(name, p) for name, p in trained if is_memory(name)]
    parts = {row: getattr(config, row.scale) for row in NATIVE if row.scale is not None}
    if len(set(parts.values())) == 1:  # one rate, one group
        sides = [("memory", memory, memory_lr * config.memory_map_scale)]
    else:
        row_of = {name: group_of(name, p, tuple(parts)) for name, p in memory}
        of_row = {row: [(name, p) for name, p in memory if row_of[name] is row] for row in parts}
        sides = [(row.name, of_row[row], memory_lr * factor) for row, factor in parts.items()]
    sides.insert(0, ("backbone", backbone, config.adamw_lr))
    return [{"name": name, "params": params, "lr": lr * scale, **common} for name, params, lr in sides if params]


# ------------------------------------------------------------------ the optimizer


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one step that a flag on the device can turn into nothing.

    State is made at once, one entry per parameter: ``momentum`` (laid out as the parameter) and
    ``second_moment`` for Muon; ``exp_avg``, ``exp_avg_sq`` and ``step`` for AdamW. So a checkpoint can be
    read into it on any number of ranks.

    Args:
        groups: as ``parameter_groups`` gives them.
        direction: Muon's whole-matrix part.
        compile: run Muon's parts compiled, each once a shape.
    """

    def __init__(self, groups: list[Table], *, direction: Direction = direction, compile: bool = False) -> None:
        super().__init__(groups, defaults={})
        parts = Parts(direction=direction)
        self._parts = parts.compiled() if compile else parts
        for group in self.param_groups:
            group["base_lr"], group["base_weight_decay"] = group["lr"], group["weight_decay"]
            for parameter in group["params"]:
                self.state[parameter] = _fresh_state(parameter, kind=group["kind"])

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], object] | None = None, *, finite: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """Update every parameter that has a gradient; the gradients are not to be read afterwards.

        Args:
            closure: not supported.
            finite: 0-D tensor on the device; where it is 0 nothing changes, neither parameters nor state. None = 1.
            scale: 0-D float32 tensor on the device, the factor of all gradients, as ``clip_factor`` gives it. None = 1.
        """
        if closure is not None:
            raise ValueError("MuonAdamW.step takes no closure: compute the gradients first")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            flag = torch.ones((), device=local(params[0]).device) if finite is None else finite.float()
            if group["kind"] == "muon":
                self._muon(params, group, flag, scale)
            else:
                self._adamw(params, group, flag, scale)

    def _muon(self, params: list[Tensor], group: Table, finite: Tensor, scale: Tensor | None) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in params:
            by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        for members in by_shape.values():
            muon_step(
                members,
                [self.state[p]["momentum"] for p in members],
                [self.state[p]["second_moment"] for p in members],
                lr=group["lr"],
                momentum=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                finite=finite,
                scale=scale,
                parts=self._parts,
            )

    def _adamw(self, params: list[Tensor], group: Table, finite: Tensor, scale: Tensor | None) -> None:
        params = [p for p in params if local(p).numel()]  # a rank may hold no row of a small parameter
        if not params:
            return
        states = [self.state[p] for p in params]
        adamw(
            [local(p) for p in params],
            [gradient_of(p) for p in params],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=True,  # the one kernel of torch that knows found_inf
            found_inf=1.0 - finite,
            grad_scale=None if scale is None else scale.reciprocal(),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def set_rates(self, rates: Rates) -> None:
        """Give every group its numbers for the coming step."""
        for group in self.param_groups:
            group["lr"] = rate_of(group, rates)
        self.set_momentum(rates)

    def set_momentum(self, rates: Rates) -> None:
        """Give Muon's groups their momentum and weight decay for the coming step; learning rates stay as they are."""
        for group in self.param_groups:
            if group["kind"] == "muon":
                group["weight_decay"] = group["base_weight_decay"] * rates.decay_scale
                group["betas"] = (rates.momentum, group["betas"][1])

    def named_state(self) -> dict[str, Tensor]:
        """Every state tensor as ``name.key``, aliasing the state: what a checkpoint holds."""
        pairs = [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"])]
        return {f"{name}.{key}": value for name, parameter in pairs for key, value in self.state[parameter].items()}


def _fresh_state(parameter: Tensor, *, kind: str) -> dict[str, Tensor]:
    if kind == "muon":
        return {"momentum": torch.zeros_like(parameter), "second_moment": second_moment_like(parameter)}
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter), "step": step}


# ------------------------------------------------------------------ gradients, all together


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Global 2-norm of all gradients as a 0-D tensor, equal on every rank, with no host sync."""
    parameters = [p for p in parameters if p.grad is not None]
    square = torch.stack(torch._foreach_norm([gradient_of(p) for p in parameters])).float().square().sum()
    layout = layout_of(parameters[0])
    if layout is not None:
        dist.all_reduce(square, group=layout.group)
    return square.sqrt()


def clip_factor(norm: Tensor, *, clip_norm: float) -> Tensor:
    """The factor that makes the gradients' global norm at most ``clip_norm``: 0-D, for ``MuonAdamW.step``."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)
