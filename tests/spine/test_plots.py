"""What people look at: labels that can be read, numbers that fit their cells, figures that are also said in words."""

import base64
import itertools

import adjustText
import matplotlib
import nbformat
import numpy as np
import pytest

from utils import plots
from utils.results import Row

matplotlib.use("agg")


@pytest.fixture
def axes():
    figure, axes = plots.figure()
    yield axes
    plots.plt.close(figure)


def a_row(method: str, accuracy: float, stored_bytes: float, **changes) -> Row:
    fields = {"method": method, "label": method, "accuracy": accuracy, "accuracy_ci95": [accuracy - 0.01, accuracy + 0.01], "drop": 0.0,
              "drop_ci95": [0.0, 0.0], "parameters": 1, "nonzero_parameters": 1, "parameters_without_embeddings": 1,
              "stored_bytes": int(stored_bytes), "stored_bytes_without_embeddings": 1, "macs": 1}  # fmt: skip
    return Row(**{**fields, **changes})


BASELINE = a_row("-", 0.83, 9.1e7)


def test_labels_of_neighbouring_points_do_not_overlap(axes):
    rows = [a_row(f"P-{i:02}", 0.8 + 0.001 * (i % 3), 5e7 + 1e4 * i) for i in range(6)]
    rows += [a_row("P-90", 0.6, 9e7), a_row("control", 0.5, 6e7)]
    methods = tuple(row.method for row in rows[:-1])
    plots.plane(axes, rows, BASELINE, "stored_bytes", "MB", "title", {"some": methods, "controls": ("control",)})
    axes.figure.canvas.draw()
    assert "some: 7 points; controls: 1 point; baseline: 1 point." in plots.describe(axes.figure)
    of_methods, of_controls = (next(c for c in axes.collections if c.get_label() == name) for name in ("some", "controls"))
    assert of_controls.get_zorder() < of_methods.get_zorder() and of_controls.get_sizes()[0] < of_methods.get_sizes()[0]
    assert sorted(text.get_text() for text in axes.texts if text.get_text()) == sorted(method[2:] for method in methods)
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    shared = [max(0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0, min(a.y1, b.y1) - max(a.y0, b.y0))
              for a, b in itertools.combinations(boxes, 2)]  # fmt: skip
    assert max(shared) < 0.25 * min(box.width * box.height for box in boxes)


def test_a_plane_without_rows_and_rows_without_speed(axes):
    plots.plane(axes, [], BASELINE, "batch32", "speed", "title", {"some": ("P-01",)})
    plots.plane(axes, [a_row("P-01", 0.8, 1e7)], BASELINE, "batch32", "speed", "title", {"some": ("P-01",)})
    assert axes.texts[:] == []


def test_a_short_log_scale_has_plain_numbers_that_do_not_collide(axes):
    axes.set_xscale("log")
    axes.set_xlim(15, 99)
    plots.plain_numbers(axes.xaxis)
    axes.figure.canvas.draw()
    said = [label.get_text() for label in axes.get_xticklabels(which="both") if label.get_text()]
    assert {"20", "30", "50", "70"} <= set(said) <= {f"{step * ten:g}" for step in (1, 1.5, 2, 3, 5, 7) for ten in (1, 10, 100)}
    boxes = sorted((label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize("right", [1.2, 1.7, 2.1])
def test_a_log_scale_of_less_than_a_factor_three_has_numbers_too(axes, right):
    axes.set_xscale("log")
    axes.scatter([0.76, 1, right], [1, 2, 3])
    plots.plain_numbers(axes.xaxis)
    axes.figure.canvas.draw()
    low, high = axes.get_xlim()
    said = [float(label.get_text()) for label in axes.get_xticklabels(which="both") if label.get_text()]
    assert 1 in said and sum(low <= number <= high for number in said) >= 3


def test_a_legend_below_stays_inside_its_figure(axes):
    for name in ("controls", "structured, common factors", "shared word vectors", "adaptive depth", "one layer"):
        axes.plot([0, 1], [0, 1], label=name)
    plots.legend_below(axes.figure, axes)
    axes.figure.canvas.draw()
    (legend,) = axes.figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= axes.figure.bbox.x1


def test_numbers_stand_in_a_map_only_where_they_can_be_read(axes):
    plots.heatmap(axes, np.full((2, 3), -0.394), [0, 1, 2], [0, 1], "title", "unit", 2, vmin=-1, vmax=1)
    assert {text.get_text() for text in axes.texts} == {"-0.39"}
    assert all(text.get_fontsize() >= 9 for text in axes.texts)


@pytest.mark.parametrize(("columns", "expected"), [(10, {"-0.4"}), (40, set())])
def test_crowded_maps_drop_digits_and_then_numbers(axes, columns, expected):
    plots.heatmap(axes, np.full((2, columns), -0.394), list(range(columns)), [0, 1], "title", "unit", 2, vmin=-1, vmax=1)
    assert {text.get_text() for text in axes.texts} == expected


def test_a_map_whose_ticks_are_thinned_is_still_said_in_words(axes):
    values = np.zeros((2, 40))
    values[1, 39] = 3.0
    plots.heatmap(axes, values, list(range(40)), ["a", "b"], "title", "unit", 1)
    axes.figure.canvas.draw()
    assert len(axes.get_xticks()) == 20 and "lowest 0 at a, 0, highest 3 at b, 39" in plots.describe(axes.figure)


def test_cells_without_a_number_stay_empty(axes):
    plots.heatmap(axes, np.array([[1.0, np.nan]]), ["a", "b"], ["c"], "title", "unit", vmin=0, vmax=1)
    assert [text.get_text() for text in axes.texts] == ["1.00"]


@pytest.mark.parametrize(("columns", "width"), [(1, 5.0), (1, 6.6), (2, 6.0), (3, 4.6)])
def test_text_has_nine_points_in_a_column_of_720_pixels(columns, width):
    figure, _ = plots.figure(1, columns, width=width)
    shrunk = min(1.0, 720 / (figure.get_figwidth() * plots.DPI))
    pixels = plots.SMALL * plots.plt.rcParams["font.size"] * plots.DPI / 72 * shrunk
    assert pixels >= 9 * 96 / 72
    plots.plt.close(figure)


def test_a_curve_shows_how_sure_it_is(axes):
    plots.curves(axes, [0, 1], {"a": [50.0, 60.0]}, "x (s)", "y (%)", "Title", error=3.6)
    assert axes.collections[0].get_paths()[0].get_extents().ymin == pytest.approx(46.4)
    text = plots.describe(axes.figure)
    low, high, left, right = *axes.get_ylim(), *axes.get_xlim()
    ranges = f"y (%) from {low:.3g} to {high:.3g} against x (s) from {left:.3g} to {right:.3g}"
    assert low < 46.4 and high > 63.6 and text == f"Title ({ranges}): a from 50 to 60."


def test_a_figure_in_words_follows_its_data():
    figure, panels = plots.figure(1, 3)
    plots.curves(panels[0], [0, 1, 2], {"up and down": [1.0, 9.0, 2.0]}, "x", "y", "Lines")
    panels[1].bar(["a", "b"], [3.0, 4.0])
    panels[1].set_title("Bars")
    plots.heatmap(panels[2], np.array([[1.0, 5.0]]), ["left", "right"], ["row"], "Map", "unit")
    figure.canvas.draw()
    text = plots.describe(figure)
    assert "up and down from 1 to 2 (lowest 1, highest 9)" in text and "bars a: 3, b: 4" in text
    assert "map of 1 × 2, lowest 1 at row, left, highest 5 at row, right" in text
    plots.plt.close(figure)


def test_bars_carry_the_names_of_their_axis_and_histograms_are_summed_up(axes):
    axes.barh(np.arange(2) + 0.2, [3.0, 4.0], 0.4, label="speed")
    axes.set_yticks([0, 1], ["dense", "int8"])
    assert "speed bars dense: 3, int8: 4" in plots.describe(axes.figure)
    axes.clear()
    axes.hist([0.5] * 7 + list(range(20)), bins=20, range=(0, 20))
    assert "20 bars from 0.5 to 19.5, the highest 8 at 0.5" in plots.describe(axes.figure)


def test_colours_stand_out_from_white_and_a_ninth_series_from_the_first(axes):
    def luminance(color: str) -> float:
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)]
        return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))

    assert min(1.05 / (luminance(color) + 0.05) for color in plots.COLORS) >= 3  # WCAG's bar for parts of a picture
    plots.curves(axes, [0, 1], {str(i): [i, i] for i in range(16)}, "x", "y", "title")
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 16
    families = {str(i): (f"P-{i:02}",) for i in range(16)}
    axes.clear()
    plots.plane(
        axes, [a_row(f"P-{i:02}", 0.8, 1e7 + 1e6 * i) for i in range(16)], BASELINE, "stored_bytes", "MB", "title", families
    )
    clouds = [cloud for cloud in axes.collections if cloud.get_label() in families]
    looks = {(*cloud.get_facecolor()[0], cloud.get_paths()[0].vertices.tobytes()) for cloud in clouds}
    assert len(clouds) == len(looks) == 16


def test_labels_of_a_crowded_front_keep_apart_however_busy_the_machine(monkeypatch):
    megabytes = (9.9, 14.2, 14.2, 15.6, 15.6, 15.7, 15.7, 16.9, 16.9, 18.2, 48.3)
    heights = (71.4, 74.5, 74.8, 78.2, 78.8, 79.3, 79.5, 80.9, 81.8, 82.4, 82.7)
    rows = [a_row(f"Q-{i:02}", y / 100, 1e6 * x) for i, (x, y) in enumerate(zip(megabytes, heights, strict=True))]
    drawn = np.random.default_rng(0)
    others = [a_row("control", y, x) for x, y in zip(drawn.uniform(1.4e7, 9e7, 300), drawn.uniform(0.5, 0.82, 300), strict=True)]
    families = {"some": tuple(row.method for row in rows), "controls": ("control",)}

    def places() -> list:
        figure, panels = plots.figure(1, 2, width=4.5, height=5, sharey=True)
        panels[0].set_xscale("log")
        plots.plane(panels[0], [*rows, *others], BASELINE, "stored_bytes", "MB", "title", families, rows)
        boxes = [text.get_window_extent() for text in panels[0].texts if text.get_text()]
        plots.plt.close(figure)
        return boxes

    boxes = places()
    monkeypatch.setattr(adjustText, "timer", itertools.count().__next__)  # a second between one look at the clock and the next
    assert len(boxes) == len(rows)
    assert not [(i, k) for i, box in enumerate(boxes) for k in range(i) if box.overlaps(boxes[k])]
    assert all(np.allclose(box.bounds, again.bounds) for box, again in zip(boxes, places(), strict=True))


def test_show_gives_image_alt_text_and_words_that_nbconvert_writes(monkeypatch):
    from nbconvert import HTMLExporter

    shown = []
    monkeypatch.setattr(plots, "display", lambda data, raw=False, metadata=None: shown.append((data, metadata)))
    figure, axes = plots.figure()
    plots.curves(axes, [0, 1], {"<a>": [1.0, 2.0]}, "x", "y", "Title")
    plots.show(figure, alt="And more.")
    (image, metadata), (words, _) = shown
    description = "Title (y from 0.95 to 2.05 against x from -0.05 to 1.05): <a> from 1 to 2. And more."
    assert metadata["image/png"]["alt"] == image["text/plain"] == description and not plots.plt.get_fignums()

    data = {**image, "image/png": base64.b64encode(image["image/png"]).decode()}
    outputs = [nbformat.v4.new_output("display_data", data=data, metadata=metadata),
               nbformat.v4.new_output("display_data", data={"text/html": words.data})]  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])
    pages = {name: HTMLExporter(template_name=name).from_notebook_node(notebook)[0] for name in ("classic", "lab")}
    escaped = description.replace("<a>", "&lt;a&gt;")
    assert f'alt="{escaped}"' in pages["classic"]
    assert all(page.count("<img ") == 1 and f"</summary>{escaped}</details>" in page for page in pages.values())


def test_series_with_error_bars_are_told_by_their_names(axes):
    axes.errorbar([1, 2, 3], [4.0, 9.0, 2.0], [0.1, 0.2, 0.3], label="dense")
    axes.errorbar([1], [5.0], [0.1], label="_internal")
    text = plots.describe(axes.figure)
    assert "dense from 4 to 2 (lowest 2, highest 9)" in text and "internal" not in text
