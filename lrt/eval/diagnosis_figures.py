"""One page of figures about what the memory does (``lrt.eval.diagnosis``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrt.eval.diagnosis import PARTS, Report
from lrt.eval.figures import COLOURS, MODE_COLOURS, figure, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH = 50  # tokens of drift that are averaged


def draw(report: Report, path: Path, *, title: str) -> Path:
    """Write the page as a PNG.

    Raises:
        ValueError: matplotlib is missing.
    """
    with figure(path, rows=2, columns=3, size=(16, 9), title=title) as axes:
        _losses(axes[0][0], report["loss"])
        _gates(axes[0][1], report)
        _sweeps(axes[0][2], report["sweeps"])
        _gaps(axes[1][0], report)
        _drift(axes[1][1], report.get("drift"))
        _gains(axes[1][2], report["positions"])
        for panel in axes.flat:
            panel.xaxis.get_major_locator().set_params(integer=True)
    return path


def _losses(panel: Axes, loss: Report) -> None:
    for (name, parts), colour in zip(((n, p) for n, p in loss.items() if isinstance(p, dict)), COLOURS):
        for part, style in zip(PARTS, ("-", "--")):
            if part in parts:
                panel.plot(
                    loss["blocks"], parts[part], style, color=colour, marker="o", markersize=3, label=f"{name}, {part}"
                )
    panel.set(title="Loss when one block's memory is changed", xlabel="block", ylabel="bits per byte above intact")
    panel.legend(fontsize=7, handlelength=4)


def _gates(panel: Axes, report: Report) -> None:
    blocks = report["loss"]["blocks"]
    for name in ("memory_gate", "local_gate", "key_ratio", "value_ratio", "injection_ratio"):
        if name in report["activations"]:
            panel.plot(
                blocks, report["activations"][name]["mean"], marker="o", markersize=3, label=name.replace("_", " ")
            )
    if "gains" in report["parameters"]:
        panel.plot(blocks, report["parameters"]["gains"], marker="s", markersize=3, color="black", label="gain g")
    panel.axhline(0, color="#606060", linewidth=0.8)
    panel.set(title="Gates, gains and shares of the memory", xlabel="block", ylabel="mean")
    panel.legend(fontsize=7)


def _sweeps(panel: Axes, sweeps: Report) -> None:
    numbers = range(1, len(sweeps["change"]) + 1)
    for name, label in (
        ("change", "change to one sweep before"),
        ("change_over_two", "to two before"),
        ("error", "error to decode"),
    ):
        shown = [(n, max(value, 1e-9)) for n, value in zip(numbers, sweeps[name]) if value is not None]
        panel.plot(
            [n for n, _ in shown], [value for _, value in shown], marker="o", markersize=3, label=f"{label} (mean)"
        )
    panel.set(
        title="How the memory settles", xlabel="sweep (full refinement)", ylabel="relative change of m", yscale="log"
    )
    beside = panel.twinx()
    beside.plot(numbers, sweeps["exact_prefix"], ":", color="black", label="exact prefix")
    beside.set(ylabel="exact positions of the worst row")
    panel.legend(fontsize=7)


def _gaps(panel: Axes, report: Report) -> None:
    positions, residues = report["positions"], report["residues"]
    places = range(1, len(positions["decode"]) + 1)
    _line(
        panel,
        places,
        _differences(positions["decode"], positions["parallel"]),
        color=MODE_COLOURS["decode"],
        label="all positions",
    )
    gaps = _differences(residues["decode"], residues["parallel"])
    for number, gap in enumerate(gaps):
        if gap is not None:
            label = f"t = {number} (mod {len(gaps)}): {gap:+.4f}"
            panel.axhline(gap, linestyle="--", linewidth=1, color=COLOURS[1 + number % (len(COLOURS) - 1)], label=label)
    panel.set(title="decode minus parallel", xlabel=f"part of the row (of {len(places)})", ylabel="bits per byte")
    panel.legend(fontsize=7)


def _drift(panel: Axes, drift: Report | None) -> None:
    panel.set(title="Drawn text: the memory over time", xlabel="token", ylabel="RMS of the source block's output")
    if drift is None:
        panel.text(0.5, 0.5, "no text was drawn", ha="center", va="center", transform=panel.transAxes)
        return
    panel.plot(smooth(drift["rms"], window=SMOOTH), color=COLOURS[0], label="RMS")
    beside = panel.twinx()
    beside.plot(smooth(drift["angle"], window=SMOOTH), color=COLOURS[1], linewidth=0.8, label="angle of m[t] to m[t-1]")
    beside.plot(smooth(drift["angle_over_two"], window=SMOOTH), color=COLOURS[4], linewidth=0.8, label="to m[t-2]")
    beside.set(ylabel="degrees", ylim=(0, 180))
    lines = [*panel.get_lines(), *beside.get_lines()]
    panel.legend(lines, [str(line.get_label()) for line in lines], fontsize=7)


def _gains(panel: Axes, positions: Report) -> None:
    places = range(1, len(positions["decode"]) + 1)
    for mode in ("parallel", "decode"):
        _line(panel, places, _differences(positions["zero"], positions[mode]), color=MODE_COLOURS[mode], label=mode)
    panel.axhline(0, color="#606060", linewidth=0.8)
    panel.set(
        title="What memory gains, by position",
        xlabel=f"part of the row (of {len(places)})",
        ylabel="bits per byte below zero memory",
    )
    panel.legend(fontsize=7)


def _line(panel: Axes, places: Sequence[int], values: Sequence[float | None], **look: str) -> None:
    shown = [(place, value) for place, value in zip(places, values) if value is not None]
    drawn = panel.plot([place for place, _ in shown], [value for _, value in shown], marker="o", markersize=3)
    drawn[0].set(**look)


def _differences(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(first, second)]
