"""Time whole training steps of an adapted decoder: its plain twin, memory in several ways, and transformers alone.

examples:
  python tools/bench/adapted.py --size tiny --rows 2 --length 64      # CPU: does it run
  python tools/bench/adapted.py --out speed.json                      # one GPU: SmolLM2-135M, rows of 2,048
  python tools/bench/adapted.py --decoder folder --only plain transformers

Weights are random, because speed does not depend on them. Every row is a whole step: forward, backward, clipping and
AdamW, on random tokens, with float32 masters and bfloat16 computation on a GPU. ``transformers`` is the step of its
Trainer with ``torch_compile``: the decoder under autocast, its own loss, ``clip_grad_norm_``, fused AdamW. Rows take
turns in one process. The last line printed is one JSON object; --out has it after every row.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import lrt
from lrt.accounting import training_flops
from lrt.adaptation import without_memory
from lrt.commands.bench.decoders import LLAMAS
from lrt.commands.bench.timing import Subject, device_name
from lrt.commands.options import at_least
from lrt.config import OptimizerConfig, ParallelConfig, Recipe, RecurrenceConfig, RunConfig, TrainingConfig, Weights
from lrt.data import Batch
from lrt.serialization.decoders import decoder_of_shapes, transformers
from lrt.tables import Table
from lrt.train.distributed.graphs import single_device
from lrt.train.distributed.parallel import named_parameters
from lrt.train.distributed.world import World, open_world
from lrt.train.optim.groups import MuonAdamW, parameter_groups
from lrt.train.step import train_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = {name.removesuffix("-llama"): shape for name, shape in LLAMAS.items()}
PLAIN, ALONE = "plain", "transformers"


def upper(layers: int) -> tuple[int, ...]:
    return tuple(range(layers // 2 + 1, layers + 1))


def fifth(layers: int) -> tuple[int, ...]:
    """A fifth of the blocks, above the middle."""
    return tuple(range(layers // 2 + 1, layers // 2 + 1 + max(1, layers // 5)))


# A row: where memory enters (all, or some of the blocks), how, and the weights of the two passes.
ROWS: dict[str, tuple[Callable[[int], tuple[int, ...]] | None, Table, Weights]] = {
    "aligned, upper half, weights (0, 1)": (upper, {"projection": "aligned"}, (0.0, 1.0)),
    "aligned, upper half": (upper, {"projection": "aligned"}, "paper"),
    "aligned, a fifth, weights (0, 1)": (fifth, {"projection": "aligned"}, (0.0, 1.0)),
    "aligned, projected residual, upper half, weights (0, 1)": (
        upper, {"projection": "aligned", "residual": "projected"}, (0.0, 1.0),
    ),
    "aligned, all blocks": (None, {"projection": "aligned"}, "paper"),
    "shared, all blocks": (None, {}, "paper"),
}  # fmt: skip


def decoder_for(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """A decoder with random weights, in float32."""
    with torch.device(device):
        if options.decoder is not None:
            return decoder_of_shapes(options.decoder, dtype=torch.float32)
        library = transformers()
        return library.LlamaForCausalLM(library.LlamaConfig(**SIZES[options.size], tie_word_embeddings=True))


def tokens_for(options: argparse.Namespace, vocabulary: int, device: torch.device) -> Tensor:
    return torch.randint(0, vocabulary, (options.rows, options.length + 1), device=device)


def ours(name: str, options: argparse.Namespace, world: World, pool: tuple[int, int] | None) -> Subject:
    """A step as ``lrt.train`` makes it."""
    cuda = world.device.type == "cuda"
    decoder = decoder_for(options, world.device)
    blocks, entry, weights = ROWS.get(name, (None, {}, "paper"))
    places = None if blocks is None else blocks(len(decoder.model.layers))
    model = lrt.adapt(decoder, RecurrenceConfig(init="identity", blocks=places, **entry))
    model = (without_memory(model) if name == PLAIN else model).train()
    schedule = lrt.baseline() if name == PLAIN else lrt.refine(1, weights=weights)
    batch = options.rows * options.length
    recipe = Recipe(
        run=RunConfig(backbone="folder"),
        optimizer=OptimizerConfig(kind="adamw", reference_batch_tokens=batch, betas=(0.9, 0.95), eps=1e-8),
        training=TrainingConfig(
            steps=1, batch_tokens=2048 * -(-batch // 2048), micro_batch=options.rows, clip_norm=1.0
        ),
        parallel=ParallelConfig(param_dtype="bfloat16" if cuda else "float32", compile=cuda),
    )
    model.backbone.pack(loss_chunk=recipe.parallel.loss_chunk, attention_reset=None)
    runner = single_device(model, recipe.parallel, world, pool=pool)
    optimizer = MuonAdamW(parameter_groups(named_parameters(model), recipe))
    rows = tokens_for(options, model.vocab_size, world.device)
    parts = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), "random")]

    def step() -> None:
        train_step(runner, optimizer, parts, schedule=schedule, seed=1, clip_norm=1.0, world=world)

    sizes = [p.numel() * p.element_size() for p in (*model.parameters(), *runner.compute.parameters())]
    own = sum(sizes) + (0 if runner.sums is None else runner.sums.bytes)
    return Subject(
        name, step, own_bytes=own, flops=training_flops(model, schedule, options.length), world=world, tokens=batch
    )


def alone(options: argparse.Namespace, world: World) -> Subject:
    """A step as the Trainer of transformers makes it with ``bf16`` and ``torch_compile``."""
    cuda = world.device.type == "cuda"
    model = decoder_for(options, world.device).train()
    run = torch.compile(model) if cuda else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    rows = tokens_for(options, model.config.vocab_size, world.device)[:, :-1].contiguous()

    def step() -> None:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=cuda):
            loss = run(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    own = sum(p.numel() * p.element_size() for p in model.parameters())
    return Subject(ALONE, step, own_bytes=own, flops=None, world=world, tokens=options.rows * options.length)


def main(arguments: list[str] | None = None) -> int:
    """Time the rows; returns the exit code (1: a row failed)."""
    names = [PLAIN, ALONE, *ROWS]
    text, _, epilog = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, epilog=epilog, formatter_class=formatter)
    parser.add_argument("--size", choices=list(SIZES), default="smollm2", help="of the decoder (default: smollm2)")
    parser.add_argument("--decoder", metavar="FOLDER", help="with a config.json, instead of --size")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW", help=f"of {', '.join(names)}")
    parser.add_argument("--rows", type=at_least(1), default=16, help="a step (default: 16)")
    parser.add_argument("--length", type=at_least(1), default=2048, help="tokens a row (default: 2048)")
    parser.add_argument("--turns", type=at_least(1), default=3, help="in which every row is timed (default: 3)")
    parser.add_argument("--steps", type=at_least(1), default=5, help="timed in a turn (default: 5)")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result there too, after every row")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 256  # a graph for each kind of block of each row
    parallel = ParallelConfig(param_dtype="bfloat16" if cuda else "float32")
    try:
        with open_world(Recipe(parallel=parallel)) as world:
            return _time(options, world, pool=torch.cuda.graph_pool_handle() if cuda else None)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _time(options: argparse.Namespace, world: World, *, pool: tuple[int, int] | None) -> int:
    result: Table = {
        "device": device_name(world),
        "torch": torch.__version__,
        "rows": options.rows,
        "length": options.length,
    }
    subjects: list[Subject] = []
    failed: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # the others are still worth timing
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
            subjects[:] = [subject for subject in subjects if subject.name != name]

    def keep() -> None:
        timed = [subject.row() for subject in subjects if subject.times]
        plain = next((row["ms"] for row in timed if row["variant"] == PLAIN), None)
        result.update(steps=[{**row, "ratio": row["ms"] / plain if plain else None} for row in timed], failed=failed)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1))

    def begin(name: str) -> None:
        subject = alone(options, world) if name == ALONE else ours(name, options, world, pool)
        subjects.append(subject)
        subject.warm_up()
        subject.measure(options.steps)
        row = subject.row()
        print(
            f"{name}: {row['ms']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s, "
            f"warm after {row['compile_s']:.0f} s",
            flush=True,
        )

    for name in options.only:
        attempt(name, lambda name=name: begin(name))
        keep()
    for _ in range(options.turns - 1):
        for subject in list(subjects):
            attempt(subject.name, lambda subject=subject: subject.measure(options.steps))
        keep()
    print(json.dumps(result))
    return int(bool(failed))
