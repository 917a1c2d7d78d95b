"""How well all edits so far hold: reliability, generalization and locality as the run goes on."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol, cast, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lit_edit.evaluation.evaluate import Reference, Way, evaluate, figures
from lit_edit.evaluation.scope import EditedFacts
from lit_edit.model.prompts import Prompter
from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Journal
from lit_edit.runs.outcomes import FILE_NAME, outcome_record, write_outcomes

from .every_n import EveryNEdits, as_found, run_folder


class Editing(Protocol):
    """What `Retention` needs of a module; `LitEdit` has it."""

    model: nn.Module
    tokenizer: Any

    @property
    def prompter(self) -> Prompter:
        """The tokenisation of the model."""

    @property
    def edits_applied(self) -> int:
        """How many edits the weights have seen."""

    @property
    def edited_requests(self) -> list[EditRequest]:
        """Their requests."""

    @property
    def journal(self) -> Journal:
        """Their record."""


class Retention(EveryNEdits):
    """Asks for all edits so far, every N edits: the *retention* curve, and what became of every single edit.

    ``reliability``: the edit prompt is answered by the new target; ``generalization``: so are its rephrasings;
    ``locality``: questions that no edit has touched still get the unedited model's answer. A probe about another fact
    of an edited subject counts under ``locality/same_subject``, one that asks for what an edit has written under
    ``consistency``; ``portability`` where the data have it. An edit is judged by the latest target of its fact. At 0
    edits
    all requests of the run are asked of the untouched model: the baseline. Intervals and counts come along, see
    `lit_edit.evaluation.evaluate.figures`.

    ``outcomes.jsonl`` in the run's log directory has every question and answer, see `lit_edit.runs.outcomes`.

    Args:
        every_n: Edits between two evaluations, or an ascending list of the counts to evaluate at.
        at_start: Also measure the baseline.
        at_end: Also measure after the last edit.
        ways: How answers are judged, see `lit_edit.evaluation.evaluate.Way`; the first one's figures have the plain
            names.
        immediate: Also judge every batch right after it was written, all its probes included, against the model just
            before it (MOSE Eq. 25-27): ``immediate/reliability`` and so on, the mean over all edits so far. Asks two
            further times per edit.
        outcomes: Whether to write ``outcomes.jsonl``.

    Raises:
        ValueError: For an unknown way of judging, or none.
        TypeError: At the start of a fit, if the module is not a `LitEdit`: only that has edits to ask for.
    """

    def __init__(
        self,
        every_n: int | list[int] = 25,
        at_start: bool = True,
        at_end: bool = True,
        ways: list[Way] | None = None,
        immediate: bool = False,
        outcomes: bool = True,
    ) -> None:
        super().__init__(every_n, at_start, at_end)
        self.ways: list[Way] = list(get_args(Way)) if ways is None else list(ways)
        unknown = [way for way in self.ways if way not in get_args(Way)]
        if unknown or not self.ways:
            raise ValueError(f"Answers are judged by {', '.join(get_args(Way))}, not by {unknown or 'nothing'}.")
        self.immediate, self.outcomes = immediate, outcomes
        self._reference = Reference()
        self._just_before = Reference()
        self._at_once: dict[str, list[float]] = {}
        self._batch: list[EditRequest] = []
        self.counts_by_status: Counter[str] = Counter()

    @override
    def reset(self) -> None:
        super().reset()
        self._reference, self._at_once = Reference(), {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not hasattr(pl_module, "edited_requests"):
            raise TypeError(f"Retention evaluates edits; {type(pl_module).__name__} makes none (LitEdit does).")
        module = cast(Editing, pl_module)
        requests = self._all_requests(trainer)
        # Now already: if the run is resumed, the model will have been edited when the next hook is called. The answers
        # in the checkpoint count more, but they do not know requests that were added to the data since.
        module.model.to(trainer.strategy.root_device)
        with as_found(pl_module):
            new = self._reference.collect(module.model, module.prompter, requests)
        if new and module.edits_applied:
            rank_zero_warn(
                f"Retention compares {new} questions with the model as it is after {module.edits_applied} edits: their "
                "requests were not known when it was unedited.",
                category=UserWarning,
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._judge_at_once(pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.immediate:
            module = cast(Editing, pl_module)
            self._just_before, self._batch = Reference(), list(batch)
            with as_found(pl_module):
                self._just_before.collect(module.model, module.prompter, batch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge_at_once(pl_module)
        super().on_train_end(trainer, pl_module)

    def _judge_at_once(self, pl_module: LightningModule) -> None:
        """Judges the batch that was written last."""
        module, batch = cast(Editing, pl_module), self._batch
        self._batch = []
        with as_found(pl_module):
            for outcome in evaluate(module.model, module.prompter, batch, self._just_before, ways=self.ways[:1]):
                for name, value in figures([outcome], self.ways[:1]).items():
                    if not name.startswith(("interval/", "count/")):
                        self._at_once.setdefault(name, []).append(value)

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        module = cast(Editing, pl_module)
        standing = module.edited_requests  # none before the first edit, or where all were taken back
        requests = standing or self._all_requests(trainer)
        facts = EditedFacts(standing)
        found = evaluate(module.model, module.prompter, requests, self._reference, edited=facts, ways=self.ways)
        made = [edit for edit, _ in module.journal.standing] if standing else [None] * len(requests)
        records = [
            outcome_record(o, edit, edits, self._reference.text(module.prompter, o.request.prompt))
            for o, edit in zip(found, made, strict=True)
        ]
        if standing:
            self.counts_by_status = Counter(str(record["status"]) for record in records)
        folder = run_folder(trainer)
        if self.outcomes and trainer.is_global_zero and folder is not None:
            write_outcomes(folder / FILE_NAME, records)
        at_once = {f"immediate/{name}": sum(values) / len(values) for name, values in self._at_once.items()}
        return figures(found, self.ways) | at_once

    @staticmethod
    def _all_requests(trainer: Trainer) -> list[EditRequest]:
        requests: list[EditRequest] = list(getattr(getattr(trainer, "datamodule", None), "requests", []))
        if not requests:
            raise TypeError("Retention needs a data module that offers `requests`, as those of lit_edit do.")
        return requests

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reference": self._reference.answers, "at_once": self._at_once}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._reference.answers.update(state_dict["reference"])
        self._at_once = {name: list(values) for name, values in state_dict["at_once"].items()}
