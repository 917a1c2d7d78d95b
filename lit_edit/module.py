"""`LitEdit`: sequential editing as a LightningModule. Hooks only; the maths lives in editors and their parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_edit.editors import Editor, Guard, Mending, Plan
from lit_edit.model.fingerprint import model_fingerprint
from lit_edit.model.loading import EMBEDDED, load_model, on_terminal, save_model
from lit_edit.model.prompts import Prompter
from lit_edit.program import program
from lit_edit.requests import EditRequest
from lit_edit.runs.checkpoint import VerifiedCheckpointIO, go_on_after, reopen_end, reopen_epoch
from lit_edit.runs.delta import DeltaHeader, save_delta
from lit_edit.runs.interrupts import signals_held
from lit_edit.runs.journal import Edit, Journal
from lit_edit.runs.updates import LIMIT
from lit_edit.session import EditSession, Preparation

CHECKPOINT_KEY = "lit_edit"
_PREFIX = "model."  # of the names of the model's parameters in this module


class LitEdit(L.LightningModule):
    """Applies a stream of edit requests to a language model, batch after batch.

    ``training_step`` computes v* by gradient optimisation, ``on_train_batch_end`` applies the closed-form update.
    Callbacks see the edit count as `edits_applied` and the requests so far as `edited_requests`. A checkpoint holds the
    weights of the layers that were edited and the editor's state, not the rest of the model, and no weight as it was
    before: on resuming, the unedited model has it.

    Args:
        editor: Method.
        model: ``embedded``, a folder or a hub name; or a loaded model, together with its ``tokenizer``.
        tokenizer: Tokenizer of a loaded model.
        dtype: Dtype in which a named model is loaded.
        mending: When past edits that slipped are written again; never if None.
        guard: What becomes of edits that fail; the defaults of `lit_edit.editors.Guard` if None.
        **preparation: Settings of `lit_edit.session.Preparation`.

    Raises:
        ValueError: if a loaded model comes without its tokenizer.
    """

    def __init__(
        self,
        editor: Editor,
        model: str | nn.Module = EMBEDDED,
        tokenizer: Any = None,
        dtype: str = "float32",
        mending: Mending | None = None,
        guard: Guard | None = None,
        **preparation: Any,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.editor = editor
        self.model_name = model if isinstance(model, str) else type(model).__name__
        if isinstance(model, str):
            self.model, self.tokenizer = load_model(model, dtype)
        else:
            if tokenizer is None:
                raise ValueError("A loaded model needs its tokenizer: LitEdit(editor, model, tokenizer=...).")
            self.model, self.tokenizer = model, tokenizer
        self.model.eval().requires_grad_(False)
        self.mending, self.guard = mending, guard
        self.preparation = Preparation(**preparation)
        self.session: EditSession | None = None
        self.last_edits: list[Edit] = []
        self._pending: Plan | None = None
        self._fitted_before = 0  # edits of earlier fits of this object
        self._fingerprint: str | None = None  # of the unedited model

    @property
    def journal(self) -> Journal:
        """Every edit applied so far."""
        return self.session.journal if self.session is not None else Journal()

    @property
    def edits_applied(self) -> int:
        """How many edits the weights have seen: the step of every figure that is logged."""
        return len(self.journal)

    @property
    def edited_requests(self) -> list[EditRequest]:
        """The requests so far, in order, but for those that were taken back."""
        return [request for _, request in self.journal.standing]

    @property
    def prompter(self) -> Prompter:
        """The tokenisation that edits use; for callbacks that ask the model, also before a fit has been set up."""
        if self.session is None:
            return Prompter.of(self.model, self.tokenizer, self.preparation.chat_template)
        return self.session.workspace.prompter

    def edited_parameters(self) -> dict[str, Tensor]:
        """The matrices that edits may touch, by name; for callbacks that watch them."""
        if self.session is None:
            raise RuntimeError("The editable weights are known once a fit has been set up.")
        return self.session.edited_weights()

    def original_parameter(self, name: str) -> Tensor:
        """A parameter as it was before the first edit, for callbacks that compare.

        Args:
            name: Name as in `edited_parameters`, or as in ``named_parameters`` of this module.

        Returns:
            A copy on the CPU, shared by all who ask; of a parameter that was never edited the parameter itself,
            detached. Not to be changed, and not to be held across an edit.

        Raises:
            AttributeError: If the model has no such parameter.
        """
        if self.session is None:
            raise RuntimeError("The original weights are known once a fit has been set up.")
        own = name.removeprefix(_PREFIX) if name in dict(self.named_parameters()) else name
        site = next((site for site in self.session.sites if site.name == own), None)
        return self.model.get_parameter(own).detach() if site is None else site.original_stored

    def latest_keys(self) -> dict[str, Tensor]:
        """Keys of the latest batch's edits, by the names of `edited_parameters`; for callbacks that look at updates.

        Returns:
            ``(p, n)`` for each weight that one of them was written into; empty for editors without keys.
        """
        numbers = {edit.number for edit in self.last_edits}
        sites = self.session.sites if self.session is not None else []
        places = {site.name: [i for i, owner in enumerate(site.owners) if owner in numbers] for site in sites}
        return {site.name: site.keys[:, places[site.name]] for site in sites if places[site.name]}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The model as it would be if the run ended here: what an editor does at the end is done, and taken back.

        PRUNE's figures at any count are then those of its paper, which prunes a copy each time.
        """
        if self.session is None:
            yield
            return
        workspace = self.session.workspace
        with workspace.for_now() if self.editor.finishes and workspace.edits else nullcontext():
            if workspace.edits:
                self.editor.finish(workspace)
            yield

    def go_back(self, edits: int, reason: str = "") -> list[int]:
        """Takes back all edits after the first so many, see `lit_edit.session.EditSession.undo`.

        Args:
            edits: Number of the last edit to stay.
            reason: Noted in the journal.

        Returns:
            Numbers of the edits taken back.

        Raises:
            ValueError: If an update that it takes is no longer kept. Nothing is changed then.
        """
        return self._session().undo(to=edits, reason=reason)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Ends the epoch before another edit where a callback has just asked to stop."""
        return -1 if self.trainer.should_stop else None

    def keep_in(self, folder: Path, before: Path | None = None, limit: int = LIMIT) -> None:
        """Keeps journal and updates in a run's folder, see `lit_edit.session.EditSession.keep_in`."""
        session = self._session()
        session.updates.limit = limit
        session.keep_in(folder, before)

    def _requests(self) -> list[EditRequest]:
        """All requests of the run, where the data module offers them."""
        return list(getattr(getattr(self.trainer, "datamodule", None), "requests", []))

    def setup(self, stage: str) -> None:
        """Prepares contexts and statistics on the unedited model and checks every request."""
        if stage != "fit":
            return
        VerifiedCheckpointIO.install(self.trainer)
        if self.session is not None:
            self._warn_of_repeats()
            return
        bar = self.trainer.progress_bar_callback is not None and on_terminal()
        zero = self.trainer.is_global_zero
        self.open(self._requests(), self.trainer.strategy.root_device, progress=zero and bar, announce=zero)
        # Without a data module of this project the requests are seen, and checked, batch by batch only.
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", 1)
        self._session().check(self._requests(), batch_size)

    def open(
        self, requests: Sequence[EditRequest], device: torch.device, progress: bool = False, announce: bool = False
    ) -> EditSession:
        """Opens the session on the unedited model, as a fit does.

        Args:
            requests: Those to come, or those of the run that is to be restored.
            device: Where to compute.
            progress: Show a bar while statistics are collected.
            announce: Say how long that takes, if it is more than a minute.
        """
        self.model.to(device)
        self.session = EditSession(
            self.model,
            self.tokenizer,
            self.editor,
            self.preparation,
            self.mending,
            requests,
            self.guard,
            progress=progress,
            notify=self._announce if announce else None,
        )
        self._fingerprint = model_fingerprint(self.model)
        return self.session

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the edits, under `CHECKPOINT_KEY`."""
        return {"original": self._fingerprint, **self._session().state_dict()}

    def restore(self, state: Mapping[str, Any] | None, requests: Sequence[EditRequest]) -> EditSession:
        """Restores `state`'s result on the unedited model.

        Raises:
            ValueError: If it is none, or of another model, other layers or other settings.
        """
        session = self._session()
        if state is None:
            raise ValueError("The checkpoint was not made by LitEdit: it holds no record of edits.")
        if state.get("original") != self._fingerprint:
            raise ValueError(
                "The checkpoint was made from another model, or the same in another dtype: resume with the model and "
                "dtype the run was started with."
            )
        session.load_state_dict(state, requests)
        return session

    def _warn_of_repeats(self) -> None:
        """A second fit may bring the facts of the first."""
        made = {request.case_id for request in self.edited_requests}
        again = [request.case_id for request in self._requests() if request.case_id in made]
        if again:
            rank_zero_warn(
                f"{len(again)} of the facts are in the weights already (case {again[0]!r} first) and are written a "
                "second time: edit a fresh model, or leave them out.",
                category=UserWarning,
            )

    @staticmethod
    def _announce(said: str) -> None:
        print(
            f"{said} (`{program()} statistics` with the same options does this beforehand, and goes on if cut.)",
            flush=True,
        )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None: the values' own Adam lives and ends within a training step."""
        return []

    def on_train_start(self) -> None:
        """Dropout off: `fit` would leave it on. Finishes what was resumed after its last batch.

        Lightning counts the epoch of a checkpoint that was saved at the end of the last batch as done, and passes over
        `on_train_epoch_end`; callbacks measure the end of the run after this.
        """
        self.model.eval()
        done: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", 1)
        self._fitted_before = max(len(self.journal) - done.ready * batch_size, 0)
        if self.trainer.fit_loop.done:
            self._session().finish()

    def _session(self) -> EditSession:
        if self.session is None:
            raise RuntimeError("LitEdit is set up by Trainer.fit; outside it, use lit_edit.edit.")
        return self.session

    def training_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        """The gradient half: optimises v* of the batch's requests."""
        self._pending = self._session().plan(batch)

    def on_train_batch_end(self, outputs: Any, batch: list[EditRequest], batch_idx: int) -> None:
        """The closed-form half: applies the update."""
        self._apply_pending()

    def on_train_epoch_end(self) -> None:
        """No more edits follow: lets the editor finish. Callbacks that measure when training ends see its work."""
        self._session().finish()

    @torch.no_grad()
    def _apply_pending(self) -> None:
        if self._pending is None:
            return
        with signals_held():  # the weights, the journal and the log change together
            plan, self._pending = self._pending, None
            self.last_edits = self._session().apply(plan)
        n = len(self.last_edits)
        written = [e for e in self.last_edits if e.change]
        figures = {
            "train/loss": sum(e.loss for e in self.last_edits) / n,
            "train/p_value": sum(e.p_value for e in self.last_edits) / n,
            "train/p_target": sum(e.p_target for e in self.last_edits) / n,
            "train/seconds_per_edit": self.last_edits[-1].seconds,
        }
        if written:
            figures["train/relative_change"] = sum(max(e.change.values()) for e in written) / len(written)
            figures["train/middle_layer"] = sum(e.layers[len(e.layers) // 2] for e in written) / len(written)
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(figures, step=self.edits_applied)

    @property
    def strict_loading(self) -> bool:
        """False: a checkpoint holds the weights of edited layers only."""
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        raise AttributeError("LitEdit checkpoints hold edited weights only and are never loaded strictly.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the weights of the layers that were edited, the names of all editable ones, and the editor's state.

        A callback may save between the two halves of a batch. Lightning counts that batch as done, so its update is
        applied first; otherwise a resumed run would lack one edit. In the same way the editor finishes first where a
        callback saves between the end of the epoch and `on_train_epoch_end`: the weights of such a checkpoint are
        those of a whole run.
        """
        session = self._session()
        self._apply_pending()
        epoch: Any = self.trainer.fit_loop.epoch_progress.current
        if epoch.processed > epoch.completed:
            session.finish()
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if batch_size:  # a batch that ended in an error counts as done in Lightning, and has left no edit
            go_on_after(checkpoint, math.ceil((len(session.journal) - self._fitted_before) / batch_size))
        checkpoint["state_dict"] = {}
        checkpoint[CHECKPOINT_KEY] = self.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` kept; the originals are the model's weights as they are now, unedited.

        Raises:
            ValueError: If the checkpoint is none of an editing run, or of another model or other layers.
        """
        requests = self._requests()
        session = self.restore(checkpoint.get(CHECKPOINT_KEY), requests)
        if len(session.journal) < len(requests):
            reopen_epoch(checkpoint)
        else:
            reopen_end(checkpoint)

    def export(self, folder: str | Path) -> None:
        """Writes the edited model and its tokenizer as `transformers` loads them."""
        save_model(self.model, self.tokenizer, folder)

    def export_delta(self, path: str | Path, tolerance: float = 0.0) -> DeltaHeader:
        """Writes what the edits changed, see `lit_edit.runs.delta.save_delta`.

        Raises:
            ValueError: Before a fit.
        """
        if self.session is None or self._fingerprint is None:
            raise ValueError("Nothing was edited yet: a delta is what a fit has changed.")
        return save_delta(
            path,
            self.model,
            {site.name: site.original_stored for site in self.session.sites if site.edited},
            original=self._fingerprint,
            tolerance=tolerance,
            method=self.editor.describe(),
            edits=self.edits_applied,
        )
