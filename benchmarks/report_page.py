"""How long a report takes to write and to open: made-up runs, a real browser, medians over repeats.

* ``write``: reading the runs and writing the page.
* ``open``: from the start of the navigation until everything is drawn, in a fresh tab.
* ``filter``, ``search``, ``sort``: from the event until the table shows the result and the browser has laid it out.

Needs Chromium (Debian: ``apt-get install chromium``) and playwright (in ``.[dev]``).

    python benchmarks/report_page.py --edits 1000 --runs 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lit_edit.files import write_json
from lit_edit.runs.report import write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.browser import chromium, opened
from helpers.reports import write_run

_EVENTS = {
    "filter": """document.querySelector('[data-filter="forgotten"]').click()""",
    "search": """const box = document.querySelector("[type=search]");
        box.value = "oslo"; box.dispatchEvent(new Event("input"))""",
    "sort": """document.querySelector(".requests thead th:nth-child(3) button").click()""",
}
_TIMED = """() => {
  const start = performance.now();
  %s;
  document.body.getBoundingClientRect(); // waits for the layout
  return performance.now() - start;
}"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--edits", type=int, default=1000, help="edits of a run")
    options.add_argument("--runs", type=int, default=5, help="runs on the page")
    options.add_argument("--evaluations", type=int, default=10, help="evaluations of a run")
    options.add_argument("--repeats", type=int, default=9, help="times that the page is opened")
    options.add_argument("--out", type=Path, default=Path("runs/bench-report.json"), help="where the figures go")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given)
    write_json(given.out, vars(given) | {"out": str(given.out)} | found)
    print(f"{given.runs} runs of {given.edits:,} edits, {found['megabytes']:.2f} MB")
    print("| | median | slowest |\n|---|---|---|")
    for name, seconds in found["seconds"].items():
        print(f"| {name} | {statistics.median(seconds):.3f} s | {max(seconds):.3f} s |")
    print(f"Figures: {given.out}")


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Makes the runs and their page, and opens it."""
    for seed in range(given.runs):
        every = max(1, given.edits // given.evaluations)
        write_run(folder / f"run-{seed}", name=f"run-{seed}", edits=given.edits, every=every, seed=seed, spectra=True)
    page = folder / "report.html"
    start = time.perf_counter()
    write_report([folder], page)
    seconds: dict[str, list[float]] = {"write": [time.perf_counter() - start], "open": []}
    with chromium() as browser:
        for _ in range(given.repeats):
            with opened(browser, page) as tab:
                seconds["open"].append(float(tab.page.evaluate("document.documentElement.dataset.ready")) / 1000)
                for name, event in _EVENTS.items():
                    seconds.setdefault(name, []).append(tab.page.evaluate(_TIMED % event) / 1000)
    return {"megabytes": page.stat().st_size / 1e6, "seconds": seconds}


if __name__ == "__main__":
    main()
