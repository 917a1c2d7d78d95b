"""Everything an editor works with, bound to one model: architecture, tokenisation, contexts, statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.model.edited_weight import EditedWeight, all_or_nothing
from lit_edit.model.families import Architecture, Family
from lit_edit.model.passes import Known
from lit_edit.model.prompts import Prompter, Row, in_context
from lit_edit.model.stopwatch import Stopwatch
from lit_edit.requests import EditRequest, plain

KL_PROMPT = "{} is a"


class _ForNow(Exception):
    """Ends a block whose writes are not to stay."""


@dataclass
class BatchKeys:
    """The keys of the batch being edited, for as long as neither a weight nor the contexts change.

    An edit asks for the same keys several times: where its layers are chosen, where its values start from, and where
    its first layer is solved for. An average of keys is known again by its identity.
    """

    _of: Any = None
    _keys: dict[tuple[int, int, str, str, str], tuple[object, Tensor]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forgets all: another batch begins."""
        self._keys.clear()

    def look_up(
        self, workspace: Workspace, requests: Sequence[EditRequest], layers: Sequence[int], average: object
    ) -> dict[int, Tensor] | None:
        """The keys as `lit_edit.editors.keys.compute_keys` gives them, if all are there."""
        now = (tuple(workspace.contexts), [(layer, site.version) for layer, site in workspace.sites.items()])
        if now != self._of:
            self._of = now
            self.clear()
        found = {layer: [self._keys.get(_name(average, layer, r)) for r in requests] for layer in layers}
        kept = {layer: [key[1] for key in keys if key is not None] for layer, keys in found.items()}
        if not requests or any(len(keys) < len(requests) for keys in kept.values()):
            return None
        return {layer: torch.stack(keys, dim=1) for layer, keys in kept.items()}

    def keep(self, requests: Sequence[EditRequest], average: object, keys: dict[int, Tensor]) -> None:
        """Keeps what `look_up` did not find."""
        for layer, found in keys.items():
            for i, request in enumerate(requests):
                # With the average, so that its identity is not given to another while the key is here.
                self._keys[_name(average, layer, request)] = average, found[:, i]


def _name(average: object, layer: int, request: EditRequest) -> tuple[int, int, str, str, str]:
    return id(average), layer, request.prompt, request.subject, request.target_new


@dataclass
class Workspace:
    """One model and what has been prepared for editing it.

    Attributes:
        contexts: Templates with one ``{}`` for the prompt, the bare ``{}`` first; part of an edit's definition.
        sites: The layers whose weight somebody has asked for, by index; see `site`.
        history: Edits in the weights by their number, oldest first. Numbers count up from 1 and are never given twice;
            edits that were refused or taken back are missing.
        last_number: Of the latest edit, in the weights or not.
        finished_at: ``edits`` when the editor last finished a run.
        stopwatch: Seconds of an edit by stage.
        cuts: What was found out about partial passes of the model (`lit_edit.model.passes`).
        keys: Keys of the batch being edited.
    """

    model: nn.Module
    tokenizer: Any
    architecture: Architecture
    prompter: Prompter
    contexts: list[str]
    sites: dict[int, EditedWeight] = field(default_factory=dict)
    history: dict[int, EditRequest] = field(default_factory=dict)
    last_number: int = 0
    finished_at: int = 0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    cuts: Known = field(default_factory=Known)
    keys: BatchKeys = field(default_factory=BatchKeys)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        contexts: Sequence[str] = ("{}",),
        family: Family | None = None,
        chat_template: bool = False,
    ) -> Workspace:
        """Binds a model and its tokenizer.

        Args:
            model: A causal language model of `transformers`.
            tokenizer: Its fast tokenizer.
            contexts: Contexts, as above.
            family: Where a model of an unknown kind keeps its parts.
            chat_template: Put every prompt into the tokenizer's chat template, see `lit_edit.model.prompts.chat_frame`.
        """
        prompter = Prompter.of(model, tokenizer, chat_template)
        return cls(model, tokenizer, Architecture(model, family), prompter, list(contexts))

    @property
    def edits(self) -> int:
        """Number of edits in the weights."""
        return len(self.history)

    def earlier(self, request: EditRequest) -> dict[int, EditRequest]:
        """The edits so far about a request's subject, by number."""
        subject = plain(request.subject)
        return {n: r for n, r in self.history.items() if plain(r.subject) == subject}

    def note(self, requests: Mapping[int, EditRequest]) -> None:
        """Notes edits, by number, as being in the weights; those already there stay in their place."""
        self.history.update(requests)
        self.last_number = max([self.last_number, *requests])

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Gives weights, memories and history their former content where the block ends in an error.

        Blocks can be nested.

        Raises:
            ValueError: If a weight was changed by other means than an edit.
        """
        before = dict(self.history), self.last_number, self.finished_at
        try:
            with all_or_nothing(list(self.sites.values())):
                yield
        except BaseException:
            self.history, self.last_number, self.finished_at = before
            raise

    @contextmanager
    def for_now(self) -> Iterator[None]:
        """Takes back, bit by bit, whatever the block writes."""
        with suppress(_ForNow), self.all_or_nothing():
            yield
            raise _ForNow

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.architecture.device

    def site(self, layer: int) -> EditedWeight:
        """The editable weight of a layer."""
        if layer not in self.sites:
            part = self.architecture[layer]
            self.sites[layer] = EditedWeight(part.projection.weight, part.name, layer, part.transposed)  # type: ignore[arg-type]
        return self.sites[layer]

    def rewriting_rows(self, request: EditRequest, contexts: Sequence[str] | None = None) -> list[Row]:
        """The edit prompt and its target within every context, the subject located behind the context.

        A context that would make the text longer than the model takes is left out for this request; the bare prompt
        never is (`RequestError`).
        """
        rows = []
        for context in self.contexts if contexts is None else contexts:
            prompt, before = in_context(context, request.prompt)
            if before and self.prompter.length(prompt, request.target_new) > self.prompter.max_length:
                continue
            rows.append(self.prompter.row(prompt, request.target_new, request.subject, request.source, before))
        return rows

    def essence_row(self, request: EditRequest) -> Row:
        """ "{subject} is a", whose next-token distribution the KL term preserves."""
        # The first occurrence: a subject like "a" stands in the template's own words, too.
        return self.prompter.row(KL_PROMPT.format(request.subject), "", request.subject, request.source, first=True)
