"""The edited model of a run: the model it started from, and the weights of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit import files
from lit_edit.configs.find import read_config
from lit_edit.datamodules.base import OnBadRecord
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.model.families import Architecture, Family
from lit_edit.model.fingerprint import model_fingerprint
from lit_edit.model.loading import EMBEDDED, load_model
from lit_edit.module import CHECKPOINT_KEY
from lit_edit.runs.journal import EDITS_FILE
from lit_edit.runs.results import ResultsError, read_results
from lit_edit.runs.updates import FOLDER, UpdateLog

CHECKPOINT = Path("checkpoints", "edits.ckpt")


def find_run(name: str | Path) -> Path:
    """The folder of a run.

    Args:
        name: The folder; or ``last`` for the newest one below ``runs``.

    Raises:
        ValueError: If there is no run.
    """
    if str(name) == "last":
        found = sorted(Path("runs").glob("*/*/config.yaml"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError("There is no run below ./runs: name the folder of one.")
        return found[-1].parent
    folder = Path(name).expanduser()
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no folder of a run: it has no config.yaml.")
    return folder


@dataclass(frozen=True)
class EditedRun:
    """What a run edited, and where the result is.

    Attributes:
        model: ``embedded``, a folder or a hub name: the model before the first edit.
        dtype: in which it was edited.
        checkpoint: the file with the edited weights.
        folder: of the run.
        method: for people; empty if not known.
        chat_template: whether prompts are put into the tokenizer's chat template.
        on_bad_record: what the run did with facts that cannot be edited.
        family: where a model of an unknown kind keeps its parts.
    """

    model: str
    dtype: str
    checkpoint: Path
    folder: Path
    method: str = ""
    chat_template: bool = False
    on_bad_record: OnBadRecord = "raise"
    family: Family | None = None

    @classmethod
    def find(cls, run: Path | None, checkpoint: Path | None, model: str | None = None) -> EditedRun:
        """From a run's folder, or from a checkpoint in it.

        Args:
            run: the folder with ``config.yaml``; None takes the one that the checkpoint lies in.
            checkpoint: None takes the run's own.
            model: where the model is that was edited, if it is not where the run found it.

        Raises:
            ValueError: if either is missing.
        """
        if run is None and checkpoint is None:
            raise ValueError("Which run? --run runs/mose/version_0, or --ckpt_path of a checkpoint in a run's folder.")
        folder = find_run(run if run is not None else Path(str(checkpoint)).resolve().parent.parent)
        config = read_config(str(folder / "config.yaml"))
        settings = config.get("model") or {}
        if checkpoint is None:
            own = (config.get("checkpoint") or {}).get("dirpath")
            checkpoint = Path(own) / CHECKPOINT.name if own else folder / CHECKPOINT
        if not checkpoint.is_file():
            raise ValueError(f"There is no checkpoint at {checkpoint}: name one with --ckpt_path.")
        named = model or settings.get("model", EMBEDDED)
        in_chat = bool(settings.get("chat_template", False))
        skips = ((config.get("data") or {}).get("init_args") or {}).get("on_bad_record") == "skip"
        return cls(
            named,
            settings.get("dtype", "float32"),
            checkpoint,
            folder,
            _method(folder),
            in_chat,
            "skip" if skips else "raise",
            Family(**settings["family"]) if settings.get("family") else None,
        )

    def load(self) -> tuple[nn.Module, Any]:
        """The model before the first edit, and its tokenizer.

        Raises:
            lit_edit.model.loading.LoadingError: if it is no longer there.
        """
        model, tokenizer = load_model(self.model, self.dtype)
        return model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def apply(self, model: nn.Module, at: int | None = None) -> Applied:
        """Turns the model as `load` gave it into the edited one, in place.

        Args:
            model: The unedited model.
            at: As it was after so many edits, by the updates that the run has kept; as it is in the checkpoint if None.

        Raises:
            ValueError: If the checkpoint cannot be read, was not made by a run of edits, or belongs to another model;
                the model is then unchanged.
        """
        content = files.load_checkpoint(self.checkpoint).get(CHECKPOINT_KEY)
        if content is None:
            raise ValueError(f"{self.checkpoint} was not made by a run of edits: it holds no record of them.")
        fingerprint = model_fingerprint(model)
        if content.get("original") != fingerprint:
            raise ValueError(
                f"{self.checkpoint} was made from another model than {self.model!r} is now, or from the same in "
                "another dtype: name the one that was edited."
            )
        architecture = Architecture(model, self.family)
        originals, sites = {}, {}
        for layer, state in content["sites"].items():
            part = architecture[layer]
            site = sites[layer] = EditedWeight(part.projection.weight, part.name, layer, part.transposed)  # type: ignore[arg-type]
            site.check_state(state)
        for layer, state in content["sites"].items():
            sites[layer].load_state_dict(state)
        edits = len([edit for edit in content["journal"]["edits"] if edit["status"] == "written"])
        if at is not None:
            edits = self._go_to(sites, at, len(content["journal"]["edits"]))
        for layer in sites:
            if sites[layer].edited:
                originals[sites[layer].name] = sites[layer].original_stored
        return Applied(fingerprint, originals, edits)

    def standing(self, at: int | None = None) -> list[dict[str, Any]]:
        """The edits that are in the weights, of the first ``at``; empty where the run has no journal."""
        path = self.folder / EDITS_FILE
        if not path.is_file():
            return []
        edits = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [edit for edit in edits[:at] if edit.get("status", "written") == "written"]

    def records(self, edits: int) -> list[dict[str, Any]]:
        """What was measured, if that ends with as many edits as are in the weights."""
        try:
            found = read_results(self.folder).records
        except (ResultsError, FileNotFoundError):
            return []
        return found if found and found[-1]["edits"] == edits else []

    def _go_to(self, sites: Mapping[int, EditedWeight], at: int, made: int) -> int:
        """Puts layers to what they were after ``at`` edits, and counts those in the weights."""
        if not 0 <= at <= made:
            raise ValueError(f"The run made {made} edits: --at takes a number from 0 to {made}, not {at}.")
        log = UpdateLog(self.folder / FOLDER)
        if at and not len(log):
            raise ValueError(f"{self.folder} has kept no updates, by which alone there is a model after {at} edits.")
        last = log.until(at)
        log.compose(sites, until=last)
        return len({number for write in log.standing(last) for number in write.numbers})


@dataclass(frozen=True, eq=False)
class Applied:
    """What was there before a run's weights: the model's fingerprint, the weights by name, and the count of edits."""

    fingerprint: str
    originals: dict[str, Tensor]
    edits: int


def _method(run: Path) -> str:
    try:
        return str(read_results(run).run.get("method") or "")
    except ResultsError:  # a run with another logger has none
        return ""
