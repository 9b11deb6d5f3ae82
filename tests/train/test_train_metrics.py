"""Records: one a step, none twice, none lost, read late; and what is said when an optional package is missing."""

import errno
import io
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lrt.train.monitor.curves import plot_curves
from lrt.train.monitor.metrics import Clock, Console, JsonLines, LateReader, read_records
from lrt.train.monitor.sinks import TensorBoard


def record(step, **more):
    common = {
        "kind": "train",
        "loss": 1.5,
        "groups": [2.0, 1.0],
        "lr_scale": 1.0,
        "grad_norm": 0.5,
        "tokens_per_second": 1e3,
        "data_wait": 0.01,
    }
    return {**common, "step": step, "peak_memory_gib": 1.0, "skipped": 0, **more}


def test_a_resumed_file_repeats_no_step_and_survives_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in range(1, 7):
        first.write(record(step))
    first.close()
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 7, "lo')  # killed while writing
    second = JsonLines(path, resume_step=4)
    second.write(record(5, loss=9.0))
    second.close()
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(1, 1.5), (2, 1.5), (3, 1.5), (4, 1.5), (5, 9.0)]
    JsonLines(path).close()
    assert read_records(path) == []


def test_records_wait_for_room(tmp_path):
    """A disk that fills up takes part of a line; the rest and all later records follow once there is room."""
    said, room = [], [30]

    class Disk(io.FileIO):
        def write(self, data):
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = min(room[0], len(data))
            room[0] -= taken
            return super().write(data[:taken])

    sink = JsonLines(tmp_path / "m.jsonl", report=said.append)
    sink._file = Disk(tmp_path / "m.jsonl", "ab")
    for step in (1, 2, 3):
        sink.write(record(step))
    assert read_records(tmp_path / "m.jsonl") == [] and len(said) == 1 and "No space left on device" in said[0]
    room[0] = 10**6
    sink.write(record(4))
    assert [r["step"] for r in read_records(tmp_path / "m.jsonl")] == [1, 2, 3, 4]
    room[0] = 0
    sink.write(record(5))
    sink.close()
    assert "lacks its last 1 records" in said[-1]


def test_numbers_that_are_none_stay_valid_json(tmp_path):
    sink = JsonLines(tmp_path / "m.jsonl")
    sink.write(record(1, loss=float("nan"), grad_norm=float("inf"), groups=[float("nan"), 1.0]))
    sink.close()

    def refuse(word):
        raise AssertionError(word)

    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["grad_norm"] is None and line["groups"] == [None, 1.0]


def test_late_numbers_come_in_order_and_all_of_them():
    late = LateReader()
    for step in (1, 2):
        late.push(step, torch.tensor([float(step)]), f"note {step}")
        (got,) = late.pop()  # on the CPU nothing is queued, so nothing is late
        assert got == (step, [float(step)], f"note {step}")
    assert list(late.pop(keep=0)) == []


def test_the_clock_tells_waiting_from_working_and_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    with clock.waiting(LateReader()):
        now[0] += 2.0
    with clock.paused():
        now[0] += 20.0
    now[0] += 6.0
    assert clock.lap() == (8.0, 0.25)
    now[0] += 1.0
    assert clock.lap() == (1.0, 0.0)


@pytest.mark.parametrize("done, waits", [(False, False), (True, True)])
def test_nobody_waits_for_data_while_the_device_has_work(done, waits):
    late, clock = LateReader(), Clock()
    # a step that is queued, as on a GPU
    late._waiting.append((1, torch.zeros(1), SimpleNamespace(query=lambda: done), None))
    with clock.waiting(late):
        time.sleep(0.01)
    assert (clock.lap()[1] > 0) == waits


def test_the_console_prints_rows_in_columns(capsys):
    console = Console(total=100, start=0, every=10)
    for step in range(1, 31):
        console.write(record(step, mfu=0.4321) if step == 20 else record(step))
    console.write({"kind": "evaluation", "step": 30, "bpb": {"zero": 1.25, "decode": 1.0}, "seconds": 2.3})
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["step", "1", "10", "20", "30"]
    assert "43.2%" in lines[3] and " - " in lines[2]
    assert lines[-1].split() == ["30", "bits", "per", "byte:", "zero", "1.2500", "decode", "1.0000", "(2", "s)"]


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    sink.write(record(3))
    sink.write({"kind": "evaluation", "step": 3, "bpb": {"decode": 1.0}})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("train/groups/1")[0].value == 1.0 and events.Scalars("evaluation/bpb/decode")[0].step == 3


@pytest.mark.parametrize(
    "package, use, text",
    [
        (
            "matplotlib",
            lambda folder: plot_curves([], folder / "x.png"),
            r'figures need matplotlib: pip install -e "\.\[plot\]"',
        ),
        ("torch.utils.tensorboard", TensorBoard, r'pip install -e "\.\[tensorboard\]"'),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, package, use, text):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=text):
        use(tmp_path)


@pytest.mark.parametrize("counts", [(1, 2, 3), (3, 1, 2)])
def test_curves_of_a_run_whose_schedule_changes(tmp_path, counts):
    rows = [record(step, groups=[1.0] * count) for step, count in enumerate(counts, start=1)]
    plot_curves(rows, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_curves_of_a_run_without_evaluations(tmp_path):
    plot_curves([record(1), record(2), record(3, loss=None, groups=[None, None], grad_norm=None)], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000
