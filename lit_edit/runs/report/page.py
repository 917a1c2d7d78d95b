"""The page: what `content` gathers from runs, compressed into one HTML file that loads nothing.

Texts of prompts and answers come from files that anybody may have written. They reach the page in base64 only, and its
script makes text nodes of them, never HTML. A content security policy forbids every other script, and the network.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lit_edit.evaluation.evaluate import WAYS
from lit_edit.files import write_whole
from lit_edit.runs.pictures import Picture
from lit_edit.units import size_text, time_text

from .differences import Difference, common_count, difference
from .figures import figure, ordered, way_of, weight_of
from .gather import STATUSES, Case, RunData, find_runs, label_runs, read_run
from .tables import PaperTable, paper_table

FILE_NAME = "report.html"
_SCRIPTS = ("elements.js", "charts.js", "pictures.js", "requests.js", "page.js")
_TITLES_NAMED = 3  # runs that the title names
_UNCHANGED = ("locality", "same_subject")
_OF_EDITS = ("reliability", "generalization", "portability")  # at 0 edits there is nothing to retain


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: The HTML file.
        tables: Files of the papers' tables, Markdown and LaTeX; none unless asked for.
        missing: By run, what its folder lacks.
    """

    page: Path
    tables: tuple[Path, ...]
    missing: dict[str, list[str]]


def write_report(
    places: Sequence[Path],
    out: Path,
    *,
    at: Sequence[int] | None = None,
    names: list[str] | None = None,
    tables: bool = False,
) -> Report:
    """Writes the page of some runs.

    Args:
        places: Folders of runs, or folders with runs below them. The first run is the one that others are compared
            with.
        out: Target; replaced in one step.
        at: Counts of edits in the papers' tables, see `lit_edit.runs.report.tables.paper_table`.
        names: Labels, one for each run; if None, their configurations' names.
        tables: Whether to write the papers' tables beside the page, too: ``<stem>-tables.md`` and ``.tex``.

    Raises:
        ValueError: If a place holds no run or a damaged one, or labels or counts do not fit.
    """
    runs = [read_run(folder) for folder in find_runs(list(places))]
    label_runs(runs, names)
    table = paper_table(runs, at)
    written = []
    _write_text(out, page(content(runs, table)))
    if tables:
        for ending, text in (("md", table.markdown()), ("tex", table.latex())):
            written.append(out.with_name(f"{out.stem}-tables.{ending}"))
            _write_text(written[-1], text)
    return Report(out, tuple(written), {run.label: run.missing for run in runs if run.missing})


def _write_text(path: Path, text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")
    write_whole(path, lambda draft: draft.write_bytes(data))


def page(plain: dict[str, Any]) -> str:
    """The HTML of a report's content (`content`)."""
    part = {name: files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css")}
    script = "".join(files(__package__).joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script, style = f'"use strict";\n{script}', part["page.css"]
    text = json.dumps(plain, allow_nan=False, separators=(",", ":"))
    packed = gzip.compress(text.encode("ascii"), compresslevel=9, mtime=0)
    filled = {
        "TITLE": html.escape(plain["title"]),
        "SCRIPT_HASH": _hash(script),
        "STYLE_HASH": _hash(style),
        "STYLE": style,
        "DATA": base64.b64encode(packed).decode("ascii"),
        "SCRIPT": script,
    }
    # In one go: a title may look like a place in the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], part["page.html"])


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


class _Texts:
    """Every text once, known by its place: prompts and answers occur in every run."""

    def __init__(self) -> None:
        self.all: dict[str, int] = {}

    def __call__(self, text: Any) -> int | None:
        return None if text is None else self.all.setdefault(str(text), len(self.all))


def content(runs: Sequence[RunData], table: PaperTable) -> dict[str, Any]:
    """Everything the page shows, in types that JSON has.

    Args:
        runs: As `read_run` and `label_runs` leave them; the first one is what others are compared with.
        table: The papers' table of these runs.
    """
    texts = _Texts()
    cases: dict[Case, int] = {}
    statuses = list(dict.fromkeys([*STATUSES, *(row["status"] for run in runs for row in run.last.rows.values())]))
    plain_runs = [_run(run, texts, cases, statuses) for run in runs]
    count = common_count(list(runs)) if len(runs) > 1 else None
    keys = ordered({key for run in runs for record in run.records for key in record})
    labels = [run.label for run in runs]
    more = f" and {len(runs) - _TITLES_NAMED} more" if len(runs) > _TITLES_NAMED else ""
    return {
        "title": f"{', '.join(labels[:_TITLES_NAMED])}{more}: {'editing report' if len(runs) == 1 else 'compared'}",
        "statuses": statuses,
        "figures": {key: vars(figure(key)) for key in keys},
        "runs": plain_runs,
        "common": count,
        "differences": [] if count is None else _differences(runs, keys, count),
        "same_edits": len({frozenset(run.last.rows) for run in runs}) <= 1,
        "tables": {"markdown": table.markdown(), "latex": table.latex(), "counts": table.counts},
        "cases": [[texts(case_id), texts(prompt)] for case_id, prompt, _ in cases],
        "texts": list(texts.all),  # last: the above adds to it
    }


def _run(run: RunData, texts: _Texts, cases: dict[Case, int], statuses: Sequence[str]) -> dict[str, Any]:
    keys = ordered({key for record in run.records for key in record})
    return {
        "label": run.label,
        "verdict": verdict(run),
        "missing": run.missing,
        "made": run.made,
        "about": about(run),
        "settings": {name: _said(value) for name, value in run.settings.items()},
        "final": {key: _final(run, key) for key in keys},
        "curves": {key: _curve(run, key) for key in keys},
        "ways": _ways(run),
        "weights": _weights(run),
        "seconds": run.seconds_by_stage(),
        "spectra": run.spectra,
        "pictures": [_picture(picture) for picture in run.pictures if picture.on_page],
        "evaluations": [n for n in run.evaluations if n],
        "outcomes": _outcomes(run, texts, cases, statuses),
    }


def verdict(run: RunData) -> str:
    """What became of the edits, in a few sentences."""
    rows = run.last.rows
    status = Counter(row["status"] for row in rows.values())
    n, edits = len(rows), run.last.edits
    said: list[str] = []
    if edits and run.evaluations:
        parts = [f"{status['holds']:,} of {n:,} edits hold"]
        if status["never written"]:
            parts.append(f"{_were(status['never written'])} never written")
        if status["forgotten"]:
            parts.append(f"{_were(status['forgotten'])} written and forgotten")
        said.append("; ".join(parts) + ".")
        asked = [q for row in rows.values() for q in row["questions"] if q["kind"] in _UNCHANGED]
        broken = sum(not question["exact"] for question in asked)
        if asked:
            said.append(f"{broken:,} of {len(asked):,} neighbour questions get another answer than before.")
    elif rows and edits:
        said.append(f"{n - status['never written']:,} of {n:,} edits were written; nobody kept what they answer now.")
    elif not run.made:
        said.append("No edit was judged.")
    fate = Counter(edit.get("status") for edit in run.edits.values())
    if fate["refused"]:
        said.append(f"{_were(fate['refused'])} refused.")
    if fate["undone"]:
        said.append(
            f"{_were(fate['undone'])} taken back later and {'is' if fate['undone'] == 1 else 'are'} not judged."
        )
    for collapse in run.run.get("collapses") or []:
        where = f"; back to {collapse['went_back_to']}" if collapse.get("went_back_to") is not None else ""
        said.append(f"Collapse after {collapse.get('edits')} edits ({collapse.get('figure')}{where}).")
    if not run.evaluations and (held := run.figure("reliability")) is not None and run.made:
        said.append(f"Reliability after {run.made} edits: {_short(held)}.")
    abilities = [key for record in run.records for key in record if key.startswith("downstream/")]
    ends = [_mean(run, dict.fromkeys(abilities), place) for place in (0, -1)]
    if run.made and None not in ends:
        said.append(f"General abilities: {_short(ends[0])} before, {_short(ends[1])} now.")
    return " ".join(said) or "Nothing was measured."


def _were(number: int) -> str:
    return f"{number:,} {'was' if number == 1 else 'were'}"


def _mean(run: RunData, keys: Iterable[str], place: int) -> float | None:
    found = [[record[key] for record in run.records if key in record][place] for key in keys]
    return sum(found) / len(found) if found and None not in found else None


def _short(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def about(run: RunData) -> dict[str, str]:
    """What was run, by name: for people."""
    said = run.run
    machine: dict[str, Any] = said["machine"] if isinstance(said.get("machine"), dict) else {}
    parts = [machine.get("system"), machine.get("processor"), machine.get("accelerator")]
    parts += [f"{machine['cores']} cores" if machine.get("cores") else None]
    parts += [f"{size_text(machine['memory_bytes'])} of memory" if machine.get("memory_bytes") else None]
    parts += [f"computed on {said['device']}" if said.get("device") else None]
    parts += [f"{said['threads']} thread{'s' * (said['threads'] != 1)}" if said.get("threads") else None]
    versions: dict[str, str] = said["versions"] if isinstance(said.get("versions"), dict) else {}
    planned = f" of {run.planned}" if run.planned is not None else ""
    dtype = run.settings.get("model.dtype")
    found = {
        "method": said.get("method"),
        "model": f"{said['model']}{f', {dtype}' if dtype else ''}" if said.get("model") else None,
        "data": ", ".join(str(part) for part in (said.get("data"), said.get("data_path")) if part),
        "edits": f"{run.made}{planned}, {said.get('batch_size') or 1} at a time",
        "seed": said.get("seed"),
        "took": time_text(said["seconds"]) if said.get("seconds") is not None else None,
        "peak memory": size_text(said["peak_memory_bytes"]) if said.get("peak_memory_bytes") else None,
        "machine": ", ".join(str(part) for part in parts if part),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _final(run: RunData, key: str) -> dict[str, Any]:
    """Before the first edit (None unless measured then), at the last count that has the figure, and its interval."""
    having = [record for record in run.records if key in record]
    last = having[-1]
    bounds = run.bounds(key, last["edits"])
    return {
        "before": having[0][key] if having[0]["edits"] == 0 else None,
        "at": last["edits"],
        "now": last[key],
        "bounds": None if bounds is None else list(bounds),
        "questions": last.get(f"count/{key}"),
    }


def _curve(run: RunData, key: str) -> list[list[float | None]]:
    """``[edits, value, low, high]`` at every evaluation that has the figure, and something to judge."""
    points = []
    for record in run.records:
        if key in record and not (key in _OF_EDITS and record["edits"] == 0):
            low, high = (record.get(f"interval/{key}/{side}") for side in ("low", "high"))
            points.append([record["edits"], record[key], low, high])
    return points


def _ways(run: RunData) -> dict[str, dict[str, float | None]]:
    """The last figures by the other ways of judging: by way, then by figure."""
    found: dict[str, dict[str, float | None]] = {way: {} for way in WAYS}
    for record in run.records:
        for key, value in record.items():
            way = way_of(key)
            if way is not None:
                found[way][key.removeprefix(f"{way}/")] = value
    return {way: values for way, values in found.items() if values}


def _picture(picture: Picture) -> dict[str, Any]:
    plain = asdict(picture)
    return {name: plain[name] for name in plain if name not in ("name", "on_page")}


def _weights(run: RunData) -> dict[str, dict[str, list[list[float | None]]]]:
    """Curves of single weights: by parameter, then by figure, ``[edits, value]``."""
    found: dict[str, dict[str, dict[int, float | None]]] = {}  # two callbacks may have logged the same figure
    for record in run.records:
        for key, value in record.items():
            name = weight_of(key)
            if name is not None:
                found.setdefault(name[0], {}).setdefault(name[1], {})[record["edits"]] = value
    return {
        name: {kind: [[edits, value] for edits, value in points.items()] for kind, points in kinds.items()}
        for name, kinds in found.items()
    }


def _differences(runs: Sequence[RunData], keys: Sequence[str], count: int) -> list[list[Any]]:
    """``[one, other, key, difference, low, high, clear, how]`` for every two runs, by their places."""
    found = []
    for i, one in enumerate(runs):
        for j in range(i):
            for key in keys:
                between: Difference | None = difference(one, runs[j], key, count)
                if between is not None:
                    found.append([i, j, key, between.value, between.low, between.high, between.clear, between.how])
    return found


def _outcomes(run: RunData, texts: _Texts, cases: dict[Case, int], statuses: Sequence[str]) -> list[list[Any]]:
    """A list per edit; the script names its places."""
    rows = []
    for case, row in run.last.rows.items():
        place = cases.setdefault(case, len(cases))
        edit = run.edits.get(row["number"], {})
        rows.append(
            [
                place,
                row["number"],
                texts(row["subject"]),
                texts(row["expected"]),
                texts(row["answer_before"]),
                texts(row["answer_after"]),
                texts(row["answer"]),
                statuses.index(row["status"]),
                row["neighbours_broken"],
                _rounded(row["probability"]),
                row["rank"],
                _rounded(row["probability_after"]),
                row["rank_after"],
                row["layers"],
                _rounded(row["change"]),
                _rounded(row["seconds"]),
                _rounded(edit.get("loss")),
                edit.get("steps"),
                run.history(case),
                edit.get("reason") or None,
                [
                    [
                        texts(question["kind"]),
                        texts(question["prompt"]),
                        texts(question["expected"]),
                        texts(_before(run, question)),
                        texts(question["answer"]),
                        int(bool(question["exact"])),
                        _rounded(question["probability"]),
                    ]
                    for question in row["questions"]
                ],
            ]
        )
    return rows


def _before(run: RunData, question: dict[str, Any]) -> str | None:
    """The unedited model's answer: what "unchanged" was judged against, or what it said at 0 edits."""
    expected: str = question["expected"]
    return expected if question["kind"] in _UNCHANGED else run.before.get(question["prompt"])


def _rounded(value: float | None) -> float | None:
    """Three digits are enough; None also where JSON has no word for it."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")
