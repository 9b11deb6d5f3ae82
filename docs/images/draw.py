"""Draws architecture.png and schedules.png of this folder: python docs/images/draw.py (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
BLUE, ORANGE, GREY, GREEN = "#3b6fb6", "#d9822b", "#8a8f98", "#4c956c"


def box(ax, x, y, w, h, text, color, size=9):
    ax.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.02,rounding_size=0.08", fc=color + "22", ec=color, lw=1.4)
    )
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)


def arrow(ax, start, end, color, style="-|>", width=1.6, curve=0.0):
    ax.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={"arrowstyle": style, "color": color, "lw": width, "connectionstyle": f"arc3,rad={curve}"},
    )


def architecture():
    fig, (ax, zoom) = plt.subplots(1, 2, figsize=(11, 5.4), width_ratios=[1.15, 1])
    names = ["token t-1", "token t", "token t+1"]
    for i, name in enumerate(names):
        x = 0.4 + 2.4 * i
        ax.text(x + 0.75, 0.05, name, ha="center", fontsize=10)
        for level in range(6):
            source = level == 3
            box(
                ax,
                x,
                0.6 + 0.8 * level,
                1.5,
                0.55,
                "source block" if source else f"block {level + 1}",
                ORANGE if source else BLUE,
                9,
            )
            if level < 5:
                arrow(ax, (x + 0.75, 1.15 + 0.8 * level), (x + 0.75, 1.4 + 0.8 * level), GREY, width=1)
        arrow(ax, (x + 0.75, 0.3), (x + 0.75, 0.6), GREY, width=1)
        arrow(ax, (x + 0.75, 5.15), (x + 0.75, 5.45), GREY, width=1)
        ax.text(x + 0.75, 5.55, "next token", ha="center", fontsize=9, color=GREY)
        if i < 2:
            for level in range(6):
                arrow(ax, (x + 1.5, 3.27), (x + 2.4, 0.87 + 0.8 * level), ORANGE, width=1.1)
            ax.text(x + 1.95, 3.85, "m", ha="center", fontsize=11, color=ORANGE, style="italic")
    ax.set_title("A high state of the previous token feeds every block of the next", fontsize=11)
    ax.set_xlim(0, 7.4)
    ax.set_ylim(-0.2, 6)
    ax.axis("off")

    box(zoom, 0.3, 0.3, 1.7, 0.6, "hidden state x", BLUE)
    box(zoom, 5.0, 0.3, 1.9, 0.6, "memory m[t-1]", ORANGE)
    box(zoom, 0.3, 1.5, 1.7, 0.6, "x + g · m", GREEN)
    box(zoom, 5.0, 1.5, 1.9, 0.6, "U_k m,  U_v m", ORANGE)
    box(zoom, 0.1, 2.7, 1.1, 0.6, "W_q n", BLUE)
    box(zoom, 1.4, 2.7, 1.7, 0.6, "W_k n,  W_v n", BLUE)
    box(zoom, 2.3, 3.9, 3.4, 0.7, "k, v = gate · local + gate · memory", GREEN)
    box(zoom, 0.3, 5.1, 6.6, 0.6, "RoPE, attention, MLP: as before;  ordinary KV cache", BLUE)
    arrow(zoom, (1.15, 0.9), (1.15, 1.5), GREY)
    arrow(zoom, (5.0, 0.7), (2.0, 1.75), ORANGE)
    arrow(zoom, (5.95, 0.9), (5.95, 1.5), ORANGE)
    arrow(zoom, (0.8, 2.1), (0.65, 2.7), GREY)
    arrow(zoom, (1.4, 2.1), (2.2, 2.7), GREY)
    arrow(zoom, (2.3, 3.3), (3.2, 3.9), GREY)
    arrow(zoom, (5.9, 2.1), (4.8, 3.9), ORANGE)
    arrow(zoom, (4.0, 4.6), (4.0, 5.1), GREY)
    arrow(zoom, (0.6, 3.3), (0.8, 5.1), GREY)
    zoom.text(2.15, 2.0, "Residual Injection", fontsize=8.5, color=GREEN)
    zoom.text(4.9, 3.1, "KV Projection", fontsize=8.5, color=ORANGE, ha="right")
    zoom.set_title("Inside one block", fontsize=11)
    zoom.set_xlim(0, 7.2)
    zoom.set_ylim(0, 6)
    zoom.axis("off")
    fig.tight_layout()
    fig.savefig(HERE / "architecture.png", dpi=130)


def schedules():
    length = 8
    plans = [
        ("sequential(): the reference", [[t] for t in range(length)]),
        ("baseline()", [list(range(length))]),
        ("interleaved(2)", [list(range(length)), list(range(0, length, 2)), list(range(1, length, 2))]),
        ("refine(2)", [list(range(length))] * 3),
        ("chunked(4)", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ]
    fig, axes = plt.subplots(1, 5, figsize=(13, 3.3), width_ratios=[1] * 5)
    for ax, (title, passes) in zip(axes, plans):
        exact = exact_positions(title, length)
        for row, positions in enumerate(passes):
            starts = row == 0 and not title.startswith(("seq", "chunk"))
            for t in range(length):
                face = "white"
                if t in positions:
                    face = GREY + "66" if starts else ORANGE + "aa"
                    if title.startswith(("seq", "chunk")) and t != positions[0]:
                        face = GREY + "66"
                last = t in positions and not any(t in later for later in passes[row + 1 :])
                ax.add_patch(plt.Rectangle((t, -row), 0.9, 0.8, fc=face, ec=GREY, lw=0.6))
                if last and t in exact:
                    ax.text(t + 0.45, -row + 0.4, "=", ha="center", va="center", fontsize=9)
        ax.set_xlim(-0.3, length + 0.2)
        ax.set_ylim(-7.4, 1.6)
        ax.set_title(title, fontsize=10)
        ax.text(length / 2, 1.05, "positions →", fontsize=7, color=GREY, ha="center")
        ax.axis("off")
    axes[0].text(-0.9, -3, "passes →", rotation=270, fontsize=7, color=GREY, va="center")
    legend = ("grey: zero memory", "orange: the newest memory of the position before", "= : equal to true recurrence")
    fig.text(0.5, 0.05, "        ".join(legend), ha="center", fontsize=9)
    fig.tight_layout(rect=(0, 0.08, 1, 1))
    fig.savefig(HERE / "schedules.png", dpi=130)


def exact_positions(title, length):
    known = {"seq": length, "bas": 1, "int": 2, "ref": 3, "chu": 1}[title[:3]]
    return set(range(known))


if __name__ == "__main__":
    architecture()
    schedules()
