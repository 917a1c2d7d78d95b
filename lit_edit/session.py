"""Editing one model, without a Trainer: what `LitEdit` and `edit` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.architectures import Family
from lit_edit.editors import Editor, Plan
from lit_edit.evaluation import score_targets
from lit_edit.journal import Edit, Journal
from lit_edit.prompts import check_requests, sample_contexts
from lit_edit.requests import EditRequest
from lit_edit.statistics import covariances, gradients
from lit_edit.workspace import Workspace


def cache_folder() -> Path:
    """Where statistics are kept: ``$LIT_EDIT_CACHE``, or ``lit_edit`` in the user's cache folder."""
    if "LIT_EDIT_CACHE" in os.environ:
        return Path(os.environ["LIT_EDIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lit_edit"


class EditSession:
    """A model, an editor, and the edits applied so far.

    Args:
        model: a causal language model of `transformers`; edited in place. Put into evaluation mode, its weights no
            longer require gradients.
        tokenizer: its fast tokenizer.
        editor: the method.
        corpus: texts over which key covariances and gradients are taken, for methods that need them.
        corpus_name: names it in the cached artefact.
        corpus_tokens: at most so many tokens.
        cache_dir: where artefacts are kept; `cache_folder` if None.
        seed: of the sampled contexts.
        progress: show a bar while statistics are collected.
        family: where a model of an unknown kind keeps its parts.

    Attributes:
        prepared: seconds that were spent before the first edit, on ``contexts`` and ``statistics``.

    Raises:
        ValueError: if the model, tokenizer or layers do not fit; the message says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        editor: Editor,
        corpus: Iterable[str],
        corpus_name: str,
        corpus_tokens: int = 50_000,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        progress: bool = False,
        family: Family | None = None,
    ) -> None:
        model.eval().requires_grad_(False)
        self.editor = editor
        self.workspace = Workspace.of(model, tokenizer, family=family)
        self.journal = Journal()
        layers = editor.editable_layers(self.workspace)
        self.editable = [self.workspace.architecture[layer] for layer in layers]
        number, length = editor.context_sampling
        watch = self.workspace.stopwatch
        if number:
            with watch.measure("contexts"):
                self.workspace.contexts = sample_contexts(model, self.workspace.prompter, number, length, seed)
        if editor.needs_covariances or editor.needs_gradients:
            texts = list(corpus)  # may be a stream, and is read once for each statistic

            def over_corpus(collect: Callable[..., dict[str, Tensor]]) -> dict[int, Tensor]:
                found = collect(
                    model,
                    tokenizer,
                    texts,
                    corpus_name,
                    {part.name: part.projection for part in self.editable},
                    cache_folder() if cache_dir is None else cache_dir,
                    max_tokens=corpus_tokens,
                    sequence_length=min(256, self.workspace.prompter.max_length),
                    progress=progress,
                )
                return {part.index: found[part.name] for part in self.editable}

            with watch.measure("statistics"):
                if editor.needs_covariances:
                    self.workspace.covariances = over_corpus(covariances)
                if editor.needs_gradients:
                    self.workspace.gradients = over_corpus(gradients)
        if editor.needs_originals:
            self.workspace.originals = {part.index: part.weight.clone() for part in self.editable}
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
        change: dict[int, float] = {}
        for item in applied:  # the edit's own update comes first, what restrains the sum of all of them after it
            change.setdefault(item.layer, item.relative_change)
        rows = [self.workspace.prompter.row(r.prompt, r.target_new) for r in plan.requests]
        with watch.measure("score"):
            p_target = score_targets(self.workspace.model, self.workspace.prompter, rows).log_prob.exp().tolist()
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
                p_target=p_target[i],
                steps=plan.steps[i],
                change={str(layer): change[layer] for layer in plan.layers[i]},
                seconds=sum(stages.values()),
                stages=stages,
            )
            self.journal.add(request, edit)
            edits.append(edit)
        return edits

    def finish(self) -> None:
        """Does what the editor does once, when no more edits follow (PRUNE). More edits may follow all the same."""
        self.editor.finish(self.workspace)

    def edited_weights(self) -> dict[str, Tensor]:
        """The editable weights as the model stores them, by parameter name."""
        return {part.name: part.projection.weight.detach() for part in self.editable}  # type: ignore[operator]
