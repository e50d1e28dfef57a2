"""Curves as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from benchmarks.curves import Curve

CURVES = Path(__file__).with_name("curves")


def draw(curve: Curve, series: dict[str, list[list[float]]]) -> Path:
    """Draw a curve, the abscissa logarithmic, and give the file it is in."""
    # The same points are the same file.
    mpl.rcParams.update({"svg.hashsalt": curve.name, "font.size": 8})
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes: Any = figure.subplots()
    for name, points in series.items():
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker="o", markersize=3.5, linewidth=1.2, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in series.values() for point in points})
    # Those that stand apart.
    shown = [tick for tick, last in zip(ticks, [0.0, *ticks], strict=False) if tick >= 1.5 * last]
    axes.set_xticks(shown)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}".replace(",", " ")))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y)
    axes.grid(visible=True, linewidth=0.3)
    if len(series) > 1:
        axes.legend(frameon=False)
    CURVES.mkdir(exist_ok=True)
    path = CURVES / f"{curve.name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
