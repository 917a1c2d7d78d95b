"""What edits so far have to do with a question: which one it asks for, or whose subject it is about.

A probe of "everything else" that an edit has changed on purpose must not count against the editor. Scope is found by
what the data say: the prompt, and the subject with its relation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from lit_edit.requests import DISTRACTING, EditRequest, Probe, plain

Scope = Literal["locality", "same_subject", "consistency"]
_WORD = re.compile(r"\w+")
# Words that open a sentence in a capital and are no part of a name.
_OPENINGS = frozenset(
    "a an as at by can could did do does for from has have how if in into is of on or over the to under was were what "
    "when where which who whom whose why will with would".split()
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


class EditedFacts:
    """The facts that a sequence of edits has written, the latest target of each.

    Two edits write the same fact if they have the same prompt, or the same subject and relation.

    Args:
        requests: The edits, oldest first.
    """

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        self.requests = list(requests)
        self._by_prompt: dict[str, int] = {}
        self._by_question: dict[str, int] = {}  # rephrasings, too
        self._by_fact: dict[tuple[tuple[str, ...], str], int] = {}
        self._subjects: set[tuple[str, ...]] = set()
        for i, request in enumerate(self.requests):
            self._by_prompt[plain(request.prompt)] = i
            for prompt in (request.prompt, *(probe.prompt for probe in request.probes_of("generalization"))):
                self._by_question[plain(prompt)] = i
            if request.relation is not None:
                self._by_fact[_words(request.subject), plain(request.relation)] = i
            self._subjects.add(_words(request.subject))
        self._subjects.discard(())
        self._longest = max(map(len, self._subjects), default=0)

    def latest(self, request: EditRequest) -> EditRequest:
        """The last edit of the same fact; the request itself where no edit is."""
        found = [self._by_prompt.get(plain(request.prompt), -1)]
        if request.relation is not None:
            found.append(self._by_fact.get((_words(request.subject), plain(request.relation)), -1))
        return self.requests[max(found)] if max(found) >= 0 else request

    def scope(self, probe: Probe) -> tuple[Scope, EditRequest | None]:
        """What a locality probe is about.

        Returns:
            ``consistency`` and the edit, where the probe asks what an edit has written; ``same_subject``, where it is
            about another fact of an edited subject; else ``locality``.
        """
        # Before a distracting probe stands an edited fact, on purpose; what it asks comes last.
        prompt = probe.prompt.rsplit(". ", 1)[-1] if probe.name == DISTRACTING else probe.prompt
        found = self._by_question.get(plain(prompt), -1)
        named = self._named_subjects(prompt)
        if probe.relation is not None:
            found = max([found, *(self._by_fact.get((subject, plain(probe.relation)), -1) for subject in named)])
        if found >= 0:
            return "consistency", self.requests[found]
        return ("same_subject", None) if named else ("locality", None)

    def _named_subjects(self, prompt: str) -> list[tuple[str, ...]]:
        """The edited subjects in a text that are no part of a longer name."""
        found = list(_WORD.finditer(prompt))
        words = tuple(word[0].casefold() for word in found)
        # Whether a name goes on from each word to the next: "Ada Lovelace", not "In Peru" at the start of a sentence.
        goes_on = [
            left[0][0].isupper()
            and right[0][0].isupper()
            and prompt[left.end() : right.start()] in (" ", "-")
            and not (i == 0 and words[0] in _OPENINGS)
            for i, (left, right) in enumerate(pairwise(found))
        ]
        joined = [False, *goes_on, False]
        return [
            words[start:end]
            for start in range(len(words))
            for end in range(start + 1, min(start + self._longest, len(words)) + 1)
            if words[start:end] in self._subjects and not joined[start] and not joined[end]
        ]
