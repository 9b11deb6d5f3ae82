"""The report of a comparison: tables for the terminal, a Markdown page, and its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from lrt.eval.bootstrap import Interval
from lrt.eval.compare import AXES, Comparison, Curve, Difference, Point
from lrt.eval.compare_figures import SHORT, draw
from lrt.eval.figures import amount
from lrt.eval.runs import Record

# ------------------------------------------------------------------ tables


def scores_table(comparison: Comparison) -> list[list[str]]:
    """A row a setting and horizon: what was spent, and bits per byte by memory mode, mean ± deviation over seeds."""
    modes = _modes(comparison)
    rows = [["setting", "seeds", "tokens", "FLOPs", "seconds", *modes]]
    for curve in comparison.curves:
        for point in curve.points:
            scores = [_score(point, mode) if mode in point.scores else "-" for mode in modes]
            if curve.plain:
                scores = ["" if mode != curve.mode else _score(point, mode) for mode in modes]
            note = "" if point.unfinished is None else f" (at step {point.unfinished[0]:,} of {point.unfinished[1]:,})"
            spent = [
                amount(point.amounts["tokens"]),
                f"{point.amounts['flops']:.3g}",
                f"{point.amounts['seconds']:,.0f}" if "seconds" in point.amounts else "-",
            ]
            rows.append([curve.label + note, str(len(point.runs)), *spent, *scores])
    return rows


def differences_table(comparison: Comparison) -> list[list[str]]:
    """A row a setting and horizon: percent of the reference's score at equal tokens, compute and seconds."""
    rows = [["setting", "tokens", *(f"at equal {SHORT[axis]}" for axis in AXES), "on the same documents"]]
    for curve in comparison.curves[1:]:
        for point in curve.points:
            found = [_percent(comparison.difference(curve, point, axis=axis)) for axis in AXES]
            rows.append(
                [curve.label, amount(point.amounts["tokens"]), *found, _paired(comparison.paired(curve, point))]
            )
    return rows


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under each other: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def _modes(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(mode for curve in comparison.curves for point in curve.points for mode in point.scores))


def _score(point: Point, mode: str) -> str:
    deviation = point.deviation(mode)
    return f"{point.mean(mode):.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _percent(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{100 * difference.relative:+.2f} %" + (
        "" if difference.half is None else f" ± {100 * difference.half:.2f}"
    )


def _paired(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


# ------------------------------------------------------------------ the page


def write_report(comparison: Comparison, out: Path) -> Path:
    """Write the page, its figures and all numbers as JSON.

    Args:
        comparison: of runs.
        out: a folder, which gets report.md; or the page's own path, which ends in .md.

    Returns:
        The page's path.

    Raises:
        ValueError: matplotlib is missing.
    """
    page = out if out.suffix == ".md" else out / "report.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    reference, several = comparison.reference, len(comparison.curves) > 1
    parts = [f"# {' / '.join(curve.label for curve in comparison.curves)}", _scored(comparison)]
    parts += [
        "## Scores",
        "Bits per byte, mean ± deviation over seeds; lower is better.",
        _markdown_table(scores_table(comparison)),
    ]
    if several:
        parts += [
            f"## Against {reference.label}",
            "Percent of its bits per byte at equal tokens, training compute and seconds (± half of a 95 % interval "
            "over seeds), and the difference on the same documents with a 95 % bootstrap interval. Below 0 is better. "
            f"Between the ends of {reference.label}'s runs its score is interpolated over the logarithm of the amount; "
            "outside of them nothing is said (-).",
            _markdown_table(differences_table(comparison)),
        ]
    for path, caption in draw(comparison, page):
        parts += [f"![{path.stem.removeprefix(page.stem + '_')}]({path.name})", f"*{caption}*"]
    parts += ["## Runs", _markdown_table(_runs_table(comparison)), *_remarks(comparison)]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(to_json(comparison), indent=1), encoding="utf-8")
    return page


def _scored(comparison: Comparison) -> str:
    """What the scores are of."""
    scored = comparison.reference.points[0].runs[0].evaluations[-1].get("scored") or {}
    text = f"{scored['tokens']:,} held-out tokens, {scored['bytes']:,} bytes." if scored else "Held-out text."
    return text if comparison.data else text + " **The runs do not tell, or do not share, their data.**"


def _runs_table(comparison: Comparison) -> list[list[str]]:
    rows = [["run", "seed", "commit", "torch", "device", "steps"]]
    for curve in comparison.curves:
        for point in curve.points:
            for run, seed in zip(point.runs, point.seeds):
                attempt = run.attempt
                commit = (attempt.get("commit") or "-")[:10] + (" (changed)" if attempt.get("changed") else "")
                torch = attempt.get("versions", {}).get("torch", "-")
                rows.append(
                    [run.folder.name, str(seed), commit, torch, attempt.get("device", "-"), f"{run.last['step']:,}"]
                )
    return rows


def _remarks(comparison: Comparison) -> list[str]:
    runs = [run for curve in comparison.curves for point in curve.points for run in point.runs]
    devices = sorted({run.attempt.get("device", "unknown") for run in runs})
    remarks = []
    if len(devices) > 1:
        remarks.append(f"Seconds were measured on different devices ({', '.join(devices)}), so they do not compare.")
    goes_on = [run.folder.name for run in runs if run.goes_on]
    if goes_on:
        remarks.append(
            f"{', '.join(goes_on)}: these go on from other runs, whose tokens and FLOPs they count and whose seconds "
            "they do not know, so nothing is said at equal seconds."
        )
    if any(point.unfinished for curve in comparison.curves for point in curve.points):
        remarks.append(
            "Unfinished runs are scored before their rates have fallen, and are in no comparison at equal amounts."
        )
    return remarks


def to_json(comparison: Comparison) -> Record:
    """Every number of the report."""
    return {
        "reference": comparison.reference.label,
        "data": comparison.data,
        "settings": [
            {
                "label": curve.label,
                "plain": curve.plain,
                "points": [_point_json(comparison, curve, point) for point in curve.points],
            }
            for curve in comparison.curves
        ],
    }


def _point_json(comparison: Comparison, curve: Curve, point: Point) -> Record:
    paired = comparison.paired(curve, point)
    found = {axis: comparison.difference(curve, point, axis=axis) for axis in AXES}
    return {
        "runs": [str(run.folder) for run in point.runs],
        "seeds": list(point.seeds),
        **{axis: point.amounts.get(axis) for axis in AXES},
        "bpb": {
            mode: {"mean": point.mean(mode), "deviation": point.deviation(mode), "seeds": list(point.scores[mode])}
            for mode in point.scores
        },
        "difference": {axis: None if d is None else d.__dict__ for axis, d in found.items()},
        "documents": None
        if paired is None
        else {k: v if math.isfinite(v) else None for k, v in paired._asdict().items()},
        "unfinished": point.unfinished,
    }
