"""The report: what it gathers of whole and of broken runs, what it calls a difference, and what stands in the file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reports import NEIGHBOURS, REPHRASINGS, write_run

from lit_edit.runs.report import write_report
from lit_edit.runs.report.differences import FEWEST, common_count, difference
from lit_edit.runs.report.figures import figure, ordered
from lit_edit.runs.report.gather import RunData, find_runs, flattened, label_runs, read_run, thinned
from lit_edit.runs.report.page import about, content, verdict
from lit_edit.runs.report.tables import COLUMNS, paper_table
from lit_edit.runs.results import read_results

HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"><!-- {{DATA}} \u2028 ${1} `"


def plain_of(html: str) -> dict[str, Any]:
    """What the page's script will read."""
    found = re.search(r'<script type="application/octet-stream" id="data">([^<]*)</script>', html)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))  # type: ignore[no-any-return]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page_of(*places: Path, **settings: Any) -> dict[str, Any]:
    out = places[0].parent / "page.html"
    write_report(places, out, **settings)
    return plain_of(out.read_text(encoding="utf-8"))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_run(tmp_path / "whole")


# What is gathered


def test_the_verdict_counts_what_the_lines_of_the_last_evaluation_say(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "run", edits=40, every=20)
    last = [line for line in lines(whole / "outcomes.jsonl") if line["edits"] == 40]
    number = {
        status: sum(line["status"] == status for line in last) for status in ("holds", "never written", "forgotten")
    }
    asked = [q for line in last for q in line["questions"] if q["kind"] in ("locality", "same_subject")]
    broken = sum(not q["exact"] for q in asked)
    assert min(number.values()) > 0
    assert broken > 0
    said = verdict(read_run(whole))
    assert said.startswith(f"{number['holds']} of 40 edits hold; {number['never written']} w")
    assert f"; {number['forgotten']} w" in said
    assert f" {broken} of {len(asked)} neighbour questions" in said
    assert said.endswith("General abilities: 1.00 before, 0.99 now.")


def test_every_edit_of_the_page_is_the_line_of_its_file(whole: Path) -> None:
    page = page_of(whole)
    (run,) = page["runs"]
    texts = page["texts"]
    last = [line for line in lines(whole / "outcomes.jsonl") if line["edits"] == 12]
    assert len(run["outcomes"]) == len(last) == 12
    for row, line in zip(run["outcomes"], last, strict=True):
        case, prompt = (texts[i] for i in page["cases"][row[0]])
        assert (case, prompt, row[1]) == (line["case_id"], line["prompt"], line["number"])
        said = [None if i is None else texts[i] for i in row[2:7]]
        assert said == [line[k] for k in ("subject", "expected", "answer_before", "answer_after", "answer")]
        assert page["statuses"][row[7]] == line["status"]
        assert row[8] == line["neighbours_broken"]
        assert len(row[-1]) == len(line["questions"]) == REPHRASINGS + NEIGHBOURS
        for asked, question in zip(row[-1], line["questions"], strict=True):
            assert [texts[asked[0]], texts[asked[1]]] == [question["kind"], question["prompt"]]
            assert (texts[asked[4]], bool(asked[5])) == (question["answer"], question["exact"])


def test_what_the_unedited_model_said_comes_from_the_first_evaluation(whole: Path) -> None:
    page = page_of(whole)
    before = {q["prompt"]: q["answer"] for line in lines(whole / "outcomes.jsonl")[:12] for q in line["questions"]}
    for row in page["runs"][0]["outcomes"]:
        for kind, prompt, expected, was, *_ in row[-1]:
            text = page["texts"]
            unchanged = text[kind] in ("locality", "same_subject")
            assert text[was] == (text[expected] if unchanged else before[text[prompt]])


def test_the_course_of_an_edit_is_its_status_at_every_evaluation(whole: Path) -> None:
    page = page_of(whole)
    letters = {"holds": "h", "forgotten": "f", "never written": "n"}
    status = {(line["edits"], line["number"]): line["status"] for line in lines(whole / "outcomes.jsonl")}
    assert page["runs"][0]["evaluations"] == [4, 8, 12]
    for row in page["runs"][0]["outcomes"]:
        expected = "".join(letters.get(status.get((n, row[1]), ""), ".") for n in (4, 8, 12))
        assert row[18] == expected
    assert page["runs"][0]["outcomes"][-1][18].startswith("..")  # made last


def test_the_final_figures_are_the_last_ones_with_their_intervals(whole: Path) -> None:
    (run,) = page_of(whole)["runs"]
    last = read_results(whole).records[-1]
    for key in ("reliability", "generalization", "locality"):
        assert run["final"][key]["now"] == last[key]
        assert run["final"][key]["bounds"] == [last[f"interval/{key}/low"], last[f"interval/{key}/high"]]
        assert run["final"][key]["questions"] == last[f"count/{key}"]
    assert run["final"]["locality"]["before"] == 1
    assert run["final"]["locality/same_subject"]["before"] is None  # there are none before the first edit
    assert [point[0] for point in run["curves"]["locality"]] == [0, 4, 8, 12]
    assert [point[0] for point in run["curves"]["reliability"]] == [4, 8, 12]  # nothing to retain before
    assert run["ways"]["token_accuracy"]["reliability"] == last["token_accuracy/reliability"]
    assert run["weights"]["blocks.2.weight"]["frobenius_norm"][-1] == [12, 74.0]
    assert run["seconds"] == pytest.approx({"values": 0.3, "solve": 0.05, "write": 0.01})


def test_what_was_run_is_said(whole: Path) -> None:
    said = about(read_run(whole))
    assert said["method"] == "MEMIT"
    assert said["edits"] == "12 of 12, 1 at a time"
    assert said["took"] == "2.5 min"
    assert said["machine"] == "Linux, x86_64, 2 cores, 16 GB of memory, computed on cpu, 2 threads"
    assert "torch " in said["versions"]
    assert page_of(whole)["runs"][0]["settings"] == {
        "data": "FactsDataModule",
        "data.n_edits": "12",
        "model.editor": "LocateThenEdit",
        "model.editor.contexts": "0",
    }


def test_settings_are_flattened_by_class_and_argument() -> None:
    content = {
        "model": {"class_path": "a.b.C", "init_args": {"x": 1, "y": None, "z": [{"class_path": "d.E"}, {"w": 2}]}}
    }
    assert dict(flattened(content)) == {"model": "C", "model.x": 1, "model.z.1": "E", "model.z.2.w": 2}
    assert dict(flattened({"layers": [2, 3], "empty": ""})) == {"layers": [2, 3]}


def test_edits_that_were_refused_or_taken_back_are_said(whole: Path) -> None:
    """An edit that was taken back is in the journal, and no longer among the outcomes."""
    fates = {2: ("refused", "p(target) stayed at 0.1"), 5: ("undone", "asked for"), 6: ("undone", "asked for")}
    edits = lines(whole / "edits.jsonl")
    for edit in edits:
        edit["status"], edit["reason"] = fates.get(edit["number"], ("written", ""))
    (whole / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits), encoding="utf-8")
    kept = [line for line in lines(whole / "outcomes.jsonl") if line["edits"] < 12 or line["number"] not in (5, 6)]
    (whole / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    (run,) = page_of(whole)["runs"]
    assert run["missing"] == []
    assert "1 was refused. 2 were taken back later and are not judged." in run["verdict"]
    assert {row[1]: row[19] for row in run["outcomes"]} == {
        number: "p(target) stayed at 0.1" if number == 2 else None for number in range(1, 13) if number not in (5, 6)
    }
    (whole / "outcomes.jsonl").unlink()
    assert [row[1] for row in page_of(whole)["runs"][0]["outcomes"]] == [1, 2, 3, 4, *range(7, 13)]


def test_spectra_are_read_and_thinned(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", edits=2, every=2, spectra=True))
    before = run.spectra["blocks.2.weight"]["before"]
    assert (len(before), before[0], before[-1][0]) == (400, [1, 50.0], 600)
    assert thinned([3.0, None, 1.0]) == [[1, 3.0], [2, None], [3, 1.0]]
    places = [place for place, _ in thinned([1.0] * 5000, most=7)]
    assert (places[0], places[-1], len(places)) == (1, 5000, 7)
    assert max(np.diff(places)) - min(np.diff(places)) <= 1


def test_the_same_request_twice_is_two_edits(whole: Path) -> None:
    """A record may stand in the data twice; each is found again at the next evaluation."""
    path = whole / "outcomes.jsonl"
    changed = [
        line | {"case_id": "c0", "prompt": "The capital of Land0 is"} if line["number"] == 2 else line
        for line in lines(path)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed), encoding="utf-8")
    run = read_run(whole)
    assert len(run.last.rows) == 12
    assert ("c0", "The capital of Land0 is", 1) in run.last.rows


# What is missing


@pytest.mark.parametrize(
    ("name", "said"),
    [("outcomes.jsonl", "what each edit answers now"), ("edits.jsonl", "edits"), ("config.yaml", "settings")],
)
def test_a_missing_file_is_named_and_the_rest_is_shown(whole: Path, name: str, said: str) -> None:
    (whole / name).unlink()
    (run,) = page_of(whole)["runs"]
    (what,) = run["missing"]
    assert what.startswith(f"{name} is missing")
    assert said in what
    assert run["final"]["reliability"]["now"] == read_results(whole).records[-1]["reliability"]
    assert len(run["outcomes"]) == 12


def test_without_outcomes_the_journal_tells_what_was_written(whole: Path) -> None:
    (whole / "outcomes.jsonl").unlink()
    page = page_of(whole)
    exact = [edit["exact"] for edit in lines(whole / "edits.jsonl")]
    status = [page["statuses"][row[7]] for row in page["runs"][0]["outcomes"]]
    assert status == ["not asked" if hit else "never written" for hit in exact]
    assert page["runs"][0]["verdict"].startswith(f"{sum(exact)} of 12 edits were written; nobody kept what they answer")
    (whole / "edits.jsonl").unlink()
    page = page_of(whole)
    assert page["runs"][0]["outcomes"] == []
    assert page["runs"][0]["verdict"].startswith("Reliability after 12 edits: 0.")


def test_a_run_that_ended_early_is_shown_as_far_as_it_went(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "cut", planned=40)
    (folder / "edits.jsonl").unlink()
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    del results["run"]["seconds"], results["run"]["seconds_per_edit"]
    path.write_text(json.dumps(results), encoding="utf-8")
    (run,) = page_of(folder)["runs"]
    assert run["missing"][0] == "The run ended early, after 12 of 40 edits."
    assert run["about"]["edits"] == "12 of 40, 1 at a time"
    assert (run["seconds"], len(run["outcomes"])) == ({}, 12)


def test_an_evaluation_that_was_cut_off_is_left_out_and_named(whole: Path) -> None:
    path = whole / "outcomes.jsonl"
    path.write_bytes(path.read_bytes()[:-700])  # in the middle of a line
    run = read_run(whole)
    assert [n for n in run.evaluations if n] == [4, 8]
    assert (run.last.edits, len(run.last.rows)) == (8, 8)
    assert any("was read up to a line" in what for what in run.missing)
    assert any("after 12 edits is incomplete" in what for what in run.missing)


def test_a_run_that_judged_nothing_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"run": {}, "records": []}', encoding="utf-8")
    (run,) = page_of(tmp_path)["runs"]
    assert run["verdict"] == "No edit was judged."
    assert len(run["missing"]) == 4


def test_before_the_first_edit_nothing_holds_and_nothing_is_lost(whole: Path) -> None:
    path = whole / "outcomes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(path)[:12]), encoding="utf-8")
    (whole / "results.json").write_text(
        json.dumps({"run": {}, "records": [{"edits": 0, "locality": 1}]}), encoding="utf-8"
    )
    (whole / "edits.jsonl").unlink()
    page = page_of(whole)
    assert {page["statuses"][row[7]] for row in page["runs"][0]["outcomes"]} == {"to come"}
    assert page["runs"][0]["verdict"] == "No edit was judged."


@pytest.mark.parametrize("broken", ["{", "[]", '{"w": {"before": [1]}}', '{"w": {"before": ["x"], "after": [1]}}'])
def test_spectra_of_another_shape_are_named(whole: Path, broken: str) -> None:
    (whole / "spectra.json").write_text(broken, encoding="utf-8")
    (what,) = read_run(whole).missing
    assert what.startswith("spectra.json cannot be read")


def test_figures_that_are_not_finite_are_shown_as_such(whole: Path) -> None:
    path = whole / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["records"][-1] |= {"reliability": None, "downstream/qa": None}
    path.write_text(json.dumps(results), encoding="utf-8")
    edits = lines(whole / "edits.jsonl")
    edits[0]["loss"] = math.nan
    (whole / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits), encoding="utf-8")
    (run,) = page_of(whole)["runs"]
    assert run["final"]["reliability"]["now"] is None
    assert "abilities" not in run["verdict"]
    assert run["outcomes"][0][16] is None


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is no folder of a run: it has no results.json"):
        write_report([tmp_path / "nothing"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# Several runs


def labels(*runs: tuple[str, int, str]) -> list[str]:
    made = [RunData(Path("runs") / folder, name, {"seed": seed}, []) for name, seed, folder in runs]
    label_runs(made)
    return [run.label for run in made]


def test_runs_are_told_apart_by_what_differs() -> None:
    assert labels(("memit", 0, "a"), ("rome", 0, "b")) == ["memit", "rome"]
    assert labels(("memit", 0, "a"), ("memit", 1, "b"), ("rome", 1, "c")) == ["memit, seed 0", "memit, seed 1", "rome"]
    assert labels(("m", 0, "m/version_0"), ("m", 0, "m/version_1")) == ["m, m/version_0", "m, m/version_1"]
    assert labels(("m", 0, "x/m/v"), ("m", 0, "y/m/v")) == ["m, run 1", "m, run 2"]
    three = labels(("m", 0, "a/v"), ("m", 0, "b/v"), ("m", 1, "c/v"))
    assert three == ["m, seed 0, a/v", "m, seed 0, b/v", "m, seed 1"]


def test_names_that_are_given_have_to_fit() -> None:
    made = [RunData(Path("a"), "m", {}, []), RunData(Path("b"), "m", {}, [])]
    label_runs(made, ["ours", "theirs"])
    assert [run.label for run in made] == ["ours", "theirs"]
    for names in (["one"], ["same", "same"]):
        with pytest.raises(ValueError, match="2 runs need as many different names"):
            label_runs(made, names)


def test_a_folder_stands_for_the_runs_below_it(tmp_path: Path) -> None:
    for name in ("rome/seed-1", "memit/seed-0"):
        write_run(tmp_path / name, edits=2, every=2)
    assert find_runs([tmp_path]) == [tmp_path / "memit/seed-0", tmp_path / "rome/seed-1"]
    assert find_runs([tmp_path / "rome/seed-1", tmp_path]) == [tmp_path / "rome/seed-1", tmp_path / "memit/seed-0"]


@pytest.fixture
def two(tmp_path: Path) -> tuple[RunData, RunData]:
    places = [write_run(tmp_path / f"{i}", edits=60, every=20, seed=i, keeps=(0.95, 0.6)[i]) for i in (0, 1)]
    return read_run(places[0]), read_run(places[1])


def by_edit(run: RunData, kind: str) -> np.ndarray[Any, Any]:
    """The share of right answers of every edit, straight from the file."""
    found = []
    for line in lines(run.folder / "outcomes.jsonl"):
        if line["edits"] == 60:
            hits = [q["exact"] for q in line["questions"] if q["kind"] == kind]
            found.append(np.mean(hits) if kind != "reliability" else line["status"] == "holds")
    return np.array(found, dtype=float)


@pytest.mark.parametrize("kind", ["reliability", "generalization", "locality"])
def test_runs_of_the_same_edits_are_compared_edit_by_edit(two: tuple[RunData, RunData], kind: str) -> None:
    """Against the interval of a mean of independent differences, which a bootstrap approaches."""
    found = difference(*two, kind, 60)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    single = by_edit(two[0], kind) - by_edit(two[1], kind)
    half = 1.96 * single.std() / math.sqrt(len(single))
    assert (found.how, found.clear) == ("edit by edit", True)
    assert found.value == pytest.approx(single.mean())
    assert found.low == pytest.approx(single.mean() - half, abs=0.15 * half + 1 / 60)
    assert found.high == pytest.approx(single.mean() + half, abs=0.15 * half + 1 / 60)
    turned = difference(two[1], two[0], kind, 60)
    assert turned is not None
    assert turned.low is not None
    assert turned.value == pytest.approx(-found.value)
    assert turned.low == pytest.approx(-found.high, abs=2 / 60)


def test_a_run_does_not_differ_from_itself(two: tuple[RunData, RunData]) -> None:
    for key in ("reliability", "generalization", "locality", "locality/same_subject"):
        found = difference(two[0], two[0], key, 60)
        assert found is not None
        assert (found.value, found.low, found.high, found.clear) == (0, 0, 0, False)


def test_pairing_sees_what_two_intervals_hide(tmp_path: Path) -> None:
    """Ten of sixty edits that only one run gets right: the figures' own intervals overlap, the edits leave no doubt."""
    one = read_run(write_run(tmp_path / "one", edits=60, every=60, keeps=0.8))
    shutil.copytree(one.folder, tmp_path / "other")
    other = read_run(tmp_path / "other")
    scores = one.evaluations[60].scores["reliability"]
    held = [case for case, score in scores.items() if score == 1][:10]
    lost = {case: 0.0 if case in held else score for case, score in scores.items()}
    other.evaluations[60].scores["reliability"] = lost
    other.records[-1]["reliability"] = sum(lost.values()) / 60
    assert one.bounds("reliability") == other.bounds("reliability")
    paired = difference(one, other, "reliability", 60)
    assert paired is not None
    assert (paired.how, paired.clear) == ("edit by edit", True)
    one.evaluations.clear()
    unpaired = difference(one, other, "reliability", 60)
    assert unpaired is not None
    assert unpaired.how == "by intervals"
    assert unpaired.high is not None
    assert paired.high is not None
    assert unpaired.high - unpaired.value > paired.high - paired.value


def made(value: float, low: float | None, high: float | None, count: float = 50) -> RunData:
    record = {"edits": 10, "reliability": value, "count/reliability": count}
    if low is not None:
        record |= {"interval/reliability/low": low, "interval/reliability/high": high}
    return RunData(Path(), "made", {}, [record])


def test_intervals_are_combined_by_mover() -> None:
    """By hand: 0.7 - sqrt(0.3^2 + 0.4^2) and 0.7 + sqrt(0.06^2 + 0.08^2)."""
    found = difference(made(0.9, 0.6, 0.96), made(0.2, 0.12, 0.6), "reliability", 10)
    assert found is not None
    assert found.how == "by intervals"
    assert (found.value, found.low, found.high) == pytest.approx((0.7, 0.2, 0.8))
    assert found.clear is True
    overlapping = difference(made(0.5, 0.4, 0.6), made(0.4, 0.3, 0.5), "reliability", 10)
    assert overlapping is not None
    assert overlapping.clear is False
    touching = difference(made(0.5, 0.4, 0.6), made(0.35, 0.25, 0.45), "reliability", 10)
    assert touching is not None  # the intervals overlap, that of the difference leaves out zero
    assert touching.clear is True


def test_without_intervals_or_with_few_edits_nothing_is_judged() -> None:
    bare = difference(made(0.9, None, None), made(0.2, 0.1, 0.3), "reliability", 10)
    assert bare is not None
    assert (bare.how, bare.clear, bare.value) == ("not judged", None, pytest.approx(0.7))
    few = difference(made(0.9, 0.8, 1, FEWEST - 1), made(0.2, 0.1, 0.3), "reliability", 10)
    assert few is not None
    assert (few.how, few.clear) == ("too few edits", None)
    assert difference(made(0.9, 0.8, 1), made(0.2, 0.1, 0.3), "locality", 10) is None


def test_figures_by_another_way_of_judging_are_not_compared_by_exact_answers(two: tuple[RunData, RunData]) -> None:
    two[0].records[-1]["reliability"] -= 0.1  # such as the share of tokens
    found = difference(*two, "reliability", 60)
    assert found is not None
    assert found.how == "by intervals"


def test_other_edits_are_compared_by_intervals(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / s, edits=20, every=20, subject=s)) for s in ("Land", "Isle")]
    found = difference(runs[0], runs[1], "reliability", 20)
    assert found is not None
    assert found.how == "by intervals"
    label_runs(runs)
    assert content(runs, paper_table(runs))["same_edits"] is False


def test_runs_are_compared_at_the_last_count_they_share(tmp_path: Path) -> None:
    short = read_run(write_run(tmp_path / "short", edits=20, every=10))
    long = read_run(write_run(tmp_path / "long", edits=40, every=20, seed=1))
    odd = read_run(write_run(tmp_path / "odd", edits=9, every=9, seed=2))
    assert common_count([short, long]) == 20
    assert common_count([short, odd]) is None
    page = page_of(short.folder, long.folder)
    assert page["common"] == 20
    assert {row[2] for row in page["differences"]} >= {"reliability", "locality", "stability/mean_frobenius_norm"}
    assert page_of(short.folder, odd.folder)["differences"] == []


def test_the_runs_of_a_page_share_cases_and_texts(tmp_path: Path) -> None:
    places = [write_run(tmp_path / f"{i}", seed=i) for i in range(3)]
    page = page_of(*places)
    assert len(page["cases"]) == 12
    assert [[row[0] for row in run["outcomes"]] for run in page["runs"]] == [list(range(12))] * 3
    assert len(set(page["texts"])) == len(page["texts"])
    assert page["title"] == "memit, seed 0, memit, seed 1, memit, seed 2: compared"


# Tables of the papers


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def test_the_papers_table_holds_the_figures_at_every_count(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{i}", name=f"m{i}", edits=12, every=3, seed=i)) for i in (0, 1)]
    table = paper_table(runs, [3, 12])
    head, _, *rows = table.markdown().splitlines()
    assert cells_of(head) == ["method", *(f"{name} after {n}" for n in (3, 12) for name in COLUMNS)]
    latex = [line for line in table.latex().splitlines() if line.startswith("m") and "method" not in line]
    assert len(rows) == len(latex) == 2
    for run, row, tex in zip(runs, rows, latex, strict=True):
        records = {record["edits"]: record for record in run.records}
        expected = []
        for n in (3, 12):
            for key in COLUMNS:
                half = (records[n][f"interval/{key}/high"] - records[n][f"interval/{key}/low"]) / 2
                expected.append((f"{records[n][key]:.3f}", f"{half:.3f}"))
        assert [tuple(cell.split(" ± ")) for cell in cells_of(row)[1:]] == expected
        plain = tex.removesuffix(r" \\").replace("$", "").split(" & ")
        assert [tuple(cell.split(r" \pm ")) for cell in plain[1:]] == expected


def test_latex_is_a_whole_table_and_names_are_escaped(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", edits=12, every=4))
    run.label = r"50% of_{a} & b\c ^ ~ #"
    table = paper_table([run])
    text = table.latex()
    width = len(COLUMNS) * len(table.counts)
    assert rf"\begin{{tabular}}{{l{'r' * width}}}" in text
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body[1:]] == [width, width]
    assert r"50\% of\_\{a\} \& b\textbackslash{}c \textasciicircum{} \textasciitilde{} \#" in text
    assert rf"\cmidrule(lr){{{width - 1}-{width + 1}}}" in text
    run.label = "a|b"
    assert r"| a\|b |" in paper_table([run]).markdown()


def test_counts_of_the_papers_table_are_quarters_of_what_is_shared(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{n}", edits=n, every=2, seed=n)) for n in (16, 20)]
    label_runs(runs)
    assert paper_table(runs).counts == [4, 8, 12, 16]
    assert paper_table(runs, [20]).rows[runs[0].label][0] == (None, None)
    assert "| - | - | - |" in paper_table(runs, [20]).markdown()
    with pytest.raises(ValueError, match=r"No run was judged after 5 edits; there are 2, 4, 6"):
        paper_table(runs, [5, 20])
    assert paper_table([RunData(Path(), "empty", {}, [])]).counts == []


# The file


def test_the_page_is_one_file_that_runs_nothing_else(tmp_path: Path) -> None:
    """Whatever prompts, answers and names hold, it is in base64; the policy allows one script, known by its hash."""
    folder = write_run(tmp_path / "run", subject=HOSTILE, answer=HOSTILE)
    out = tmp_path / "page.html"
    write_report([folder], out, names=[HOSTILE])
    html = out.read_text(encoding="utf-8")
    assert plain_of(html)["runs"][0]["label"] == HOSTILE
    assert HOSTILE in " ".join(plain_of(html)["texts"])
    assert html.count("</script>") == html.count("<script") == 2
    assert "<img" not in html
    assert html.count("&lt;/script&gt;&lt;img src=x") == 2  # in the title and the heading
    tags = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", html, flags=re.DOTALL).replace(escape(HOSTILE), "")
    assert re.findall(r'(?:src|href)="?([^" ]*)', tags) == ["data:,", "#content"]
    assert re.findall(r"https?://[^\"' ]+", html) == ["http://www.w3.org/2000/svg"]  # a name, never fetched
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]
    for tag in ("script", "style"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        assert body
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_the_same_runs_give_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    write_report([whole], tmp_path / "a.html")
    write_report([whole], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_tables_are_written_beside_the_page(whole: Path, tmp_path: Path) -> None:
    written = write_report([whole], tmp_path / "out" / "my.html", tables=True, at=[8])
    assert [path.name for path in written.tables] == ["my-tables.md", "my-tables.tex"]
    page = plain_of((tmp_path / "out" / "my.html").read_text(encoding="utf-8"))
    assert page["tables"]["counts"] == [8]
    assert written.tables[0].read_text(encoding="utf-8") == page["tables"]["markdown"]
    assert written.tables[1].read_text(encoding="utf-8") == page["tables"]["latex"]


def test_figures_have_an_order_and_unknown_ones_come_last() -> None:
    keys = {"spectrum/x", "downstream/qa", "locality", "reliability", "stability/mean_frobenius_norm", "edits"}
    keys |= {"interval/locality/low", "count/locality", "probability/locality", "immediate/reliability"}
    keys |= {"stability/blocks.1.weight/condition_number", "perplexity"}
    found = ["reliability", "locality", "immediate/reliability", "downstream/qa", "perplexity"]
    assert ordered(keys) == [*found, "stability/mean_frobenius_norm", "spectrum/x"]
    assert figure("immediate/reliability").title == "right after: reliability"
    assert replace(figure("spectrum/x"), title="") == replace(figure("another"), title="")


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(theme: int) -> None:
    """Text 4.5 to 1 and curves 3 to 1 against what they stand on (WCAG 2.2, 1.4.3 and 1.4.11)."""
    style = files("lit_edit.runs.report").joinpath("page.css").read_text(encoding="utf-8")
    colours = {name: pair.split(", ")[theme] for name, pair in re.findall(r"--(\w+): light-dark\(([^)]*)\)", style)}
    assert len([name for name in colours if re.fullmatch(r"s\d", name)]) == 8
    for ground in ("page", "raised"):
        for name in ("text", "quiet", "link", "good", "bad", "never"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for number in range(8):
        assert contrast(colours[f"s{number}"], colours["page"]) >= 3, number
