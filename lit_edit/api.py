"""Editing without a Trainer: a session on a model, or one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import nn

from lit_edit.configs.find import read_config
from lit_edit.datamodules.records import ALL_FORMS, read_request
from lit_edit.editors import Editor, Guard, Mending
from lit_edit.evaluation.evaluate import Outcome, Reference, Way, evaluate, figures
from lit_edit.evaluation.scope import EditedFacts
from lit_edit.evaluation.scores import greedy
from lit_edit.model.fingerprint import model_fingerprint
from lit_edit.model.loading import EMBEDDED, load_model, save_model
from lit_edit.model.prompts import check_requests
from lit_edit.requests import EditRequest
from lit_edit.runs.delta import DeltaHeader, save_delta
from lit_edit.runs.journal import Edit, Journal
from lit_edit.session import EditSession, Preparation
from lit_edit.settings import settings_of
from lit_edit.trust import check_classes
from lit_edit.units import counted

Fact = EditRequest | Mapping[str, Any]
_MARK = "_lit_edit_session"  # attribute of an edited model: its session, which alone knows how to go on


def load_editor(method: str | Path) -> Editor:
    """The editor that a configuration describes under ``model.editor``.

    Args:
        method: A YAML file, or the name of one that comes with the package (``mose``, ``mose.yaml``).

    Raises:
        ValueError: If there is no such configuration or it describes no editor.
    """
    section = read_config(str(method)).get("model", {}).get("editor")
    if section is None:
        raise ValueError(f"The configuration {str(method)!r} has no `model.editor`.")
    check_classes(section, (), str(method))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--editor", type=Editor)
    return parser.instantiate(parser.parse_object({"editor": section})).editor


def facts_of(given: Fact | Iterable[Fact], first: int = 1) -> list[EditRequest]:
    """Facts as requests.

    Args:
        given: One or several; a dictionary has the fields of any file that the data modules read: at least ``prompt``
            (with ``{}`` for the subject, or with the subject itself), ``subject`` and ``target_new``.
        first: Number of the first, which names facts without a ``case_id``.

    Raises:
        TypeError: For something else.
        lit_edit.requests.RequestError: If a field is missing or not as it should be.
    """
    if isinstance(given, (str, bytes)):
        raise TypeError(
            f"A fact is a dictionary with prompt, subject and target_new, or an EditRequest; not the text {given!r}."
        )
    several = [given] if isinstance(given, (EditRequest, Mapping)) else list(given)
    found = []
    for i, fact in enumerate(several, start=first):
        if isinstance(fact, EditRequest):
            found.append(fact)
        elif isinstance(fact, Mapping):
            found.append(read_request(dict(fact), f"fact {i}", str(i), ALL_FORMS))
        else:
            raise TypeError(
                f"Fact {i} is of type {type(fact).__name__}: a dictionary with prompt, subject and target_new is "
                "needed, or an EditRequest."
            )
    return found


class Session:
    """A model that is edited, asked, and put back, fact by fact.

    Statistics are collected once, on the unedited model, when the session is opened; edits then go on from one another
    as in a run.

    Args:
        model: ``embedded``, a folder or a hub name; or a loaded model of `transformers`, edited in place.
        method: An editor, or the configuration that describes one.
        tokenizer: Of a loaded model.
        dtype: In which a named model is loaded.
        mending: When past edits that slipped are written again; never if None.
        guard: What becomes of edits that fail; the defaults of `lit_edit.editors.Guard` if None.
        facts: Those to come, as far as they are known: what does not fit the model is said before statistics are
            collected.
        progress: Show a bar while statistics are collected.
        **preparation: Settings of `lit_edit.session.Preparation`: ``corpus``, ``seed``, ``cache_dir`` and others.

    Raises:
        ValueError: If model, tokenizer and method do not fit, or the model was edited by another session.

    Example:
        >>> session = Session("embedded", method="rome")
        >>> edits = session.edit({"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"})
        >>> session.ask("The capital of France is", tokens=4)
        'Lyon.'
        >>> session.undo(last=1)
        [1]
    """

    inner: EditSession

    def __init__(
        self,
        model: str | nn.Module = EMBEDDED,
        method: Editor | str | Path = "mose",
        *,
        tokenizer: Any = None,
        dtype: str = "float32",
        mending: Mending | None = None,
        guard: Guard | None = None,
        facts: Fact | Iterable[Fact] = (),
        progress: bool = False,
        **preparation: Any,
    ) -> None:
        if isinstance(model, str):
            model, tokenizer = load_model(model, dtype)
        elif tokenizer is None:
            raise ValueError("A loaded model needs its tokenizer: Session(model, tokenizer=...).")
        before = getattr(model, _MARK, None)
        if isinstance(before, Session) and before.inner.workspace.edits:
            raise ValueError(
                f"This model holds {counted(before.inner.workspace.edits, 'edit')} of another session: go on with that "
                "one (`session.edit`), take its edits back (`session.undo(to=0)`), or load the model again."
            )
        self.method = method if isinstance(method, Editor) else load_editor(method)
        self.tokenizer = tokenizer
        self._fingerprint = model_fingerprint(model)
        self.inner = EditSession(
            model,
            tokenizer,
            self.method,
            Preparation(**preparation),
            mending,
            facts_of(facts),
            guard=guard,
            progress=progress,
        )
        self._reference = Reference()
        #: What a further call of `edit` has to agree with.
        self.settings = [settings_of(p) for p in (self.method, mending, self.inner.guard, self.inner.preparation)]
        object.__setattr__(model, _MARK, self)

    def __repr__(self) -> str:
        edits = counted(self.inner.workspace.edits, "edit")
        return f"<Session on {type(self.model).__name__} with {self.method.describe()}: {edits} in the weights>"

    @property
    def model(self) -> Any:
        """The model as edited so far."""
        return self.inner.model

    @property
    def journal(self) -> Journal:
        """Every edit so far, and what became of it."""
        return self.inner.journal

    def edit(self, facts: Fact | Iterable[Fact], batch_size: int = 1) -> list[Edit]:
        """Writes facts, one batch after another. All are checked before the first is written.

        Args:
            facts: See `facts_of`.
            batch_size: Facts written together.

        Returns:
            What the journal says of them.

        Raises:
            ValueError: If a fact does not fit the model, or the batch size the method; nothing is written then.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size should be positive, it is {batch_size}.")
        requests = facts_of(facts, len(self.journal) + 1)
        self.inner.check(requests, batch_size)
        with torch.no_grad():
            self._reference.collect(self.model, self.inner.workspace.prompter, requests)
        made: list[Edit] = []
        for first in range(0, len(requests), batch_size):
            made += self.inner.apply(self.inner.plan(requests[first : first + batch_size]))
        return made

    def finish(self) -> None:
        """Does what a method does at the end of a run: a last mending, PRUNE."""
        self.inner.finish()

    @torch.no_grad()
    def ask(self, prompt: str | Sequence[str], tokens: int = 8) -> Any:
        """What the model answers now, greedily.

        Args:
            prompt: One, or several.
            tokens: Length of an answer at most.

        Returns:
            A text for one prompt, a list for several.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompter = self.inner.workspace.prompter
        found = greedy(self.model, prompter, prompts, [tokens] * len(prompts))
        answers = [prompter.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
        return answers[0] if isinstance(prompt, str) else answers

    def undo(self, *numbers: int, **which: Any) -> list[int]:
        """Takes edits back, see `lit_edit.session.EditSession.undo`: numbers, ``last=``, ``to=`` or ``case_ids=``."""
        return self.inner.undo(numbers, **which)

    @torch.no_grad()
    def outcomes(self, facts: Fact | Iterable[Fact] | None = None) -> list[Outcome]:
        """Asks for facts and their probes.

        Args:
            facts: The edits that nobody has taken back if None.
        """
        edited = [request for _, request in self.journal.standing]
        requests = edited if facts is None else facts_of(facts)
        prompter = self.inner.workspace.prompter
        check_requests(requests, prompter)
        self._reference.collect(self.model, prompter, requests)
        return evaluate(self.model, prompter, requests, self._reference, edited=EditedFacts(edited))

    def evaluate(
        self, facts: Fact | Iterable[Fact] | None = None, ways: Sequence[Way] = ("exact_match",)
    ) -> dict[str, float]:
        """Reliability, generalization, locality and the like of facts, with intervals.

        Questions that were first asked after edits are compared with what the model answered then.

        Args:
            facts: The edits so far if None.
            ways: How answers are judged.
        """
        return figures(self.outcomes(facts), ways)

    def save(self, folder: str | Path | None = None, delta: str | Path | None = None) -> DeltaHeader | None:
        """Writes the edited model as `transformers` loads it, or what changed as a file for `load_delta`, or both.

        Raises:
            ValueError: If neither is named.
        """
        if folder is None and delta is None:
            raise ValueError("Save what? save('folder') writes the model, save(delta='file') what changed.")
        if folder is not None:
            save_model(self.model, self.tokenizer, folder)
        if delta is None:
            return None
        return save_delta(
            delta,
            self.model,
            {site.name: site.original_stored for site in self.inner.sites if site.edited},
            original=self._fingerprint,
            method=self.method.describe(),
            edits=self.inner.workspace.edits,
        )


def edit(
    model: nn.Module,
    tokenizer: Any,
    requests: Fact | Iterable[Fact],
    method: Editor | str | Path = "mose",
    *,
    batch_size: int = 1,
    mending: Mending | None = None,
    guard: Guard | None = None,
    **preparation: Any,
) -> tuple[nn.Module, Journal]:
    """Edits a model in one call. A second call on it goes on from the first, if nothing but the facts differs.

    Args:
        model: A causal language model of `transformers`. It is edited in place; pass a copy to keep the original.
        tokenizer: Its fast tokenizer.
        requests: Facts to write, as `EditRequest` or dictionaries. All are checked before the first is written.
        method: An editor, or the configuration that describes one.
        batch_size: Requests edited together.
        mending: When past edits that slipped are written again; never if None.
        guard: What becomes of edits that fail; the defaults of `lit_edit.editors.Guard` if None.
        **preparation: Settings of `lit_edit.session.Preparation`: ``corpus``, ``seed``, ``cache_dir`` and others.

    Returns:
        The edited model (the same object) and the record of its edits, earlier calls' included.

    Raises:
        ValueError: If a request, the model or the method do not fit one another, or the model holds edits of an earlier
            call with other settings; nothing is edited then.
        TypeError: If the model is a name: `load_model` loads it, or `Session` does.

    Example:
        >>> from lit_edit import EditRequest, edit, load_model
        >>> model, tokenizer = load_model("embedded")
        >>> fact = EditRequest("1", "The capital of France is", "France", "Lyon")
        >>> model, journal = edit(model, tokenizer, [fact], method="rome")
        >>> len(journal)
        1
    """
    if batch_size < 1:
        raise ValueError(f"batch_size should be positive, it is {batch_size}.")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"edit() takes a loaded model and its tokenizer, not {model!r}: `load_model({model!r})` gives both, "
            f"`Session({model!r})` opens one."
        )
    editor = method if isinstance(method, Editor) else load_editor(method)
    session = getattr(model, _MARK, None)
    asked = [settings_of(part) for part in (editor, mending, guard or Guard(), Preparation(**preparation))]
    if not isinstance(session, Session) or session.settings != asked:
        known = facts_of(requests)
        session = Session(model, editor, tokenizer=tokenizer, mending=mending, guard=guard, facts=known, **preparation)
        session.edit(known, batch_size)
    else:
        session.edit(facts_of(requests, len(session.journal) + 1), batch_size)
    session.finish()
    return model, session.journal
