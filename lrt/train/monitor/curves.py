"""The figure of a run: loss, bits per byte, gradient norm and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrt.eval.figures import COLOURS, MODE_COLOURS, amount, figure, label_amounts, label_counts, limits, smooth
from lrt.eval.runs import Record, scores_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

START = 0.05  # share of a run whose steep fall would press everything after it together


def plot_curves(records: Sequence[Record], path: Path, *, title: str = "") -> None:
    """Draw the curves of a run into a PNG.

    Args:
        records: of a metrics.jsonl.
        path: of the PNG.
        title: what the run is called.

    Raises:
        ValueError: matplotlib is missing.
    """
    train = [r for r in records if r["kind"] == "train" and r["loss"] is not None]
    scores = [r for r in records if r["kind"] == "evaluation"]
    found = scores_of(scores[-1]) if scores else {}
    with figure(path, rows=2, columns=2, size=(11, 7), title=_heading(title, records, found)) as axes:
        _losses(axes[0][0], train)
        if len({r["step"] for r in scores}) > 1:
            _scores(axes[0][1], scores, found)
        else:
            _positions(axes[0][1], scores, found)
        _line(axes[1][0], train, "grad_norm", title="gradient norm", log=True)
        _line(axes[1][1], train, "lr_scale", title="learning rate, share of the full one")


def _heading(title: str, records: Sequence[Record], found: dict[str, float]) -> str:
    """Name, length and last score of the run."""
    last = next((r for r in reversed(records) if r["kind"] == "train"), None)
    words = [title] if title else []
    if last is not None:
        words.append(f"{last['step']:,} steps" + (f", {amount(last['tokens'])} tokens" if "tokens" in last else ""))
    mode = "decode" if "decode" in found else next(iter(found), None)
    if mode is not None and found[mode] is not None:
        words.append(f"{found[mode]:.4f} bits per byte" + (f" in {mode}" if len(found) > 1 else ""))
    return "   ·   ".join(words)


def _losses(axes: Axes, train: Sequence[Record]) -> None:
    """Loss of every pass: thin as it was, thick its moving average."""
    late: list[float] = []
    for group in range(
        max((len(r["groups"]) for r in train), default=0)
    ):  # phases of a schedule have different numbers
        shown = [r for r in train if len(r["groups"]) > group and r["groups"][group] is not None]
        steps, losses = [r["step"] for r in shown], [r["groups"][group] for r in shown]
        means = smooth(losses, window=max(1, len(losses) // 40))
        colour = COLOURS[group % len(COLOURS)]
        axes.plot(steps, losses, color=colour, linewidth=0.6, alpha=0.3)
        axes.plot(steps, means, color=colour, label=f"pass {group}" if group else "initialization")
        late += losses[int(START * len(losses)) :]
    axes.set(title="training loss", ylabel="nats per token")
    _finish(axes, train, late)


def _scores(axes: Axes, scores: Sequence[Record], found: dict[str, float]) -> None:
    """Bits per byte of every evaluation, a line per mode."""
    values: list[float] = []
    for mode in found:
        points = [(r["step"], r["bpb"][mode]) for r in scores if r["bpb"].get(mode) is not None]
        axes.plot(*zip(*points), marker="o", markersize=4, color=MODE_COLOURS[mode], label=_called(mode, found))
        values += [value for _, value in points[int(START * len(points)) :]]
    axes.set(title="held-out bits per byte", ylabel="bits per byte")
    _finish(axes, scores, values)


def _positions(axes: Axes, scores: Sequence[Record], found: dict[str, float]) -> None:
    """Bits per byte of the only evaluation by position in the row, a step line per mode."""
    axes.set(
        title="held-out bits per byte by position",
        xlabel="position in the row (% of its length)",
        ylabel="bits per byte",
    )
    axes.set_xlim(0, 100)
    record = scores[-1] if scores else {}
    values: list[float] = []
    for mode in found:
        parts = [value for value in (record.get("bpb_of_buckets") or {}).get(mode) or [record["bpb"][mode]]]
        if None in parts:
            continue
        edges = [100 * i / len(parts) for i in range(len(parts) + 1)]
        axes.stairs(parts, edges, baseline=None, color=MODE_COLOURS[mode], linewidth=2, label=_called(mode, found))
        values += parts
    if values:
        axes.set_ylim(*limits(values))
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no evaluation", transform=axes.transAxes, ha="center", color="#606060")


def _called(mode: str, found: dict[str, float]) -> str:
    """A mode with its score; a model without memory has one score and no mode."""
    value = found.get(mode)
    name = mode if len(found) > 1 else "all positions"
    return name if value is None else f"{name} {value:.4f}"


def _line(axes: Axes, train: Sequence[Record], key: str, *, title: str, log: bool = False) -> None:
    shown = [r for r in train if r.get(key) is not None and (r[key] > 0 or not log)]
    axes.plot([r["step"] for r in shown], [r[key] for r in shown], color=COLOURS[0], linewidth=1.0)
    axes.set_title(title)
    if log and shown:
        axes.set_yscale("log")
        values = [r[key] for r in shown]
        label_amounts(axes.yaxis, values, log=True, form="{:g}".format)
        axes.set_ylim(0.85 * min(values), 1.18 * max(values))
    _finish(axes, train, [])


def _finish(axes: Axes, records: Sequence[Record], values: Sequence[float]) -> None:
    """Axes from the data, and a legend where there are several lines."""
    axes.set_xlabel("step")
    label_counts(axes.xaxis)
    if records:
        axes.set_xlim(0, 1.01 * max(r["step"] for r in records))
    if values:
        axes.set_ylim(*limits(values))
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()
