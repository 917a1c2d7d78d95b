"""Editing one model, without a Trainer: what `LitEdit` and `edit` share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.algebra.linalg import fill_silent
from lit_edit.algebra.updates import UnwritableError
from lit_edit.editors import Editor, FailedEditError, Guard, Mending, Plan
from lit_edit.evaluation.scores import greedy, score_targets
from lit_edit.model.edited_weight import Written
from lit_edit.model.families import Family
from lit_edit.model.loading import EMBEDDED
from lit_edit.model.prompts import Row, check_requests, sample_contexts
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Edit, Event, Journal
from lit_edit.runs.updates import FOLDER as UPDATES
from lit_edit.runs.updates import Kind, UpdateLog
from lit_edit.settings import first_difference, settings_of
from lit_edit.statistics import Collector, GradientCollector, KeyCollector, Statistics
from lit_edit.statistics.corpora import load_corpus

TOLERATED_ROUNDING = 0.5  # of a change's norm; beyond it what is stored is rather noise than the edit


@dataclass(frozen=True)
class Preparation:
    """How a model is prepared for editing.

    Args:
        corpus: Text for key covariances and gradients: ``embedded``, a text or JSONL file, a Hugging Face data set (see
            `lit_edit.statistics.corpora.load_corpus`), or the texts themselves.
        corpus_tokens: Number of its tokens to count, at most.
        cache_dir: Folder of the statistics; the user's cache folder if None.
        seed: Seed of the sampled contexts.
        family: Where a model of an unknown kind keeps its parts; the error about such a model proposes one.
        chat_template: Put every prompt into the tokenizer's chat template as the words of a user, with the target as
            the reply: for instruction-tuned models that are asked in chats. Evaluation asks the same way.
        collect_statistics: Whether statistics that are not there are collected; an error if not.
    """

    corpus: str | list[str] = EMBEDDED
    corpus_tokens: int = 50_000
    cache_dir: str | None = None
    seed: int = 0
    family: Family | None = None
    chat_template: bool = False
    collect_statistics: bool = True

    def statistics(self, collector: type[Collector], workspace: Workspace, layers: Sequence[int]) -> Statistics:
        """Statistics that editing some layers of a model needs, whether they are there or not.

        Args:
            collector: Their kind.
            workspace: Of the model before the first edit.
            layers: Indices of blocks.
        """
        parts = [workspace.architecture[layer] for layer in layers]
        return Statistics(
            collector,
            workspace.model,
            workspace.tokenizer,
            load_corpus(self.corpus) if isinstance(self.corpus, str) else self.corpus,
            self.corpus if isinstance(self.corpus, str) else "given",
            {part.name: part.projection for part in parts},
            self.cache_dir,
            max_tokens=self.corpus_tokens,
            sequence_length=min(256, workspace.prompter.max_length),
        )


class EditSession:
    """A model, an editor, and the edits applied so far.

    Args:
        model: A causal language model of `transformers`; edited in place. Put into evaluation mode, its weights no
            longer require gradients.
        tokenizer: Its fast tokenizer.
        editor: The method.
        preparation: Corpus, seed and the like.
        mending: When past edits that slipped are written again; never if None.
        guard: What becomes of edits that fail; its defaults if None.
        updates: Where the updates are kept that undo goes by; a temporary folder if None.
        requests: Those to come, as far as they are known: what does not fit the model is reported before statistics
            are collected.
        progress: Show a bar while statistics are collected.
        notify: Told how long it will take to collect them, if that is more than a minute.

    Attributes:
        sites: The weights that edits may touch.
        journal: Every edit so far and what became of it.
        prepared: Seconds spent before the first edit, on ``contexts`` and ``statistics``.

    Raises:
        ValueError: If the model, tokenizer or layers do not fit; the message says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        editor: Editor,
        preparation: Preparation | None = None,
        mending: Mending | None = None,
        requests: Sequence[EditRequest] = (),
        guard: Guard | None = None,
        updates: UpdateLog | None = None,
        progress: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        how = Preparation() if preparation is None else preparation
        model.eval().requires_grad_(False)
        self.editor, self.mending, self.preparation = editor, mending, how
        self.guard = Guard() if guard is None else guard
        self.updates = UpdateLog() if updates is None else updates
        if len(self.updates):
            raise ValueError(f"{self.updates.folder} holds updates of another session: name an empty folder.")
        self._mended_at = 0
        self.workspace = Workspace.of(model, tokenizer, family=how.family, chat_template=how.chat_template)
        self.journal = Journal()
        self._warned_of_rounding = False
        self._kept_before = 0  # files of updates that belong to a checkpoint
        check_requests(requests, self.workspace.prompter)
        layers = editor.editable_layers(self.workspace)
        self.sites = [self.workspace.site(layer) for layer in layers]
        number, length = editor.context_sampling
        watch = self.workspace.stopwatch
        if number:
            with watch.measure("contexts"):
                self.workspace.contexts = sample_contexts(model, self.workspace.prompter, number, length, how.seed)

        def collected(collector: type[Collector]) -> dict[str, Tensor]:
            with watch.measure("statistics"):
                statistics = how.statistics(collector, self.workspace, layers)
                return statistics.get(progress=progress, may_collect=how.collect_statistics, notify=notify)

        if editor.needs_covariances:
            found = collected(KeyCollector)
            for site in self.sites:
                site.covariance = fill_silent(found[site.name])
        if editor.needs_gradients:
            found = collected(GradientCollector)
            for site in self.sites:
                site.gradient = found[site.name]
        self.prepared = watch.take()  # and the first edit's own seconds begin at nothing

    @property
    def model(self) -> nn.Module:
        """The model as edited so far."""
        return self.workspace.model

    def check(self, requests: Sequence[EditRequest], batch_size: int) -> None:
        """Finds what cannot be edited before the first edit.

        Raises:
            ValueError: naming the record, the batch size, or the layer whose statistics do not serve.
        """
        self.editor.check(self.workspace, batch_size)
        check_requests(requests, self.workspace.prompter)

    def plan(self, requests: Sequence[EditRequest]) -> Plan:
        """The gradient half of a batch of edits."""
        with self.workspace.stopwatch.measure("other"), torch.enable_grad():
            return self.editor.plan(self.workspace, requests)

    @torch.no_grad()
    def apply(self, plan: Plan) -> list[Edit]:
        """The closed-form half: changes the weights and writes the journal.

        Where it ends in an error, no edit of the batch is in the weights, the journal or the kept updates.

        Raises:
            lit_edit.editors.FailedEditError: If an edit fails and the guard says ``stop``.
        """
        with self.workspace.stopwatch.measure("other"):
            plan = replace(plan, numbers=list(plan.numbered(self.workspace)))
            batch = _Batch(plan)
            with self._all_or_nothing():
                self._write_guarded(plan, batch)
                with self.workspace.stopwatch.measure("score"):
                    said = self._asked(plan.requests, self._rows(plan.requests))
                self.workspace.last_number = max([self.workspace.last_number, *batch.numbers])
        self._warn_of_rounding(batch.first.values())
        edits = self._record(batch, said)
        if self.mending is not None and self.mending.is_due(self._mended_at, len(self.journal)):
            self.mend()
        return edits

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Weights, memories and kept updates as before where the block ends in an error."""
        kept = len(self.updates)
        try:
            with self.workspace.all_or_nothing():
                yield
        except BaseException:
            self.updates.cut(kept)
            raise

    def _write_guarded(self, plan: Plan, batch: _Batch) -> None:
        """Writes those of a plan that the guard lets pass."""
        refused = self.guard.refused_plans(plan)
        if not refused:
            try:
                with self._all_or_nothing():
                    written = self._write("edit", plan, edits=len(self.journal) + len(batch.numbers))
                    if reason := self.guard.explosion(written):
                        raise UnwritableError(reason)
                    refused = self._failed(plan, batch)
                    if refused:
                        raise _TakenBackError
                for item in written:
                    if item.requests:
                        batch.first[item.layer] = item
                return
            except UnwritableError as error:
                if len(plan.requests) > 1:  # one of them spoils the others
                    for i in range(len(plan.requests)):
                        self._write_guarded(self._again(plan, [i]), batch)
                    return
                refused = {0: str(error)}
            except _TakenBackError:
                pass
        numbers = plan.numbers or []
        for i, reason in refused.items():
            if self.guard.on_failed_edit == "stop":
                raise FailedEditError(
                    f"Edit {numbers[i]} ({plan.requests[i].case_id!r}) failed and is not in the weights: {reason}. "
                    "Leave it out, or choose another `on_failed_edit`."
                )
            batch.refused[numbers[i]] = reason
        left = [i for i in range(len(plan.requests)) if i not in refused]
        if left:
            self._write_guarded(self._again(plan, left), batch)

    def _failed(self, plan: Plan, batch: _Batch) -> dict[int, str]:
        """Those of a plan that was just written that have to go, written again first where the guard says so."""
        how, numbers = self.guard.on_failed_edit, plan.numbers or []
        if how in ("undo", "stop"):
            return self.guard.failed(self._probabilities(plan.requests))
        for _ in range(self.guard.tries if how == "retry" else 0):
            failed = self.guard.failed(self._probabilities(plan.requests))
            if not failed:
                break
            written = self._write("mend", self._again(plan, list(failed)), len(self.journal) + len(batch.numbers))
            if reason := self.guard.explosion(written):
                raise UnwritableError(reason)
            for i, reason in failed.items():
                batch.tries[numbers[i]] = batch.tries.get(numbers[i], 1) + 1
                batch.reasons[numbers[i]] = reason
        return {}

    def _again(self, plan: Plan, places: Sequence[int]) -> Plan:
        """Some requests of a plan, planned anew on the model as it is."""
        numbers = plan.numbers or []
        again = self.plan([plan.requests[i] for i in places])
        return replace(again, numbers=[numbers[i] for i in places])

    def _write(self, kind: Kind, plan: Plan, edits: int) -> list[Written]:
        """Writes a plan, and keeps its updates."""
        also = [n for n in self.editor.kept_with(self.workspace, plan.requests) if n not in (plan.numbers or [])]
        if self.workspace.edits and not len(self.updates):  # resumed without them: what undo can go back to
            self.updates.add_point(self.workspace.sites, len(self.journal))
        written = self.editor.apply(self.workspace, plan)
        with self.workspace.stopwatch.measure("log"):
            self.updates.add(kind, written, self.workspace.sites, plan.numbers or [], also, edits)
        return written

    def mend(self) -> list[int]:
        """Writes past edits that slipped again, as the session's `Mending` says (its defaults if it has none).

        Returns:
            Numbers of the edits that were written again.
        """
        began = time.perf_counter()
        with self._all_or_nothing():
            numbers = (self.mending or Mending()).run(
                self.workspace, self.editor, lambda _, plan: self._write("mend", plan, len(self.journal))
            )
        self.workspace.stopwatch.take()  # counted here, not with the next edit
        self._mended_at = len(self.journal)
        if len(self.journal):
            self.journal.note(Event("mended", len(self.journal), numbers, time.perf_counter() - began))
        return numbers

    @torch.no_grad()
    def undo(
        self,
        numbers: Iterable[int] = (),
        *,
        last: int | None = None,
        to: int | None = None,
        case_ids: Iterable[str] = (),
        reason: str = "",
    ) -> list[int]:
        """Takes edits back, the latest ones or any others.

        With all edits taken back the weights are bit by bit what they were before the first. With some in the middle
        they are what the other writes make of the unedited weights; edits that had been written together with them are
        written again alone. Later edits stay what they were computed to be, on weights with the edits that are gone.

        Args:
            numbers: Of the edits, as in the journal.
            last: Number of last edits to take back.
            to: Number of first edits to keep; the others are taken back.
            case_ids: Of requests.
            reason: Noted in the journal.

        Returns:
            Numbers of the edits taken back, ascending.

        Raises:
            ValueError: If an edit is not in the weights, or its update is no longer kept. Nothing is changed then.
        """
        began = time.perf_counter()
        gone = self._named(numbers, last, to, case_ids)
        if not gone:
            return []
        history, edits = self.workspace.history, len(self.journal)
        rest = {number: request for number, request in history.items() if number not in gone}
        writes, mates = (self.updates.writes, []) if not rest else self.updates.affected(gone)
        finished = [write for write in self.updates.writes if write.kind == "finish"]
        with self._all_or_nothing():
            if rest:
                left_out = {write.index for write in [*writes, *finished]}
                self.updates.compose(self.workspace.sites, without=left_out)
                for site in self.sites:
                    site.forget([*gone, *mates])
                self.updates.drop([write for write in self.updates.writes if write.index in left_out], edits)
            else:
                for site in self.sites:
                    site.restore()
                self.updates.drop_all(edits)
            self.workspace.history = rest
            if finished:
                self.workspace.finished_at = -1
            size = self.editor.max_batch or max(len(mates), 1)
            for start in range(0, len(mates), size):
                part = mates[start : start + size]
                with torch.enable_grad():
                    again = self.editor.plan(self.workspace, [history[n] for n in part])
                self._write("mend", replace(again, numbers=part), edits)
            if finished and rest:
                self._finish_editor()
        seconds = time.perf_counter() - began
        self.workspace.stopwatch.take()
        self.journal.note(Event("undone", edits, gone, seconds, reason))
        if mates:
            self.journal.note(Event("rewritten", edits, mates, 0.0, f"written together with {_listed(gone)}"))
        return gone

    def _named(self, numbers: Iterable[int], last: int | None, to: int | None, case_ids: Iterable[str]) -> list[int]:
        """The edits that `undo` is asked for, ascending."""
        history, gone = self.workspace.history, set(numbers)
        standing = sorted(history)
        if last is not None or to is not None:
            if (to if last is None else last) < 0:  # type: ignore[operator]
                raise ValueError("`last` and `to` are numbers of edits, 0 or more.")
            gone |= set(standing[len(standing) - min(last, len(standing)) :] if last is not None else ())
            gone |= {number for number in standing if to is not None and number > to}
        for case_id in case_ids:
            found = [number for number, request in history.items() if request.case_id == case_id]
            if not found:
                raise ValueError(f"No edit in the weights has the case id {case_id!r}; edits.jsonl lists all.")
            gone |= set(found)
        unknown = sorted(gone - history.keys())
        if unknown:
            raise ValueError(
                f"Edit {unknown[0]} is not in the weights: it was refused, taken back before, or never made. There are "
                f"{len(history)} edits in them{f', {standing[0]} to {standing[-1]}' if standing else ''}."
            )
        return sorted(gone)

    def _rows(self, requests: Sequence[EditRequest]) -> list[Row]:
        return [self.workspace.prompter.row(r.prompt, r.target_new) for r in requests]

    def _probabilities(self, requests: Sequence[EditRequest]) -> list[float]:
        """Of the new targets, now."""
        scores = score_targets(self.workspace.model, self.workspace.prompter, self._rows(requests))
        return [float(p) for p in scores.log_prob.exp()]

    def _asked(self, requests: Sequence[EditRequest], rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What the model answers now to the edit prompts of a batch."""
        model, prompter = self.workspace.model, self.workspace.prompter
        scores = score_targets(model, prompter, rows)
        said = []
        for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
            exact, answer = bool(scores.exact[i]), request.target_new
            if not exact:
                (ids,) = greedy(model, prompter, [request.prompt], [len(row.ids) - row.target_start])
                answer = prompter.tokenizer.decode(ids, skip_special_tokens=True).strip()
            found = {"p_target": float(scores.log_prob[i].exp()), "exact": exact, "rank": int(scores.rank[i])}
            said.append({**found, "answer": answer})
        return said

    def _record(self, batch: _Batch, said: list[dict[str, Any]]) -> list[Edit]:
        """Writes a batch that was applied into the journal."""
        watch, plan = self.workspace.stopwatch, batch.plan
        stages = {stage: seconds / len(plan.requests) for stage, seconds in watch.take().items()}
        edits = []
        for i, (number, request) in enumerate(zip(batch.numbers, plan.requests, strict=True)):
            layers = [] if number in batch.refused else [layer for layer in plan.layers[i] if layer in batch.first]
            edit = Edit(
                number=number,
                case_id=request.case_id,
                prompt=request.prompt,
                subject=request.subject,
                target_new=request.target_new,
                layers=layers,
                loss=plan.loss[i],
                p_value=plan.probability[i],
                **said[i],
                steps=plan.steps[i],
                change={str(layer): batch.first[layer].relative_change for layer in layers},
                seconds=sum(stages.values()),
                stages=stages,
                rounding={str(layer): batch.first[layer].rounding for layer in layers},
                status="refused" if number in batch.refused else "written",
                reason=batch.refused.get(number, batch.reasons.get(number, "")),
                tries=0 if number in batch.refused else batch.tries.get(number, 1),
            )
            self.journal.add(request, edit)
            edits.append(edit)
        return edits

    def _warn_of_rounding(self, applied: Iterable[Written]) -> None:
        """Says once that edits are lost to the weights' precision, which nothing else would show."""
        worst = max(applied, key=lambda item: item.rounding, default=None)
        if worst is None or worst.rounding <= TOLERATED_ROUNDING or self._warned_of_rounding:
            return
        kind = self.workspace.site(worst.layer).weight.dtype
        if torch.finfo(kind).bits > 16:  # what is lost to float32 is nothing to begin with: a fact known already
            return
        if len(self.journal):  # what rounding took is of all edits, beside which a single one may be small
            return
        self._warned_of_rounding = True
        dtype = str(kind).removeprefix("torch.")
        warnings.warn(
            f"Edit {len(self.journal) + 1}: rounding to {dtype} took {worst.rounding:.0%} of the change of layer "
            f"{worst.layer}, which is {worst.relative_change:.1e} of the weight, for now: it is kept, and stored with "
            "the next edits of the layer. Load the model in float32 to write such small changes at once; the journal "
            "has `rounding` for every edit.",
            stacklevel=2,
        )

    def finish(self) -> None:
        """Does what is done once, when no more edits follow: a last mending, PRUNE. More may follow all the same."""
        if self.mending is not None and self._mended_at < len(self.journal):
            self.mend()
        self._finish_editor()

    def _finish_editor(self) -> None:
        with self._all_or_nothing():
            written = self.editor.finish(self.workspace)
            if written:
                self.updates.add("finish", written, self.workspace.sites, edits=len(self.journal))

    def edited_weights(self) -> dict[str, Tensor]:
        """The editable weights as the model stores them, by parameter name."""
        return {site.name: site.stored for site in self.sites}

    def state_dict(self) -> dict[str, Any]:
        """All that later edits depend on, as plain types and tensors on the CPU."""
        return {
            "sites": {site.layer: site.state_dict() for site in self.sites},
            "contexts": list(self.workspace.contexts),
            "cuttable": self.workspace.cuts.cuttable,
            "finished_at": self.workspace.finished_at,
            "mended_at": self._mended_at,
            "last_number": self.workspace.last_number,
            "journal": self.journal.state_dict(),
            "updates": self.updates.state_dict(),
            "settings": self.settings(),
        }

    def settings(self) -> dict[str, Any]:
        """What decides about the weights of a run, beside model and data: another value would make others."""
        how = self.preparation
        return {
            "editor": settings_of(self.editor),
            "mending": settings_of(self.mending),
            "guard": settings_of(self.guard),
            "seed": how.seed,
            "chat_template": how.chat_template,
        }

    def load_state_dict(self, state: Mapping[str, Any], requests: Sequence[EditRequest]) -> None:
        """Restores `state_dict`'s result.

        Args:
            state: As above.
            requests: Those of the run, among which the journal's are found.

        Raises:
            ValueError: If the state is of other layers, or the requests lack one that was applied.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(
                f"The checkpoint lacks {', '.join(missing)}: it was made by another version of this project. Resume "
                "with the version it was made with, or start again."
            )
        sites: Mapping[int, Mapping[str, Tensor]] = state["sites"]
        here = {site.layer for site in self.sites}
        if set(sites) != here:
            raise ValueError(
                f"The checkpoint holds the layers {_listed(sites)}, this run edits {_listed(here)}: resume with the "
                "method and layers the run was started with."
            )
        differs = first_difference(state["settings"], self.settings())
        if differs is not None:
            raise ValueError(f"The checkpoint was made with other settings: {differs}. Resume with those of its run.")
        for site in self.sites:
            site.check_state(sites[site.layer])
        self.journal.load_state_dict(state["journal"], requests)
        for site in self.sites:
            site.load_state_dict(sites[site.layer])
        workspace = self.workspace
        workspace.contexts = list(state["contexts"])
        workspace.cuts.cuttable = bool(state["cuttable"])
        workspace.finished_at = int(state["finished_at"])
        made = zip(self.journal.edits, self.journal.requests, strict=True)
        workspace.history = {edit.number: request for edit, request in made if edit.status == "written"}
        workspace.last_number = int(state["last_number"])
        self._mended_at = int(state["mended_at"])
        self._kept_before = int(state["updates"]["last"])

    def kept_updates(self, folder: Path) -> UpdateLog:
        """The updates in a run's folder that belong to the restored checkpoint; the folder stays as it is."""
        found = UpdateLog(folder / UPDATES, self.updates.limit)
        return found if len(found) == self._kept_before else found.up_to(self._kept_before)

    def keep_in(self, folder: Path, before: Path | None = None) -> None:
        """Keeps journal and updates in a run's folder from now on.

        Args:
            folder: Of the run.
            before: Folder of the run that a resumed checkpoint came from; its updates are taken over, so that edits
                from before can be taken back, too. It stays as it is.
        """
        if self._kept_before:
            source = (before or folder) / UPDATES
            self.updates = UpdateLog.resumed(source, folder / UPDATES, self._kept_before, self.updates.limit)
            self._kept_before = 0
        else:
            self.updates.move_to(folder / UPDATES)
        self.journal.keep_in(folder)


class _TakenBackError(Exception):
    """Some edits of a batch have to go: ends the block that wrote them."""


@dataclass
class _Batch:
    """What became of the edits of a batch.

    Attributes:
        plan: As it was first.
        refused: Why edits are not in the weights, by number.
        reasons: Why edits were tried again.
        tries: Times that edits were written, where it is not once.
        first: What the batch's own update did, by layer; what restrains the sum of all of them comes after it.
    """

    plan: Plan
    refused: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    first: dict[int, Written] = field(default_factory=dict)

    @property
    def numbers(self) -> list[int]:
        """Of the edits."""
        return self.plan.numbers or []


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in sorted(layers))
