"""The trainer: mesh, model, plan, data, optimizer, checkpoint, loop, in that order.

Everything that resuming needs is in ``TrainState``, the tensors of model and optimizer, and each rank's
loader and random numbers; what changes with the step (rates, order of subsets) is a function of the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.accounting import count_parameters, peak_flops, training_flops
from lrt.config import Recipe, dump_recipe
from lrt.data import Batch, Tokenizer, build_loader, load_tokenizer
from lrt.data.conversations import open_rows
from lrt.data.locks import locked
from lrt.eval.runs import read_records
from lrt.schedules import describe
from lrt.train.checkpoint import CheckpointManager, stored_recipe, write_history
from lrt.train.checkpoint.branching import begin_ramp, check_length, find_branch, without_fresh_memory
from lrt.train.checkpoint.resuming import Resumed, check_past, find_resumed, random_state, restore
from lrt.train.checkpoint.starting_model import check_separator, check_tokenizer, shapes_of
from lrt.train.checkpoint.weights import build_parallel, not_finite, refuse_non_finite, warm_start
from lrt.train.core_subset import open_core
from lrt.train.distributed.graphs import make_runner
from lrt.train.distributed.parallel import named_parameters
from lrt.train.distributed.world import World, check_same_on_all, open_world
from lrt.train.entrance import open_entrance
from lrt.train.evaluation import evaluate_run
from lrt.train.further_sources import open_sources
from lrt.train.horizon import plan_horizon, rest_of
from lrt.train.monitor.faults import (
    FiniteGuard,
    HangError,
    Heartbeat,
    NonFiniteError,
    NotSavedError,
    StopSignal,
    hang_message,
    start_compile_workers,
)
from lrt.train.monitor.host import host_threads
from lrt.train.monitor.metrics import Clock, Console, LateReader, Recorder, Sink, peak_memory_gib
from lrt.train.monitor.notes import opening_notes
from lrt.train.monitor.profiling import profiler
from lrt.train.monitor.sinks import Guarded, open_sinks
from lrt.train.optim.groups import MuonAdamW, is_memory, parameter_groups, rate_of
from lrt.train.optim.rates import Rates, rates_at
from lrt.train.provenance import RunFile, provenance
from lrt.train.report import finish
from lrt.train.run import Run, RunResult, TrainState, run_folder
from lrt.train.samples import record_sample
from lrt.train.step import StepNumbers, train_step
from lrt.train.timetable import plan_timetable
from lrt.train.tuning import open_tuning
from lrt.types import Schedule

# ------------------------------------------------------------------ putting a run together


def train(recipe: Recipe, *, sinks: Sequence[Sink] = ()) -> RunResult:
    """Train, evaluate, export: the whole life of a run.

    Args:
        recipe: everything that the run needs to know.
        sinks: of one's own, which get every record on rank 0 and cannot end the run.

    Raises:
        ValueError: the recipe, the data or a checkpoint cannot be used.
        NonFiniteError: too many steps in a row were not finite.
        HangError: a rank died or hangs; the message names the step.
    """
    with open_world(recipe) as world, StopSignal() as signals:
        if recipe.parallel.compile and world.device.type == "cuda":
            # a stop that ends these workers too would leave the next compilation waiting for ever
            with signals.unheard():
                start_compile_workers()
        timeout = 60 * recipe.parallel.timeout_minutes
        with (
            Heartbeat(timeout_s=timeout, rank=world.rank) as heart,
            _named_hangs(heart, timeout),
            contextlib.ExitStack() as held,
        ):
            check_same_on_all(recipe, world)
            held.enter_context(_held_folder(recipe, world))
            run = assemble(recipe, world, sinks=sinks)
            try:
                with host_threads(world.device, threads=recipe.parallel.host_threads):
                    result = _loop(run, signals, heart)
                _tell(run, "done" if result.stopped is None else f"stopped: {result.stopped}")
                return result
            except BaseException as error:
                _tell(run, f"failed: {error or type(error).__name__}")
                if isinstance(error, NonFiniteError):
                    run.manager.wait()
                raise
            finally:
                run.recorder.close()


def assemble(recipe: Recipe, world: World, *, sinks: Sequence[Sink] = ()) -> Run:
    """All parts of a run, at the step of its newest checkpoint."""
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.run.seed)
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
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    check_tokenizer(recipe, tokenizer, shapes.vocab_size)
    check_separator(recipe, tokenizer)
    core = world.from_main(lambda: open_core(recipe))
    loader = _rows(recipe, tokenizer, world, rows=horizon.rows)
    model = build_parallel(recipe, world)
    memory = tuple(parameter for name, parameter in named_parameters(model) if is_memory(name))
    entrance = open_entrance(timetable, named_parameters(model), began=state.began)
    if resumed is None and recipe.training.init_from is not None:
        warm_start(model, recipe.training.init_from, world)
    if begun is None:
        refuse_non_finite(model, recipe, world)
    optimizer = MuonAdamW(parameter_groups(named_parameters(model), recipe), compile=recipe.parallel.compile)
    if resumed is not None:
        restore(resumed, _tensors(model, optimizer), loader, world)
    if branch is not None:
        restore(branch, without_fresh_memory(_tensors(model, optimizer), branch, recipe), loader, world)
        if entrance is not None:
            begin_ramp(entrance, _tensors(model, optimizer), world)
    console = _start_folder(recipe, folder, world, total=horizon.steps, resumed=resumed, branch=branch)
    say = console.say if console is not None else lambda text: None
    for note in opening_notes(recipe, tokenizer, world.device, steps=horizon.steps - state.step):
        say(note)
    manager = CheckpointManager(
        folder / "checkpoints",
        config=recipe.checkpoint,
        recipe=recipe,
        rank=world.rank,
        world_size=world.size,
        process_group=world.checkpoint_group,
        report=say,
    )
    manager.last_saved = state.step if resumed is not None else -1
    kept: list[Sink] = [console] if console is not None else []
    if world.main:
        kept += open_sinks(recipe, folder, resume_step=state.step, report=say)
        kept += [Guarded(sink, report=say) for sink in sinks]
    guard = FiniteGuard(
        limit=recipe.training.max_skipped, path=folder / f"not_finite_rank{world.rank}.jsonl", total=state.skipped
    )
    scored = recipe.evaluation
    validation = _rows(recipe, tokenizer, world, rows=scored.batch, split="validation", limit_tokens=scored.tokens)
    runner = make_runner(model, recipe.parallel, world, report=say)
    told = None
    if world.main:
        data = {"train": loader.fingerprint, "validation": validation.fingerprint, "tokenizer": tokenizer.fingerprint}
        about = provenance(world.device, world_size=world.size)
        told = RunFile(folder / "run.json", steps=horizon.steps, start=state.step, data=data, about=about)
    return Run(
        recipe, world, folder, horizon, parameters, timetable, flops, model, memory, entrance, runner, optimizer, tokenizer, loader, validation,
        manager, Recorder(kept), guard, say, state, told, open_sources(recipe, tokenizer, world), core,
        open_tuning(recipe, tokenizer),
    )  # fmt: skip


def _tell(run: Run, state: str) -> None:
    """Write into run.json how this attempt ended."""
    if run.told is not None:
        run.told.end(state, step=run.state.step)


@contextlib.contextmanager
def _held_folder(recipe: Recipe, world: World) -> Iterator[None]:
    """Rank 0 holds the run's folder, alone among all processes of the machine or the file system,
    while the block runs."""
    with contextlib.ExitStack() as held:
        world.from_main(lambda: held.enter_context(locked(run_folder(recipe), advice="choose another run.name")))
        yield


def _rows(recipe: Recipe, tokenizer: Tokenizer, world: World, *, rows: int, **more: Any) -> Any:
    """This rank's batches of ``rows`` rows; held-out ones are the same in every mode, at every step,
    and for every number of ranks."""
    ranks: dict[str, Any] = {"rank": world.rank, "world_size": world.size}
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


def _tensors(model: Any, optimizer: MuonAdamW) -> dict[str, Tensor]:
    """Everything that is sharded or the same on all ranks, aliasing the live tensors."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in named_parameters(model)}
    return {**tensors, **{f"optimizer.{name}": tensor for name, tensor in optimizer.named_state().items()}}


def _start_folder(
    recipe: Recipe, folder: Path, world: World, *, total: int, resumed: Resumed | None, branch: Resumed | None
) -> Console | None:
    """Write what the run is, and say where it begins."""
    if not world.main:
        world.barrier()
        return None
    folder.mkdir(parents=True, exist_ok=True)
    begun = resumed or branch
    start = 0 if begun is None else begun.state.step
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


@contextlib.contextmanager
def _named_hangs(heart: Heartbeat, timeout_s: float) -> Iterator[None]:
    """A collective that failed says in which step."""
    try:
        yield
    except RuntimeError as error:  # so is torch.distributed.DistError
        named = isinstance(error, torch.distributed.DistError) or any(
            word in str(error).lower() for word in ("gloo", "timeout")
        )
        if not named:
            raise
        message = hang_message(heart.where, timeout_s, silent_s=heart.silent_s)
        raise HangError(f"{message} ({str(error).splitlines()[0]})") from error


# ------------------------------------------------------------------ the loop


def _loop(run: Run, signals: StopSignal, heart: Heartbeat) -> RunResult:
    recipe, state, total = run.recipe, run.state, run.horizon.steps
    late, clock = LateReader(), Clock()
    speeds: list[float] = []
    stop = False
    if _evaluation_missed(run):
        with clock.paused(), signals.unheard():
            evaluate_run(run, heart)
            record_sample(run)
    with profiler(recipe, run.folder, run.world) as profile:
        while state.step < total and not stop:
            heart.beat(f"step {state.step + 1}")
            profile(state.step + 1)
            with clock.waiting(late):
                batches = [next(run.loader) for _ in range(run.horizon.accumulation)]
            share = 1.0 if run.entrance is None else run.entrance.share(state.step)
            rates = rates_at(
                state.step, total=total, training=recipe.training, optimizer=recipe.optimizer, memory_scale=share
            )
            run.optimizer.set_rates(rates)
            schedule = run.timetable.schedule(state.step)
            with signals.unheard():  # a compiler that a step starts must not end by a stop's signal
                numbers = train_step(
                    run.model,
                    run.optimizer,
                    [_to_device(batch, run.world.device) for batch in batches],
                    schedule=schedule,
                    seed=run.timetable.seed_of(state.step),
                    clip_norm=recipe.training.clip_norm,
                    world=run.world,
                    stop=signals.received is not None or run.recorder.lost is not None,
                    runner=run.runner,
                    frozen=run.memory if run.timetable.at(state.step).plain else (),
                )
            if run.entrance is not None:
                run.entrance.advance(state.step)
            state.step += 1
            state.tokens += run.horizon.batch_tokens
            state.flops += run.horizon.batch_tokens * run.flops_a_token[schedule]
            sources = [source for batch in batches for source in batch.source]
            late.push(
                state.step,
                numbers,
                Passed(rates, schedule, state.tokens, state.flops, sources, run.loader.shares, *clock.lap()),
            )
            due = _due(recipe, state.step, total)
            for past in late.pop(keep=0 if due else 1):
                stop |= _note(run, StepNumbers.of(past), past.note, speeds=speeds)
            run.manager.poll()
            if "save" in due and not stop:
                _save(run)  # first: a stop during an evaluation may end the process before it is over
            if "evaluate" in due and not stop:
                with clock.paused(), signals.unheard():
                    evaluate_run(run, heart)
                    record_sample(run)
        heart.beat(f"the end, at step {state.step}")
        for past in late.pop(keep=0):
            stop |= _note(run, StepNumbers.of(past), past.note, speeds=speeds)
    reached = state.step >= total
    _save(run)
    run.manager.wait()
    if run.manager.last_saved != state.step:
        raise NotSavedError(
            f"the checkpoint at the end (step {state.step}) could not be written: "
            "make room and give the same command, which goes on from the newest"
        )
    run.recorder.check()
    # Asked to stop, a run does not begin its last evaluation either: the same command does.
    name = None if reached and not stop else signals.received or "a signal on another rank"
    speed = sorted(speeds)[len(speeds) // 2] if speeds else 0.0
    result = RunResult(run.folder, state.step, name, {}, speed, run.parameters.total)
    if name is not None:
        run.say(
            f"stopped by {name} at step {state.step} of {total}; the same command goes on from {run.manager.folder}"
        )
        return result
    if run.guard.skipping:
        raise NonFiniteError(
            f"the run ended at step {state.step} while its steps were not finite and were skipped (the last "
            f"{run.guard.skipping}), so nothing is "
            f"exported. The weights are finite: the same command evaluates and exports them as they are"
        )
    return finish(run, result, heart)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.input_ids.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True), batch.source
    )


def _evaluation_missed(run: Run) -> bool:
    """Whether a resumed run lacks the evaluation of the step it goes on from:
    something ended it after the checkpoint."""
    step = run.state.step
    if step == 0 or "evaluate" not in _due(run.recipe, step, run.horizon.steps):
        return False
    records = read_records(run.folder / "metrics.jsonl") if run.world.main else []
    return not run.world.agree(int(any(r["kind"] == "evaluation" and r["step"] == step for r in records)))


def _due(recipe: Recipe, step: int, total: int) -> set[str]:
    """What this step ends with: numbers must be read before a checkpoint holds their count."""
    every = {"evaluate": recipe.evaluation.every, "save": recipe.checkpoint.every}
    return {what for what, n in every.items() if n and step % n == 0 and step < total}


class Passed(NamedTuple):
    """What is known of a step when it is queued, for its record."""

    rates: Rates
    schedule: Schedule
    tokens: int  # of all steps so far
    flops: float  # of all steps so far
    sources: list[str]
    shares: dict[str, float]  # of data.sources, in the rows so far
    seconds: float  # taken when the step is queued: read late, the last step would seem to take no time
    waited: float  # share of them spent waiting for data


def _note(run: Run, numbers: StepNumbers, passed: Passed, *, speeds: list[float]) -> bool:
    """Record a step that has been read; True when some rank was asked to stop."""
    run.guard.see(
        numbers.step, skipped=not numbers.finite, loss=numbers.loss, norm=numbers.norm, sources=passed.sources
    )
    run.state.skipped = run.guard.total
    speed = run.horizon.batch_tokens / passed.seconds
    speeds.append(speed)
    device = run.world.device
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    flops = speed * run.flops_a_token[passed.schedule]
    run.recorder.write(
        {
            "kind": "train",
            "step": numbers.step,
            "loss": numbers.loss,
            "groups": list(numbers.groups),
            "schedule": describe(passed.schedule),
            "lr_scale": passed.rates.lr_scale,
            "lr": {group["name"]: rate_of(group, passed.rates) for group in run.optimizer.param_groups},
            "grad_norm": numbers.norm,
            "tokens": passed.tokens,
            "tokens_per_second": speed,
            "flops": passed.flops,
            "flops_per_second": flops,
            **({} if peak is None else {"mfu": flops / run.world.size / peak}),
            "data_wait": passed.waited,
            **({"data_shares": passed.shares} if passed.shares else {}),
            "peak_memory_gib": peak_memory_gib(device),
            "skipped": run.guard.total,
        }
    )
    return numbers.stop


def _save(run: Run) -> None:
    if run.state.step == run.manager.last_saved:
        return
    tensors = _tensors(run.model, run.optimizer)
    bad = not_finite(tensors, run.world)
    if bad:
        raise NonFiniteError(
            f"step {run.state.step}: {bad} not finite, so no checkpoint of it is written and nothing is "
            "exported. The checkpoints before are whole: "
            f"go on from one of them with lower learning rates (training.branch_from), or look at the data"
        )
    run.manager.save(
        run.state.step,
        tensors=tensors,
        rank_state={"loader": run.loader.state_dict(), "random": random_state(run.world.device)},
        meta={**dataclasses.asdict(run.state), "planned_steps": run.horizon.steps},
        prune=not run.guard.skipping,
    )
