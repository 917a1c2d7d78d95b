"""What a model's continuation answers: the part of it that is compared with the recorded answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Literal, get_args

Extract = Literal["line", "label", "letter", "number", "word"]
"""Which part of a continuation is the answer.

``line``: the first line. ``label``: the first of the task's labels that
stands there as a word of its own, whatever its case. ``letter``: the first capital A to Z that stands alone, as in
"(B)" or "B. library". ``number``: the last number, without thousands separators and trailing zeros. ``word``: the
first word, without punctuation around it.
"""
EXTRACTS: tuple[Extract, ...] = get_args(Extract)

_LEAD = re.compile(r"^answer\s*:\s*", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
_LETTER = re.compile(r"(?<![A-Za-z'’])([A-Z])(?![A-Za-z'’])")


def cut(text: str, stops: Sequence[str]) -> str:
    """A continuation up to the first of some texts that end it, without white space or "Answer:" at its beginning.

    Example:
        >>> cut("\\nAnswer: 7.  Question: what is next?", ["Question:"])
        '7.'
    """
    text = _LEAD.sub("", text.strip())
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(ends)].strip() if ends else text


def line(text: str) -> str:
    """The first line that is not empty."""
    return next((part.strip() for part in text.splitlines() if part.strip()), "")


def label(text: str, labels: Sequence[str]) -> str:
    """The first label in a text; empty if there is none.

    Example:
        >>> label("It is false.", ["True", "False"])
        'False'
    """
    longest_first = sorted(labels, key=len, reverse=True)
    pattern = r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)"
    found = re.search(pattern, text, re.IGNORECASE)
    return next((one for one in labels if found and one.casefold() == found[0].casefold()), "")


def letter(text: str) -> str:
    """The first capital letter that stands alone; empty if there is none.

    "A" and "I" as words of a sentence are passed over: a capital counts at the beginning, before punctuation or at the
    end, or in brackets.

    Example:
        >>> letter("I think that it is (B).")
        'B'
    """
    for found in _LETTER.finditer(text):
        rest = text[found.end() :]
        if not rest.strip() or not rest[0].isspace() or (not text[: found.start()].strip() and found[0] not in "AI"):
            return found[0]
    return ""


def number(text: str) -> str:
    """The last number in a text in its shortest form; empty if there is none.

    Example:
        >>> number("16 - 7 = 9 eggs, so she makes $1,018.50 a year.")
        '1018.5'
    """
    found = _NUMBER.findall(text)
    if not found:
        return ""
    short = format(Decimal(found[-1].replace(",", "")).normalize(), "f")
    return "0" if short == "-0" else short


def word(text: str) -> str:
    """The first word, without punctuation around it; empty if there is none."""
    for part in text.split():
        if bare := _bare(part):
            return bare
    return ""


def extracted(text: str, how: Extract, labels: Sequence[str] = ()) -> str:
    """The answer in a continuation.

    Args:
        text: What the model said.
        how: Which part of it is meant.
        labels: Those of the task, for ``label``.
    """
    if how == "label":
        return label(text, labels)
    ways: dict[str, Callable[[str], str]] = {"line": line, "letter": letter, "number": number, "word": word}
    return ways[how](text)


def comparable(text: str) -> str:
    """An answer as accuracy compares it: without case, punctuation around it, and surplus white space.

    Example:
        >>> comparable(" True. ") == comparable("true")
        True
    """
    return " ".join(_bare(text).casefold().split())


def _bare(text: str) -> str:
    """A text without what is neither letter nor digit at its ends; signs and currencies stay."""
    return re.sub(r"^[^\w$€£%+-]+|[^\w$€£%+-]+$", "", text.strip())
