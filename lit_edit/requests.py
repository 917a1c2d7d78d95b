"""What flows through an editing run: a fact to write (`EditRequest`) and the questions that judge it (`Probe`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

DISTRACTING = "distracting"
"""Name of locality probes before which the edited fact is put."""
ProbeKind = Literal["generalization", "locality", "portability", "generation", "instance"]


def plain(text: str) -> str:
    """Text as questions are compared: without case and surplus white space."""
    return " ".join(text.casefold().split())


class RequestError(ValueError):
    """A record that cannot be edited; the message names the file, the record and the field, in one line.

    What is long in it is shortened, and what cannot be printed is escaped, whatever the record holds.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_short_line(message, _REASON if message.count(_SEVERAL) == 0 else _LONGEST))


_REASON, _LONGEST = 400, 1200  # characters of an error about one record, and about several
_SEVERAL = " records cannot be edited: "


def one_short_line(text: str, most: int) -> str:
    """A text without what cannot be printed, and without its middle if it is too long.

    Example:
        >>> one_short_line("a" * 30 + "end", 20)
        'aaaaaaaaa [...] aend'
    """
    if len(text) > 2 * most:  # before the work of escaping it
        text = text[:most] + text[-most:]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= most:
        return text
    cut = " [...] "
    start = (most - len(cut)) * 3 // 4
    return text[:start] + cut + text[start + len(cut) - most :]


def _refuse(source: str, field: str, why: str) -> RequestError:
    return RequestError(f"{source or 'request'}, field '{field}': {why}")


def refusal(reasons: Sequence[str], of: int, most: int = 10) -> RequestError:
    """One error for all records that cannot be edited, so that a file is not mended one mistake a run.

    Args:
        reasons: Why each such record is refused, as a `RequestError` says it; at least one.
        of: Number of records in all.
        most: Number of reasons that are named; the rest is counted.

    Example:
        >>> str(refusal(["a.csv, line 2, field 'prompt': is empty."], 7))
        "a.csv, line 2, field 'prompt': is empty."
    """
    if len(reasons) == 1:
        return RequestError(reasons[0])
    shown: list[str] = []
    for reason in reasons[:most]:
        if shown and sum(map(len, shown)) + len(reason) > _LONGEST - 200:
            break
        shown.append(reason)
    more = f" And {len(reasons) - len(shown)} more." if len(reasons) > len(shown) else ""
    return RequestError(f"{len(reasons)} of {of}{_SEVERAL}{' '.join(shown)}{more}")


@dataclass(frozen=True)
class Probe:
    """One question put to the model to judge an edit.

    Args:
        kind: ``generalization`` (a rephrasing: the new target is wanted), ``locality`` (out of scope: the output of the
            unedited model is wanted), ``portability`` (a consequence of the edit: ``target`` is wanted), ``generation``
            (an open prompt for free text, not scored by default) or ``instance`` (ConceptEdit's yes/no question).
        prompt: Complete text that the model continues.
        target: Recorded answer. For locality it is the true object, which the `probability` definition compares
            with the new target; exact match is taken against the unedited model instead.
        name: Sub-group within a kind, where a data set has several (``neighborhood``, ``Relation_Specificity``).
        relation: Relation that the question asks for, where the file says; tells whether an edit has written its
            answer.
        field: Field of the record that the prompt stands in, as an error message should name it; the same question
            from elsewhere is an equal probe.
    """

    kind: ProbeKind
    prompt: str
    target: str | None = None
    name: str = ""
    relation: str | None = None
    field: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(ProbeKind):
            raise ValueError(f"Probe kind {self.kind!r} is not one of {', '.join(get_args(ProbeKind))}.")
        if not self.prompt.strip():
            raise ValueError(f"A {self.kind} probe has an empty prompt.")


@dataclass(frozen=True)
class EditRequest:
    """One fact to write into the model: under ``prompt`` it should answer ``target_new``.

    Args:
        case_id: Identifier of the request within its file.
        prompt: Complete edit prompt; contains ``subject``. The target follows it after one space.
        subject: Words whose last token is edited.
        target_new: Answer wanted, without surrounding white space.
        target_true: Answer the unedited model is believed to give, if the file says.
        relation: A relation identifier, if the file says.
        probes: Questions that judge the edit besides ``prompt`` itself.
        source: Where it came from, as an error message names it (``facts.csv, record 3``).

    Raises:
        RequestError: if the prompt, subject or target is empty, or the subject does not occur in the prompt.
    """

    case_id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    relation: str | None = None
    probes: tuple[Probe, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("prompt", "subject", "target_new"):
            if not getattr(self, field).strip():
                raise _refuse(self.source, field, "is empty.")
        if self.subject not in self.prompt:
            raise _refuse(
                self.source,
                "subject",
                f"{self.subject!r} does not occur in the prompt {self.prompt!r}; write the prompt with the subject in "
                "it, or with {} where the subject belongs.",
            )

    def probes_of(self, kind: ProbeKind) -> tuple[Probe, ...]:
        """The probes of one kind, in file order."""
        return tuple(p for p in self.probes if p.kind == kind)
