"""Everything an editor works with, bound to one model: architecture, tokenisation, contexts, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.architectures import Architecture, Family
from lit_edit.keys import KeptKeys
from lit_edit.prompts import Prompter, Row, in_context
from lit_edit.requests import EditRequest
from lit_edit.stopwatch import Stopwatch
from lit_edit.suffix import Known

KL_PROMPT = "{} is a"


@dataclass
class Workspace:
    """One model and what has been prepared for editing it.

    ``contexts`` are templates with one ``{}`` for the prompt, the bare ``{}`` first; they are part of an edit's
    definition. Each for the layers where it was asked for: ``covariances`` maps a layer to C = E[k kᵀ] (p, p),
    ``gradients`` to the gradient of the language-model loss on a corpus (d, p), ``originals`` to a copy of the weight
    (d, p) before the first edit. ``stopwatch`` counts the seconds of an edit by stage. ``cuts`` is what was found
    out about passes of the model that are cut (`lit_edit.suffix`), ``keys`` are those of the batch being edited.
    """

    model: nn.Module
    tokenizer: Any
    architecture: Architecture
    prompter: Prompter
    contexts: list[str]
    covariances: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    originals: dict[int, Tensor] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    cuts: Known = field(default_factory=Known)
    keys: KeptKeys = field(default_factory=KeptKeys)

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
            model: a causal language model of `transformers`.
            tokenizer: its fast tokenizer.
            contexts: as above.
            family: where a model of an unknown kind keeps its parts.
            chat_template: put every prompt into the tokenizer's chat template, see `lit_edit.prompts.chat_frame`.
        """
        prompter = Prompter.of(model, tokenizer, chat_template)
        return cls(model, tokenizer, Architecture(model, family), prompter, list(contexts))

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.architecture.device

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
