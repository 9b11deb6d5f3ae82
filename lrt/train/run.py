"""The values of a run that its parts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lrt.accounting import Parameters
from lrt.config import Recipe
from lrt.config.files import local_path
from lrt.data import Tokenizer
from lrt.data.chat import Chat
from lrt.data.conversations import HeldOutConversations, TuningLoader
from lrt.data.examples import Example
from lrt.data.held_out import ValidationLoader
from lrt.data.loader import TrainLoader
from lrt.eval.core import Questions
from lrt.eval.runs import Record
from lrt.model import LatentRecurrentModel
from lrt.tables import ReadTable
from lrt.train.checkpoint import CheckpointManager
from lrt.train.distributed.graphs import Runner
from lrt.train.distributed.world import World
from lrt.train.entrance import Entrance
from lrt.train.horizon import Horizon
from lrt.train.monitor.faults import FiniteGuard, Heartbeat, StopSignal
from lrt.train.monitor.metrics import Recorder
from lrt.train.optim.groups import MuonAdamW
from lrt.train.provenance import RunFile
from lrt.train.timetable import Timetable
from lrt.types import Schedule


def run_folder(recipe: Recipe) -> Path:
    """Where a run writes; ``~`` in run.output is a home folder."""
    return local_path(recipe.run.output, key="run.output") / recipe.run.name


@dataclass
class TrainState:
    """Exactly what resuming needs beside tensors and loaders."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    flops: float = 0.0
    began: int = 0  # the step of the checkpoint from which it branched off


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: of the run.
        step: optimizer steps done.
        stopped: signal that ended it early; None when it reached its end.
        bpb: bits per byte by memory mode; empty when it was stopped.
        tokens_per_second: of training, over all ranks.
        parameters: of the model.
        sample: decoded text; None where none was made.
    """

    folder: Path
    step: int
    stopped: str | None
    bpb: dict[str, float]
    tokens_per_second: float
    parameters: int
    sample: str | None = None


@dataclass(frozen=True)
class Tuning:
    """What a tuning run needs beside its rows.

    Attributes:
        chat: makes tokens of conversations.
        problems: held-out conversations to answer.
    """

    chat: Chat
    problems: Sequence[Example]


class Callback:
    """What a caller of ``train`` does at points of a run: derive from it what is wanted, the rest does nothing.

    Every rank calls it, so that what it does together with other ranks is done by all. An exception ends the run.
    """

    def opened(self, run: Run) -> None:
        """All parts of the run are there, at the step from which it goes on."""

    def stepped(self, run: Run) -> None:
        """The weights have been updated; ``run.state.step`` steps are done. On a GPU the device may still compute
        it."""

    def evaluated(self, run: Run, record: Record) -> None:
        """Held-out data have been scored.

        Args:
            run: at this step.
            record: what the sinks get of it.
        """

    def closed(self, run: Run, result: RunResult) -> None:
        """The last checkpoint is written, and of a run that reached its end the evaluation and the export."""


@dataclass(kw_only=True)
class Run:
    """The parts of a run, put together once and used by the loop."""

    recipe: Recipe
    world: World
    signals: StopSignal
    heart: Heartbeat
    callbacks: Sequence[Callback] = ()
    folder: Path
    horizon: Horizon
    parameters: Parameters
    timetable: Timetable
    flops_a_token: dict[Schedule, float]
    model: LatentRecurrentModel
    memory: tuple[nn.Parameter, ...]  # the parameters of the model's recurrence, which rest in plain phases
    entrance: Entrance | None
    runner: Runner
    optimizer: MuonAdamW
    tokenizer: Tokenizer
    loader: TrainLoader | TuningLoader
    validation: ValidationLoader | HeldOutConversations
    manager: CheckpointManager
    recorder: Recorder
    guard: FiniteGuard
    say: Callable[[str], None]
    state: TrainState
    told: RunFile | None = None  # run.json, of the rank that writes
    sources: ReadTable = field(default_factory=dict)  # further held-out rows by name
    core: tuple[Questions, ...] = ()  # tasks of CORE
    tuning: Tuning | None = None  # of a run that tunes on conversations

    def stop(self, why: str) -> None:
        """Ask for a checkpoint and a clean end, as a signal does; one rank's word is enough.

        Args:
            why: ``RunResult.stopped`` on this rank.
        """
        self.signals.ask(why)

    def tell(self, state: str) -> None:
        """Write into run.json how this attempt ended."""
        if self.told is not None:
            self.told.end(state, step=self.state.step)
