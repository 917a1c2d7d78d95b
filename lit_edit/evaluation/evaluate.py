"""Judging a model on edits: every question asked and every answer kept, then the figures over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from lit_edit.evaluation.scope import EditedFacts
from lit_edit.evaluation.scores import greedy, score_targets
from lit_edit.model.prompts import Prompter, Row
from lit_edit.requests import EditRequest, Probe

Way = Literal["exact_match", "token_accuracy", "probability", "generation"]
"""How an answer is judged.

``exact_match``: every token of the wanted answer is the most likely one under teacher forcing. ``token_accuracy``: the
share of its tokens that are. ``probability``: the wanted answer is more probable, per token, than the other one on
record (new against true; CounterFact's own score). ``generation``: the greedy continuation begins with the wanted
answer.
"""
WAYS: tuple[Way, ...] = get_args(Way)
_SPARE = 3  # tokens beyond the wanted answer that a continuation may have
_RESAMPLES = 1000
_INSTANCE_TOKENS = 4


@dataclass(frozen=True)
class Question:
    """One question and how it was answered.

    Attributes:
        kind: ``reliability``, ``generalization``, ``locality``, ``same_subject`` (a locality probe about another fact
            of an edited subject), ``consistency`` (one that asks for what an edit has written), ``portability`` or
            ``instance``.
        prompt: Text that the model continues.
        expected: Answer wanted now.
        answer: Greedy continuation; ``expected`` where that is what the model says, None where nobody asked.
        exact: Whether every token of the wanted answer is the most likely one.
        token_accuracy: Share of them that are.
        probability: Of the whole wanted answer.
        rank: Worst place of one of its tokens; 1 if ``exact``.
        preferred: Whether it is more probable per token than the other answer on record; None where there is none.
    """

    kind: str
    prompt: str
    expected: str
    answer: str | None
    exact: bool
    token_accuracy: float
    probability: float
    rank: int
    preferred: bool | None = None

    def score(self, way: Way) -> float | None:
        """1 or 0, or a share of tokens; None where this way has nothing to judge by."""
        if way == "exact_match":
            return float(self.exact)
        if way == "token_accuracy":
            return self.token_accuracy
        if way == "probability":
            return None if self.preferred is None else float(self.preferred)
        if self.answer is None:
            return None
        return float(self.exact or (bool(self.expected) and self.answer.startswith(self.expected)))


@dataclass(frozen=True)
class Outcome:
    """One edit as it stands: its own question first, then its probes."""

    request: EditRequest
    questions: list[Question]

    @property
    def own(self) -> Question:
        """The edit prompt."""
        return self.questions[0]


class Reference:
    """The unedited model's answers: what "unchanged" is judged against, and what the edits replaced.

    The answer to a locality probe is the greedy continuation of its prompt, as long as the recorded answer (or the new
    target, where the file records none). MOSE Eq. 27 compares with the model before the latest edit; the unedited one
    is the stricter default of this project.

    Attributes:
        answers: Token ids by prompt.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[int]] = {}

    @torch.no_grad()
    def collect(self, model: nn.Module, prompter: Prompter, requests: Sequence[EditRequest]) -> int:
        """Asks the model every question it has not been asked yet; returns how many these were."""
        length: dict[str, int] = {}
        for request in requests:
            asked = [(request.prompt, request.target_new, ("prompt", "target_new"))]
            for probe in request.probes_of("locality"):
                asked.append(
                    (probe.prompt, probe.target or request.target_new, (probe.field or "prompt", "target_new"))
                )
            for prompt, wanted, fields in asked:
                if prompt not in self.answers:
                    row = prompter.row(prompt, wanted, source=request.source, fields=fields)
                    length[prompt] = max(len(row.ids) - row.target_start, length.get(prompt, 0))
            for probe in request.probes_of("instance"):
                if probe.prompt not in self.answers:
                    length[probe.prompt] = _INSTANCE_TOKENS
        prompts = list(length)
        answers = greedy(model, prompter, prompts, [length[p] for p in prompts])
        end = prompter.tokenizer.eos_token_id
        self.answers |= {p: answer or [end] for p, answer in zip(prompts, answers, strict=True)}
        return len(prompts)

    def row(self, prompter: Prompter, prompt: str) -> Row:
        """A question with its reference as target."""
        ids = prompter.row(prompt).ids
        return Row((*ids, *self.answers[prompt]), len(ids))

    def text(self, prompter: Prompter, prompt: str) -> str | None:
        """The reference as text; None where the model was not asked."""
        found = self.answers.get(prompt)
        return None if found is None else _decoded(prompter, found)


@dataclass(eq=False)
class _Asked:
    """A question on its way: the row to score, and the row of the answer it competes with."""

    owner: int
    kind: str
    prompt: str
    expected: str
    row: Row
    other: Row | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    prompter: Prompter,
    requests: Sequence[EditRequest],
    reference: Reference,
    *,
    edited: EditedFacts | None = None,
    ways: Sequence[Way] = WAYS,
) -> list[Outcome]:
    """Asks a model every question of some edits.

    An edit is judged by the latest target of its fact. A locality probe that asks for an edited fact is judged by the
    new target, under ``consistency``; one about another fact of an edited subject counts apart (`EditedFacts.scope`).

    Args:
        model: The model as edited so far.
        prompter: Its tokenisation.
        requests: Edits to judge.
        reference: The unedited model's answers, which must know the requests.
        edited: All edits so far; ``requests`` if None.
        ways: What is judged: leaving out ``probability`` and ``generation`` saves their passes.

    Returns:
        An outcome per request, in their order.
    """
    if not requests:
        return []
    facts = EditedFacts(requests) if edited is None else edited
    asked = [q for i, request in enumerate(requests) for q in _questions(i, request, facts, prompter, reference)]
    others = [q.other for q in asked if q.other is not None] if "probability" in ways else []
    scores = score_targets(model, prompter, [q.row for q in asked] + others)
    exact = scores.exact.tolist()
    answers: dict[int, str] = {}
    if "generation" in ways:
        wrong = [i for i, hit in enumerate(exact[: len(asked)]) if not hit]
        lengths = [len(asked[i].row.ids) - asked[i].row.target_start + _SPARE for i in wrong]
        given = greedy(model, prompter, [asked[i].prompt for i in wrong], lengths)
        answers = {i: _decoded(prompter, ids) for i, ids in zip(wrong, given, strict=True)}
    token, log_prob, rank = scores.token_accuracy.tolist(), scores.log_prob.exp().tolist(), scores.rank.tolist()
    mean = scores.mean_log_prob.tolist()
    rivals: Iterator[float] = iter(mean[len(asked) :])
    questions: list[list[Question]] = [[] for _ in requests]
    for i, q in enumerate(asked):
        preferred = mean[i] > next(rivals) if others and q.other is not None else None
        answer = answers.get(i, q.expected if exact[i] else None)
        found = Question(q.kind, q.prompt, q.expected, answer, exact[i], token[i], log_prob[i], rank[i], preferred)
        questions[q.owner].append(found)
    outcomes = [Outcome(request, found) for request, found in zip(requests, questions, strict=True)]
    _ask_instances(model, prompter, outcomes, reference)
    return outcomes


def _questions(
    i: int, request: EditRequest, facts: EditedFacts, prompter: Prompter, reference: Reference
) -> Iterator[_Asked]:
    latest = facts.latest(request)
    superseded = latest.target_new != request.target_new

    def wanted(kind: str, prompt: str, target: str, other: str | None) -> _Asked:
        row = prompter.row(prompt, target, source=request.source)
        rival = None if other is None or other == target else prompter.row(prompt, other, source=request.source)
        return _Asked(i, kind, prompt, target, row, rival)

    yield wanted("reliability", request.prompt, latest.target_new, request.target_true)
    for probe in request.probes:
        if probe.kind == "generalization":
            target = latest.target_new if superseded or probe.target is None else probe.target
            yield wanted("generalization", probe.prompt, target, request.target_true)
        elif probe.kind == "portability" and probe.target and not superseded:
            yield wanted("portability", probe.prompt, probe.target, None)
        elif probe.kind == "locality":
            yield _locality(i, request, probe, facts, prompter, reference)


def _locality(
    i: int, request: EditRequest, probe: Probe, facts: EditedFacts, prompter: Prompter, reference: Reference
) -> _Asked:
    scope, edit = facts.scope(probe)
    if edit is not None:
        row = prompter.row(probe.prompt, edit.target_new, source=request.source)
        return _Asked(i, scope, probe.prompt, edit.target_new, row)
    row = reference.row(prompter, probe.prompt)
    rival = None
    if probe.target is not None and probe.target != request.target_new:
        rival = prompter.row(probe.prompt, request.target_new, source=request.source)
    return _Asked(i, scope, probe.prompt, _decoded(prompter, row.ids[row.target_start :]), row, rival)


def _ask_instances(model: nn.Module, prompter: Prompter, outcomes: Sequence[Outcome], reference: Reference) -> None:
    """ConceptEdit's questions: whether an instance still belongs to the concept, yes or no."""
    asked = [(outcome, probe.prompt) for outcome in outcomes for probe in outcome.request.probes_of("instance")]
    given = greedy(model, prompter, [prompt for _, prompt in asked], [_INSTANCE_TOKENS] * len(asked))
    for (outcome, prompt), ids in zip(asked, given, strict=True):
        before, now = reference.text(prompter, prompt) or "", _decoded(prompter, ids)
        same = _yes_or_no(before) == _yes_or_no(now)
        outcome.questions.append(Question("instance", prompt, before, now, same, float(same), float("nan"), 0))


def _yes_or_no(text: str) -> str | None:
    word = text.strip().casefold().split()[:1]
    return next((answer for answer in ("yes", "no") if word and word[0].strip(".,;:!") == answer), None)


def _decoded(prompter: Prompter, ids: Sequence[int]) -> str:
    text: Any = prompter.tokenizer.decode(list(ids), skip_special_tokens=True)
    return str(text).strip()


@dataclass
class _Tally:
    """Scores of one kind of question by request."""

    by_request: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def means(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([sum(scores) / len(scores) for scores in self.by_request.values()])


def figures(outcomes: Sequence[Outcome], ways: Sequence[Way] = WAYS) -> dict[str, float]:
    """The figures over edits: probes are averaged within an edit, then over the edits that have any (MOSE Eq. 25-27).

    Args:
        outcomes: As `evaluate` gives them.
        ways: How answers are judged; the first one's figures stand under their plain names.

    Returns:
        ``reliability``, ``generalization``, ``locality``, ``locality/same_subject``, ``consistency`` and
        ``portability``, those that occur, by the first way; the others under ``<way>/<name>``. ``interval/<name>/low``
        and ``/high``: the 95 % bootstrap interval over edits. ``count/<name>``: the questions. ``instance_change``: the
        share of yes-or-no answers about instances that differ from the unedited model's, of those that are one or the
        other both times; ``instance_unclear``: the share of all that are not.
    """
    tallies: dict[str, dict[Way, _Tally]] = defaultdict(lambda: {way: _Tally() for way in ways})
    counts: dict[str, int] = defaultdict(int)
    for i, outcome in enumerate(outcomes):
        for question in outcome.questions:
            if question.kind == "instance":
                continue
            name = "locality/same_subject" if question.kind == "same_subject" else question.kind
            counts[name] += 1
            for way in ways:
                score = question.score(way)
                if score is not None:
                    tallies[name][way].by_request[i].append(score)
    found: dict[str, float] = {}
    for name, by_way in tallies.items():
        for place, way in enumerate(ways):
            means = by_way[way].means()
            if not len(means):
                continue
            found[name if not place else f"{way}/{name}"] = float(means.mean())
            if not place:
                low, high = interval(means)
                found[f"interval/{name}/low"], found[f"interval/{name}/high"] = low, high
        found[f"count/{name}"] = counts[name]
    return found | _instances(outcomes)


def _instances(outcomes: Sequence[Outcome]) -> dict[str, float]:
    asked = [q for outcome in outcomes for q in outcome.questions if q.kind == "instance"]
    if not asked:
        return {}
    both = [(_yes_or_no(q.expected), _yes_or_no(q.answer or "")) for q in asked]
    clear = [(before, now) for before, now in both if before and now]
    found = {"instance_unclear": 1 - len(clear) / len(asked)}
    if clear:
        found["instance_change"] = sum(before != now for before, now in clear) / len(clear)
    return found


def interval(values: np.ndarray[Any, np.dtype[np.float64]], level: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval of a mean: percentiles of the means of resamples, always the same ones.

    Args:
        values: ``(n,)``, one per edit.
        level: Share of resamples inside.
    """
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
