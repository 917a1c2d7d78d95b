"""The model card of an edited model: what was edited, how, what it scored, and what it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_edit.model.loading import EMBEDDED, embedded_path
from lit_edit.program import __version__
from lit_edit.runs.results import INTERVAL, headlines
from lit_edit.units import counted

FILE_NAME = "README.md"
_LISTED = 100  # edits that the card names


def model_card(
    base: str, method: str, edits: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]] = ()
) -> str:
    """A card in the Hugging Face hub's form.

    Args:
        base: The model that was edited: ``embedded``, a folder or a hub name.
        method: For people.
        edits: Those in the weights, with ``prompt``, ``subject`` and ``target_new``.
        records: What was measured along the run, ascending in ``edits``; see `lit_edit.runs.results`.
    """
    about: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    about["tags"] = ["knowledge-editing", "lit-edit"]
    # The base model's licence holds for what was made of it.
    about["license"] = license_of(base)
    on_hub = base != EMBEDDED and not Path(base).expanduser().exists()
    if on_hub:
        about["base_model"] = base
    name = "the embedded model of lit-edit" if base == EMBEDDED else base if on_hub else Path(base).name
    lines = ["---", yaml.safe_dump(about, sort_keys=False).rstrip(), "---", f"# {name}, edited", ""]
    how = f" with {method}" if method else ""
    lines.append(
        f"{counted(len(edits), 'fact')} {'was' if len(edits) == 1 else 'were'} written into the weights of {name}{how} "
        f"by lit-edit {__version__}. Everything else is meant to be as it was; how far it is, the table says."
    )
    if about["license"] == "unknown":
        lines += ["", "The licence of the base model holds for this one, too; it is not known here: fill it in above."]
    lines += ["", *_scores(records), *_edits(edits)]
    return "\n".join(lines).rstrip() + "\n"


def write_card(folder: str | Path, text: str) -> None:
    """Puts a card into a model's folder."""
    Path(folder, FILE_NAME).write_text(text, encoding="utf-8")


def license_of(base: str) -> str:
    """The licence that the card in a model's folder states; ``unknown`` if there is none to be read."""
    folder = embedded_path("model") if base == EMBEDDED else Path(base).expanduser()
    try:
        text = (folder / FILE_NAME).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return "unknown"
    return str(front.get("license") or "unknown") if isinstance(front, dict) else "unknown"


def _scores(records: Sequence[Mapping[str, Any]]) -> list[str]:
    if not records:
        return []
    lines = [
        f"## Scores after {counted(records[-1]['edits'], 'edit')}",
        "",
        "| figure | before | after |",
        "|---|---|---|",
    ]
    for key in headlines(records):
        having = [record for record in records if key in record]
        low, high = (having[-1].get(f"{INTERVAL}/{key}/{side}") for side in ("low", "high"))
        within = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
        before = f"{_number(having[0][key])}" if len(having) > 1 else ""
        lines.append(f"| {key} | {before} | {_number(having[-1][key])}{within} |")
    return [*lines, "", "Exact match, with 95 % intervals over facts where there are any.", ""]


def _edits(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["## Edits", "", "| prompt | new answer |", "|---|---|"]
    lines += [f"| {_cell(edit['prompt'])} | {_cell(edit['target_new'])} |" for edit in edits[:_LISTED]]
    if len(edits) > _LISTED:
        lines += ["", f"and {len(edits) - _LISTED:,} more."]
    return lines


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
