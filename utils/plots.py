"""One look for all figures: colours that colour-blind readers can tell apart, units on the axes, legends beside the data."""

import re
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def figure(
    rows: int = 1, columns: int = 1, width: float = 6.0, height: float = 3.6, **options
) -> tuple[Figure, np.ndarray | Axes]:
    """Axes in the suite's style; `width` and `height` are inches per panel."""
    plt.rcParams.update({"axes.prop_cycle": plt.cycler(color=COLORS), "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 80,
                         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "font.size": 10})  # fmt: skip
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", **options)


def legend_outside(axes: Axes, **options) -> None:
    """A legend to the right of the axes, where it hides nothing."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, **options)


def curves(axes: Axes, x: Iterable[float], series: dict[str, list[float]], xlabel: str, ylabel: str, title: str) -> None:
    """One line per series, told apart by colour and marker."""
    for number, (name, values) in enumerate(series.items()):
        style = "-" if number < 8 else "--"  # a ninth series repeats the first colour
        axes.plot(list(x), values, style, marker=MARKERS[number % 8], color=COLORS[number % 8], markersize=5, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)


def heatmap(
    axes: Axes, values: np.ndarray, xlabels: list, ylabels: list, title: str, unit: str, digits: int = 2, **options
) -> None:
    """A labelled matrix of numbers; `options` go to imshow."""
    image = axes.imshow(values, aspect="auto", **{"cmap": "cividis", **options})
    axes.set_xticks(range(len(xlabels)), xlabels, rotation=40, ha="right")
    axes.set_yticks(range(len(ylabels)), ylabels)
    axes.set_title(title)
    axes.grid(False)
    crowded = len(xlabels) > 8
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            shade = "black" if value > middle else "white"
            text = f"{value:.{digits}f}"
            text = re.sub(r"^(-?)0\.(?=\d\d)", r"\1.", text) if crowded else text
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=shade)
    axes.figure.colorbar(image, ax=axes, label=unit, shrink=0.9)


def plane(
    axes: Axes, rows: list[dict], baseline: dict, x: str, xlabel: str, title: str, families: dict[str, tuple[str, ...]]
) -> None:
    """Accuracy against a cost: one point per row, one colour and marker per family, the baseline as a cross.

    `x` is `stored_bytes`, or `batch1` / `batch32` of the latency ratio. `families` maps a name to method ids.
    """
    places, names = [], []
    for number, (name, methods) in enumerate(families.items()):
        chosen = [r for r in rows if r["method"] in methods and (x == "stored_bytes" or r["latency_ratio"])]
        values = [r["stored_bytes"] / 1e6 if x == "stored_bytes" else r["latency_ratio"][x] for r in chosen]
        heights = [100 * r["accuracy"] for r in chosen]
        axes.scatter(values, heights, marker=MARKERS[number % 8], color=COLORS[number % 8], s=34, label=name, zorder=3)
        places += zip(values, heights, strict=True)
        names += [axes.text(value, top, r["method"][2:], fontsize=7)
                  for r, value, top in zip(chosen, values, heights, strict=True) if r["method"] != "control"]  # fmt: skip
    origin = baseline["stored_bytes"] / 1e6 if x == "stored_bytes" else 1.0
    axes.scatter([origin], [100 * baseline["accuracy"]], marker="+", color="black", s=90, label="baseline", zorder=4)
    axes.axhline(100 * baseline["accuracy"], color="black", linewidth=0.7, linestyle=":")
    axes.set(xlabel=xlabel, ylabel="validation accuracy (%)", title=title)
    axes.figure.canvas.draw()  # labels are moved on the page, so the page must be laid out
    adjust_text(names, *zip(*places, strict=True), ax=axes, time_lim=0.25, arrowprops={"arrowstyle": "-", "color": "gray"})
