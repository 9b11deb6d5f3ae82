"""The steps that the training benchmark times: ours bare and whole, and those of the official code."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from lrt.commands.bench.suites import Suite
from lrt.config import DataConfig, ParallelConfig, Recipe, RecurrenceConfig, RunConfig, ScheduleConfig, TrainingConfig
from lrt.data import Batch, build_loader, load_tokenizer
from lrt.train.distributed.graphs import Runner
from lrt.train.distributed.parallel import free_gathered
from lrt.train.distributed.world import World
from lrt.train.optim.groups import MuonAdamW
from lrt.train.step import train_step
from lrt.types import Schedule


def recipe_of(suite: Suite, recurrence: RecurrenceConfig | None, parallel: ParallelConfig) -> Recipe:
    return Recipe(
        run=RunConfig(name="bench"),
        model=suite.model(),
        recurrence=recurrence,
        schedule=ScheduleConfig(kind="baseline") if recurrence is None else ScheduleConfig(),
        data=DataConfig(train="demo", tokenizer="bytes"),
        training=TrainingConfig(steps=1, batch_tokens=suite.rows * suite.length, micro_batch=suite.rows, clip_norm=1.0),
        parallel=parallel,
    )


def held_bytes(runner: Runner) -> int:
    """What a rank holds between steps: masters, working copy and sums."""
    modules = (runner.model, runner.compute)
    tensors = {id(p): getattr(p, "_local_tensor", p) for module in modules for p in module.parameters()}
    sums = 0 if runner.sums is None else runner.sums.bytes
    return sums + sum(t.numel() * t.element_size() for t in tensors.values())


def random_rows(suite: Suite, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, suite.vocabulary, (suite.rows, suite.length + 1), device=world.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def bare_step(
    runner: Runner, schedule: Schedule, suite: Suite, world: World, *, accumulation: int = 1
) -> Callable[[], None]:
    """Forward and backward of all micro-batches of a step, as the trainer runs them."""
    tokens, targets = random_rows(suite, world)
    parameters = list(runner.model.parameters())
    options = {
        "schedule": schedule,
        "seed": 1,
        "valid_targets": torch.tensor(targets.numel() * world.size, device=world.device),
    }

    def step() -> None:
        for index in range(accumulation):
            first, last = index == 0, index == accumulation - 1
            runner.forward_backward(tokens, targets, **options, first=first, last=last)
        free_gathered(runner.model)
        for parameter in parameters:
            parameter.grad = None

    return step


def whole_step(
    runner: Runner, schedule: Schedule, recipe: Recipe, world: World, optimizer: MuonAdamW, *, accumulation: int
) -> Callable[[], None]:
    """Data, forwards and backwards, norm, clipping and the optimizer, as the trainer does them."""
    rows = recipe.training.micro_batch
    options = {
        "sequence_length": recipe.model.sequence_length,
        "rows": rows,
        "rank": world.rank,
        "world_size": world.size,
        "seed": 1,
    }
    loader = iter(build_loader(recipe.data, tokenizer=load_tokenizer(recipe.data.tokenizer), **options))

    def step() -> None:
        rows = [next(loader) for _ in range(accumulation)]
        batches = [
            Batch(*(x.to(world.device, non_blocking=True) for x in (b.input_ids, b.targets)), b.source) for b in rows
        ]
        train_step(runner, optimizer, batches, schedule=schedule, seed=1, clip_norm=1.0, world=world)

    return step


def official_step(path: str, suite: Suite, world: World, *, recurrent: bool) -> tuple[Callable[[], None], int]:
    """The official code from a checkout: its baseline with value embeddings everywhere, or its recurrent step."""
    sys.path.insert(0, path)
    from nanochat.gpt import GPT, GPTConfig

    config = suite.model()
    with torch.device("meta"):
        model = GPT(
            GPTConfig(
                sequence_len=suite.length, vocab_size=suite.vocabulary, n_layer=suite.layers, n_head=config.heads,
                n_kv_head=config.heads, n_embd=config.d_model, window_pattern=suite.pattern, ve_every_layer=True,
                use_interleaved=recurrent,
            )
        )  # fmt: skip
    model.to_empty(device=world.device)
    model.init_weights()
    compiled = torch.compile(model, dynamic=False)
    tokens, targets = random_rows(suite, world)

    def step() -> None:
        with torch.autocast(world.device.type, torch.bfloat16):
            if recurrent:
                loss = model.forward_interleaved_train(tokens, targets, use_compiled_model=compiled)["loss"]
            else:
                loss = compiled(tokens, targets)
                loss = loss[0] if isinstance(loss, tuple) else loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step, sum(p.numel() * p.element_size() for p in model.parameters())
