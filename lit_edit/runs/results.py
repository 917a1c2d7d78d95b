"""``results.json``: what a run measured, complete after every evaluation, and the table that sums it up.

The file is one JSON object::

    {
      "run": {"method": "...", "model": "...", "seed": 0, "seconds": 12.3, "versions": {"torch": "..."}, ...},
      "records": [
        {"edits": 0, "reliability": 0.0, "locality": 1.0, "stability/<parameter>/condition_number": 7.1, ...},
        ...
      ]
    }

with one record per evaluation point, in the order of the edits. A figure that is not finite is ``null``: JSON has no
NaN.
"""

from __future__ import annotations

import json
import math
import os
import platform
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich import box
from rich.table import Table
from typing_extensions import override

from lit_edit.files import write_json
from lit_edit.units import counted

FILE_NAME = "results.json"

# Figures of `results_table`, in its order; each stands for itself and for its sub-figures (``downstream/sst2``).
HEADLINES = (
    "reliability",
    "generalization",
    "locality",
    "consistency",
    "portability",
    "instance_change",
    "immediate",
    "downstream",
    "lm_eval",
    "perplexity",
    "stability/worst_condition_number",
    "stability/worst_spectrum_drift",
    "stability/mean_frobenius_norm",
    "stability/mean_relative_drift",
)
INTERVAL = "interval"
"""Before the names of the bounds: ``interval/<figure>/low`` and ``/high``."""

_PACKAGES = ("lit-edit", "torch", "lightning", "transformers", "torchmetrics", "lm_eval")

Record = dict[str, Any]


class ResultsError(ValueError):
    """A results file that cannot be read; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Results:
    """The content of one results file.

    Args:
        run: What was run: method, model, data, seed, versions, seconds, as far as they were logged.
        records: One per evaluation point, ascending in ``edits``; the other values are numbers, or None if not finite.
    """

    run: Record
    records: list[Record]


def read_results(path: str | Path) -> Results:
    """Read a results file.

    Args:
        path: File, or the directory that holds a ``results.json``.

    Returns:
        Its run and records.

    Raises:
        FileNotFoundError: if there is no such file.
        ResultsError: if it is not a results file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
        raise ResultsError(f"{path} is not a results file: it should be an object with the keys 'run' and 'records'.")
    records = content.get("records")
    if not isinstance(records, list):
        raise ResultsError(f"{path}, field 'records': should be a list.")
    for position, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not isinstance(record.get("edits"), int):
            raise ResultsError(f"{path}, record {position}, field 'edits': should be a whole number.")
    return Results(run=content["run"], records=records)


class ResultsLogger(Logger):
    """A Lightning logger that keeps ``results.json`` in a directory, rewritten atomically after every evaluation.

    Everything logged with the same step becomes one record, whose ``edits`` is the step. Only evaluations belong in it:
    a call that carries ``epoch``, which is how Lightning passes on ``self.log``, is left out as a whole, and of the
    others every key that starts with ``train/``. Log an evaluation as `lit_edit.callbacks.EveryNEdits` does:
    ``logger.log_metrics(figures, step=edits)``.

    If the directory already holds a results file, the first step logged tells what becomes of it. Step 0 is a new run
    and replaces it. A later step is a resumed run: records up to that step stay, later ones are dropped, since they
    will be measured again, and a figure logged again replaces the old one.

    Args:
        directory: Folder of ``results.json``; made when first written to. As the first of the trainer's loggers it
            also decides where Lightning puts checkpoints.

    Raises:
        ResultsError: at the first evaluation, if the file there is not a results file.

    Example:
        >>> logger = ResultsLogger("runs/mose")
        >>> logger.log_metrics({"reliability": 0.5}, step=10)  # doctest: +SKIP
        >>> read_results("runs/mose").records  # doctest: +SKIP
        [{'edits': 10, 'reliability': 0.5}]
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self.directory = Path(directory)
        self._own_run: Record = {"versions": _versions()}
        self._inherited_run: Record = {}
        self._records: dict[int, Record] = {}
        self._last_step: int | None = None

    @property
    def path(self) -> Path:
        """The results file."""
        return self.directory / FILE_NAME

    @property
    def run(self) -> Record:
        """The run record so far, with what a resumed run took over from the file."""
        return {**self._inherited_run, **self._own_run}

    @property
    def records(self) -> list[Record]:
        """The records so far, ascending in ``edits``."""
        return [{"edits": step, **self._records[step]} for step in sorted(self._records)]

    @property
    @override
    def name(self) -> str:
        # Lightning puts checkpoints under <save_dir>/<name>/<version>: with both empty, beside the results.
        return ""

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.directory)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add the figures of one evaluation to the record of their step and write the file.

        Args:
            metrics: A number per tag.
            step: Count of edits; without it, the step logged last.
        """
        if "epoch" in metrics:
            return
        figures = {key: _number(key, value) for key, value in metrics.items() if key not in ("edits", "step")}
        figures = {key: value for key, value in figures.items() if not key.startswith("train/")}
        if not figures:
            return
        if step is None:
            step = self._last_step or 0
        self._make_room(int(step))
        self._records.setdefault(int(step), {}).update(figures)
        self._write()

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep hyperparameters in the run record, see `log_run`.

        Args:
            params: Hyperparameters.
            *args: Ignored.
            **kwargs: Ignored.
        """
        self.log_run(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_run(self, values: Mapping[str, Any]) -> None:
        """Add to the run record.

        Args:
            values: Such as method, model, data, seed or seconds. What JSON cannot hold is kept as text; names that
                start with an underscore are left out.
        """
        self._own_run.update(_plain({key: value for key, value in values.items() if not str(key).startswith("_")}))
        # Before the first evaluation it is not known whether a file that is already there is to be continued.
        if self._last_step is not None:
            self._write()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write a file even if nothing was evaluated, unless that would touch the file of another run.

        Args:
            status: How the run ended; ignored.
        """
        if self._last_step is None and not self.path.exists():
            self._write()

    def _make_room(self, step: int) -> None:
        """Take over or drop what was measured before, when a run begins here or goes back."""
        if self._last_step is None and step > 0 and self.path.exists():
            found = read_results(self.path)
            self._inherited_run = dict(found.run)
            self._records = {record["edits"]: _without_edits(record) for record in found.records}
        if self._last_step is None or step < self._last_step:
            self._records = {edits: record for edits, record in self._records.items() if step > 0 and edits <= step}
            if step == 0:
                self._inherited_run = {}
                self._own_run.pop("seconds", None)
        self._last_step = step

    def _write(self) -> None:
        write_json(self.path, {"run": self.run, "records": self.records})


def results_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The headline figures before the first edit and after the last, side by side, within 80 columns.

    Args:
        records: Those of `read_results` or of a `ResultsLogger`, ascending in ``edits``.

    Returns:
        A table to print with ``rich``. "Before" and "after" are the first and the last record that have the figure;
        "n/a" is one that was not finite.

    Raises:
        ValueError: if there is no record.
    """
    if not records:
        raise ValueError("There is no record to make a table of.")
    last, first = counted(records[-1]["edits"], "edit"), records[0]["edits"]
    table = Table(title=f"Results after {last}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("figure", overflow="fold")
    # A run that goes on elsewhere has not seen the model before its first edit.
    for heading in (f"after {first:,}" if first else "before", "after", "95 % interval", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key in headlines(records):
        having = [record for record in records if key in record]
        before, after = having[0][key], having[-1][key]
        known = len(having) > 1 and before is not None and after is not None
        bounds = [having[-1].get(f"{INTERVAL}/{key}/{side}") for side in ("low", "high")]
        within = "" if None in bounds else f"{_shown(bounds[0])} to {_shown(bounds[1])}"
        table.add_row(key, _shown(before), _shown(after), within, _changed(before, after) if known else "-")
    return table


def headlines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The headline figures that some records have, in the order of `HEADLINES`."""
    keys = dict.fromkeys(key for record in records for key in record)
    ordered: dict[str, None] = {}
    for headline in HEADLINES:
        ordered.update(dict.fromkeys(sorted(k for k in keys if k == headline or k.startswith(f"{headline}/"))))
    return list(ordered)


def _shown(value: float | None) -> str:
    if value is None:
        return "n/a"
    if value and abs(value) < 1e-6:  # rounding
        return "~ 0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _changed(before: float, after: float) -> str:
    change = after - before
    return _shown(change) if change < 0 or abs(change) < 1e-6 else f"+{_shown(change)}"


def _number(key: str, value: Any) -> float | int | None:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, int):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"The metric {key!r} should be a number, it is {value!r}.") from error
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """The same value in the types that JSON has."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)


def _without_edits(record: Mapping[str, Any]) -> Record:
    return {key: value for key, value in record.items() if key != "edits"}


def machine(device: torch.device) -> Record:
    """What a run is made on, in general terms: nothing that tells one machine from another of its kind."""
    found: Record = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
