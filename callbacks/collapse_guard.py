"""Stops a run whose model collapses, or goes back to the last good point."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lit_edit.runs.journal import Event, Journal
from lit_edit.runs.results import ResultsLogger

from .checkpoint import EditCheckpoint
from .every_n import EveryNEdits, count_edits


class Undoing(Protocol):
    """What `CollapseGuard` needs of a module to go back; `LitEdit` has it."""

    def go_back(self, edits: int, reason: str) -> list[int]:
        """Takes back all edits after the first so many, and says which these were."""


class CollapseGuard(Callback):
    """Watches figures that other callbacks measure, and acts when one leaves its bounds.

    Looked at are the figures of every `EveryNEdits` callback, as they are logged: ``perplexity`` (`Perplexity`),
    ``stability/worst_condition_number`` (`MatrixStability`), ``downstream/qa`` (`DownstreamEval`), ``reliability``
    (`Retention`). One that is not a number is a collapse, too. The bound of a figure that nobody measures is an error
    as soon as everybody has measured, not a guard that sleeps.

    A collapse is found at the first measurement after it. What happened is a line in ``events.jsonl`` (event
    ``collapsed``, and ``undone`` for edits that were taken back), an entry of ``collapses`` in the run record of
    ``results.json``, and a warning. After going back everything is measured again at the same count, so that figures
    and checkpoints are those of the weights.

    Cost: none of its own; going back takes an undo and one more measurement by every callback.

    Args:
        at_most: Largest value by figure: ``{perplexity: 50, stability/worst_condition_number: 1000}``.
        at_least: Smallest value by figure: ``{downstream/qa: 0.5}``.
        relative: Whether bounds are multiples of the figure before the first edit.
        go_back: Whether to take back all edits since the last measurement that was within bounds (`LitEdit` only).
        stop: Whether to end the run: `LitEdit` at once, ordinary training with the batch at hand. Without it, and with
            ``go_back``, the run goes on with the next edits.

    Raises:
        ValueError: If there is no bound, a bound is not finite, or neither ``go_back`` nor ``stop`` is set; when all
            have measured, for a figure that nobody measures or, with ``relative``, not before the first edit.
        TypeError: At the start of a fit, with ``go_back`` for a module that cannot.

    Example:
        >>> callback = CollapseGuard(at_most={"stability/worst_condition_number": 1000}, go_back=True)
    """

    def __init__(
        self,
        at_most: dict[str, float] | None = None,
        at_least: dict[str, float] | None = None,
        relative: bool = False,
        go_back: bool = False,
        stop: bool = True,
    ) -> None:
        super().__init__()
        self.at_most, self.at_least = dict(at_most or {}), dict(at_least or {})
        bounds = [*self.at_most.values(), *self.at_least.values()]
        if not bounds or not all(math.isfinite(bound) for bound in bounds):
            raise ValueError("CollapseGuard needs finite bounds: at_most={'perplexity': 50}, or at_least.")
        if not go_back and not stop:
            raise ValueError("CollapseGuard should go back, stop, or both: set `go_back` or `stop`.")
        self.relative, self.go_back, self.stop = relative, go_back, stop
        self._first: dict[str, float] = {}
        self._good = 0
        self._seen: int | None = None  # count last judged
        self._ended = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.go_back and not callable(getattr(pl_module, "go_back", None)):
            raise TypeError(f"{type(pl_module).__name__} cannot take edits back (LitEdit can): leave `go_back` out.")
        if count_edits(trainer, pl_module) == 0:
            self._first, self._good, self._seen = {}, 0, None
        self._ended = False
        # Figures of a count are judged when all of them are there. Lightning calls callbacks in their order.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        last = max((i for i, c in enumerate(callbacks) if isinstance(c, EveryNEdits)), default=-1)
        if callbacks.index(self) < last:
            others = [c for c in callbacks if c is not self]
            trainer.callbacks = [*others[:last], self, *others[last:]]  # type: ignore[attr-defined]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._judge(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge(trainer, pl_module)

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what was measured at this count, once."""
        edits = count_edits(trainer, pl_module)
        measured = self._measured(trainer, edits)
        if self._ended or not measured or edits == self._seen:
            return
        self._seen = edits
        self._check_names(trainer)
        for name in {**self.at_most, **self.at_least}:
            if name in measured and edits == 0:
                self._first[name] = measured[name]
        broken = self._broken(measured)
        if broken is None:
            self._good = edits
            return
        self._act(trainer, pl_module, edits, broken)

    @staticmethod
    def _measured(trainer: Trainer, edits: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EveryNEdits) and callback.last_measured == edits:
                found |= callback.latest
        return found

    def _check_names(self, trainer: Trainer) -> None:
        """Finds bounds of what nobody measures, as soon as everybody has measured."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        measuring = [c for c in callbacks if isinstance(c, EveryNEdits)]
        known = {tag for callback in measuring for tag in callback.latest}
        missing = [name for name in {**self.at_most, **self.at_least} if name not in known]
        if missing and not any(c.as_if_finished and c.last_measured is None for c in measuring):
            raise ValueError(
                f"CollapseGuard has a bound for {missing[0]!r}, which no callback measures. Measured are "
                f"{', '.join(sorted(name for name in known if name.count('/') < 2)) or 'no figures'}."
            )

    def _bound(self, name: str, bound: float) -> float:
        if not self.relative:
            return bound
        if name not in self._first:
            raise ValueError(
                f"CollapseGuard compares {name!r} with its value before the first edit, which was not measured: set "
                "`at_start` of the callback that measures it, or give a bound that is not relative."
            )
        return bound * self._first[name]

    def _broken(self, measured: Mapping[str, float]) -> tuple[str, float, float] | None:
        """Figure, value and bound of the first that is out of bounds."""
        for bounds, within in ((self.at_most, lambda v, b: v <= b), (self.at_least, lambda v, b: v >= b)):
            for name, given in bounds.items():
                if name in measured:
                    bound = self._bound(name, given)
                    if not within(measured[name], bound):  # also where it is NaN
                        return name, measured[name], bound
        return None

    def _act(self, trainer: Trainer, pl_module: LightningModule, edits: int, broken: tuple[str, float, float]) -> None:
        name, value, bound = broken
        began = time.perf_counter()
        side = "above" if name in self.at_most and not value <= bound else "below"
        reason = f"{name} is {value:.4g}, {side} {bound:.4g}" if math.isfinite(value) else f"{name} is {value}"
        journal = getattr(pl_module, "journal", None)
        if isinstance(journal, Journal):
            journal.note(Event("collapsed", edits, [], 0.0, reason))
        gone: list[int] = []
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if self.go_back:
            gone = cast(Undoing, pl_module).go_back(self._good, f"collapse: {reason}")
            for callback in callbacks:
                if isinstance(callback, EveryNEdits):
                    callback.weights_replaced(trainer, pl_module, self._good)
            measuring = [c for c in callbacks if isinstance(c, EveryNEdits)]
            for callback in sorted(measuring, key=lambda c: isinstance(c, EditCheckpoint)):  # which saves the others
                callback.measure_again(trainer, pl_module)
        said = {"edits": edits, "figure": name, "value": value, "bound": bound}
        said |= {"went_back_to": self._good if self.go_back else None, "stopped": self.stop}
        said |= {"seconds": round(time.perf_counter() - began, 3)}
        for logger in trainer.loggers:
            if isinstance(logger, ResultsLogger):
                logger.log_run({"collapses": [*(logger.run.get("collapses") or []), said]})
        done = f"{len(gone)} edits were taken back, to {self._good}. " if self.go_back else ""
        rank_zero_warn(
            f"After {edits} edits {reason}. {done}{'The run ends here.' if self.stop else 'The run goes on.'}",
            category=UserWarning,
        )
        if self.go_back:
            self._good = edits  # what is in the weights now is what was good
        if self.stop:
            self._ended = trainer.should_stop = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "good": self._good, "seen": self._seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first, self._good, self._seen = dict(state_dict["first"]), state_dict["good"], state_dict["seen"]
