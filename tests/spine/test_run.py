"""A run can be stopped, killed, damaged and gone on with; it never shares its output, and never leaves a process behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from utils import CompanionError, notebooks
from utils import run as runs

LESSON = """# 09 · Made up

```{code-cell} python
:tags: [parameters]
PAUSE = 0.0
```

```{code-cell} python
import json, os, time
from pathlib import Path

journal, finished = Path(os.environ["COMPANION_JOURNAL"]), json.loads(os.environ["COMPANION_FINISHED"])
rows = [row for row in json.loads(journal.read_text()) if row[0] in finished] if finished else []


def put(section, value):
    rows.append([section, value])
    journal.write_text(json.dumps(rows))
    time.sleep(PAUSE)


class board:
    def close():
        target = Path(os.environ["COMPANION_OUT"]) / "results" / "smoke" / (os.environ["COMPANION_NAME"] + ".json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"rows": rows}))
```

## 1 First

```{code-cell} python
put("1", "a")
print(os.getpid())
```

## 2 Second

```{code-cell} python
put("2", "b")
```

```{code-cell} python
put("2", "c")
```

## 3 Third

```{code-cell} python
put("3", "d")
```

## What to remember

```{code-cell} python
board.close()
```
"""
MOMENTS = range(5) if os.environ.get("COMPANION_ALL_MOMENTS") else (0, 3)  # each costs three kernels
ROWS = [["1", "a"], ["2", "b"], ["2", "c"], ["3", "d"]]
DRIVER = """
import sys
from pathlib import Path
from utils import notebooks, run as runs

lesson, out = Path(sys.argv[1]), Path(sys.argv[2])
notebooks.lesson_path = runs.lesson_path = lambda chapter: lesson
stop = runs.Stop()
with runs.signals(stop):
    outcomes = runs.run_all(sys.argv[3:], runs.Request(out, "smoke", {"PAUSE": 0.4}, resume=True), 1, lambda name, what: None, stop)
for outcome in outcomes:
    print(outcome.name, outcome.ok, outcome.message)
sys.exit(128 + stop.signal if stop.signal else int(not all(outcome.ok for outcome in outcomes)))
"""


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """Write a lesson in place of all chapters; the function returned changes it."""
    path = tmp_path / "lesson.md"
    monkeypatch.setattr(notebooks, "lesson_path", lambda chapter: path)
    monkeypatch.setattr(runs, "lesson_path", lambda chapter: path)

    def write(old: str = "", new: str = "") -> Path:
        path.write_text(LESSON.replace(old, new) if old else LESSON)
        return path

    write()
    return write


def rows_in(out: Path, name: str = "09") -> list:
    return json.loads((out / "results" / "smoke" / f"{name}.json").read_text())["rows"]


def kernels(out: Path) -> list[psutil.Process]:
    """Processes that this run has started and that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(out) in process.environ().get("COMPANION_JOURNAL", "") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(out: Path, seconds: float = 8.0) -> bool:
    end = time.monotonic() + seconds
    while kernels(out) and time.monotonic() < end:
        time.sleep(0.1)
    return not kernels(out)


def request(out: Path, **options) -> runs.Request:
    return runs.Request(out, "smoke", **options)


def test_a_run_leaves_notebook_and_results_and_nothing_else(lesson, tmp_path):
    out = tmp_path / "out"
    outcome = runs.run_chapter("09", request(out))
    assert outcome.ok, outcome.message
    assert sorted(path.name for path in out.iterdir()) == ["09.ipynb", "results"] and rows_in(out) == ROWS
    assert runs.run_chapter("09", request(out, resume=True)).skipped
    assert not runs.run_chapter("09", request(out, resume=True, parameters={"PAUSE": 0.01})).skipped
    lesson('put("3", "d")', 'put("3", "other")')
    assert not runs.run_chapter("09", request(out, resume=True)).skipped and rows_in(out)[-1] == ["3", "other"]


def test_a_failing_cell_costs_itself_and_fails_the_chapter(lesson, tmp_path):
    lesson('put("2", "b")', "1 / 0")
    outcome = runs.run_chapter("09", request(tmp_path))
    assert not outcome.ok and outcome.message == "section 2: ZeroDivisionError: division by zero"
    assert rows_in(tmp_path) == [row for row in ROWS if row != ["2", "b"]] and outcome.notebook.name == "09.ipynb"
    assert not runs.run_chapter("09", request(tmp_path, resume=True)).skipped


def test_an_opening_that_fails_ends_the_chapter(lesson, tmp_path):
    lesson("import json, os, time", "import json, os, time, no_such_module")
    outcome = runs.run_chapter("09", request(tmp_path / "out"))
    assert not outcome.ok and "no_such_module" in outcome.message and outcome.notebook.is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["09.failed.ipynb"]


def test_a_kernel_that_dies_is_named(lesson, tmp_path):
    lesson('put("3", "d")', "os.kill(os.getpid(), 9)")
    outcome = runs.run_chapter("09", request(tmp_path))
    assert not outcome.ok and "section 3: the kernel died" in outcome.message and "--resume" in outcome.message


def test_sections_and_tracks_have_names_of_their_own(lesson, tmp_path):
    outcome = runs.run_chapter("09", request(tmp_path, sections=("2",)))
    assert outcome.ok and outcome.name == "09.section-2" and rows_in(tmp_path, "09.section-2") == ROWS[1:3]
    assert runs.run_chapter("09", request(tmp_path, track="core")).notebook.name == "09.core.ipynb"


def test_going_on_keeps_finished_sections_and_gives_the_same_rows(lesson, tmp_path):
    lesson('put("3", "d")', 'put("3", "lost"); os.kill(os.getpid(), 9)')
    assert not runs.run_chapter("09", request(tmp_path)).ok
    partial = json.loads((tmp_path / ".09" / "partial.ipynb").read_text())
    first = next(cell for cell in partial["cells"] if cell["source"] == ['put("1", "a")\n', "print(os.getpid())"])
    lesson()
    stamp = runs.make_stamp("09", request(tmp_path))
    partial["metadata"]["companion"]["stamp"] = stamp  # as if the third section had died by itself
    (tmp_path / ".09" / "partial.ipynb").write_text(json.dumps(partial))
    assert runs.finished_sections(tmp_path / ".09", stamp) == ["1", "2"]
    assert runs.run_chapter("09", request(tmp_path, resume=True)).ok and rows_in(tmp_path) == ROWS
    after = json.loads((tmp_path / "09.ipynb").read_text())
    assert first["outputs"][0]["text"] in [cell["outputs"][0]["text"] for cell in after["cells"] if cell.get("outputs")]


@pytest.mark.parametrize("damage", ["", "{", '{"rows": 3}'])
def test_damaged_leftovers_count_as_not_there(lesson, tmp_path, damage):
    assert runs.run_chapter("09", request(tmp_path)).ok
    (tmp_path / ".09").mkdir()
    for path in (tmp_path / ".09" / "partial.ipynb", tmp_path / ".09" / "rows.json", tmp_path / "results/smoke/09.json"):
        path.write_text(damage)
    outcome = runs.run_chapter("09", request(tmp_path, resume=True))
    assert outcome.ok and outcome.skipped == (damage == '{"rows": 3}')


def test_the_stamp_knows_the_content_of_data_and_model(tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,label\nfine,1\n")
    first = runs.content_key(str(data))
    assert first == runs.content_key(str(data)) != str(data)
    data.write_text("text,label\nfine,0\n")
    folder = runs.content_key(str(tmp_path))
    assert runs.content_key(str(data)) != first
    (tmp_path / "more").write_text("")
    assert runs.content_key(str(tmp_path)) != folder and runs.content_key("embedded") == "embedded"


def start(lesson: Path, out: Path, *chapters: str) -> subprocess.Popen:
    """The command's own code in a process of its own."""
    arguments = [sys.executable, "-c", DRIVER, str(lesson), str(out), *chapters]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_rows(out: Path, count: int, name: str = "09") -> None:
    journal, end = out / f".{name}" / "rows.json", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if len(json.loads(journal.read_text())) >= count:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.05)
    log = out / f".{name}" / "log"
    raise AssertionError(f"no {count} rows within a minute: {log.read_text() if log.is_file() else 'no child was started'}")


def test_two_runs_on_one_output_do_not_mix(lesson, tmp_path):
    first = start(lesson(), tmp_path, "09")
    wait_for_rows(tmp_path, 1)
    with pytest.raises(CompanionError, match=f"being run into .* already .process {first.pid}."):
        runs.run_chapter("09", request(tmp_path))
    assert first.wait(30) == 0 and rows_in(tmp_path) == ROWS


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_kernels_and_pending_chapters(lesson, tmp_path, number, status):
    process = start(lesson(), tmp_path, "08", "09")
    wait_for_rows(tmp_path, 2, "08")
    process.send_signal(number)
    out, _ = process.communicate(timeout=15)
    assert process.returncode == status and "08 False stopped" in out
    assert gone(tmp_path) and not (tmp_path / ".09").exists()
    again = start(lesson(), tmp_path, "08")
    assert again.wait(30) == 0 and rows_in(tmp_path, "08") == ROWS


def test_a_closed_terminal_stops_nothing(lesson, tmp_path):
    process = start(lesson(), tmp_path, "09")
    wait_for_rows(tmp_path, 1)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(30) == 0 and rows_in(tmp_path) == ROWS


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["command", "child"])
def test_killed_and_gone_on_with_it_gives_the_same_rows(lesson, tmp_path, victim):
    for moment in MOMENTS:
        out = tmp_path / str(moment)
        process = start(lesson(), out, "09")
        wait_for_rows(out, 1) if moment else time.sleep(0.6)
        time.sleep(0.3 * moment)
        child = [p for p in psutil.Process(process.pid).children() if "utils.execute" in " ".join(p.cmdline())]
        if victim == "command":
            process.kill()
        else:
            for other in child:
                other.kill()
        process.communicate(timeout=15)
        assert gone(out), f"moment {moment}: {kernels(out)}"
        again = start(lesson(), out, "09")
        said, _ = again.communicate(timeout=60)
        assert again.returncode == 0 and rows_in(out) == ROWS, f"moment {moment}: {said}"
        assert sorted(path.name for path in out.iterdir()) == ["09.ipynb", "results"]


def test_time_left_follows_earlier_sections(tmp_path, monkeypatch):
    clock = runs.Clock({"opening": 60.0, "1": 120.0, "2": 120.0})
    assert clock.left("P-03 something") == " · about 5 min left"
    monkeypatch.setattr(time, "perf_counter", lambda: clock.started + 360.0)  # twice as slow as before
    assert clock.left("section 2") == " · about 4 min left"
    assert runs.Clock({}).left("section 1") == ""
