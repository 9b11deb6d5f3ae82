"""Comparing runs: seeds, equal tokens, compute and seconds, documents in pairs, the page and its figures, bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import score, write_run

from lrt.eval.bootstrap import DocumentScores
from lrt.eval.compare import compare, interpolate
from lrt.eval.compare_page import scores_table, to_json, write_report
from lrt.eval.figures import amount, figure, label_amounts, power_of_ten, smooth
from lrt.eval.runs import read_run
from lrt.eval.spread import Spread, half_interval

ROOT = Path(__file__).resolve().parents[2]
M = 1_000_000


def twins(folder, *, budgets=(100 * M, 200 * M, 400 * M), seeds=(1, 2, 3), cost=1.25, gain=0.02):
    """A plain curve, and one with memory that pays ``cost`` times as much a token."""
    for tokens in budgets:
        for seed in seeds:
            write_run(folder / f"plain-{tokens}-s{seed}", tokens=tokens, seed=seed, plain=True)
            write_run(folder / f"lrt-{tokens}-s{seed}", tokens=tokens, seed=seed, cost=cost, gain=gain)
    return folder


def test_seeds_are_one_point_and_horizons_one_curve(tmp_path):
    found = compare([twins(tmp_path)])
    assert [(c.label, c.plain, c.mode, len(c.points)) for c in found.curves] == [
        ("plain", True, "decode", 3),
        ("lrt", False, "decode", 3),
    ]
    point = found.curves[1].points[1]
    assert point.seeds == (1, 2, 3) and point.unfinished is None
    assert point.mean("decode") == pytest.approx(score(200 * M, gain=0.02, seed=2)) and point.deviation(
        "decode"
    ) == pytest.approx(0.004)
    assert point.half("decode") == pytest.approx(4.303 * 0.004 / math.sqrt(3))  # Student's t of two degrees of freedom
    assert point.amounts["tokens"] == 200 * M and point.amounts["flops"] == pytest.approx(6e6 * 1.25 * 200 * M)
    assert point.amounts["seconds"] == pytest.approx(1.25 * 200)  # without the first step, which took 50 times as long
    assert found.data == {"train": "abc", "validation": "def", "tokenizer": "0"}


def test_differences_at_equal_tokens_compute_and_seconds(tmp_path):
    """The plain score is linear in the logarithm of its tokens, so every difference is known."""
    found = compare([twins(tmp_path)])
    curve = found.curves[1]
    for point in curve.points:
        own = point.mean("decode")
        for axis, equal in (("tokens", 1.0), ("flops", 1.25), ("seconds", 1.25)):
            got = found.difference(curve, point, axis=axis)
            if point is curve.points[-1] and axis != "tokens":
                assert got is None  # the plain runs do not reach so far, and nothing is extrapolated
                continue
            plain = score(equal * point.amounts["tokens"], seed=2)
            assert got.absolute == pytest.approx(own - plain) and got.relative == pytest.approx(own / plain - 1)
    assert found.difference(curve, curve.points[0], axis="tokens").relative == pytest.approx(-0.02)
    assert found.difference(curve, curve.points[0], axis="flops").relative == pytest.approx(
        0.98 * 1.3 / (1.3 - 0.05 * math.log2(1.25)) - 1
    )
    half = found.difference(curve, curve.points[0], axis="tokens").half
    assert half == pytest.approx(2.776 * math.sqrt(2 / 3) * 0.004 / score(100 * M, seed=2))  # four degrees of freedom
    assert interpolate(found.reference, 99 * M, axis="tokens") is None


@pytest.mark.parametrize("seeds", [(2, 2), (3, 5)])
def test_intervals_over_seeds_cover(seeds):
    """95 % intervals hold the truth at least so often with few seeds, where a normal distribution's would 84 times."""
    generator, held, draws = np.random.default_rng(0), 0, 4000
    for _ in range(draws):
        a, b = (generator.normal(0.0, 1.0, n) for n in seeds)
        half = half_interval([Spread(x.var(ddof=1) / len(x), len(x)) for x in (a, b)])
        held += abs(a.mean() - b.mean()) <= half
    assert 0.94 <= held / draws <= 0.99
    assert half_interval([Spread(0.0, 3)]) == 0.0


def test_one_seed_has_a_score_and_no_interval(tmp_path):
    found = compare([twins(tmp_path, seeds=(1,))])
    curve = found.curves[1]
    assert (
        curve.points[0].deviation("decode") is None
        and found.difference(curve, curve.points[0], axis="tokens").half is None
    )
    assert scores_table(found)[1][-1] == "1.2960"


def test_what_is_not_at_its_end_is_shown_and_not_compared(tmp_path):
    write_run(tmp_path / "plain", plain=True)
    write_run(tmp_path / "lrt", steps=30)
    (curve,) = compare([tmp_path / "lrt"]).curves
    assert curve.points[0].unfinished == (30, 60)
    found = compare([tmp_path / "lrt", tmp_path / "plain"], reference="lrt")
    assert found.difference(found.curves[1], found.curves[1].points[0], axis="tokens") is None
    assert "lrt (at step 30 of 60)" in [row[0] for row in scores_table(found)]


def test_seeds_that_branch_from_runs_of_their_own_are_one_setting(tmp_path):
    for seed in (1, 2):
        branch = [f"training.branch_from={tmp_path}/trunk-s{seed}", "training.lr_schedule=wsd", "data.workers=2"]
        write_run(tmp_path / f"branch-s{seed}", seed=seed, overrides=branch)
    (curve,) = compare([tmp_path]).curves
    assert (curve.label, curve.points[0].seeds) == ("branch", (1, 2))


@pytest.mark.parametrize("both", [False, True])
def test_a_run_that_goes_on_from_another_has_no_seconds(tmp_path, both):
    """Its tokens and FLOPs are those of both runs, so its own seconds alone would look far too fast."""
    write_run(tmp_path / "plain", plain=True, first=41 if both else 1)
    write_run(tmp_path / "branch", first=41, gain=0.02)
    found = compare([tmp_path])
    assert [c.label for c in found.curves] == ["plain", "branch"]
    curve = found.curves[1]
    assert curve.points[0].amounts == {"tokens": 100 * M, "flops": 6e6 * 100 * M}
    assert found.difference(curve, curve.points[0], axis="tokens").relative == pytest.approx(-0.02, rel=1e-2)
    assert found.difference(curve, curve.points[0], axis="seconds") is None
    assert scores_table(found)[2][:5] == ["branch", "1", "100M", "6e+14", "-"]
    assert to_json(found)["settings"][1]["points"][0]["seconds"] is None
    text = write_report(found, tmp_path / "report").read_text()
    assert "branch: these go on from other runs" in text and "nothing is said at equal seconds" in text


def test_documents_in_pairs(tmp_path):
    """Both seeds of a setting are averaged; the difference is exact, and so is its interval where documents agree."""
    index, size = np.arange(40), np.full(40, 100)
    for name, plain, extra in (("plain", True, 0.0), ("lrt", False, -2.0)):
        for seed in (1, 2):
            run = write_run(tmp_path / f"{name}-s{seed}", seed=seed, plain=plain)
            nats = 50.0 + 10 * np.sin(index) + extra + (0.5 if seed == 1 else -0.5)
            DocumentScores("held out", index, size, {mode: nats for mode in ("zero", "parallel", "decode")}).save(
                run / "documents.npz"
            )
    found = compare([tmp_path])
    curve = found.curves[1]
    gap = -2.0 / (100 * math.log(2))
    assert found.paired(curve, curve.points[0]) == pytest.approx((gap, gap, gap))
    assert to_json(found)["settings"][1]["points"][0]["documents"]["value"] == pytest.approx(gap)
    (tmp_path / "lrt-s2" / "documents.npz").unlink()
    assert found.paired(curve, curve.points[0]) is None


def test_a_sweep_is_compared_by_its_labels(tmp_path):
    lines = []
    for label, plain, state in (
        ("plain tokens=100000000", True, "done"),
        ("refine passes=1", False, "done"),
        ("refine passes=2", False, "failed"),
    ):
        name = label.replace(" ", "_") + "-s1-0123abcd"
        write_run(tmp_path / "runs" / name, plain=plain)
        lines.append({"run": name, "label": label, "stage": "compare", "state": state, "folder": f"runs/{name}"})
    lines.append({"run": "tune", "label": "tune", "stage": "tune", "state": "done", "folder": "runs/tune"})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [c.label for c in compare([tmp_path]).curves] == ["plain", "refine passes=1"]


# ------------------------------------------------------------------ bad input


def test_different_data_are_refused_unless_asked_for(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", data="xyz", plain=True)
    with pytest.raises(ValueError, match=r"a and b have different train data.*--different-data"):
        compare([a, b])
    assert compare([a, b], different_data=True).data is None
    text = (b / "metrics.jsonl").read_text()
    (b / "metrics.jsonl").write_text(text.replace('"bytes": 65000', '"bytes": 64000'))
    (b / "run.json").unlink()
    with pytest.raises(ValueError, match="different scored tokens and bytes"):
        compare([a, b])


def without_flops(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({k: v for k, v in record.items() if k != "flops"}) + "\n" for record in records]
    (run / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda run: write_run(run, evaluate=False),
            "has no evaluation yet: let the run reach its end, or set evaluation.every",
        ),
        (
            lambda run: write_run(run, bpb={"decode": None, "zero": 1.0}),
            "bits per byte in decode are no number: the run has diverged",
        ),
        (
            lambda run: without_flops(write_run(run)),
            "run has steps without training FLOPs: it was trained before they were recorded; leave it out",
        ),
        (lambda run: run.mkdir(), "holds no run: name the folder of a run"),
        (lambda run: write_run(run).joinpath("recipe.toml").unlink(), "holds no recipe.toml"),
        (lambda run: write_run(run).joinpath("recipe.toml").write_text("= 1"), "holds no recipe.toml that can be read"),
    ],
)
def test_runs_that_cannot_be_compared_say_why(tmp_path, change, message):
    change(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        compare([tmp_path / "run"])


def test_an_unknown_reference_and_a_sweep_without_results(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="reference 'plain' is none of the settings: use one of run"):
        compare([run], reference="plain")
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="sweep without a finished run"):
        compare([tmp_path])
    shutil.rmtree(run)
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        read_run(run)


# ------------------------------------------------------------------ the page


@pytest.mark.parametrize("values", [[1_228_800.0], [1.20e6, 1.21e6], [100e6, 101e6], [100e6, 140e6]])
def test_no_two_ticks_have_one_label(values, tmp_path):
    """A single run, or runs of nearly the same length."""
    with figure(tmp_path / "f.png", rows=1, columns=1, size=(4, 3)) as axes:
        panel = axes[0][0]
        panel.plot(values, [1.0] * len(values), "o")
        label_amounts(panel.xaxis, values, log=False)
        labels = [panel.xaxis.get_major_formatter()(tick) for tick in panel.xaxis.get_major_locator()()]
    assert labels and len(set(labels)) == len(labels)


def test_the_page_has_every_figure_labelled_and_not_blank(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    drawn, save = {}, Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, path, **options: (drawn.update({Path(path).name: self}), save(self, path, **options)),
    )
    page = write_report(compare([twins(tmp_path / "runs")]), tmp_path / "report")
    text = page.read_text()
    assert page == tmp_path / "report" / "report.md" and "| plain | 3 | 100M |" in text
    assert "-2.00 %" in text and "NVIDIA H200" in text and "0123456789" in text
    assert json.loads((tmp_path / "report" / "report.json").read_text())["reference"] == "plain"
    names = {"report_curves.png", "report_gains.png", "report_modes.png", "report_positions.png", "report_loss.png"}
    assert set(drawn) == names and all(f"]({name})" in text for name in names)
    for name, shown in drawn.items():
        for axes in shown.axes:
            assert axes.get_xlabel() and axes.get_title(loc="left"), name
            assert len(axes.get_xticks()) >= 2 or not axes.has_data(), name
        assert shown.axes[0].get_ylabel() or name == "report_modes.png"
        assert {t.get_text() for t in shown.legends[0].get_texts()} & {"plain", "lrt"}, name
        pixels = imread(tmp_path / "report" / name)[..., :3]
        assert 0.005 < (pixels.min(-1) < 0.9).mean() < 0.5, name  # neither blank nor filled
        assert pixels.shape[1] >= 1000


def test_one_run_alone_has_a_page(tmp_path):
    page = write_report(compare([write_run(tmp_path / "run")]), tmp_path / "page.md")
    assert (
        page == tmp_path / "page.md"
        and "## Against" not in page.read_text()
        and (tmp_path / "page_curves.png").is_file()
    )


def test_the_command_line(tmp_path):
    twins(tmp_path / "runs", seeds=(2,), budgets=(100 * M,))
    line = [sys.executable, str(ROOT / "tools" / "compare.py")]
    done = subprocess.run(
        [*line, str(tmp_path / "runs"), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "against plain-100000000:" in done.stdout and "-2.00 %" in done.stdout, done.stderr
    done = subprocess.run(
        [*line, str(tmp_path / "none"), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "holds no run" in done.stderr


def test_numbers_for_people():
    assert [amount(v) for v in (0, 950, 84e6, 1.5e9, 168_000_000)] == ["0", "950", "84M", "1.5G", "168M"]
    assert [power_of_ten(v) for v in (5e14, 1.2e15)] == ["5e14", "1.2e15"]
    assert smooth([1, 2, 3, 4], window=2) == [1, 1.5, 2.5, 3.5]
