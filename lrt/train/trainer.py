"""The trainer as a library: ``train`` opens a run, goes through its steps, and closes it.

Everything that resuming needs is in ``TrainState``, the tensors of model and optimizer, and each rank's
loader and random numbers; what changes with the step (rates, order of subsets) is a function of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lrt.config import Recipe
from lrt.data import Batch
from lrt.eval.runs import read_records
from lrt.train.checkpoint.saving import save, save_last
from lrt.train.evaluation import evaluate_run
from lrt.train.monitor.faults import NonFiniteError
from lrt.train.monitor.host import host_threads
from lrt.train.monitor.metrics import Sink
from lrt.train.monitor.profiling import profiler
from lrt.train.opening import open_run
from lrt.train.optim.rates import rates_at
from lrt.train.report import finish
from lrt.train.run import Callback, Run, RunResult
from lrt.train.samples import record_sample
from lrt.train.session import open_session
from lrt.train.step import train_step
from lrt.train.steplog import StepLog

__all__ = ["Callback", "Run", "RunResult", "train"]


def train(recipe: Recipe, *, sinks: Sequence[Sink] = (), callbacks: Sequence[Callback] = ()) -> RunResult:
    """Train, evaluate, export: the whole life of a run.

    Args:
        recipe: everything that the run needs to know.
        sinks: of one's own, which get every record on rank 0 and cannot end the run.
        callbacks: called on every rank at points of the run, with all its parts.

    Raises:
        ValueError: the recipe, the data or a checkpoint cannot be used.
        NonFiniteError: too many steps in a row were not finite.
        HangError: a rank died or hangs; the message names the step.
    """
    with open_session(recipe) as session:
        run = open_run(recipe, session, sinks=sinks, callbacks=callbacks)
        try:
            with host_threads(run.world.device, threads=recipe.parallel.host_threads):
                result = close(run, go_through(run))
            run.tell("done" if result.stopped is None else f"stopped: {result.stopped}")
            return result
        except BaseException as error:
            run.tell(f"failed: {error or type(error).__name__}")
            if isinstance(error, NonFiniteError):
                run.manager.wait()
            raise
        finally:
            run.recorder.close()


def go_through(run: Run) -> StepLog:
    """Every step from where the run is, until its end or until it is asked to stop."""
    state, total, log = run.state, run.horizon.steps, StepLog(run)
    for callback in run.callbacks:
        callback.opened(run)
    if _evaluation_missed(run):
        with log.paused():
            _evaluate(run)
    with profiler(run.recipe, run.folder, run.world) as profile:
        while state.step < total and not log.stopped:
            run.heart.beat(f"step {state.step + 1}")
            profile(state.step + 1)
            take_step(run, log)
            for callback in run.callbacks:
                callback.stepped(run)
            due = _due(run, state.step)
            log.read(keep=0 if due else 1)
            run.manager.poll()
            if "save" in due and not log.stopped:
                save(run)  # first: a stop during an evaluation may end the process before it is over
            if "evaluate" in due and not log.stopped:
                with log.paused():
                    _evaluate(run)
        run.heart.beat(f"the end, at step {state.step}")
        log.read(keep=0)
    return log


def take_step(run: Run, log: StepLog) -> None:
    """Data, gradients, update; what the step says of itself is read later."""
    recipe, state = run.recipe, run.state
    with log.waiting():
        batches = [next(run.loader) for _ in range(run.horizon.accumulation)]
    rates = rates_at(
        state.step,
        total=run.horizon.steps,
        training=recipe.training,
        optimizer=recipe.optimizer,
        memory_scale=1.0 if run.entrance is None else run.entrance.share(state.step),
    )
    run.optimizer.set_rates(rates)
    schedule = run.timetable.schedule(state.step)
    with run.signals.unheard():  # a compiler that a step starts must not end by a stop's signal
        numbers = train_step(
            run.runner,
            run.optimizer,
            [_to_device(batch, run.world.device) for batch in batches],
            schedule=schedule,
            seed=run.timetable.seed_of(state.step),
            clip_norm=recipe.training.clip_norm,
            world=run.world,
            stop=run.signals.received is not None or run.recorder.lost is not None,
            frozen=run.memory if run.timetable.at(state.step).plain else (),
        )
    if run.entrance is not None:
        run.entrance.advance(state.step)
    state.step += 1
    state.tokens += run.horizon.batch_tokens
    state.flops += run.horizon.batch_tokens * run.flops_a_token[schedule]
    log.push(numbers, batches, rates=rates, schedule=schedule)


def close(run: Run, log: StepLog) -> RunResult:
    """The last checkpoint, and of a run that reached its end its evaluation and export.

    Args:
        run: whose steps are done.
        log: of them.

    Raises:
        NonFiniteError: the run ended while its steps were not finite.
        NotSavedError: what it ends with could not be written.
    """
    step, total = run.state.step, run.horizon.steps
    save_last(run)
    run.recorder.check()
    # Asked to stop, a run does not begin its last evaluation either: the same command does.
    by = None if step >= total and not log.stopped else run.signals.received or "a signal on another rank"
    result = RunResult(run.folder, step, by, {}, log.speed, run.parameters.total)
    if by is not None:
        run.say(f"stopped by {by} at step {step} of {total}; the same command goes on from {run.manager.folder}")
    elif run.guard.skipping:
        raise NonFiniteError(
            f"the run ended at step {step} while its steps were not finite and were skipped (the last "
            f"{run.guard.skipping}), so nothing is "
            f"exported. The weights are finite: the same command evaluates and exports them as they are"
        )
    else:
        result = finish(run, result)
    for callback in run.callbacks:
        callback.closed(run, result)
    return result


def _evaluate(run: Run) -> None:
    evaluate_run(run)
    record_sample(run)


def _evaluation_missed(run: Run) -> bool:
    """Whether a resumed run lacks the evaluation of the step it goes on from:
    something ended it after the checkpoint."""
    step = run.state.step
    if step == 0 or "evaluate" not in _due(run, step):
        return False
    records = read_records(run.folder / "metrics.jsonl") if run.world.main else []
    return not run.world.agree(int(any(r["kind"] == "evaluation" and r["step"] == step for r in records)))


def _due(run: Run, step: int) -> set[str]:
    """What this step ends with: numbers must be read before a checkpoint holds their count."""
    every = {"evaluate": run.recipe.evaluation.every, "save": run.recipe.checkpoint.every}
    return {what for what, n in every.items() if n and step % n == 0 and step < run.horizon.steps}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.input_ids.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True), batch.source
    )
