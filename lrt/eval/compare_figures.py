"""Figures of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lrt.eval.compare import AXES, Comparison, Curve, Point
from lrt.eval.figures import COLOURS, MODE_COLOURS, amount, figure, label_amounts, limits, power_of_ten, smooth
from lrt.eval.runs import RunFolder
from lrt.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "tokens": "training tokens",
    "flops": "training compute (FLOPs, every pass)",
    "seconds": "seconds of training",
}
FORMS = {"tokens": amount, "flops": power_of_ten, "seconds": "{:g}".format}
SHORT = {"tokens": "tokens", "flops": "compute", "seconds": "seconds"}


def draw(comparison: Comparison, page: Path) -> list[tuple[Path, str]]:
    """Draw every figure that the runs have numbers for.

    Args:
        comparison: of runs.
        page: the report, beside which the PNGs go.

    Returns:
        Path and caption of each.

    Raises:
        ValueError: matplotlib is missing.
    """
    found = []
    for name, one in (
        ("curves", _curves), ("gains", _gains), ("modes", _modes), ("positions", _positions), ("loss", _losses),
    ):  # fmt: skip
        path = page.with_name(f"{page.stem}_{name}.png")
        caption = one(comparison, path)
        if caption is not None:
            found.append((path, caption))
    return found


# ------------------------------------------------------------------ one figure each; None: there is nothing to draw


def _curves(comparison: Comparison, path: Path) -> str | None:
    """Scores against tokens, compute and seconds."""
    with figure(path, rows=1, columns=3, size=(12, 4.3)) as axes:
        for axis, panel in zip(AXES, axes[0]):
            spent: list[float] = []
            scores: list[float] = []
            for curve, colour in _coloured(comparison):
                points = [point for point in curve.points if axis in point.amounts]
                if not points:
                    continue
                x = [point.amounts[axis] for point in points]
                y = [point.mean(curve.mode) for point in points]
                bars = [point.half(curve.mode) or 0.0 for point in points]
                style: Table = {"marker": "o", "markersize": 5, "capsize": 3, "color": colour, "label": curve.label}
                panel.errorbar(x, y, yerr=bars if any(bars) else None, **style)
                spent += x
                scores += [value + sign * bar for value, bar in zip(y, bars) for sign in (-1, 1)]
                if len(curve.points) == 1:
                    way = _on_the_way(curve.points[0].runs[0], axis, curve.mode)
                    panel.plot(*zip(*way), color=colour, linewidth=0.9, alpha=0.45)
                    late = way[len(way) // 2 :]
                    spent += [x for x, _ in late]
                    scores += [y for _, y in late]
            panel.set(xlabel=TITLES[axis], title=f"against {SHORT[axis]}")
            if not spent:
                _say(panel, "not known")
                panel.set_yticks([])
                continue
            log = max(spent) > 1.5 * min(spent)
            if log:
                panel.set_xscale("log")
            label_amounts(panel.xaxis, spent, log=log, form=FORMS[axis])
            panel.set_xlim((min(spent) / 1.2, max(spent) * 1.2) if log else limits(spent, share=0.1))
            panel.set_ylim(*limits(scores, share=0.1))
        axes[0][0].set_ylabel("held-out bits per byte")
        _legend(axes[0][0])
    return (
        "Bits per byte at the end of each run against what it spent, with 95 % intervals over seeds. Thin lines: "
        "scores on the way of a single run, whose rates have not fallen yet. With memory the score is that of mode "
        "decode, where it is known."
    )


def _gains(comparison: Comparison, path: Path) -> str | None:
    """Percent of the reference's score, at equal tokens, compute and seconds."""
    found = {
        (axis, curve.label): [
            (point.amounts[axis], difference)
            for point in curve.points
            if (difference := comparison.difference(curve, point, axis=axis)) is not None
        ]
        for axis in AXES
        for curve in comparison.curves[1:]
    }
    drawn = [d for points in found.values() for _, d in points]
    if not drawn:
        return None
    with figure(path, rows=1, columns=3, size=(12, 4.3)) as axes:
        ends = [100 * (d.relative + sign * (d.half or 0.0)) for d in drawn for sign in (-1, 1)]
        for axis, panel in zip(AXES, axes[0]):
            panel.axhline(0, color="black", linewidth=1.2)
            spent = [x for (of, _), points in found.items() if of == axis for x, _ in points]
            for curve, colour in _coloured(comparison)[1:]:
                points = found[axis, curve.label]
                bars = [100 * (d.half or 0.0) for _, d in points]
                style: Table = {"marker": "o", "markersize": 5, "capsize": 3, "color": colour, "label": curve.label}
                y = [100 * d.relative for _, d in points]
                panel.errorbar([x for x, _ in points], y, yerr=bars if any(bars) else None, **style)
            panel.set_ylim(*limits([*ends, 0.0]))
            panel.set(xlabel=TITLES[axis], title=f"at equal {SHORT[axis]}")
            if not spent:
                _say(panel, "no common range")
                continue
            log = max(spent) > 1.5 * min(spent)
            if log:
                panel.set_xscale("log")
            label_amounts(panel.xaxis, spent, log=log, form=FORMS[axis])
            panel.set_xlim((min(spent) / 1.2, max(spent) * 1.2) if log else limits(spent, share=0.5))
        axes[0][0].set_ylabel(f"% of the bits per byte of {comparison.reference.label}")
        _legend(axes[0][0])
    name = comparison.reference.label
    return f"Difference to {name} in percent of its score, with 95 % intervals over seeds; below 0 is better."


def _modes(comparison: Comparison, path: Path) -> str | None:
    """Scores by memory mode of every model with memory, beside those without."""
    points, where = _alike(comparison)
    curves = [curve for curve in comparison.curves if not curve.plain and len(points[curve.label].scores) > 1]
    if not curves:
        return None
    with figure(path, rows=1, columns=1, size=(8, 1.7 + 0.5 * len(curves))) as axes:
        panel, values = axes[0][0], list[float]()
        for row, curve in enumerate(curves):
            scores = {mode: points[curve.label].mean(mode) for mode in points[curve.label].scores}
            ends = [min(scores.values()), max(scores.values())]
            panel.plot(ends, [row, row], color="#C8C8C8", linewidth=2, zorder=1)
            for mode, value in scores.items():
                panel.scatter(value, row, s=60, color=MODE_COLOURS[mode], zorder=2, label=None if row else mode)
            values += scores.values()
        for number, curve in enumerate(curve for curve in comparison.curves if curve.plain):
            value = points[curve.label].mean(curve.mode)
            panel.axvline(
                value, color="black", linewidth=1.2, linestyle=("--", ":", "-.")[number % 3], label=curve.label
            )
            values.append(value)
        panel.set_yticks(range(len(curves)), [curve.label for curve in curves])
        panel.set_ylim(len(curves) - 0.5, -0.5)
        panel.set_xlim(*limits(values))
        panel.grid(axis="y", visible=False)
        panel.set(xlabel="held-out bits per byte", title=f"memory modes, {where}")
        _legend(panel)
    return (
        "The same models with memory off (zero), by their trained passes (parallel), and by true recurrence (decode)."
    )


def _positions(comparison: Comparison, path: Path) -> str | None:
    """Scores by position in the row, the mean over seeds."""
    points, where = _alike(comparison)
    found = []
    for curve, colour in _coloured(comparison):
        each = [run.evaluations[-1].get("bpb_of_buckets", {}).get(curve.mode) or [] for run in points[curve.label].runs]
        if len(each[0]) > 1 and all(len(one) == len(each[0]) and None not in one for one in each):
            found.append((curve.label, colour, [sum(values) / len(each) for values in zip(*each)]))
    if not found:
        return None
    with figure(path, rows=1, columns=1, size=(8, 4)) as axes:
        panel = axes[0][0]
        for label, colour, buckets in found:
            edges = [100 * i / len(buckets) for i in range(len(buckets) + 1)]
            panel.stairs(buckets, edges, baseline=None, color=colour, linewidth=2, label=label)
        panel.set_ylim(*limits([value for _, _, buckets in found for value in buckets]))
        panel.set_xlim(0, 100)
        panel.set(
            xlabel="position in the row (% of its length)",
            ylabel="held-out bits per byte",
            title=f"by position, {where}",
        )
        _legend(panel)
    return "Bits per byte by position in the row."


def _losses(comparison: Comparison, path: Path) -> str | None:
    """Training loss of the first seeds."""
    points, where = _alike(comparison)
    found, late = [], list[float]()
    for curve, colour in _coloured(comparison):
        records = [r for r in points[curve.label].runs[0].train if r.get("groups") and r["groups"][-1] is not None]
        means = smooth([r["groups"][-1] for r in records], window=max(1, len(records) // 50))
        found.append((curve.label, colour, [r["tokens"] for r in records], means))
        late += means[len(means) // 10 :]
    if not late:
        return None
    with figure(path, rows=1, columns=1, size=(8, 4)) as axes:
        panel = axes[0][0]
        for label, colour, tokens, means in found:
            panel.plot(tokens, means, color=colour, linewidth=1.2, label=label)
        label_amounts(panel.xaxis, late, log=False)
        panel.set_xlim(left=0)
        panel.set_ylim(*limits(late))
        panel.set(
            xlabel=TITLES["tokens"], ylabel="training loss, last pass (nats a token)", title=f"training loss, {where}"
        )
        _legend(panel)
    return "Training loss of the last pass, a moving average; the first seed of each."


# ------------------------------------------------------------------ parts


def _coloured(comparison: Comparison) -> list[tuple[Curve, str]]:
    """Every curve with its colour: the reference is black."""
    others = [colour for colour in COLOURS if colour != "#000000"]
    return [(c, "#000000" if i == 0 else others[(i - 1) % len(others)]) for i, c in enumerate(comparison.curves)]


def _alike(comparison: Comparison) -> tuple[dict[str, Point], str]:
    """One point per curve: at the most tokens that all have, or its longest run; and what to call them."""
    amounts = [{round(p.amounts["tokens"] / 1e3) for p in curve.points} for curve in comparison.curves]
    common = set.intersection(*amounts)
    if not common:
        return {curve.label: curve.points[-1] for curve in comparison.curves}, "longest runs"
    best = max(common)
    chosen = {
        curve.label: next(p for p in curve.points if round(p.amounts["tokens"] / 1e3) == best)
        for curve in comparison.curves
    }
    return chosen, f"{amount(1e3 * best)} tokens"


def _on_the_way(run: RunFolder, axis: str, mode: str) -> list[tuple[float, float]]:
    """(amount, score) of every evaluation of a run."""
    seconds = dict(zip((r["step"] for r in run.train), run.seconds()))
    records = {r["step"]: r for r in run.train}
    found = []
    for record in run.evaluations:
        step, score = record["step"], record["bpb"].get(mode)
        if step in records and score is not None:
            found.append((seconds[step] if axis == "seconds" else records[step][axis], score))
    return found


def _say(panel: Axes, text: str) -> None:
    """What stands in a panel without points."""
    panel.set_xticks([])
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", color="#606060")


def _legend(panel: Axes) -> None:
    """Below the whole figure, so that it hides no line."""
    handles, labels = panel.get_legend_handles_labels()
    panel.figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
