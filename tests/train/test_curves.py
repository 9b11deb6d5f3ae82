"""The figure of a run and its final table: labelled, from the data, one number once."""

import json

import pytest
import torch
from run_folders import write_run
from runs import tiny

from lrt.eval.runs import read_records, scores_of
from lrt.train.monitor.curves import plot_curves
from lrt.train.trainer import train


def drawn(records, path, monkeypatch, **options):
    """The panels of the figure, by title."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, to, **more: (kept.append(self), save(self, to, **more)))
    plot_curves(records, path, **options)
    panels = {axes.get_title(loc="left"): axes for axes in kept[0].axes}
    assert len(panels) == 4 and all(axes.get_xlabel() for axes in panels.values())
    return kept[0], panels


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_several_evaluations_are_curves_and_one_is_its_positions(tmp_path, monkeypatch):
    records = read_records(write_run(tmp_path / "many") / "metrics.jsonl")
    figure, panels = drawn(records, tmp_path / "c.png", monkeypatch, title="my run")
    assert figure.get_suptitle() == "my run   ·   60 steps, 100M tokens   ·   1.2960 bits per byte in decode"
    scores = panels["held-out bits per byte"]
    assert legend(scores) == ["zero 1.3460", "parallel 1.2920", "decode 1.2960"]
    assert [len(line.get_xdata()) for line in scores.lines] == [6, 6, 6]
    assert panels["gradient norm"].get_yscale() == "log"
    figure.canvas.draw()
    steps = [label.get_text() for label in panels["training loss"].get_xticklabels()]
    assert steps[0] == "0" and "60" in steps and len(steps) > 3, "steps from the data"

    records = read_records(write_run(tmp_path / "once", every=1000) / "metrics.jsonl")
    _, panels = drawn(records, tmp_path / "c.png", monkeypatch)
    panel = panels["held-out bits per byte by position"]
    assert legend(panel) == ["zero 1.3460", "parallel 1.2920", "decode 1.2960"] and len(panel.patches) == 3
    assert list(panel.patches[2].get_data().values) == pytest.approx([1.296 + 0.1 * 0.5**i for i in range(4)])


def test_the_first_steps_do_not_press_the_rest_together(tmp_path, monkeypatch):
    records = read_records(write_run(tmp_path / "run") / "metrics.jsonl")
    _, panels = drawn(records, tmp_path / "c.png", monkeypatch)
    low, high = panels["training loss"].get_ylim()
    assert low < 1.0 and high < max(r["loss"] for r in records if r["kind"] == "train") - 0.5


def test_a_model_without_memory_has_one_score(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", plain=True, every=1000)
    records = [{**r, "recurrence": {}} if r["kind"] == "evaluation" else r for r in read_records(run / "metrics.jsonl")]
    figure, panels = drawn(records, tmp_path / "c.png", monkeypatch, title="plain")
    assert figure.get_suptitle().endswith("·   1.2960 bits per byte"), figure.get_suptitle()
    assert legend(panels["held-out bits per byte by position"]) == ["all positions 1.2960"]
    assert scores_of({"bpb": {"zero": 1.0, "decode": 2.0}, "recurrence": {"gains": [0.1]}}) == {
        "zero": 1.0,
        "decode": 2.0,
    }


@pytest.mark.parametrize("memory", [True, False])
def test_the_final_table_says_every_number_once(tmp_path, capsys, memory):
    torch.manual_seed(0)
    sets = {} if memory else {"recurrence": "false", "schedule.kind": "baseline"}
    train(tiny(tmp_path, **{"metrics.plot": "true"}, **sets))
    shown = capsys.readouterr().out
    table = shown[shown.index("\ntiny\n") :]
    (record,) = [r for r in read_records(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "evaluation"]
    for mode, value in record["bpb"].items():
        line = f"bits per byte, {mode}" if memory else "bits per byte "
        assert table.count(line) == 1 and f"{value:.4f}" in table
    assert table.count("bits per byte") == (3 if memory else 1)
    assert shown.count("memory gate, mean") == memory and ("memory gate, mean" in table) == memory
    assert (tmp_path / "tiny" / "curves.png").is_file() and "run.json" in table
    assert json.loads((tmp_path / "tiny" / "run.json").read_text())["attempts"][0]["state"] == "done"
