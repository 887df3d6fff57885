"""What people look at: labels that can be read, numbers that fit their cells."""

import itertools

import matplotlib
import numpy as np
import pytest

from utils import plots

matplotlib.use("agg")


@pytest.fixture
def axes():
    figure, axes = plots.figure()
    yield axes
    plots.plt.close(figure)


def test_labels_of_neighbouring_points_do_not_overlap(axes):
    rows = [{"method": f"P-{i:02}", "accuracy": 0.8 + 0.001 * (i % 3), "stored_bytes": 5e7 + 1e4 * i} for i in range(6)]
    rows += [
        {"method": "P-90", "accuracy": 0.6, "stored_bytes": 9e7},
        {"method": "control", "accuracy": 0.5, "stored_bytes": 6e7},
    ]
    baseline = {"accuracy": 0.83, "stored_bytes": 9.1e7}
    methods = tuple(row["method"] for row in rows[:-1])
    plots.plane(axes, rows, baseline, "stored_bytes", "MB", "title", {"some": methods, "controls": ("control",)})
    axes.figure.canvas.draw()
    assert sorted(text.get_text() for text in axes.texts if text.get_text()) == sorted(method[2:] for method in methods)
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    shared = [max(0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0, min(a.y1, b.y1) - max(a.y0, b.y0))
              for a, b in itertools.combinations(boxes, 2)]  # fmt: skip
    assert max(shared) < 0.25 * min(box.width * box.height for box in boxes)


@pytest.mark.parametrize(("columns", "digits", "expected"), [(3, 2, "-0.39"), (12, 2, "-.39"), (12, 1, "-0.4")])
def test_crowded_cells_drop_the_zero_before_the_point(axes, columns, digits, expected):
    plots.heatmap(axes, np.full((2, columns), -0.39), list(range(columns)), [0, 1], "title", "unit", digits, vmin=-1, vmax=1)
    assert {text.get_text() for text in axes.texts} == {expected}


def test_cells_without_a_number_stay_empty(axes):
    plots.heatmap(axes, np.array([[1.0, np.nan]]), ["a", "b"], ["c"], "title", "unit", vmin=0, vmax=1)
    assert [text.get_text() for text in axes.texts] == ["1.00"]
