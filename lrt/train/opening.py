"""Putting a run together: plan, data, model and runner, optimizer, checkpoint, records, in that order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrt.accounting import Parameters, count_parameters, training_flops
from lrt.config import Recipe, dump_recipe
from lrt.data import Tokenizer, build_loader, load_tokenizer
from lrt.data.conversations import TuningLoader, open_rows
from lrt.data.loader import TrainLoader
from lrt.model import LatentRecurrentModel
from lrt.tables import Table
from lrt.train import plan
from lrt.train.checkpoint import CheckpointManager, stored_recipe, write_history
from lrt.train.checkpoint.branching import begin_ramp, check_length, find_branch, without_fresh_memory
from lrt.train.checkpoint.resuming import Resumed, check_past, find_resumed, restore
from lrt.train.checkpoint.saving import tensors_of
from lrt.train.checkpoint.starting_model import check_separator, check_tokenizer, shapes_of
from lrt.train.checkpoint.weights import refuse_non_finite, warm_start
from lrt.train.core_subset import open_core
from lrt.train.distributed.parallel import named_parameters
from lrt.train.distributed.world import World
from lrt.train.entrance import Entrance, open_entrance
from lrt.train.further_sources import open_sources
from lrt.train.horizon import Horizon, plan_horizon, rest_of
from lrt.train.monitor.faults import FiniteGuard
from lrt.train.monitor.metrics import Console, Recorder, Sink
from lrt.train.monitor.notes import opening_notes
from lrt.train.monitor.sinks import Guarded, open_sinks
from lrt.train.optim.groups import MuonAdamW, is_memory, parameter_groups
from lrt.train.provenance import RunFile, provenance
from lrt.train.run import Callback, Run, TrainState, run_folder
from lrt.train.session import Session
from lrt.train.timetable import Timetable, plan_timetable
from lrt.train.tuning import open_tuning
from lrt.types import Schedule


class Course(NamedTuple):
    """What follows from the recipe and what the run has done so far, before data are read or a model is made."""

    shapes: LatentRecurrentModel  # the model on the meta device
    parameters: Parameters
    folder: Path
    resumed: Resumed | None  # the run's own checkpoint to go on from
    branch: Resumed | None  # another run's
    state: TrainState
    horizon: Horizon
    timetable: Timetable
    flops_a_token: dict[Schedule, float]


def open_run(
    recipe: Recipe, session: Session, *, sinks: Sequence[Sink] = (), callbacks: Sequence[Callback] = ()
) -> Run:
    """All parts of a run, at the step of its newest checkpoint.

    Args:
        recipe: of the run.
        session: that surrounds it.
        sinks: of one's own.
        callbacks: of the caller.

    Raises:
        ValueError: the recipe, the data or a checkpoint cannot be used.
    """
    world = session.world
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.run.seed)
    course = plan_course(recipe, world)
    folder, state, horizon = course.folder, course.state, course.horizon
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    check_tokenizer(recipe, tokenizer, course.shapes.vocab_size)
    check_separator(recipe, tokenizer)
    core = world.from_main(lambda: open_core(recipe))
    loader = _rows(recipe, tokenizer, world, rows=horizon.rows)
    scored = recipe.evaluation
    validation = _rows(recipe, tokenizer, world, rows=scored.batch, split="validation", limit_tokens=scored.tokens)
    sources, tuning = open_sources(recipe, tokenizer, world), open_tuning(recipe, tokenizer)
    console: Console | None = None

    def say(text: str) -> None:
        if console is not None:
            console.say(text)

    model, runner = plan.build(recipe, world, shapes=course.shapes, report=say)
    entrance = open_entrance(course.timetable, named_parameters(model), began=state.began)
    if course.resumed is None and recipe.training.init_from is not None:
        warm_start(model, recipe.training.init_from, world)
    if course.resumed is None and course.branch is None:
        refuse_non_finite(model, recipe, world)
    optimizer = MuonAdamW(parameter_groups(named_parameters(model), recipe), compile=recipe.parallel.compile)
    _go_on(recipe, course, model, optimizer, entrance, loader, world)
    console = _start_folder(recipe, course, world)
    for note in opening_notes(recipe, tokenizer, world.device, steps=horizon.steps - state.step):
        say(note)
    manager = CheckpointManager(
        folder / "checkpoints",
        config=recipe.checkpoint,
        recipe=recipe,
        rank=world.rank,
        world_size=world.size,
        process_group=world.checkpoint_group,
        last_saved=-1 if course.resumed is None else state.step,
        report=say,
    )
    kept: list[Sink] = [console] if console is not None else []
    if world.main:
        kept += open_sinks(recipe, folder, resume_step=state.step, report=say)
        kept += [Guarded(sink, report=say) for sink in sinks]
    guard = FiniteGuard(
        limit=recipe.training.max_skipped, path=folder / f"not_finite_rank{world.rank}.jsonl", total=state.skipped
    )
    told = None
    if world.main:
        data = {"train": loader.fingerprint, "validation": validation.fingerprint, "tokenizer": tokenizer.fingerprint}
        about = provenance(world.device, world_size=world.size)
        told = RunFile(folder / "run.json", steps=horizon.steps, start=state.step, data=data, about=about)
    return Run(
        recipe=recipe,
        world=world,
        signals=session.signals,
        heart=session.heart,
        callbacks=tuple(callbacks),
        folder=folder,
        horizon=horizon,
        parameters=course.parameters,
        timetable=course.timetable,
        flops_a_token=course.flops_a_token,
        model=model,
        memory=tuple(parameter for name, parameter in named_parameters(model) if is_memory(name)),
        entrance=entrance,
        runner=runner,
        optimizer=optimizer,
        tokenizer=tokenizer,
        loader=loader,
        validation=validation,
        manager=manager,
        recorder=Recorder(kept),
        guard=guard,
        say=say,
        state=state,
        told=told,
        sources=sources,
        core=core,
        tuning=tuning,
    )


def plan_course(recipe: Recipe, world: World) -> Course:
    """Steps, schedules and their cost, of the run as it begins or goes on.

    Args:
        recipe: of the run.
        world: the processes.

    Raises:
        ValueError: settings that do not fit together, or not to the checkpoint from which it goes on.
    """
    shapes = shapes_of(recipe)
    parameters = count_parameters(shapes)
    horizon = plan_horizon(recipe, parameters, world_size=world.size)
    folder = run_folder(recipe)
    resumed = find_resumed(recipe, folder, world)
    branch = find_branch(recipe, world) if resumed is None else None
    begun = resumed or branch
    state = TrainState() if begun is None else begun.state
    horizon = rest_of(horizon, training=recipe.training, step=state.step, tokens=state.tokens)
    timetable = plan_timetable(recipe, steps=horizon.steps)
    if resumed is not None:
        check_past(resumed, recipe, timetable, parameters, steps=horizon.steps)
    if branch is not None:
        check_length(branch, recipe, steps=horizon.steps)
    flops = {schedule: training_flops(shapes, schedule, recipe.model.sequence_length) for schedule in timetable.kinds}
    first = recipe.metrics.profile_start
    if first is not None and not 1 <= first <= horizon.steps:
        raise ValueError(f"metrics.profile_start = {first}: use a step of this run, 1..{horizon.steps}, or none")
    return Course(shapes, parameters, folder, resumed, branch, state, horizon, timetable, flops)


def _go_on(
    recipe: Recipe, course: Course, model: LatentRecurrentModel, optimizer: MuonAdamW, entrance: Entrance | None,
    loader: TrainLoader | TuningLoader, world: World,
) -> None:  # fmt: skip
    """Put model, optimizer and loader where the checkpoint has them, if there is one."""
    tensors = tensors_of(model, optimizer)
    if course.resumed is not None:
        restore(course.resumed, tensors, loader, world)
    if course.branch is not None:
        restore(course.branch, without_fresh_memory(tensors, course.branch, recipe), loader, world)
        if entrance is not None:
            begin_ramp(entrance, tensors, world)


def _rows(recipe: Recipe, tokenizer: Tokenizer, world: World, *, rows: int, **more: Any) -> Any:
    """This rank's batches of ``rows`` rows; held-out ones are the same in every mode, at every step,
    and for every number of ranks."""
    ranks: Table = {"rank": world.rank, "world_size": world.size}
    if recipe.tuning is not None:
        return open_rows(recipe, tokenizer, rows=rows, **ranks, **more)
    return build_loader(
        recipe.data,
        tokenizer=tokenizer,
        sequence_length=recipe.model.sequence_length,
        rows=rows,
        seed=recipe.run.seed,
        **ranks,
        **more,
    )


def _start_folder(recipe: Recipe, course: Course, world: World) -> Console | None:
    """Write what the run is, and say where it begins."""
    if not world.main:
        world.barrier()
        return None
    folder, resumed, branch, total = course.folder, course.resumed, course.branch, course.horizon.steps
    folder.mkdir(parents=True, exist_ok=True)
    start = course.state.step
    changed = write_history(
        folder, recipe, step=start, there=None if resumed is None else stored_recipe(resumed.folder)
    )
    (folder / "recipe.toml").write_text(dump_recipe(recipe), encoding="utf-8")
    world.barrier()
    console = Console(total=total, start=start, every=recipe.metrics.every)
    if resumed is not None:
        console.say(f"resumed from {resumed.folder}")
    if branch is not None:
        console.say(f"branched off {branch.folder} at step {start}")
    for change in changed:
        console.say(f"from step {start} on: {change}")
    if resumed is not None and start >= total:
        console.say(
            f"already finished, nothing trained: {resumed.folder} is the end of this run, "
            "which is evaluated and exported again"
        )
    return console
