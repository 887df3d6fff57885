"""The catalogue says only what is there."""

import csv

import pytest

from utils import CompanionError, catalogue, notebooks

CHAPTERS = catalogue.chapters()


def test_catalogue_ids_are_unique_and_every_survey_method_is_there():
    with open(catalogue.CSV, newline="", encoding="utf-8") as file:
        entries = list(csv.DictReader(file))
    assert len({entry["id"] for entry in entries}) == len(entries) == 156
    assert sum(entry["chapter"] == "01_pruning" for entry in entries) == 33


@pytest.mark.parametrize("method", [m for m in catalogue.load() if m.chapter in CHAPTERS], ids=lambda m: m.id)
def test_methods_of_written_chapters_are_complete(method):
    assert catalogue.missing(method) == []


def test_only_a_measured_row_may_wait(monkeypatch):
    method = catalogue.load("01_pruning")[0]
    method.rows, method.tests = 0, []
    monkeypatch.setattr(notebooks, "stale", dict)
    assert catalogue.missing(method) == ["test", "measured row"]
    monkeypatch.setattr(notebooks, "stale", lambda: {"01_pruning": "the rerun is due"})
    assert catalogue.missing(method) == ["test"]


def test_an_unknown_chapter():
    with pytest.raises(CompanionError, match="unknown chapter '99_nothing'"):
        catalogue.load("99_nothing")


def test_tests_are_found_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    (tmp_path / "tests" / "pruning").mkdir(parents=True)
    (tmp_path / "tests" / "test_one.py").write_text('@pytest.mark.method("P-01", "P-02")\ndef test_a():\n    pass\n')
    (tmp_path / "tests" / "pruning" / "test_two.py").write_text('@pytest.mark.method("P-02")\nclass TestB:\n    pass\n')
    assert catalogue.find_tests() == {"P-01": ["test_one.py::test_a"], "P-02": ["test_two.py::TestB", "test_one.py::test_a"]}


def test_tracks_follow_the_markers(tmp_path, monkeypatch):
    lesson = tmp_path / "lesson.md"
    lesson.write_text("## 1 One\n### A (X-01)\n### B (X-02)\n<!-- extra -->\n## 2 Two (X-03)\n<!-- extra -->\n### C (X-04a, X-04b)\n"
                      "### D (X-05)\n<!-- core -->\n### E (X-06)\n")  # fmt: skip
    monkeypatch.setattr(catalogue, "lesson_path", lambda chapter: lesson)
    extra = {id for id, track in catalogue.tracks("made up").items() if track == "extra"}
    assert extra == {"X-02", "X-03", "X-04a", "X-04b", "X-06"} and catalogue.tracks("made up")["X-05"] == "core"


@pytest.mark.parametrize("text", ["", '{"rows": [', "[]", '{"claims": []}'])
def test_a_damaged_results_file_is_one_clear_line(tmp_path, monkeypatch, text):
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    file = tmp_path / "notebooks" / "results" / "cpu" / "one.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"rows": [{"method": "P-01"}, {"method": "P-01"}]}')
    assert catalogue.count_rows() == {"P-01": 2}
    file.write_text(text)
    with pytest.raises(CompanionError, match=r"one.json is no readable results file"):
        catalogue.count_rows()
