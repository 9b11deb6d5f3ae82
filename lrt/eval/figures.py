"""How figures look: one style for the curves of a run and for reports."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrt.tables import Table

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axis import Axis

# Okabe and Ito: told apart by people who see colours differently, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MODE_COLOURS = {"zero": "#8C8C8C", "parallel": "#56B4E9", "decode": "#0072B2"}
STYLE: Table = {
    "axes.axisbelow": True, "axes.edgecolor": "#606060", "axes.grid": True, "axes.labelsize": 10,
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.titleweight": "bold", "figure.titlesize": 13, "font.size": 9.5,
    "grid.color": "#E4E4E4", "grid.linewidth": 0.8, "legend.fontsize": 9, "legend.frameon": False,
    "lines.linewidth": 1.6, "savefig.dpi": 150, "savefig.facecolor": "white", "xtick.color": "#606060",
    "ytick.color": "#606060", "xtick.labelcolor": "black", "ytick.labelcolor": "black",
}  # fmt: skip


@contextlib.contextmanager
def figure(path: Path, *, rows: int, columns: int, size: tuple[float, float], title: str = "") -> Iterator[np.ndarray]:
    """Axes to draw into, as a two-dimensional array; the PNG is written at the end.

    Args:
        path: of the PNG.
        rows, columns: of panels.
        size: in inches.
        title: of the whole figure.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib import style
    except ImportError:
        raise ValueError('figures need matplotlib: pip install -e ".[plot]" in a checkout of lrt') from None
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context({**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        drawn = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.subplots(rows, columns, squeeze=False)
        if title:
            drawn.suptitle(title, x=0.01, ha="left", weight="bold")
        yield axes
        drawn.savefig(path)


def amount(value: float, unit: str = "") -> str:
    """A large number for people: 168M, 1.2e+15 as 1.2P."""
    if not value:
        return f"0{unit}"
    power = min(6, max(0, int(math.floor(math.log10(abs(value)) / 3))))
    scaled = value / 1000**power
    digits = 0 if abs(scaled) >= 100 or scaled == round(scaled) else 1
    return f"{scaled:.{digits}f}{('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}{unit}"


def label_amounts(axis: Axis, values: Sequence[float], *, log: bool, form: Callable[[float], str] = amount) -> None:
    """Ticks of an axis of amounts as people write them; a logarithmic axis has them at round numbers.

    Args:
        axis: x or y axis of matplotlib.
        values: that are drawn, all above 0.
        log: whether the axis is logarithmic.
        form: of a tick's label.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    if log:
        low, high = min(values), max(values)
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            ticks = [k * 10.0**d for d in decades for k in steps if 0.85 * low <= k * 10.0**d <= 1.18 * high]
            if len(ticks) >= 3:
                break
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
    else:
        ticks = list(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(*limits(values, share=0.1)))
        # too close together to be told apart: the amounts themselves
        if len({form(tick) for tick in ticks}) < len(ticks):
            ticks = list({form(value): value for value in values}.values())
        axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def label_counts(axis: Axis) -> None:
    """Ticks of an axis of steps, which are whole numbers: at most seven, where its limits put them.

    Args:
        axis: x or y axis of matplotlib.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))


def power_of_ten(value: float) -> str:
    """A very large number for people: 5e14."""
    return f"{value:.1e}".replace(".0e", "e").replace("e+", "e")


def limits(values: Sequence[float], *, share: float = 0.08) -> tuple[float, float]:
    """From the least to the most of some values, with a little room."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.01 * abs(high) or 1.0
    return low - room, high + room


def smooth(values: Sequence[float], *, window: int) -> list[float]:
    """Means over a window that ends at each value."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
