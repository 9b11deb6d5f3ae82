"""The table and the figure of docs/frontier.md, from results.jsonl beside this file.

    python tools/experiments/frontier/figure.py                  # prints the table
    python tools/experiments/frontier/figure.py docs/images/frontier.png

A line of results.jsonl is one run: ``cost`` is its training FLOPs, every block of every pass counted,
over those of the plain run of 2,563 steps; ``bpb`` has bits per byte by memory mode;
``set`` has what it changed in d4.toml.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lrt.eval.figures import COLOURS, figure

HERE = Path(__file__).parent
EPOCH = 2563  # steps
SHOWN = {  # settings of the figure
    "refine(1), (.3, .7)": "o",
    "plain to 50 %, then refine(1) (.3, .7)": "s",
    "plain to 50 %, then 30 % plain, 70 % refine(1) (0, 1)": "v",
    "mixture: 30 % plain, 70 % refine(1) (0, 1) cut": "^",
    "plain to 50 %, then 30 % plain, 70 % refine(1) (0, 1) cut": "D",
}


class Point(NamedTuple):
    """One setting at one budget, its seeds together."""

    label: str
    steps: int
    cost: float
    bpb: dict[str, float]  # by memory mode
    spread: float | None  # deviation of decode over seeds; None with one seed
    seeds: int
    commits: str


def points() -> list[Point]:
    """The runs of results.jsonl, seeds of a setting and a budget as one point, by budget and by score."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in (HERE / "results.jsonl").read_text().splitlines():
        run = json.loads(line)
        groups.setdefault((run["label"], run["steps"]), []).append(run)
    found = []
    for (label, steps), group in groups.items():
        bpb = {mode: statistics.mean(run["bpb"][mode] for run in group) for mode in ("zero", "parallel", "decode")}
        spread = statistics.stdev(run["bpb"]["decode"] for run in group) if len(group) > 1 else None
        commits = ", ".join(sorted({run["commit"] for run in group}))
        cost = statistics.mean(run["cost"] for run in group)
        found.append(Point(label, steps, cost, bpb, spread, len(group), commits))
    return sorted(found, key=lambda point: (point.steps, point.bpb["decode"]))


def curve(found: list[Point]) -> dict[float, float]:
    """Bits per byte of the plain model by cost."""
    return {p.cost: p.bpb["decode"] for p in sorted(found, key=lambda p: p.cost) if p.label == "plain"}


def at(plain: Mapping[float, float], cost: float) -> float:
    """The plain model's bits per byte at a cost, interpolated in its logarithm."""
    costs = list(plain)
    low, high = next((a, b) for a, b in zip(costs, costs[1:]) if a <= cost <= b)
    return plain[low] + (plain[high] - plain[low]) * math.log(cost / low) / math.log(high / low)


def table(found: list[Point]) -> str:
    """Markdown: every setting against the plain model of equal compute and of equal tokens."""
    plain, steps = curve(found), {p.steps: p.bpb["decode"] for p in found if p.label == "plain"}
    lines = [
        "| schedule | steps | seeds | cost | zero | parallel | **decode** | plain at this cost | at equal compute | "
        "at equal tokens | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in found:
        decode, spread = p.bpb["decode"], "" if p.spread is None else f" ±{p.spread:.4f}"
        row = f"| {p.label} | {p.steps:,} | {p.seeds} | {p.cost:.2f} |"
        if p.label.startswith("plain,") or p.label == "plain":
            lines.append(f"{row} | | **{decode:.4f}**{spread} | | | | {p.commits} |")
            continue
        twin, same = at(plain, p.cost), steps[p.steps]
        scores = f" {p.bpb['zero']:.4f} | {p.bpb['parallel']:.4f} | **{decode:.4f}**{spread} | {twin:.4f} |"
        gains = f" {100 * (decode / twin - 1):+.2f} % | {100 * (decode / same - 1):+.2f} % |"
        lines.append(f"{row}{scores}{gains} {p.commits} |")
    return "\n".join(lines)


def draw(found: list[Point], path: Path) -> None:
    """Bits per byte in ``decode`` against training compute and against tokens."""
    plain = curve(found)
    with figure(path, rows=1, columns=2, size=(10, 4.8)) as axes:
        for panel, by in zip(axes[0], ("cost", "steps")):
            unit = 1 if by == "cost" else EPOCH
            for (label, marker), colour in zip({"plain": ".", **SHOWN}.items(), ("#606060", *COLOURS)):
                chosen = sorted((p for p in found if p.label == label), key=lambda p: p.steps)
                places = [getattr(p, by) / unit for p in chosen]
                scores, spreads = [p.bpb["decode"] for p in chosen], [p.spread or 0.0 for p in chosen]
                name = "plain model" if label == "plain" else f"LRT: {label}"
                panel.errorbar(places, scores, yerr=spreads, color=colour, marker=marker, capsize=3, label=name)
            panel.set(
                xscale="log",
                ylabel="bits per byte, decode",
                ylim=(min(plain.values()) - 0.003, max(plain.values()) + 0.003),
            )
            panel.set_xticks([1, 1.5, 2, 2.5, 3], ["1", "1.5", "2", "2.5", "3"])
            panel.minorticks_off()
        axes[0][0].set(
            title="Equal training compute", xlabel="training FLOPs of every pass (1 = plain, 54 tokens per parameter)"
        )
        axes[0][1].set(title="Equal tokens", xlabel="tokens (1 = 168 M)")
        axes[0][0].figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        draw(points(), Path(sys.argv[1]))
    else:
        print(table(points()))
