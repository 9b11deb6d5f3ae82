"""State tracking: what the recurrence can do that a transformer of fixed depth cannot.

An automaton reads random inputs. At every position the target is its state so far, which stands nowhere in the row, so
it must be carried along. The tasks are made on the fly: parity of bits, and products of transpositions in the symmetric
group S5.

    python -m lrt.eval.tracking --recipe tracking_parity --out tracking          # minutes on a CPU
    python -m lrt.eval.tracking --recipe tracking_parity --out tracking --train-length 256 --variants sequential plain

Every variant of the recipe and every seed is trained and then tested at a length that training never saw.
The folder gets results.jsonl (what stands there is not run again) and tracking.png.

Legend: B batch, T inputs of a row, S states, I inputs of the automaton.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrt.config import Recipe, ScheduleConfig, load_recipe
from lrt.eval.figures import COLOURS, figure
from lrt.eval.runs import read_records
from lrt.model import LatentRecurrentModel, build
from lrt.schedules import baseline, sequential
from lrt.tables import Table
from lrt.train.optim.rates import rates_at
from lrt.train.sweep.spec import fingerprint

SHORTEST = 4  # inputs of the first rows
KNOWN = 0.1  # nats below which rows grow; from half of the steps on they have their full length in any case
GROWTH = 1.25
LEARNED = 2e-4  # nats at full length below which, for so many steps, training ends early
LEARNED_STEPS = 20
TEST_ROWS = 64
VARIANTS = ("sequential", "plain", "refine:1", "refine:4", "refine:16")


@dataclass(frozen=True)
class Task:
    """An automaton: state 0 at the start, ``table[state, input]`` after an input.

    Attributes:
        name: of the task.
        table: int64 (S, I).
    """

    name: str
    table: Tensor

    @property
    def vocabulary(self) -> int:
        """Token ids: inputs, and states as targets."""
        return max(self.table.shape)

    def draw(self, rows: int, length: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random inputs (B, T) and the state after each (B, T)."""
        inputs = torch.randint(self.table.shape[1], (rows, length), generator=generator)
        state, states = torch.zeros(rows, dtype=torch.int64), []
        for column in inputs.unbind(1):
            state = self.table[state, column]
            states.append(state)
        return inputs, torch.stack(states, dim=1)


def parity() -> Task:
    """Whether the number of ones so far is odd."""
    return Task("parity", torch.tensor([[0, 1], [1, 0]]))


def symmetric_group(points: int = 5) -> Task:
    """The product of transpositions so far, one of ``points`` factorial permutations;
    for 5 points no fixed depth suffices."""
    elements = list(itertools.permutations(range(points)))
    number = {element: index for index, element in enumerate(elements)}
    swaps = list(itertools.combinations(range(points), 2))

    def after(element: Sequence[int], swap: tuple[int, int]) -> int:
        moved = list(element)
        moved[swap[0]], moved[swap[1]] = moved[swap[1]], moved[swap[0]]
        return number[tuple(moved)]

    return Task(f"s{points}", torch.tensor([[after(element, swap) for swap in swaps] for element in elements]))


TASKS = {"parity": parity, "s5": symmetric_group}


# ------------------------------------------------------------------ training and testing


def variant_of(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another way to train: sequential, plain (the twin without memory) or refine:K.

    Raises:
        ValueError: another name.
    """
    kind, _, passes = name.partition(":")
    if name == "plain":
        return dataclasses.replace(recipe, recurrence=None, schedule=ScheduleConfig(kind="baseline"))
    if name == "sequential":
        return dataclasses.replace(recipe, schedule=ScheduleConfig(kind="sequential"))
    if kind == "refine" and passes.isdecimal() and int(passes) > 0:
        # Only the last pass knows as many inputs as it can: the loss of the others would ask for what they cannot know.
        weights = (0.0,) * int(passes) + (1.0,)
        return dataclasses.replace(recipe, schedule=ScheduleConfig(kind="refine", passes=int(passes), weights=weights))
    raise ValueError(f"--variants {name}: use sequential, plain, or refine:K")


def fit(
    recipe: Recipe, task: Task, *, length: int, seed: int, say: Callable[[str], None] = lambda line: None
) -> LatentRecurrentModel:
    """Train a recipe's model on a task.

    Args:
        recipe: model, schedule, ``training`` (steps, micro_batch rows per step, warmup, clipping) and AdamW's rate.
        task: makes the rows.
        length: inputs of a row at the end; rows begin short and grow whenever their present length is known.
        seed: of weights and rows.
        say: receives a line now and then.
    """
    settings = recipe.training
    assert settings.steps is not None
    model_config = dataclasses.replace(recipe.model, vocab_size=task.vocabulary)
    model = build(
        dataclasses.replace(recipe, model=model_config, run=dataclasses.replace(recipe.run, seed=seed))
    ).train()
    generator = torch.Generator().manual_seed(seed)
    rate = recipe.optimizer.adamw_lr
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=recipe.optimizer.betas, weight_decay=0.0)
    learned, now = 0, min(SHORTEST, length)
    for step in range(settings.steps):
        now = length if 2 * step >= settings.steps else now
        for group in optimizer.param_groups:
            group["lr"] = (
                rate * rates_at(step, total=settings.steps, training=settings, optimizer=recipe.optimizer).lr_scale
            )
        inputs, states = task.draw(settings.micro_batch, now, generator=generator)
        loss = model(inputs, targets=states).loss
        optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        value = float(loss.detach())
        learned = learned + 1 if now == length and value < LEARNED else 0
        now = min(length, math.ceil(GROWTH * now)) if value < KNOWN else now
        if (step + 1) % 50 == 0:
            say(f"step {step + 1}: {now} inputs, loss {value:.4f}")
        if learned == LEARNED_STEPS:
            break
    return model.eval()


@torch.no_grad()
def accuracy(
    model: LatentRecurrentModel, task: Task, *, length: int, rows: int = TEST_ROWS, seed: int = 10**6
) -> list[float]:
    """Share of rows whose state is right, by position (T,), in mode ``decode``;
    a model without memory runs in parallel.

    Args:
        length: inputs of a test row.
        rows: test rows, never drawn in training.
        seed: of the rows.
    """
    inputs, states = task.draw(rows, length, generator=torch.Generator().manual_seed(seed))
    schedule = baseline() if model.recurrence is None else sequential()
    guessed = model(inputs, schedule=schedule, return_logits=True).logits.argmax(-1)  # type: ignore[union-attr]
    return (guessed == states).double().mean(0).tolist()


# ------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, draw the figure; returns the exit code (2: bad input)."""
    args = _parser().parse_args(arguments)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _say(title: str, line: str) -> None:
    print(f"{title}: {line}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    recipe = load_recipe(args.recipe, overrides=args.set)
    name = recipe.data.train.removeprefix("task:")
    if name not in TASKS or recipe.training.steps is None:
        raise ValueError(
            f'recipe {args.recipe}: data.train = "{recipe.data.train}" with training.steps: '
            f'use "task:" and one of {", ".join(TASKS)}'
        )
    length = args.train_length or recipe.training.batch_tokens // recipe.training.micro_batch
    recipes = {variant: variant_of(recipe, variant) for variant in args.variants}
    task, out = TASKS[name](), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = read_records(results) if results.is_file() else []
    for seed, (variant, chosen) in itertools.product(args.seeds, recipes.items()):
        lengths = {"train_length": length, "test_length": args.test_length}
        about = {"task": name, "variant": variant, **lengths, "seed": seed, "settings": fingerprint(chosen)}
        if any(about.items() <= record.items() for record in done):
            continue
        began = time.perf_counter()
        title = f"{name}, {variant}, seed {seed}"
        model = fit(chosen, task, length=length, seed=seed, say=functools.partial(_say, title))
        found = accuracy(model, task, length=args.test_length)
        record = {
            **about,
            "accuracy": found,
            "mean": sum(found) / len(found),
            "last": found[-1],
            "seconds": time.perf_counter() - began,
        }
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    records = [
        record for record in read_records(results)
        if (record["task"], record["test_length"]) == (name, args.test_length)
        and record.get("settings") == fingerprint(variant_of(recipe, record["variant"]))  # of this recipe
    ]  # fmt: skip
    draw(records, out / "tracking.png")
    print(table(records))
    print(json.dumps([{key: value for key, value in record.items() if key != "accuracy"} for record in records]))


def table(records: Sequence[Table]) -> str:
    """Accuracy of every variant and training length: mean over all positions and at the last one,
    the worst seed beside."""
    lines = [
        f"{'variant':<14} {'trained on':>10} {'seeds':>5} {'all positions (worst seed)':>28} "
        f"{'last position (worst seed)':>28} {'s a run':>8}"
    ]
    for (variant, length), group in _grouped(records).items():
        means, lasts = [r["mean"] for r in group], [r["last"] for r in group]
        cells = (f"{100 * sum(v) / len(v):.1f} % ({100 * min(v):.1f} %)" for v in (means, lasts))
        seconds = sum(r["seconds"] for r in group) / len(group)
        lines.append("{:<14} {:>10} {:>5} {:>28} {:>28} {:>8.0f}".format(variant, length, len(group), *cells, seconds))
    return "\n".join(lines)


def draw(records: Sequence[Table], path: Path) -> Path:
    """Accuracy by position: the mean of the seeds, and a band from the worst to the best.

    Raises:
        ValueError: matplotlib is missing.
    """
    first = records[0]
    with figure(path, rows=1, columns=1, size=(8, 4.2), title=f"{first['task']}: state right, by position") as axes:
        panel = axes[0][0]
        for ((variant, length), group), colour in zip(_grouped(records).items(), itertools.cycle(COLOURS)):
            columns = list(zip(*(r["accuracy"] for r in group)))
            places = range(1, len(columns) + 1)
            label = f"{variant}, trained on up to {length} ({len(group)} seeds)"
            panel.plot(places, [sum(c) / len(c) for c in columns], color=colour, label=label)
            panel.fill_between(
                places, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15, linewidth=0
            )
        for length in sorted({r["train_length"] for r in records} - {first["test_length"]}):
            panel.axvline(length, color="#606060", linestyle=":", linewidth=1)
        panel.set(xlabel="inputs read (dotted: longest row of training)", ylabel="share of rows", ylim=(-0.02, 1.02))
        panel.legend(loc="lower right")
    return path


def _grouped(records: Sequence[Table]) -> dict[tuple[str, int], list[Table]]:
    groups: dict[tuple[str, int], list[Table]] = {}
    for record in records:
        groups.setdefault((record["variant"], record["train_length"]), []).append(record)
    return groups


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrt.eval.tracking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", default="tracking_parity", help="name in recipes/, or a path (default: tracking_parity)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the recipe; may be repeated",
    )
    add("--out", required=True, metavar="FOLDER", help="for results.jsonl and tracking.png")
    add("--variants", nargs="+", default=list(VARIANTS), help="sequential, plain, refine:K (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    add(
        "--train-length",
        type=int,
        metavar="T",
        help="longest row of training (default: training.batch_tokens / training.micro_batch)",
    )
    add("--test-length", type=int, default=256, metavar="T", help="inputs of a test row (default: 256)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
