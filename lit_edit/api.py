"""Editing without a Trainer: a model, a tokenizer, requests, and a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

from lit_edit.configs.find import read_config
from lit_edit.editors import Editor, Guard, Mending
from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Journal
from lit_edit.session import EditSession, Preparation
from lit_edit.trust import check_classes


def load_editor(method: str | Path) -> Editor:
    """The editor that a configuration describes under ``model.editor``.

    Args:
        method: a YAML file, or the name of one that comes with the package (``mose``, ``mose.yaml``).

    Raises:
        ValueError: if there is no such configuration or it describes no editor.
    """
    section = read_config(str(method)).get("model", {}).get("editor")
    if section is None:
        raise ValueError(f"The configuration {str(method)!r} has no `model.editor`.")
    check_classes(section, (), str(method))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--editor", type=Editor)
    return parser.instantiate(parser.parse_object({"editor": section})).editor


def edit(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    method: Editor | str | Path = "mose",
    *,
    batch_size: int = 1,
    mending: Mending | None = None,
    guard: Guard | None = None,
    **preparation: Any,
) -> tuple[nn.Module, Journal]:
    """Edits a model, one batch of requests after another.

    Args:
        model: A causal language model of `transformers`. It is edited in place; pass a copy to keep the original.
        tokenizer: Its fast tokenizer.
        requests: Facts to write. All are checked before the first is written.
        method: An editor, or the configuration that describes one.
        batch_size: Requests edited together.
        mending: When past edits that slipped are written again; never if None.
        guard: What becomes of edits that fail; the defaults of `lit_edit.editors.Guard` if None.
        **preparation: Settings of `lit_edit.session.Preparation`: ``corpus``, ``seed``, ``cache_dir`` and others.

    Returns:
        The edited model (the same object) and the record of edits.

    Raises:
        ValueError: If a request, the model or the method do not fit one another; nothing is edited then.

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
    editor = method if isinstance(method, Editor) else load_editor(method)
    session = EditSession(model, tokenizer, editor, Preparation(**preparation), mending, requests, guard)
    session.check(requests, batch_size)
    for first in range(0, len(requests), batch_size):
        session.apply(session.plan(requests[first : first + batch_size]))
    session.finish()
    return model, session.journal
