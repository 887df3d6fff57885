"""One look for all figures: colours that colour-blind readers can tell apart, text that can be read at the width of a notebook
(nine points or more in a column of 720 pixels), units on the axes, and a description in words computed from the data."""

import html
import io
from collections.abc import Container, Iterable

import matplotlib.pyplot as plt
import numpy as np
from adjustText import adjust_text
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.category import StrCategoryLocator
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from utils.results import Row

# Okabe and Ito, with ochre, grey and wine for their yellows and their light blue, which are too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07400", "#7F7F7F", "#000000", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDEST = 9.0  # inches; wider pictures are shrunk to the column until their text cannot be read
DPI = 100
SMALL = 0.9  # of the font size, for numbers inside a figure
MANY = 12  # bars; more are summed up in a description


def font_size(width: float) -> float:
    """Points that a picture of `width` inches needs for text of nine points or more once it is shrunk to a column of 720 pixels."""
    return max(10.0, 1.34 * width)


def figure(
    rows: int = 1, columns: int = 1, width: float = 6.0, height: float = 3.6, **options
) -> tuple[Figure, np.ndarray | Axes]:
    """Axes in the suite's style; `width` and `height` are inches per panel, and all panels together keep to `WIDEST`."""
    total = min(WIDEST, width * columns)
    plt.rcParams.update({"axes.prop_cycle": plt.cycler(color=COLORS), "axes.grid": True, "grid.alpha": 0.3, "figure.dpi": DPI,
                         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
                         "font.size": font_size(total), "axes.titlesize": "medium"})  # fmt: skip
    return plt.subplots(rows, columns, figsize=(total, height * rows), layout="constrained", **options)


def show(figure: Figure, alt: str = "") -> None:
    """Display a figure once, with a description computed from its data (and `alt` after it).

    The description is the alt text of the image. Of nbconvert 7 only the template `classic` writes it into a page; the template `lab`
    says that there is no description, and JupyterLab 4 writes no alt text for any image. So the description also follows the figure as
    text that can be unfolded, in every front end.
    """
    description = " ".join(filter(None, [describe(figure), alt]))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    display({"image/png": buffer.getvalue(), "text/plain": description}, raw=True, metadata={"image/png": {"alt": description}})
    display(HTML(f"<details><summary>The figure in words</summary>{html.escape(description)}</details>"))


# --- a figure in words ----------------------------------------------------------------------------------------------


def describe(figure: Figure) -> str:
    """All panels of a figure in words: titles, axes, and for every series where it starts, ends, and lies highest and lowest."""
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    title = figure.get_suptitle()
    return " ".join(filter(None, [title and f"{title}.", *(describe_panel(axes) for axes in panels)]))


def describe_panel(axes: Axes) -> str:
    """One panel in words."""
    axis_names = " against ".join(filter(None, [describe_axis(axes, "y"), describe_axis(axes, "x")]))
    head = (axes.get_title() or "Panel") + (f" ({axis_names})" if axis_names else "")
    lines = [describe_line(line.get_label(), line.get_xdata(), line.get_ydata()) for line in axes.lines if not_internal(line)]
    bars = [describe_bars(axes, container) for container in axes.containers if hasattr(container, "patches")]
    lines += [
        describe_line(one.get_label(), *one.lines[0].get_data())
        for one in axes.containers
        if isinstance(one, ErrorbarContainer) and one.lines[0] is not None and not_internal(one)
    ]  # their lines have no names
    clouds = [f"{cloud.get_label()}: {count} point{'s' * (count > 1)}" for cloud in axes.collections
              if not_internal(cloud) and (count := len(cloud.get_offsets()))]  # fmt: skip
    maps = [describe_map(axes, image.get_array()) for image in axes.images]
    return f"{head}: {'; '.join([*lines, *bars, *clouds, *maps])}."


def describe_axis(axes: Axes, which: str) -> str:
    """The label of the `x` or `y` axis and the range it shows; maps and axes with names have no range."""
    axis: Axis = getattr(axes, f"{which}axis")
    label = axis.get_label_text()
    if not label or axes.images or isinstance(axis.get_major_locator(), FixedLocator | StrCategoryLocator):
        return label
    low, high = sorted(axis.get_view_interval())
    return f"{label} from {low:.3g} to {high:.3g}"


def not_internal(artist: object) -> bool:
    """Whether an artist has a name that a reader sees."""
    label = str(artist.get_label())
    return bool(label) and not label.startswith("_")


def describe_line(name: str, x: Iterable, y: Iterable) -> str:
    """First, last, lowest and highest value of a line."""
    values = np.asarray(list(y), dtype=float)
    if not np.isfinite(values).any():
        return f"{name} without values"
    first, last, low, high = values[0], values[-1], np.nanmin(values), np.nanmax(values)
    return f"{name} from {first:.3g} to {last:.3g}" + (f" (lowest {low:.3g}, highest {high:.3g})" if low < min(first, last)
                                                       or high > max(first, last) else "")  # fmt: skip


def describe_bars(axes: Axes, container: object) -> str:
    """The values of a group of bars with their places; of many bars, as in a histogram, only their ends and the highest."""
    sideways = getattr(container, "orientation", "vertical") == "horizontal"
    values = [bar.get_width() if sideways else bar.get_height() for bar in container.patches]
    centers = [bar.get_y() + bar.get_height() / 2 if sideways else bar.get_x() + bar.get_width() / 2 for bar in container.patches]
    places = [name_at(axes.yaxis if sideways else axes.xaxis, center) for center in centers]
    name = f"{container.get_label()} " if not_internal(container) else ""
    if len(values) > MANY:
        high = int(np.argmax(values))
        return f"{name}{len(values)} bars from {places[0]} to {places[-1]}, the highest {values[high]:.3g} at {places[high]}"
    return f"{name}bars {', '.join(f'{place}: {value:.3g}' for place, value in zip(places, values, strict=True))}"


def name_at(axis: Axis, place: float) -> str:
    """The nearest tick's name where an axis has names, the number otherwise."""
    if not isinstance(axis.get_major_locator(), FixedLocator | StrCategoryLocator):
        return f"{place:.3g}"
    ticks = np.asarray(axis.get_majorticklocs())
    return axis.get_major_formatter().format_ticks(ticks)[int(np.abs(ticks - place).argmin())]


def describe_map(axes: Axes, values: np.ndarray) -> str:
    """Where a map is highest and lowest."""
    values = np.ma.filled(np.ma.masked_invalid(values), np.nan)
    names = [{round(place): label.get_text() for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)}
             for axis in (axes.yaxis, axes.xaxis)]  # fmt: skip
    places = [np.unravel_index(find(values), values.shape) for find in (np.nanargmin, np.nanargmax)]
    low, high = (f"{values[place]:.3g} at " + ", ".join(own.get(int(index)) or str(index) for own, index in zip(names, place, strict=True))
                 for place in places)  # fmt: skip
    return f"map of {values.shape[0]} × {values.shape[1]}, lowest {low}, highest {high}"


# --- kinds of figures -----------------------------------------------------------------------------------------------


def legend_outside(axes: Axes, **options) -> None:
    """A legend to the right of the axes, where it hides nothing."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, **options)


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, under them."""
    handles, labels = axes.get_legend_handles_labels()
    column = (max(map(len, labels), default=1) + 5) * 0.55 * plt.rcParams["font.size"] / 72  # inches, with marker and gap
    columns = max(1, min(4, int(figure.get_figwidth() / column)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a series; a ninth one has the first one's colour, but not its marker."""
    return COLORS[number % len(COLORS)], MARKERS[(number + number // len(COLORS)) % len(MARKERS)]


def curves(
    axes: Axes,
    x: Iterable[float],
    series: dict[str, list[float]],
    xlabel: str,
    ylabel: str,
    title: str,
    error: float | None = None,
) -> None:
    """One line per series, told apart by colour and marker; `error` is one standard error of a point, drawn as a band."""
    places = list(x)
    for number, (name, values) in enumerate(series.items()):
        color, marker = look(number)
        style = "-" if number < len(COLORS) else "--"
        axes.plot(places, values, style, marker=marker, color=color, markersize=5, label=name)
        if error is not None:
            low, high = np.asarray(values) - error, np.asarray(values) + error
            axes.fill_between(places, low, high, color=color, alpha=0.10, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)


def heatmap(
    axes: Axes, values: np.ndarray, xlabels: list, ylabels: list, title: str, unit: str, digits: int = 2, **options
) -> None:
    """A labelled matrix; numbers stand in it where they fit at a readable size. `options` go to imshow."""
    image = axes.imshow(values, aspect="auto", **{"cmap": "cividis", **options})
    long = any(len(str(label)) > 2 for label in xlabels)
    axes.set_xticks(range(len(xlabels)), xlabels, rotation=40 if long else 0, ha="right" if long else "center")
    axes.set_yticks(range(len(ylabels)), ylabels)
    axes.set_title(title)
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, label=unit, shrink=0.9)
    size = SMALL * plt.rcParams["font.size"]
    panels = max(1, sum(other.get_label() != "<colorbar>" for other in axes.figure.axes))
    share = 0.62 if max(len(str(label)) for label in ylabels) < 5 else 0.42  # of a panel, colour bar and names taken off
    room = 72 * share * axes.figure.get_figwidth() / panels / len(xlabels)  # points per cell
    if not long and 0.6 * size * (max(len(str(label)) for label in xlabels) + 0.5) > room:
        axes.set_xticks(range(0, len(xlabels), 2), xlabels[::2])
    wanted = digits
    while digits and number_width(values, digits, size) > room:
        digits -= 1
    if number_width(values, digits, size) > room or (digits == 0 < wanted and np.nanmax(values) - np.nanmin(values) < 5):
        return
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            shade = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=size, color=shade)


def plain_numbers(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of every decade of a log scale, where powers of ten would collide or be none; where fewer than three
    of them fall on it at more places, and on the shortest scales at equal steps."""
    low, high = sorted(axis.get_view_interval())
    choices = LogLocator(subs=(1, 2, 5)), LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
    enough = (marks for marks in choices if sum(low <= place <= high for place in marks.tick_values(low, high)) > 2)
    axis.set_major_locator(next(enough, MaxNLocator(5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def number_width(values: np.ndarray, digits: int, size: float) -> float:
    """Points that the widest number of a map takes, with a little air."""
    return 0.6 * size * (max(len(f"{value:.{digits}f}") for value in np.ravel(values)) + 0.3)


def plane(
    axes: Axes,
    rows: list[Row],
    baseline: Row,
    x: str,
    xlabel: str,
    title: str,
    families: dict[str, tuple[str, ...]],
    named: Container[str] | list[Row] | None = None,
) -> None:
    """Accuracy against a cost: one point per row, one colour and marker per family, the baseline as a cross with its interval.

    `x` is `stored_bytes`, or `batch1` / `batch32` of the latency ratio. `families` maps a name to method ids. With `named`, a list of rows,
    only these have their ids beside them; with a set of method ids, only the best row of each of these.
    """  # fmt: skip

    def cost(row: Row) -> float | None:
        return row.stored_bytes / 1e6 if x == "stored_bytes" else (row.latency_ratio or {}).get(x)

    places, names = [], []
    for number, (name, methods) in enumerate(families.items()):
        chosen = [row for row in rows if row.method in methods and cost(row) is not None]
        heights = [100 * row.accuracy for row in chosen]
        color, marker = look(number)
        size, order = (14, 2) if set(methods) == {"control"} else (34, 3)  # controls lie behind, and hide no method
        axes.scatter([cost(row) for row in chosen], heights, marker=marker, color=color, s=size, label=name, zorder=order)
        places += [(cost(row), height) for row, height in zip(chosen, heights, strict=True)]
        said = [row for row in chosen if row.method != "control"]
        if isinstance(named, list):
            said = [row for row in said if row in named]
        elif named is not None:
            best = {row.method: row for row in sorted(said, key=lambda row: row.accuracy)}
            said = [row for method, row in best.items() if method in named]
        names += [axes.text(cost(row), 100 * row.accuracy, row.method[2 * (named is None) :], fontsize=SMALL * plt.rcParams["font.size"])
                  for row in said]  # fmt: skip
    low, high = (100 * end for end in baseline.accuracy_ci95)
    origin = cost(baseline) if x == "stored_bytes" else 1.0
    axes.axhspan(low, high, color="black", alpha=0.06, linewidth=0)
    axes.axhline(100 * baseline.accuracy, color="black", linewidth=0.7, linestyle=":")
    axes.scatter([origin], [100 * baseline.accuracy], marker="+", color="black", s=90, label="baseline", zorder=4)
    axes.set(xlabel=xlabel, ylabel="validation accuracy (%)", title=title)
    if axes.get_xscale() == "log":
        plain_numbers(axes.xaxis)
    if names:
        axes.figure.canvas.draw()  # labels are moved on the page, so the page must be laid out
        adjust_text(names, *zip(*places, strict=True), ax=axes, iter_lim=100, expand=(1.25, 1.4), force_text=(0.3, 0.6),
                    force_static=(0.2, 0.4), arrowprops={"arrowstyle": "-", "color": "gray"})  # fmt: skip
