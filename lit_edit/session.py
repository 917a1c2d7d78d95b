"""Editing one model, without a Trainer: what `LitEdit` and `edit` share."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.algebra.linalg import fill_silent
from lit_edit.editors import Editor, Mending, Plan
from lit_edit.evaluation.scores import greedy, score_targets
from lit_edit.model.edited_weight import Written
from lit_edit.model.families import Family
from lit_edit.model.loading import EMBEDDED
from lit_edit.model.prompts import Row, check_requests, sample_contexts
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Edit, Journal, Mended
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
        requests: Those to come, as far as they are known: what does not fit the model is reported before statistics
            are collected.
        progress: Show a bar while statistics are collected.
        notify: Told how long it will take to collect them, if that is more than a minute.

    Attributes:
        sites: The weights that edits may touch.
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
        progress: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        how = Preparation() if preparation is None else preparation
        model.eval().requires_grad_(False)
        self.editor, self.mending = editor, mending
        self._mended_at = 0
        self.workspace = Workspace.of(model, tokenizer, family=how.family, chat_template=how.chat_template)
        self.journal = Journal()
        self._warned_of_rounding = False
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
        """The closed-form half: changes the weights and writes the journal."""
        watch = self.workspace.stopwatch
        with watch.measure("other"):
            applied = self.editor.apply(self.workspace, plan)
        own: dict[int, Written] = {}
        for item in applied:  # the edit's own update comes first, what restrains the sum of all of them after it
            own.setdefault(item.layer, item)
        self._warn_of_rounding(own.values())
        rows = [self.workspace.prompter.row(r.prompt, r.target_new) for r in plan.requests]
        said = [{"p_target": math.nan} for _ in rows]
        try:
            with watch.measure("score"):
                said = self._asked(plan.requests, rows)
        finally:  # the weights are edited, whatever becomes of the score: the journal must say so
            edits = self._record(plan, own, said)
        if self.mending is not None and self.mending.is_due(self._mended_at, len(self.journal)):
            self.mend()
        return edits

    def mend(self) -> list[int]:
        """Writes past edits that slipped again, as the session's `Mending` says (its defaults if it has none).

        Returns:
            Numbers of the edits that were written again.
        """
        began = time.perf_counter()
        numbers = (self.mending or Mending()).run(self.workspace, self.editor)
        self.workspace.stopwatch.take()  # counted here, not with the next edit
        self._mended_at = len(self.journal)
        if len(self.journal):
            self.journal.mendings.append(Mended(len(self.journal), numbers, time.perf_counter() - began))
        return numbers

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

    def _record(self, plan: Plan, own: dict[int, Written], said: list[dict[str, Any]]) -> list[Edit]:
        """Writes a batch that was applied into the journal."""
        watch = self.workspace.stopwatch
        stages = {stage: seconds / len(plan.requests) for stage, seconds in watch.take().items()}
        edits = []
        for i, request in enumerate(plan.requests):
            edit = Edit(
                number=len(self.journal) + 1,
                case_id=request.case_id,
                prompt=request.prompt,
                subject=request.subject,
                target_new=request.target_new,
                layers=list(plan.layers[i]),
                loss=plan.loss[i],
                p_value=plan.probability[i],
                **said[i],
                steps=plan.steps[i],
                change={str(layer): own[layer].relative_change for layer in plan.layers[i]},
                seconds=sum(stages.values()),
                stages=stages,
                rounding={str(layer): own[layer].rounding for layer in plan.layers[i]},
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
        self.editor.finish(self.workspace)

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
            "journal": self.journal.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], requests: Sequence[EditRequest]) -> None:
        """Restores `state_dict`'s result.

        Args:
            state: As above.
            requests: Those of the run, among which the journal's are found.

        Raises:
            ValueError: If the state is of other layers, or the requests lack one that was applied.
        """
        sites: Mapping[int, Mapping[str, Tensor]] = state["sites"]
        here = {site.layer for site in self.sites}
        if set(sites) != here:
            raise ValueError(
                f"The checkpoint holds the layers {_listed(sites)}, this run edits {_listed(here)}: resume with the "
                "method and layers the run was started with."
            )
        for site in self.sites:
            site.check_state(sites[site.layer])
        self.journal.load_state_dict(state["journal"], requests)
        for site in self.sites:
            site.load_state_dict(sites[site.layer])
        self.workspace.contexts = list(state["contexts"])
        self.workspace.cuts.cuttable = bool(state["cuttable"])
        self.workspace.finished_at = int(state["finished_at"])
        self.workspace.history = dict(enumerate(self.journal.requests, 1))
        self._mended_at = int(state["mended_at"])


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in sorted(layers))
