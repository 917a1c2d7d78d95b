"""Editing without a Trainer: a model, a tokenizer, requests, and a method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

from lit_edit.configs.find import read_config
from lit_edit.editors import Editor
from lit_edit.model.families import Family
from lit_edit.model.loading import EMBEDDED
from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Journal
from lit_edit.session import EditSession
from lit_edit.statistics.corpora import load_corpus
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
    corpus: str | Iterable[str] = EMBEDDED,
    corpus_tokens: int = 50_000,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    family: Family | None = None,
    chat_template: bool = False,
) -> tuple[nn.Module, Journal]:
    """Edits a model, one batch of requests after another.

    Args:
        model: a causal language model of `transformers`. It is edited in place; pass a copy to keep the original.
        tokenizer: its fast tokenizer.
        requests: the facts to write. All are checked before the first is written.
        method: an editor, or the configuration that describes one.
        batch_size: requests edited together.
        corpus: texts for key covariances, or the name of a corpus, see `lit_edit.statistics.corpora.load_corpus`.
        corpus_tokens: at most so many of their tokens.
        cache_dir: where covariances are kept; the user's cache folder if None.
        seed: of the sampled contexts.
        family: where a model of an unknown kind keeps its parts; the error about such a model proposes one.
        chat_template: put every prompt into the tokenizer's chat template as the words of a user, with the target as
            the reply: for instruction-tuned models that are asked in chats.

    Returns:
        The edited model (the same object) and the record of edits.

    Raises:
        ValueError: if a request, the model or the method do not fit one another; nothing is edited then.

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
    named = isinstance(corpus, str)
    session = EditSession(
        model,
        tokenizer,
        method if isinstance(method, Editor) else load_editor(method),
        corpus=load_corpus(corpus) if isinstance(corpus, str) else corpus,
        corpus_name=str(corpus) if named else "given",
        corpus_tokens=corpus_tokens,
        cache_dir=cache_dir,
        seed=seed,
        family=family,
        chat_template=chat_template,
        requests=requests,
    )
    session.check(requests, batch_size)
    for first in range(0, len(requests), batch_size):
        session.apply(session.plan(requests[first : first + batch_size]))
    session.finish()
    return model, session.journal
