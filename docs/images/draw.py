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
            ax.text(x + 1.78, 4.45, "m", ha="center", fontsize=12, color=ORANGE, style="italic")
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
    plans = {
        "sequential(): the reference": [[t] for t in range(length)],
        "baseline()": [list(range(length))],
        "chunked(4)": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "interleaved(2)": [list(range(length)), list(range(0, length, 2)), list(range(1, length, 2))],
        "refine(2)": [list(range(length))] * 3,
    }
    fig = plt.figure(figsize=(12, 4.4))
    grid = fig.add_gridspec(2, 3, left=0.045, right=0.995, top=0.88, bottom=0.13, wspace=0.16, hspace=0.5)
    places = [grid[:, 0], grid[0, 1], grid[0, 2], grid[1, 1], grid[1, 2]]
    for place, (title, passes) in zip(places, plans.items()):
        ax = fig.add_subplot(place)
        draw_passes(ax, title, passes, length)
        rows = length if len(passes) == length else 3
        ax.set_xlim(-0.1, length)
        ax.set_ylim(-rows + 0.75, 0.9)
    for x, color, text in (
        (0.045, GREY + "66", "computed with zero memory"),
        (0.26, ORANGE + "aa", "with the newest memory of the position before"),
        (0.58, "white", "not computed in this pass"),
    ):
        fig.patches.append(plt.Rectangle((x, 0.035), 0.02, 0.04, fc=color, ec=GREY, lw=0.6, transform=fig.transFigure))
        fig.text(x + 0.026, 0.055, text, va="center", fontsize=9.5)
    fig.text(0.81, 0.055, "=  equals true recurrence", va="center", fontsize=9.5)
    fig.savefig(HERE / "schedules.png", dpi=150)


def draw_passes(ax, title, passes, length):
    exact, recurrent = exact_positions(title, length), title.startswith(("seq", "chunk"))
    for row, positions in enumerate(passes):
        for t in range(length):
            receives = t == positions[0] if recurrent else row > 0
            face = "white" if t not in positions else ORANGE + "aa" if receives else GREY + "66"
            ax.add_patch(plt.Rectangle((t, -row), 0.92, 0.8, fc=face, ec=GREY, lw=0.6))
            last = t in positions and not any(t in later for later in passes[row + 1 :])
            if last and t in exact:
                ax.text(t + 0.46, -row + 0.4, "=", ha="center", va="center", fontsize=10)
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_yticks([0.4 - row for row in range(len(passes))], [f"pass {row}" for row in range(len(passes))], fontsize=8)
    ax.set_xticks([t + 0.46 for t in range(length)], [str(t) for t in range(length)], fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelcolor="#606060", pad=1)
    for spine in ax.spines.values():
        spine.set_visible(False)


def exact_positions(title, length):
    known = {"seq": length, "bas": 1, "int": 2, "ref": 3, "chu": 1}[title[:3]]
    return set(range(known))


if __name__ == "__main__":
    architecture()
    schedules()
