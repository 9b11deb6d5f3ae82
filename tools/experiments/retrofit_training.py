"""A part of retrofit_grid.py, no command, one run of it: a decoder with memory or its twin, trained on rows of tokens and scored."""

from __future__ import annotations

if __name__ == "__main__":
    raise SystemExit("this file is a part of another tool: run tools/experiments/retrofit_grid.py")

import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lrt
from lrt.config import Recipe
from lrt.decoding import step as decoding
from lrt.decoding.scoring import score
from lrt.model import LatentRecurrentModel
from lrt.schedules import from_config
from lrt.train.distributed.graphs import Runner, working_copy


def prepare(decoder: Any, recipe: Recipe, *, recurrent: bool) -> Any:
    """The decoder with memory, or its twin: the same blocks under the same code without any."""
    model = lrt.adapt(decoder, recipe.recurrence if recurrent else lrt.RecurrenceConfig(init="identity", kv_projection=False))
    if not recurrent:
        model = LatentRecurrentModel(model.backbone, [block.block for block in model.blocks], None)
    model.backbone.loss_chunk = recipe.parallel.loss_chunk
    return model


def train(
    model: Any,
    recipe: Recipe,
    rows: Tensor,
    *,
    seed: int,
    tokens: int,
    stage_1: float = 0.0,
    make_runner: Callable[[Any], Runner] | None = None,
    deadline: float = math.inf,
) -> float | None:
    """Train in place.

    Args:
        model: from ``prepare``, in float32.
        recipe: rates, batch, schedule.
        rows: (rows, length + 1) tokens, on the model's device.
        seed: of the order of the rows.
        tokens: to train on.
        stage_1: the share of them on which only the memory trains.
        make_runner: what runs forward and backward, made anew for each stage; None = the model itself, under autocast on a GPU.
        deadline: of ``time.perf_counter``.

    Returns:
        Seconds, or None where the deadline came before the end.
    """
    optimizer_settings, batch = recipe.optimizer, recipe.training.batch_tokens // recipe.model.sequence_length
    steps = tokens // recipe.training.batch_tokens
    memory = model.memory_parameters()
    added = {id(p) for p in memory.values()}
    backbone = [p for p in model.parameters() if id(p) not in added]
    groups = [{"params": backbone, "rate": optimizer_settings.adamw_lr}]
    if memory:
        groups.append({"params": list(memory.values()), "rate": optimizer_settings.adamw_memory_lr or optimizer_settings.adamw_lr})
    fused = rows.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optimizer_settings.betas, eps=optimizer_settings.eps, weight_decay=0.0, fused=fused)
    schedule = from_config(recipe.schedule) if memory else lrt.baseline()
    valid = torch.tensor(batch * (rows.shape[1] - 1), device=rows.device)
    model.train()
    order = batches(len(rows), batch, seed)
    first = int(stage_1 * steps) if memory else 0
    runner: Runner | None = None
    _wait(rows.device)
    start = time.perf_counter()
    for step in range(steps):
        if step % 8 == 0:  # otherwise the host runs ahead of the device, and of the deadline
            _wait(rows.device)
            if time.perf_counter() > deadline:
                return None
        if step in (0, first):
            for parameter in backbone:
                parameter.requires_grad_(step >= first)
            if make_runner is not None:  # a captured graph has the gradients of its stage
                runner = None
                free()
                runner = make_runner(model)
        rate = min((step + 1) / (recipe.training.warmup_steps + 1), (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        for part in rows[next(order)].split(recipe.training.micro_batch):
            ids, targets = part[:, :-1], part[:, 1:]
            if runner is not None:
                runner.forward_backward(ids, targets, schedule=schedule, seed=0, valid_targets=valid)
                continue
            with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
                loss = model(ids, targets=targets, schedule=schedule, valid_targets=valid).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], recipe.training.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    _wait(rows.device)
    return time.perf_counter() - start


def batches(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, the same for every model of a seed."""
    if rows < batch:
        raise ValueError(f"{rows} rows of text, but a batch has {batch}: make more tokens (--count), or lower training.batch_tokens")
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (part for part in torch.randperm(rows, generator=generator).split(batch) if len(part) == batch)


@torch.no_grad()
def bits_per_byte(model: Any, recipe: Recipe, rows: Tensor, sizes: Tensor, *, runner: decoding.Runner) -> dict[str, float]:
    """Validation bits per byte in each memory mode; the twin has one, ``plain``."""
    # Of the float32 masters; buffers, such as RoPE's frequencies, keep their dtype.
    kept = working_copy(model, dtype=torch.bfloat16 if rows.device.type == "cuda" else torch.float32).eval()
    recurrent = kept.recurrence is not None
    schedules = {"zero": lrt.baseline(), "parallel": from_config(recipe.schedule)} if recurrent else {"plain": lrt.baseline()}
    nats: dict[str, float] = dict.fromkeys([*schedules, "decode"] if recurrent else schedules, 0.0)
    total = 0
    for part in rows.split(recipe.evaluation.batch):
        ids, targets = part[:, :-1], part[:, 1:]
        counted = sizes[targets] > 0
        total += int(sizes[targets].sum())
        each = {name: kept.score(ids, targets, schedule)[-1] for name, schedule in schedules.items()}
        if recurrent:
            each["decode"] = score(kept, ids, targets, runner=runner)[0]
        for name, values in each.items():
            nats[name] += float(values.double().mul(counted).sum())
    return {name: value / math.log(2) / total for name, value in nats.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nobody holds: models hold cycles, and captured graphs memory of their own."""
    gc.collect()
    torch.cuda.empty_cache()


def share_one_graph(model: Any, compiled: Any) -> None:
    """One compiled forward for all blocks: their parameters are its inputs."""
    for block in model.blocks:
        block.forward = lambda *args, block=block: compiled(block, *args)
