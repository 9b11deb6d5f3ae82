"""What a caller does at points of a run: when it is called, what it may ask for, and what its errors do."""

import json

import pytest
from runs import files_equal, tiny, train_records

from lrt.train.distributed.world import World
from lrt.train.monitor.faults import HangError, Heartbeat
from lrt.train.session import _named_hangs
from lrt.train.trainer import Callback, train


class Seen(Callback):
    """Notes every call; asks for the end after a step."""

    def __init__(self, *, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def opened(self, run):
        self.calls.append(("opened", run.state.step))

    def stepped(self, run):
        self.calls.append(("stepped", run.state.step))
        if run.state.step == self.stop_at:
            run.stop("enough")

    def evaluated(self, run, record):
        self.calls.append(("evaluated", record["step"]))

    def closed(self, run, result):
        self.calls.append(("closed", result.stopped))


class Fails(Callback):
    def __init__(self, at, error):
        self.at, self.error = at, error

    def opened(self, run):
        self.fail("opened")

    def stepped(self, run):
        self.fail("stepped")

    def fail(self, here):
        if here == self.at:
            raise self.error


def test_a_run_that_a_callback_stops_goes_on_as_if_it_had_not(tmp_path):
    """One step is under way when a wish to stop is heard."""
    settings = {"training.steps": 4, "checkpoint.every": 2}
    whole, first, second = Seen(), Seen(stop_at=2), Seen()
    train(tiny(tmp_path, **settings, **{"run.name": "whole"}), callbacks=[whole])
    stopped = train(tiny(tmp_path, **settings), callbacks=[first])
    ended = train(tiny(tmp_path, **settings), callbacks=[second])
    steps = [("stepped", step) for step in (1, 2, 3, 4)]
    assert whole.calls == [("opened", 0), *steps, ("evaluated", 4), ("closed", None)]
    assert first.calls == [("opened", 0), *steps[:3], ("closed", "enough")]
    assert second.calls == [("opened", 3), steps[3], ("evaluated", 4), ("closed", None)]
    assert (stopped.stopped, stopped.step, stopped.bpb) == ("enough", 3, {}) and ended.stopped is None
    assert train_records(tmp_path / "tiny") == train_records(tmp_path / "whole")
    files_equal(*(tmp_path / name / "checkpoints" / "step_00000004" for name in ("tiny", "whole")))


@pytest.mark.parametrize("at", ["opened", "stepped"])
def test_an_error_of_a_callback_ends_the_run_as_it_is(tmp_path, at):
    """It was taken for another rank that had died, because of one word in it."""
    with pytest.raises(RuntimeError, match="^my server: timeout$") as raised:
        train(tiny(tmp_path), callbacks=[Fails(at, RuntimeError("my server: timeout"))])
    assert raised.type is RuntimeError
    (attempt,) = json.loads((tmp_path / "tiny" / "run.json").read_text())["attempts"]
    assert attempt["state"] == "failed: my server: timeout"


def test_only_errors_of_collectives_are_taken_for_a_lost_rank():
    """A folder called igloo made NonFiniteError say that another rank had ended."""

    class Own(RuntimeError):
        pass

    two = World(0, 2, None, sharded=True)
    for error, becomes in ((RuntimeError("[gloo] closed by peer"), HangError), (Own("see runs/igloo/rows.jsonl"), Own)):
        with Heartbeat(timeout_s=60, rank=0) as heart, pytest.raises(becomes), _named_hangs(heart, two, timeout_s=60):
            raise error
