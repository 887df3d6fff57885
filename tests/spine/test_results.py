"""Rows say the same in every rendering; results files are whole or an error; reports compare machines and commits."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from utils import CompanionError, notebooks, plots, report, results, run
from utils.claims import Claim, Evidence
from utils.metrics import Estimate
from utils.results import Row


def a_row(**changes) -> Row:
    fields = {"method": "P-20a", "label": "heads by |R|", "accuracy": 0.81, "accuracy_ci95": [0.79, 0.83], "drop": 0.02,
              "drop_ci95": [0.01, 0.035], "parameters": 10, "nonzero_parameters": 8, "parameters_without_embeddings": 5,
              "stored_bytes": 71_000_000, "stored_bytes_without_embeddings": 1, "macs": 345_000_000, "label_loyalty": 0.9,
              "latency_ratio": {"batch1": 1.25, "batch32": 2.0}}  # fmt: skip
    return Row(**{**fields, **changes})


BASELINE = a_row(method="-", label="baseline", accuracy=0.83, latency_ratio=None)


def test_a_row_survives_json_and_unknown_or_missing_entries_are_named():
    row = a_row(against_control={"control": "dense", "difference": -0.01, "ci95": [-0.02, 0.0]}, effect={"cut": 3})
    assert Row.from_dict(json.loads(json.dumps(row.as_dict()))) == row
    with pytest.raises(CompanionError, match="unknown entries: speed_of_light"):
        Row.from_dict({**row.as_dict(), "speed_of_light": 1})
    with pytest.raises(CompanionError, match="incomplete"):
        Row.from_dict({"method": "P-01"})
    with pytest.raises(CompanionError, match="no dictionary"):
        Row.from_dict(["P-01"])


def test_a_row_of_the_first_edition_is_read_without_what_is_new():
    old = a_row().as_dict()
    for name in ("section", "track", "against_control", "part_kinds", "structure", "latency_of"):
        del old[name]
    row = Row.from_dict(old)
    assert (row.section, row.track, row.against_control, row.part_kinds, row.latency_of) == ("", "core", None, [], None)
    assert (row.speed(1), row.speed(32), row.speed(8), a_row(latency_ratio=None).speed(1)) == (1.25, 2.0, None, None)


def test_one_row_three_renderings():
    row = a_row(against_control={"control": "dense", "difference": -0.012, "ci95": [-0.02, 0.001]})
    frame = results.as_frame([row], BASELINE)
    assert frame.loc["P-20a", "drop [95 %]"] == "2.0 [1.0, 3.5]" and frame.loc["-", "drop [95 %]"] == ""
    assert frame.loc["P-20a", "vs dense control"] == "-1.2 [-2.0, 0.1]"
    lines = results.as_markdown([row], BASELINE).splitlines()
    assert len(lines) == 4 and "heads by \\|R\\|" in lines[3]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1  # a bar inside a cell adds no column


def test_the_heading_names_the_batch_sizes_that_were_measured():
    few = a_row(latency_ratio={"batch1": 1.25, "batch4": 2.5})
    assert results.as_frame([few], BASELINE).loc["P-20a", "speed ×1 / ×4"] == "1.25 / 2.50" and few.batches() == [1, 4]
    assert "speed ×1 / ×32" in results.as_frame([a_row(latency_ratio=None), a_row()], BASELINE).columns
    assert results.table([a_row(simulated=True, latency_ratio=None)], BASELINE)[0][-2] == "speed"


AGAINST = {"control": "dense, 30 steps at 0.0001", "difference": -0.012, "ci95": [-0.02, 0.001]}


def test_the_line_after_a_method_says_all_that_was_measured():
    assert a_row(label="short").summary() == (
        "P-20a short: accuracy 81.0 % (drop +2.0 [1.0, 3.5] points), 71.0 MB, speed ×1.25 / ×2.00, loyalty 90 %"
    )
    gain = a_row(drop=-0.004, drop_ci95=[-0.01, 0.001], label_loyalty=None, latency_ratio=None)
    assert gain.summary() == "P-20a heads by |R|: accuracy 81.0 % (drop -0.4 [-1.0, 0.1] points), 71.0 MB"


def test_a_long_line_is_folded_between_facts():
    text = a_row(label="a label as long as the longest of the suite has ever been", against_control=AGAINST).summary()
    assert text.splitlines()[1:] == [
        "    71.0 MB, speed ×1.25 / ×2.00, loyalty 90 %, -1.2 [-2.0, 0.1] points against dense, 30 steps at 0.0001"
    ]
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"simulated": True}, "speed emulated,"),
        ({"latency_of": "baseline"}, "speed as the dense one,"),
        ({"latency_of": "25 % of heads"}, "speed ×1.25 / ×2.00 (timed as 25 % of heads),"),
    ],
)
def test_the_line_says_whose_speed_it_is(changes, said):
    assert said in a_row(**changes).summary()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "1.25 / 2.00"),
        ({"simulated": True}, "emulated"),
        ({"latency_of": "baseline"}, "as dense"),
        ({"latency_ratio": None}, ""),
    ],
)
def test_speeds_in_words(changes, said):
    assert a_row(**changes).speeds() == said


def content(chapter: str = "01_pruning", machine: str = "AMD EPYC, 2 cores", **changes) -> dict:
    claim = Claim(
        "C2", "x", "a paper", "round", [Evidence("a over b", Estimate(2.0, 1.5, 2.5, 3), "above", 1.0)], "supported"
    ).as_dict()
    return {"chapter": chapter, "profile": "cpu", "provenance": {"device": machine}, "baseline": BASELINE.as_dict(),
            "rows": [a_row().as_dict()], "claims": [claim], "wall_seconds": 60, **changes}  # fmt: skip


def test_files_that_are_cut_short_or_foreign_are_clear_errors(tmp_path):
    results.write(tmp_path / "a.json", content())
    assert results.read(tmp_path / "a.json")["chapter"] == "01_pruning"
    kept = content()
    lacking = [{**kept, "rows": {}}, {**kept, "provenance": {}}] + [{k: v for k, v in kept.items() if k != name} for name in kept]
    for damage in ("", "{", "[]", '{"rows": 1}', "\x00\x01", *map(json.dumps, lacking)):
        (tmp_path / "a.json").write_text(damage)
        with pytest.raises(CompanionError, match="results file"):
            results.read(tmp_path / "a.json")
    with pytest.raises(CompanionError, match="no readable results file"):
        results.read(tmp_path / "missing.json")


def test_files_go_where_the_run_says(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_OUT", str(tmp_path))
    assert results.path("01_pruning", "cpu") == tmp_path / "results" / "cpu" / "01_pruning.json"
    monkeypatch.delenv("COMPANION_OUT")
    assert results.path("x", "full") == results.ROOT / "runs" / "results" / "full" / "x.json"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    results.write(tmp_path / "a.json", content())
    before = (tmp_path / "a.json").read_text()
    with pytest.raises(ValueError):
        results.write(tmp_path / "a.json", content(wall_seconds=float("nan")))
    assert (tmp_path / "a.json").read_text() == before


def test_parts_and_other_machines_are_no_record(tmp_path):
    for name in ("02_quantization", "01_pruning", "01_pruning@amd", "01_pruning.core", "01_pruning.section-7"):
        results.write(tmp_path / "results" / "cpu" / f"{name}.json", content(name))
    assert [found["chapter"] for found in results.read_all(tmp_path, "cpu")] == ["01_pruning", "02_quantization"]
    with pytest.raises(CompanionError, match="no results of profile 'full'"):
        results.read_all(tmp_path, "full")


def test_the_record_is_full_where_there_is_one_and_else_cpu(tmp_path):
    for profile, chapter in (("smoke", "00"), ("cpu", "01"), ("cpu", "02"), ("full", "02"), ("full", "03"), ("full", "04@amd")):
        results.write(tmp_path / "results" / profile / f"{chapter}.json", content(chapter, profile=profile))
    found = [(one["chapter"], one["profile"]) for one in results.of_record(tmp_path)]
    assert found == [("01", "cpu"), ("02", "full"), ("03", "full")]
    with pytest.raises(CompanionError, match="no results of profile full or cpu"):
        results.of_record(tmp_path / "nowhere")


def test_machines_lie_side_by_side(tmp_path):
    folder = tmp_path / "results" / "cpu"
    results.write(folder / "01_pruning.json", content())
    other = content(
        machine="Intel Xeon (AMX bf16), 2 cores", rows=[a_row(latency_ratio={"batch1": 3.0, "batch32": 4.0}).as_dict()]
    )
    other["claims"][0] = {**other["claims"][0], "verdict": "contradicted"}
    results.write(folder / "01_pruning@intel.json", other)
    results.write(folder / "01_pruning.section-7.json", content(machine="of a part"))
    assert [found["provenance"]["device"] for found in results.read_all(tmp_path, "cpu")] == ["AMD EPYC, 2 cores"]
    lines = report.side_by_side(tmp_path, "cpu")["01_pruning"]
    assert lines["P-20a heads by |R|"] == {"AMD EPYC, 2 cores": "1.25 / 2.00", "Intel Xeon (AMX bf16), 2 cores": "3.00 / 4.00"}
    assert lines["claim C2"]["Intel Xeon (AMX bf16), 2 cores"] == "contradicted"


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ({"processor": "AMD EPYC", "instructions": ["avx512_vnni", "avx512_bf16", "avx2"], "cores": 2, "gpu": None},
         "AMD EPYC (VNNI, AVX-512 bf16), 2 cores"),
        ({"processor": "AMD EPYC", "instructions": ["avx2"], "cores": 2, "gpu": None}, "AMD EPYC (AVX2), 2 cores"),
        ({"processor": "Xeon", "instructions": ["avx512_vnni", "amx_int8", "amx_bf16", "avx2"], "cores": 1, "gpu": None},
         "Xeon (VNNI, AMX int8, AMX bf16), 1 core"),
        ({"processor": "Apple M3", "instructions": [], "cores": 8, "gpu": None}, "Apple M3, 8 cores"),
        ({"processor": "x", "instructions": [], "cores": 1, "gpu": "NVIDIA H100"}, "NVIDIA H100"),
    ],
)  # fmt: skip
def test_machines_in_words(machine, name):
    assert results.machine_name(machine) == name


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),  # version 2, as a container sees itself
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),  # the group around allows less
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n"}, 4),
        (
            "4:cpu,cpuacct:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "25000\n", "cpu/a/cpu.cfs_period_us": "50000\n"},
            0.5,
        ),  # version 1
        ("4:cpu,cpuacct:/gone\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ("0::/\n", {"cpu.max": "800000 100000\n"}, 4),  # more than there are
        ("0::/\n", {"cpu.max": "fast 0\n"}, 4),
        ("", {}, 4),
    ],
)
def test_a_quota_of_the_control_groups_counts_as_cores(tmp_path, monkeypatch, own, files, cores):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(results, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(results, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(results, "shown_cores", lambda: 4)
    assert results.cores() == cores and results.machine()["cores"] == cores
    assert results.machine_name({**results.machine(), "cores": 0.5}).endswith("0.5 cores")


def test_what_memory_the_control_groups_allow(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "memory.max").write_text("1000\n"), (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "own").write_text("0::/a\n")
    monkeypatch.setattr(results, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(results, "OWN_GROUPS", tmp_path / "own")
    assert results.memory_limits() == [1000]
    monkeypatch.setattr(results, "OWN_GROUPS", tmp_path / "not there")  # no Linux
    assert results.memory_limits() == [] == results.quotas()


def test_the_usual_model_data_and_seed_are_those_of_the_lesson():
    assert results.usual("00_bert_baseline") == {"MODEL": "embedded", "DATASET": "rotten_tomatoes", "SEED": "0"}
    assert results.usual("06_subquadratic_transformers")["DATASET"] == "imdb" and results.usual("99_none") == {}
    for found in results.read_all(notebooks.NOTEBOOKS, "cpu"):
        assert results.unusual(found) == ""


def test_the_page_names_what_is_not_usual():
    found = content(provenance={"device": "x", "parameters": {"MODEL": "embedded", "DATASET": "my.csv", "SEED": 0}})
    assert "\n**01_pruning**, data my.csv (speeds hold for x," in report.chapter(found, ("core",))
    assert "\n**01_pruning** (speeds hold for" in report.chapter(content(), ("core",))


@pytest.mark.parametrize(
    ("flags", "name"),
    [("fma avx2 avx512f", "AMD EPYC avx2"), ("avx2 avx512_bf16 avx512_vnni", "AMD EPYC avx512_vnni avx512_bf16 avx2")],
)
def test_one_processor_name_in_two_precisions_is_two_machines(monkeypatch, flags, name):
    monkeypatch.setattr(results, "processor_facts", lambda: f"model name\t: AMD EPYC\nflags\t\t: fpu {flags}\n")
    assert results.processor() == "AMD EPYC" and results.processor_and_instructions() == name
    stamp = run.make_stamp(run.Request(Path("runs")))
    monkeypatch.setattr(results, "processor_facts", lambda: "model name\t: AMD EPYC\nflags\t\t: fpu amx_bf16\n")
    assert run.make_stamp(run.Request(Path("runs")))["machine"] != stamp["machine"]


def test_this_machine_has_a_name_and_cores():
    found = results.machine()
    assert found["processor"] and found["cores"] > 0 and found["gpu"] is None
    assert set(found["instructions"]) <= set(results.INSTRUCTIONS)
    flags = Path("/proc/cpuinfo")
    if flags.is_file() and re.search(r"^flags", flags.read_text(), re.MULTILINE):
        words = set(re.search(r"^flags\s*:(.*)$", flags.read_text(), re.MULTILINE)[1].split())
        assert set(found["instructions"]) <= words
        assert ("avx2" in words) == ("avx2" in found["instructions"])


def test_a_run_can_end_where_there_is_no_git(monkeypatch):
    known = results.provenance()
    assert re.fullmatch("[0-9a-f]{40}|unknown", known["commit"]) and known["threads"] >= 1
    monkeypatch.setenv("PATH", "/nowhere")
    assert results.provenance() == {**known, "commit": "unknown", "uncommitted_code": False}


def test_what_changed_since_a_revision(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", *arguments], check=True, capture_output=True
        )

    target = tmp_path / "notebooks" / "results" / "cpu" / "01_pruning.json"
    results.write(target, content(rows=[a_row().as_dict(), a_row(label="gone").as_dict(), a_row(label="stays").as_dict()]))
    target.with_name("02_quantization.json").write_text("{")
    git("init"), git("add", "-A"), git("commit", "-m", "x")
    target.with_name("02_quantization.json").unlink()
    now = [a_row(accuracy=0.78).as_dict(), a_row(label="stays", accuracy=0.82).as_dict(), a_row(label="new").as_dict()]
    results.write(
        target,
        content(
            rows=now, claims=[{"id": name, "unit": "round", "verdict": "inconclusive", "statement": "x"} for name in ("C2", "C3")]
        ),
    )
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.changes(tmp_path / "notebooks", "cpu", "HEAD") == [
        "01_pruning: P-20a gone is gone", "01_pruning: P-20a new is new",
        "01_pruning: P-20a heads by |R|: 81.0 % [79.0, 83.0] is now 78.0 %", "01_pruning: claim C2 was supported, is inconclusive",
        "01_pruning: claim C3 was not there, is inconclusive",
    ]  # fmt: skip
    with pytest.raises(CompanionError, match="at HEAD is no readable results file"):
        report.at_revision("HEAD", target.with_name("02_quantization.json"))
    with pytest.raises(CompanionError, match="no revision 'nowhere'"):
        report.changes(tmp_path / "notebooks", "cpu", "nowhere")


def test_the_front_holds_what_nothing_cheaper_reaches():
    rows = [a_row(method=id, label=id, accuracy=accuracy, stored_bytes=size, latency_ratio=None) for id, accuracy, size in
            (("P-01", 0.7, 30), ("P-02", 0.8, 20), ("P-03", 0.6, 10), ("P-07", 0.8, 40), ("P-08", 0.9, 40), ("P-09", 0.6, 15))]  # fmt: skip
    assert [row.method for row in report.front(rows, lambda row: row.stored_bytes)] == ["P-03", "P-02", "P-08"]
    best = a_row(method="control", label="c", accuracy=1.0, stored_bytes=1)  # a control stands on no front
    found = content(rows=[row.as_dict() for row in (*rows, best)])
    small, fast = report.on_fronts([found]).values()
    assert [row.method for row in small] == ["P-03", "P-02", "P-08"] and fast == []
    assert report.in_short(small[0]) == "P-03 P-03 (60.0 %, 0.0 MB)"


def test_readme_page_and_picture_show_what_the_committed_results_render_to():
    assert report.outdated(notebooks.NOTEBOOKS) == []


def test_a_number_that_changed_outdates_all_that_was_published(tmp_path, monkeypatch):
    file = tmp_path / "results" / "cpu" / "01_pruning.json"
    rows = [a_row(track="core"), a_row(method="P-22", label="of the other track", track="extra")]
    results.write(file, content(rows=[row.as_dict() for row in rows]))
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text("before " + " ".join(report.MARKS) + " after")
    report.publish(tmp_path)
    assert report.outdated(tmp_path) == [] and not plots.plt.get_fignums()
    readme, page = report.README.read_text(), (tmp_path / report.PAGE).read_text()
    assert readme.startswith("before ") and readme.endswith(" after") and "| C2 | supported |" in readme
    assert "heads by |R|".replace("|", "\\|") in readme and "of the other track" not in readme and "of the other track" in page
    rows[0].accuracy -= 0.01
    results.write(file, content(rows=[row.as_dict() for row in rows]))
    assert report.outdated(tmp_path) == ["README.md", "results/README.md", "results/overview.png"]


def test_committed_mechanism_numbers_are_inside_their_bounds():
    for found in results.of_record(results.ROOT / "notebooks"):
        for row in found["rows"]:
            for name, (low, high) in row["effect"].get("bounds", {}).items():
                value = row["effect"][name]
                assert (low is None or value >= low) and (high is None or value <= high), f"{row['label']}: {name}"


def test_the_verdict_of_record_comes_from_the_full_profile(tmp_path):
    assert "no verdict of record" in results.verdict_of_record("01_pruning", "C7", tmp_path)
    content = json.loads((results.ROOT / "notebooks/results/cpu/01_pruning.json").read_text())
    content["claims"] = [{**content["claims"][0], "id": "C7", "verdict": "depends"}]
    results.write(tmp_path / "results/full/01_pruning.json", content)
    said = results.verdict_of_record("01_pruning", "C7", tmp_path)
    assert said.endswith("DEPENDS") and content["provenance"]["device"] in said


def test_claims_over_seeds_are_of_record_where_they_alone_were_run(tmp_path):
    """Until the whole chapter ran in `full`; and only the same claims, word by word."""

    def judged(id: str, verdict: str, seeds: int, statement: str = "It is so", unit: str = "seed") -> dict:
        piece = Evidence("a minus b (points)", Estimate(1.0, 0.5, 1.5, seeds), "above")
        return {**Claim(id, statement, "a paper", unit, [piece], verdict).as_dict()}

    def write(place: str, profile: str, *claims: dict) -> None:
        content = json.loads((results.ROOT / "notebooks/results/cpu/01_pruning.json").read_text())
        results.write(tmp_path / "results" / place, {**content, "profile": profile, "claims": list(claims)})

    open_ones = [judged("C1", "not tested", 1), judged("C2", "not tested", 1), judged("C3", "inconclusive", 9, unit="example")]
    write("cpu/01_pruning.json", "cpu", *open_ones)
    assert "over_seeds" not in results.of_record(tmp_path)[0]
    write("full/01_pruning.claims.json", "full", judged("C1", "supported", 5), judged("C2", "supported", 5, "It was so"),
          judged("C3", "contradicted", 5, unit="example"), judged("C4", "supported", 5))  # fmt: skip
    (content,) = results.of_record(tmp_path)
    assert content["profile"] == "cpu" and [claim["verdict"] for claim in content["claims"]] == [
        "supported",
        "not tested",
        "inconclusive",
    ]
    table = "\n".join(report.verdicts(content)).splitlines()
    assert "| C1 | supported | It is so | 5 seeds |" in table and "| C2 | not tested | It is so | seed |" in table
    assert f"full, on {content['over_seeds']['device']}, with an earlier version of the lesson." in table[-1]
    content["over_seeds"]["code"] = run.code_key(notebooks.weave("01_pruning", track="claims"))
    assert report.verdicts(content)[-1].endswith(f"{content['over_seeds']['device']}.")
    assert (
        "| C1 | supported | It is so | 5 seeds | a minus b (points): 1 [0.5, 1.5] (n = 5, shows differences from 0.5), expected above 0 |"
        in ("\n".join(report.verdicts(content, measured=True)).splitlines())
    )
    assert results.verdict_of_record("01_pruning", "C1", tmp_path).endswith("SUPPORTED")
    write("full/01_pruning.json", "full", judged("C1", "contradicted", 5))
    (content,) = results.of_record(tmp_path)
    assert [claim["verdict"] for claim in content["claims"]] == ["contradicted"] and "over_seeds" not in content
    assert results.verdict_of_record("01_pruning", "C1", tmp_path).endswith("CONTRADICTED")
