"""What a run left in its folder, read for the report: anything may be missing, and what is missing is said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_edit.runs import outcomes, pictures, results, spectra
from lit_edit.runs.outcomes import read_outcomes
from lit_edit.runs.pictures import Picture, read_pictures
from lit_edit.runs.results import INTERVAL, Record, read_results

EDITS = "edits.jsonl"
SETTINGS = "config.yaml"

NOT_ASKED = "not asked"
"""Status of an edit that was exact right after it was made, in a run that kept no outcomes."""
STATUSES = ("holds", "forgotten", "never written", "to come", NOT_ASKED)
_LETTERS = {"holds": "h", "forgotten": "f", "never written": "n", "to come": "t"}
_LONGEST_SPECTRUM = 400  # values drawn

Case = tuple[str, str, int]
"""A request across runs: case id, prompt, and which of those that share both (from 0)."""


@dataclass
class Evaluation:
    """Every edit as one evaluation found it.

    Attributes:
        edits: Edits applied by then.
        rows: The lines of ``outcomes.jsonl``.
        status: By request.
        scores: By kind of question, then by request: the share of exact answers.
    """

    edits: int
    rows: dict[Case, Record] = field(default_factory=dict)
    status: dict[Case, str] = field(default_factory=dict)
    scores: dict[str, dict[Case, float]] = field(default_factory=dict)
    _seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Takes a line of the file."""
        name = (str(record["case_id"]), str(record["prompt"]))
        case = (*name, self._seen[name])
        self._seen[name] += 1
        self.rows[case], self.status[case] = record, record["status"]
        # Before the first edit every status is "to come"; the rank is 1 where the answer is exact.
        exact = {"reliability": [record["status"] == "holds" if record["edits"] else record["rank"] == 1]}
        for question in record["questions"]:
            kind = "locality/same_subject" if question["kind"] == "same_subject" else question["kind"]
            exact.setdefault(kind, []).append(bool(question["exact"]))
        for kind, hits in exact.items():
            self.scores.setdefault(kind, {})[case] = sum(hits) / len(hits)


@dataclass
class RunData:
    """A run, as its folder tells it.

    Attributes:
        folder: Where it is.
        label: Name among other runs.
        run: The run record of ``results.json``.
        records: Its evaluations, ascending in ``edits``.
        settings: ``config.yaml`` flattened: values by dotted name.
        edits: Lines of ``edits.jsonl`` by number of the edit.
        evaluations: By count of edits; ``rows`` are kept for the last complete one only.
        before: The unedited model's answers by prompt.
        spectra: Content of ``spectra.json``.
        pictures: Those of analysis callbacks.
        missing: What could not be read, and what that leaves out, in sentences.
    """

    folder: Path
    label: str
    run: Record
    records: list[Record]
    settings: dict[str, Any] = field(default_factory=dict)
    edits: dict[int, Record] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    before: dict[str, str | None] = field(default_factory=dict)
    spectra: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def made(self) -> int:
        """Edits made, as far as the folder tells."""
        counts = [record["edits"] for record in self.records[-1:]]
        return max([0, *counts, *self.evaluations, *self.edits])

    @property
    def planned(self) -> int | None:
        """Edits asked for; None where the run took all there were."""
        planned = self.run.get("n_edits")
        return planned if isinstance(planned, int) else None

    @property
    def ended_early(self) -> bool:
        """Whether the run stopped before its last edit, or before it could say how long it took."""
        if self.planned is not None and self.made < self.planned:
            return True
        return "seconds" not in self.run and not self.edits

    @property
    def last(self) -> Evaluation:
        """The last complete evaluation; made of the journal where there is none."""
        with_rows = [evaluation for evaluation in self.evaluations.values() if evaluation.rows]
        return with_rows[-1] if with_rows else Evaluation(self.made, *_from_journal(self.edits))

    def figure(self, key: str, edits: int | None = None) -> float | None:
        """A figure at a count of edits, or at the last count that has it; None where there is none."""
        having = [r for r in self.records if key in r and (edits is None or r["edits"] == edits)]
        return having[-1][key] if having else None

    def bounds(self, key: str, edits: int | None = None) -> tuple[float, float] | None:
        """The 95 % interval of a figure, see `figure`."""
        low, high = (self.figure(f"{INTERVAL}/{key}/{side}", edits) for side in ("low", "high"))
        return None if low is None or high is None else (low, high)

    def history(self, case: Case) -> str:
        """The status of a request at every evaluation after the first edit: a letter each, ``.`` before it was made."""
        counts = [n for n in self.evaluations if n]
        return "".join(_LETTERS.get(self.evaluations[n].status.get(case, ""), ".") for n in counts)

    def seconds_by_stage(self) -> dict[str, float]:
        """Mean seconds of an edit by stage."""
        said = self.run.get("seconds_per_edit")
        if isinstance(said, dict):
            return {stage: seconds for stage, seconds in said.items() if stage != "total"}
        stages = dict.fromkeys(stage for edit in self.edits.values() for stage in edit.get("stages", {}))
        n = len(self.edits)
        return {stage: sum(e.get("stages", {}).get(stage, 0.0) for e in self.edits.values()) / n for stage in stages}


def find_runs(places: list[Path]) -> list[Path]:
    """The folders of runs: each place itself, or all runs below it, as `compare` leaves them.

    Raises:
        ValueError: If a place holds no run.
    """
    found: list[Path] = []
    for place in places:
        if (place / results.FILE_NAME).is_file():
            found.append(place)
            continue
        below = sorted(file.parent for file in place.glob(f"**/{results.FILE_NAME}"))
        if not below:
            raise ValueError(f"{place} is no folder of a run: it has no {results.FILE_NAME}, nor has a folder in it.")
        found += below
    return list(dict.fromkeys(found))


def read_run(folder: Path) -> RunData:
    """Reads all that a run left.

    Args:
        folder: Folder with ``results.json``; the other files may be missing.

    Raises:
        FileNotFoundError: If there is no ``results.json``.
        lit_edit.runs.results.ResultsError: If that is not a results file.
    """
    content = read_results(folder)
    run = RunData(folder, str(content.run.get("name") or folder.name), content.run, content.records)
    _read_settings(run)
    _read_edits(run)
    _read_outcomes(run)
    _read_spectra(run)
    run.pictures, wrong = read_pictures(folder / pictures.FOLDER)
    run.missing += wrong
    if run.ended_early:
        of = f" of {run.planned}" if run.planned else ""
        run.missing.insert(0, f"The run ended early, after {run.made}{of} edits.")
    return run


def label_runs(runs: list[RunData], names: list[str] | None = None) -> None:
    """Gives every run a label of its own: its configuration's name, with what tells it from others of that name.

    Raises:
        ValueError: If there are not as many names as runs, or one occurs twice.
    """
    if names is not None:
        if len(names) != len(runs) or len(set(names)) < len(names):
            raise ValueError(f"{len(runs)} runs need as many different names, not {', '.join(names)}.")
        for run, name in zip(runs, names, strict=True):
            run.label = name
        return
    for tell in (_seed, _folder, _place):
        alike: dict[str, list[int]] = {}
        for place, run in enumerate(runs):
            alike.setdefault(run.label, []).append(place)
        for places in alike.values():
            told = [tell(runs[place], place) for place in places]
            if len(set(told)) > 1:
                for place, words in zip(places, told, strict=True):
                    runs[place].label += f", {words}"


def _seed(run: RunData, _: int) -> str:
    return f"seed {run.run.get('seed')}"


def _folder(run: RunData, _: int) -> str:
    folder = run.folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def _place(_: RunData, place: int) -> str:
    return f"run {place + 1}"


def _read_settings(run: RunData) -> None:
    path = run.folder / SETTINGS
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.missing.append(f"{SETTINGS} is missing: the settings are unknown, but for what {results.FILE_NAME} says.")
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        run.missing.append(f"{SETTINGS} cannot be read ({' '.join(str(error).split())}).")
        return
    run.settings = dict(flattened(content)) if isinstance(content, Mapping) else {}


def flattened(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name: a class by its last name, its arguments below it, what is not set left out."""
    if isinstance(content, Mapping) and "class_path" in content:
        yield name, str(content["class_path"]).rsplit(".", 1)[-1]
        yield from flattened(content.get("init_args") or {}, name)
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from flattened(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list) and any(isinstance(item, Mapping) for item in content):
        for place, item in enumerate(content, start=1):
            yield from flattened(item, f"{name}.{place}")
    elif content not in (None, ""):
        yield name, content


def _read_edits(run: RunData) -> None:
    path = run.folder / EDITS
    if not path.is_file():
        run.missing.append(f"{EDITS} is missing: how the single edits went is unknown.")
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                edit = json.loads(line)
                run.edits[int(edit["number"])] = edit
            except (ValueError, KeyError, TypeError):
                run.missing.append(f"{EDITS}, line {number}, is no edit and was left out.")


def _read_outcomes(run: RunData) -> None:
    path = run.folder / outcomes.FILE_NAME
    if not path.is_file():
        run.missing.append(
            f"{outcomes.FILE_NAME} is missing (--retention.outcomes=false?): what each edit answers now is unknown."
        )
        return
    found: list[Evaluation] = []
    try:
        for record in read_outcomes(path):
            edits = record["edits"]
            if edits == 0:
                run.before[record["prompt"]] = record["answer"]
                run.before |= {question["prompt"]: question["answer"] for question in record["questions"]}
            if not found or edits != found[-1].edits:
                for older in found[:-1]:
                    older.rows = {}  # the last complete evaluation is shown; of the others the status is enough
                found.append(Evaluation(edits))
            found[-1].add(record)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"a line lacks {error}"
        run.missing.append(f"{outcomes.FILE_NAME} was read up to a line that is no outcome ({said}).")
    undone = sum(edit.get("status") == "undone" for edit in run.edits.values())  # asked for until they were taken back
    if found and found[-1].edits and len(found[-1].rows) < found[-1].edits - undone:
        run.missing.append(
            f"The evaluation after {found[-1].edits} edits is incomplete in {outcomes.FILE_NAME} and was left out."
        )
        found.pop()
    for older in found[:-1]:
        older.rows = {}
    run.evaluations = {evaluation.edits: evaluation for evaluation in found}


def _from_journal(edits: Mapping[int, Record]) -> tuple[dict[Case, Record], dict[Case, str]]:
    """Rows as ``outcomes.jsonl`` has them, of a run that kept none: nothing is known of the time after each edit."""
    rows: dict[Case, Record] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for number, edit in sorted(edits.items()):
        if edit.get("status") == "undone":
            continue
        name = (str(edit["case_id"]), str(edit["prompt"]))
        rows[(*name, seen[name])] = {
            "number": number,
            "case_id": edit["case_id"],
            "subject": edit["subject"],
            "prompt": edit["prompt"],
            "expected": edit["target_new"],
            "answer_before": None,
            "answer_after": edit.get("answer"),
            "answer": None,
            "status": NOT_ASKED if edit.get("exact") else "never written",
            "neighbours_broken": None,
            "probability": None,
            "rank": None,
            "probability_after": edit.get("p_target"),
            "rank_after": edit.get("rank"),
            "layers": edit.get("layers", []),
            "change": max(edit.get("change", {}).values(), default=None),
            "seconds": edit.get("seconds"),
            "questions": [],
        }
        seen[name] += 1
    return rows, {case: row["status"] for case, row in rows.items()}


def _read_spectra(run: RunData) -> None:
    path = run.folder / spectra.FILE_NAME
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for parameter, sides in content.items():
            run.spectra[parameter] = {side: thinned(sides[side]) for side in ("before", "after")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        run.spectra = {}
        run.missing.append(
            f"{spectra.FILE_NAME} cannot be read ({error}): it should be {{parameter: {{before, after}}}}."
        )


def thinned(values: list[float | None], most: int = _LONGEST_SPECTRUM) -> list[Any]:
    """``[place, value]`` from 1 on, evenly spaced and with both ends where there are more than can be drawn."""
    places = range(len(values))
    if len(values) > most:
        places = sorted({round(i * (len(values) - 1) / (most - 1)) for i in range(most)})  # type: ignore[assignment]
    return [[place + 1, None if values[place] is None else float(values[place])] for place in places]  # type: ignore[arg-type]
