"""The report in a real browser: what it shows is what stands in the files, and it can be used."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import chromium, opened
from helpers.reports import NEIGHBOURS, REPHRASINGS, write_run

from lit_edit.runs.pictures import Picture, write_picture
from lit_edit.runs.report import write_report
from lit_edit.runs.results import read_results

EDITS = 60
PHONES = [{"width": 390, "height": 844}, {"width": 320, "height": 568}]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@dataclass
class Site:
    """Pages of made-up runs, and the lines of the last evaluation of each run."""

    single: Path
    several: Path
    lines: list[list[dict[str, Any]]]

    def cases(self, run: int, **wanted: Any) -> set[str]:
        return {
            line["case_id"] for line in self.lines[run] if all(line[name] == value for name, value in wanted.items())
        }

    def broken(self, run: int) -> set[str]:
        return {line["case_id"] for line in self.lines[run] if line["neighbours_broken"]}


@pytest.fixture(scope="module")
def site(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Three runs: one, one that keeps much less, and a copy of the first."""
    root = tmp_path_factory.mktemp("site")
    names = ("keeps", "loses", "copies")
    for seed, name in enumerate(names[:2]):
        write_run(root / name, name=name, edits=EDITS, every=20, seed=seed, keeps=(0.97, 0.75)[seed], spectra=True)
    shutil.copytree(root / "keeps", root / "copies")
    places = [root / name for name in names]
    write_report([root / "loses"], root / "single.html")
    write_report(places, root / "several.html", names=list(names))
    found = []
    for place in places:
        text = (place / "outcomes.jsonl").read_text(encoding="utf-8")
        found.append([line for line in map(json.loads, text.splitlines()) if line["edits"] == EDITS])
    return Site(root / "single.html", root / "several.html", found)


def shown(page: Any) -> list[str]:
    """The case ids of all rows of the table, page after page."""
    found: list[str] = page.evaluate(
        """() => {
          const [back, on] = ["Previous", "Next"].map((name) =>
            [...document.querySelectorAll(".tools button")].find((button) => button.textContent === name));
          while (!back.disabled) back.click();
          const found = [];
          for (;;) {
            found.push(...[...document.querySelectorAll("tr.row")].map((row) => row.dataset.case));
            if (on.disabled) return found;
            on.click();
          }
        }"""
    )
    return found


def unfold(page: Any, title: str | None = None) -> None:
    """Opens what is folded, and waits until it is made."""
    for summary in page.locator("summary", has_text=title).all():
        summary.click()
    # Not by `wait_for_function`: the page's policy forbids the `eval` in it.
    page.locator("details[open]:not(:has(> :nth-child(2)))").first.wait_for(state="detached")


def press(page: Any, name: str) -> Any:
    button = page.locator(f'[data-filter="{name}"]')
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    return button


# One run


@pytest.mark.parametrize("status", ["holds", "forgotten", "never written"])
def test_a_filter_shows_the_edits_of_its_status(browser: Any, site: Site, status: str) -> None:
    expected = site.cases(1, status=status)
    assert expected
    with opened(browser, site.single) as open_page:
        button = press(open_page.page, status)
        assert button.inner_text() == f"{status} {len(expected)}"
        found = shown(open_page.page)
        assert (set(found), len(found)) == (expected, len(expected))
        press(open_page.page, "all")
        assert len(shown(open_page.page)) == EDITS


def test_neighbours_that_broke_are_a_filter(browser: Any, site: Site) -> None:
    expected = site.broken(1)
    assert 0 < len(expected) < EDITS
    with opened(browser, site.single) as open_page:
        press(open_page.page, "neighbour broken")
        assert set(shown(open_page.page)) == expected


def test_search_finds_prompts_subjects_and_answers(browser: Any, site: Site) -> None:
    with opened(browser, site.single) as open_page:
        page = open_page.page
        search = page.get_by_role("searchbox")
        search.fill("LAND17 ")
        assert shown(page) == ["c17"]
        answer = site.lines[1][0]["expected"]
        search.fill(answer)
        assert set(shown(page)) >= site.cases(1, expected=answer)
        press(page, "forgotten")  # together with the search
        assert set(shown(page)) <= site.cases(1, status="forgotten")
        search.fill("nothing that anybody wrote")
        assert shown(page) == []
        assert page.get_by_text("No edit is like that.").is_visible()


def test_rows_are_sorted_both_ways(browser: Any, site: Site) -> None:
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "subject": lambda line: int(line["subject"].removeprefix("Land")),
        "p now": lambda line: line["probability"],
        "broken neighbours": lambda line: line["neighbours_broken"],
        "status": lambda line: ("holds", "forgotten", "never written").index(line["status"]),
        "edit": lambda line: line["number"],
    }
    with opened(browser, site.single) as open_page:
        heads = open_page.page.locator(".requests thead th")
        names = heads.all_inner_texts()
        for heading, value in columns.items():
            by_case = {line["case_id"]: value(line) for line in site.lines[1]}
            head = heads.nth(names.index(heading))
            for direction in ("ascending", "descending"):
                head.locator("button").click()
                assert head.get_attribute("aria-sort") == direction
                expected = sorted(by_case.values(), reverse=direction == "descending")
                assert [by_case[case] for case in shown(open_page.page)] == expected


def test_there_are_pages_of_rows(browser: Any, site: Site) -> None:
    with opened(browser, site.single) as open_page:
        page = open_page.page
        back, on = (page.get_by_role("button", name=name) for name in ("Previous", "Next"))
        assert page.locator("tr.row").count() == 25
        assert back.is_disabled()
        on.click()
        on.click()
        assert page.get_by_text(f"51 to {EDITS} of {EDITS} edits").is_visible()
        assert on.is_disabled()
        assert shown(page) == [f"c{i}" for i in range(EDITS)]


def test_a_row_unfolds_to_prompts_and_answers(browser: Any, site: Site) -> None:
    line = next(line for line in site.lines[1] if line["status"] == "forgotten")
    with opened(browser, site.single) as open_page:
        page = open_page.page
        press(page, "forgotten")
        row = page.locator(f'tr.row[data-case="{line["case_id"]}"]')
        row.locator(".unfold").press("Enter")
        assert row.locator(".unfold").get_attribute("aria-expanded") == "true"
        pairs = page.locator(".unfolded .pairs")
        said = dict(zip(pairs.locator("dt").all_inner_texts(), pairs.locator("dd").all_inner_texts(), strict=True))
        assert page.locator(".unfolded strong").inner_text() == line["prompt"]
        assert said["wanted"] == line["expected"]
        assert said["before"] == line["answer_before"]
        assert said["right after"].startswith(f"{line['answer_after']} (p of the wanted answer 0.900, rank 1)")
        assert said["now"].startswith(f"{line['answer']} (p of the wanted answer 0.010, rank 7)")
        assert re.search(r"(^|, )forgotten after \d+ edits$", said["course"])
        assert "layers 2, 3, largest relative change 0.02, 20 steps" in said["edit"]
        text = page.locator(".unfolded").inner_text()
        assert len(line["questions"]) == REPHRASINGS + NEIGHBOURS
        for question in line["questions"]:
            assert question["prompt"] in text
            assert question["answer"] in text
        wrong = sum(not question["exact"] for question in line["questions"])
        assert page.locator(".unfolded td > span.forgotten").count() == wrong
        row.locator(".unfold").press("Enter")
        assert page.locator(".unfolded").count() == 0


def test_the_final_table_has_figures_and_intervals(browser: Any, site: Site) -> None:
    last = read_results(site.single.parent / "loses").records[-1]
    with opened(browser, site.single) as open_page:
        table = open_page.page.locator("section[aria-labelledby=results] table").first
        for key in ("reliability", "generalization", "locality"):
            row = table.locator("tr", has=open_page.page.locator(f"th:text-matches('^{key}(?!:)')")).inner_text()
            assert f"{last[key]:.3f}" in row
            assert f"{last[f'interval/{key}/low']:.3f}–{last[f'interval/{key}/high']:.3f}" in row


def test_every_part_of_a_run_is_there(browser: Any, site: Site) -> None:
    with opened(browser, site.single) as open_page:
        page = open_page.page
        parts = ["Results", "Curves over edits", "Every edit", "Weights", "Seconds by stage", "Tables for a paper"]
        assert page.locator("h2").all_inner_texts() == [*parts, "What was run"]
        assert page.locator("nav a").all_inner_texts() == [*parts, "What was run"]
        captions = page.locator("section[aria-labelledby=curves] figcaption").all_inner_texts()
        assert [text.split("\n")[0] for text in captions] == [
            *("Edits", "Everything else", "General abilities", "mean norm", "worst condition number"),
        ]
        drawn = page.locator("section[aria-labelledby=curves] figure svg[role=img] path.curve")
        assert drawn.count() == 2 + 2 + 2 + 1 + 1
        assert page.locator("section[aria-labelledby=weights] figure").count() == 2
        assert page.locator("section[aria-labelledby=time] .stack > span").count() == 3
        about = page.locator("section[aria-labelledby=about]").inner_text()
        for words in ("LOSES", "FactsDataModule", "60 of 60", "took\t12", "torch", "630 MB"):
            assert words in about
        unfold(page, "All 4 settings")
        assert "model.editor.contexts" in page.locator("section[aria-labelledby=about]").inner_text()


def test_curves_are_read_out_by_keys_and_pointer(browser: Any, site: Site) -> None:
    records = {record["edits"]: record for record in read_results(site.single.parent / "loses").records}
    with opened(browser, site.single) as open_page:
        figure = open_page.page.locator("section[aria-labelledby=curves] figure").first
        picture, tip = figure.locator("svg[role=img]"), figure.locator(".tip")
        assert tip.is_hidden()
        picture.press("Home")
        assert tip.inner_text().startswith("20 edits")
        picture.press("End")
        assert f"reliability {records[EDITS]['reliability']:.3f}" in tip.inner_text()
        picture.press("ArrowLeft")
        assert f"reliability {records[40]['reliability']:.3f}" in tip.inner_text()
        picture.press("Escape")
        assert tip.is_hidden()
        box = picture.bounding_box()
        open_page.page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 40)
        assert tip.inner_text().startswith(f"{EDITS} edits")


def test_the_weights_that_moved_most_come_first(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", edits=4, every=4)
    moves = {"still": 1.0, "little": 1.1, "much": 3.0, "more": 9.0, "lost": None}
    content = {name: {"before": [2.0, 1.0], "after": [by and 2 * by, by]} for name, by in moves.items()}
    (folder / "spectra.json").write_text(json.dumps(content), encoding="utf-8")
    write_report([folder], tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as open_page:
        captions = open_page.page.locator("section[aria-labelledby=weights] > .charts figcaption")
        assert captions.all_inner_texts() == ["lost", "more", "much"]
        unfold(open_page.page, "Spectra of 2 further weights")
        more = open_page.page.locator("section[aria-labelledby=weights] details[open] figcaption")
        assert more.all_inner_texts() == ["little", "still"]


@pytest.mark.parametrize("viewport", [None, PHONES[1]], ids=["desk", "phone"])
def test_pictures_of_callbacks_are_drawn(browser: Any, tmp_path: Path, viewport: dict[str, int] | None) -> None:
    folder = write_run(tmp_path / "run", edits=4, every=4)
    matrix = [[None, 0.2, 0.4], [0.2, None, 0.1], [0.4, 0.1, None]]
    dots: list[list[float | None]] = [[float(i), float(i % 3)] for i in range(40)]
    shown = [
        Picture(
            "a", "Cosines", "A note.", "heatmap", matrix=matrix, labels=["1", "2", "3"], across="edit", up="cosine"
        ),
        Picture("b", "Drift", "", "scatter", {"before": dots, "after": [[0.0, None], [-1.0, 2.0]]}, across="first"),
        Picture("c", "Times", "", "lines", {"values": dots}, across="edits"),
        Picture("d", "Hidden", "", "lines", {"values": dots}, on_page=False),
        Picture("e", "Nothing", "", "scatter", {"before": [[0.0, None]]}),
    ]
    for picture in shown:
        write_picture(folder / "pictures", picture)
    write_report([folder], tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html", **({"viewport": viewport} if viewport else {})) as open_page:
        section = open_page.page.locator("section[aria-labelledby=pictures]")
        titles = section.locator("figcaption").all_inner_texts()
        assert [text.split("\n")[0] for text in titles] == ["Cosines", "Drift", "Times", "Nothing"]
        cells = section.locator("rect")
        assert cells.count() == 6
        assert cells.nth(1).locator("title").text_content() == "edit 1 and 3: 0.4"
        assert section.get_by_text("largest 0.4, which is drawn darkest").is_visible()
        paths = section.locator("path.dots").evaluate_all(
            "all => all.map((one) => one.getAttribute('d').split('M').length - 1)"
        )
        assert paths == [40, 1]
        assert section.locator("path.curve").count() >= 1
        assert section.get_by_text("No value is finite.").is_visible()
        assert open_page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shutil.copytree(folder, tmp_path / "other")
    write_report([folder, tmp_path / "other"], tmp_path / "two.html", names=["one", "other"])
    with opened(browser, tmp_path / "two.html") as open_page:
        unfold(open_page.page, "other: 4 pictures")
        assert open_page.page.locator("section[aria-labelledby=pictures] figure").count() == 4


def test_what_a_run_lacks_is_said(browser: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", edits=12, every=4)
    for name in ("outcomes.jsonl", "config.yaml"):
        (folder / name).unlink()
    write_report([folder], tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as open_page:
        said = open_page.page.locator(".missing").all_inner_texts()
        assert [text.split(" ")[0] for text in said] == ["config.yaml", "outcomes.jsonl"]
        assert open_page.page.locator("tr.row").count() == 12


def test_an_empty_run_has_a_page(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"run": {}, "records": []}', encoding="utf-8")
    write_report([tmp_path], tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as open_page:
        assert open_page.page.get_by_text("No single edits are on file.").is_visible()


def test_texts_of_data_are_never_more_than_text(browser: Any, tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=\"document.title='hacked'\"><!-- ${1} `"
    folder = write_run(tmp_path / "run", edits=6, every=3, subject=hostile, answer=hostile, name=hostile, keeps=0.2)
    write_report([folder], tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as open_page:
        open_page.page.locator(".unfold").first.click()
        assert open_page.page.locator("img").count() == 0
        assert hostile in open_page.page.locator(".unfolded").inner_text()
        assert open_page.page.title() == f"{hostile}: editing report"


def test_a_browser_that_is_too_old_says_so(browser: Any, site: Site) -> None:
    with opened(browser, site.single, before="delete globalThis.DecompressionStream") as open_page:
        assert open_page.page.get_by_text("this browser is too old").is_visible()


# Several runs


def test_runs_stand_side_by_side_with_what_is_a_difference(browser: Any, site: Site) -> None:
    """The copy of a run does not differ from it; the run that loses edits does."""
    records = [read_results(site.single.parent / name).records[-1] for name in ("keeps", "loses")]
    gap = records[1]["reliability"] - records[0]["reliability"]
    assert gap < -0.1
    with opened(browser, site.several) as open_page:
        page = open_page.page
        cells = page.locator("section[aria-labelledby=results] table").first.locator("tbody tr").first.locator("td")
        keeps, loses, copies = cells.all_inner_texts()
        assert "differ" not in keeps
        assert f"−{-gap:.3f}" in loses
        assert "no clear difference" in copies
        page.get_by_label("Differences to").select_option("loses")
        keeps, loses, copies = cells.all_inner_texts()
        assert f"+{-gap:.3f}" in keeps
        assert f"+{-gap:.3f}" in copies
        assert "differ" not in loses
        unfold(page, "The differences with their intervals")
        assert "edit by edit" in page.locator("section[aria-labelledby=results] details[open] table").inner_text()


def test_filters_take_any_run_or_one(browser: Any, site: Site) -> None:
    each = [site.cases(run, status="forgotten") for run in range(3)]
    by_case = [{line["case_id"]: line["status"] for line in lines} for lines in site.lines]
    with opened(browser, site.several) as open_page:
        page = open_page.page
        press(page, "forgotten")
        assert set(shown(page)) == each[0] | each[1]
        for run, name in enumerate(("keeps", "loses", "copies")):
            page.get_by_label("Edits of").select_option(name)
            assert set(shown(page)) == each[run]
        page.get_by_label("Edits of").select_option("any run")
        press(page, "differs between runs")
        assert set(shown(page)) == {case for case, status in by_case[0].items() if by_case[1][case] != status}


def test_a_row_has_the_answers_of_every_run(browser: Any, site: Site) -> None:
    case = next(iter(site.cases(1, status="forgotten") & site.cases(0, status="holds")))
    lines = [next(line for line in run if line["case_id"] == case) for run in site.lines]
    with opened(browser, site.several) as open_page:
        page = open_page.page
        page.get_by_role("searchbox").fill(f"{lines[0]['subject']} ")
        page.locator(f'tr.row[data-case="{case}"]').click()
        rows = page.locator(".unfolded table").first.locator("tbody tr").all_inner_texts()
        for row, name, line in zip(rows, ("keeps", "loses", "copies"), lines, strict=True):
            assert row.startswith(name)
            assert line["answer"] in row
            assert line["status"] in row


def test_the_legend_hides_runs(browser: Any, site: Site) -> None:
    with opened(browser, site.several) as open_page:
        page = open_page.page
        curves = page.locator('section[aria-labelledby=curves] g[data-run="1"]')
        assert curves.first.is_visible()
        button = page.locator(".legend button", has_text="loses")
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert not any(curve.is_visible() for curve in curves.all())
        assert page.locator('section[aria-labelledby=curves] g[data-run="0"]').first.is_visible()
        button.click()
        assert curves.first.is_visible()


def test_tables_are_copied(browser: Any, site: Site) -> None:
    """Where a page from a file may not use the clipboard, the text is selected instead."""
    with opened(browser, site.several) as open_page:
        page = open_page.page
        for place, first in enumerate(("| method |", r"\begin{tabular}")):
            button = page.locator(".copy").nth(place)
            button.click()
            page.locator(".copy", has_text=re.compile("Copied|Selected")).nth(place).wait_for()
            assert page.locator("section[aria-labelledby=tables] pre").nth(place).inner_text().startswith(first)
            if button.inner_text() != "Copied":
                assert page.evaluate("getSelection().toString()").startswith(first)


# Every screen


def channels(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_and_can_be_switched(browser: Any, site: Site, scheme: str) -> None:
    with opened(browser, site.several, color_scheme=scheme) as open_page:
        page = open_page.page

        def colours() -> tuple[float, float]:
            style = "getComputedStyle(document.body)"
            return channels(page.evaluate(f"{style}.backgroundColor")), channels(page.evaluate(f"{style}.color"))

        ground, text = colours()
        assert (ground > 200 and text < 60) if scheme == "light" else (ground < 60 and text > 200)
        button = page.locator("#theme")
        assert button.inner_text() == ("Dark" if scheme == "light" else "Light")
        button.click()
        other_ground, other_text = colours()
        assert (other_ground < 60 < other_text) if scheme == "light" else (other_text < 60 < other_ground)


@pytest.mark.parametrize("viewport", PHONES, ids=lambda size: f"{size['width']} wide")
@pytest.mark.parametrize("which", ["single", "several"])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Any, site: Site, which: str, viewport: dict[str, int]
) -> None:
    with opened(browser, getattr(site, which), viewport=viewport, has_touch=True) as open_page:
        page = open_page.page
        page.locator(".unfold").first.click()
        unfold(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        left = page.evaluate(
            """() => [...document.querySelectorAll("button, select, input, figure, h2, .verdict")]
            .filter((one) => one.offsetParent && !one.closest(".scroll"))
            .filter((one) => one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML)"""
        )
        assert left == []
        assert page.locator("tr.row .status").first.is_visible()
        press(page, "forgotten")
        assert set(shown(page)) == (
            site.cases(1, status="forgotten") | (site.cases(0, status="forgotten") if which == "several" else set())
        )


def test_counts_of_filters_are_those_of_the_files(browser: Any, site: Site) -> None:
    with opened(browser, site.single) as open_page:
        status = Counter(line["status"] for line in site.lines[1])
        texts = open_page.page.locator("[data-filter]").all_inner_texts()
        expected = [f"{name} {status[name]}" for name in ("holds", "forgotten", "never written")]
        assert texts == [f"all {EDITS}", *expected, f"neighbour broken {len(site.broken(1))}"]


def test_the_benchmark_of_pages_runs(browser: Any, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "report_page.py"
    small = ["--edits", "8", "--evaluations", "2", "--runs", "2", "--repeats", "1", "--out", str(tmp_path / "b.json")]
    done = subprocess.run([sys.executable, str(script), *small], capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert set(found["seconds"]) == {"write", "open", "filter", "search", "sort"}
    assert done.stdout.startswith("2 runs of 8 edits")
