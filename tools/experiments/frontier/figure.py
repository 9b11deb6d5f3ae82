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
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]


def curve(records: list[dict[str, Any]]) -> dict[float, float]:
    """Bits per byte of the plain model by cost."""
    return {r["cost"]: r["bpb"]["decode"] for r in sorted(records, key=lambda r: r["cost"]) if r["label"] == "plain"}


def at(plain: Mapping[float, float], cost: float) -> float:
    """The plain model's bits per byte at a cost, interpolated in its logarithm."""
    costs = list(plain)
    low, high = next((a, b) for a, b in zip(costs, costs[1:]) if a <= cost <= b)
    return plain[low] + (plain[high] - plain[low]) * math.log(cost / low) / math.log(high / low)


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: every run against the plain model of equal compute and of equal tokens."""
    plain, steps = curve(records), {r["steps"]: r["cost"] for r in records if r["label"] == "plain"}
    lines = [
        "| schedule | steps | cost | zero | parallel | **decode** | plain at this cost | at equal compute | at "
        "equal tokens | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        zero, parallel, decode = (r["bpb"][mode] for mode in ("zero", "parallel", "decode"))
        row = f"| {r['label']} | {r['steps']:,} | {r['cost']:.2f} |"
        if r["label"].startswith("plain,") or r["label"] == "plain":
            lines.append(f"{row} | | **{decode:.4f}** | | | | {r['commit']} |")
            continue
        twin, same = at(plain, r["cost"]), plain[steps[r["steps"]]]
        scores = f" {zero:.4f} | {parallel:.4f} | **{decode:.4f}** | {twin:.4f} |"
        gains = f" {100 * (decode / twin - 1):+.2f} % | {100 * (decode / same - 1):+.2f} % |"
        lines.append(f"{row}{scores}{gains} {r['commit']} |")
    return "\n".join(lines)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte in ``decode`` against training compute and against tokens."""
    plain = curve(records)
    with figure(path, rows=1, columns=2, size=(10, 4.8)) as axes:
        for panel, by in zip(axes[0], ("cost", "steps")):
            unit = 1 if by == "cost" else EPOCH
            twins = sorted((r[by] / unit, r["bpb"]["decode"]) for r in records if r["label"] == "plain")
            panel.plot(*zip(*twins), color="#606060", marker=".", label="plain model")
            for (label, marker), colour in zip(SHOWN.items(), COLOURS):
                points = sorted((r[by] / unit, r["bpb"]["decode"]) for r in records if r["label"] == label)
                panel.plot(*zip(*points), color=colour, marker=marker, label=f"LRT: {label}")
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
        draw(runs(), Path(sys.argv[1]))
    else:
        print(table(runs()))
