"""What a file of facts would do to a model, before anything is edited: known already, contradicting, given twice.

Two requests ask the same if the edit prompt or a rephrasing of one is that of the other, or where both name the same
subject and relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from lit_edit.evaluation.scores import score_targets
from lit_edit.model.prompts import Prompter
from lit_edit.requests import EditRequest
from lit_edit.units import counted, share_text


@dataclass(frozen=True)
class Reviewed:
    """One request as it stands before the first edit.

    Args:
        request: the request.
        edited_token: the subject's last token, at which keys and values are taken.
        target_tokens: number of tokens of the new target.
        probability: p(target) under the edit prompt.
        known: the model answers the new target already: every token is the most likely one.
        repeats: case id of an earlier request that asks the same and wants the same answer.
        contradicts: case ids of earlier requests that ask the same and want another answer. The latest edit wins.
        disturbs: case ids of other requests one of whose locality probes is the edit prompt, with another answer that
            is to stay: the recorded one, or else the unedited model's.
    """

    request: EditRequest
    edited_token: str
    target_tokens: int
    probability: float
    known: bool
    repeats: str | None = None
    contradicts: tuple[str, ...] = ()
    disturbs: tuple[str, ...] = ()


def review(requests: Sequence[EditRequest], model: nn.Module, prompter: Prompter) -> list[Reviewed]:
    """Looks at every request without editing anything.

    Raises:
        lit_edit.requests.RequestError: naming the first record that cannot be edited.
    """
    if not requests:
        return []
    rows = [prompter.row(r.prompt, r.target_new, r.subject, r.source) for r in requests]
    scores = score_targets(model, prompter, rows)
    seen: dict[tuple[str, ...], list[EditRequest]] = {}
    outside: dict[str, list[tuple[EditRequest, str | None]]] = {}
    for request in requests:
        for probe in request.probes_of("locality"):
            outside.setdefault(_plain(probe.prompt), []).append((request, probe.target))
    found = []
    for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
        earlier = {r.case_id: r for key in _questions(request) for r in seen.get(key, [])}
        same = [r.case_id for r in earlier.values() if _plain(r.target_new) == _plain(request.target_new)]
        other = [r.case_id for r in earlier.values() if _plain(r.target_new) != _plain(request.target_new)]
        for key in _questions(request):
            seen.setdefault(key, []).append(request)
        known = bool(scores.exact[i])
        disturbed = [
            other.case_id
            for other, answer in outside.get(_plain(request.prompt), [])
            if other is not request and (not known if answer is None else _plain(answer) != _plain(request.target_new))
        ]
        found.append(
            Reviewed(
                request,
                edited_token=prompter.tokenizer.decode([row.ids[row.subject_last]]),
                target_tokens=len(row.ids) - row.target_start,
                probability=float(scores.log_prob[i].exp()),
                known=known,
                repeats=same[0] if same else None,
                contradicts=tuple(other),
                disturbs=tuple(dict.fromkeys(disturbed)),
            )
        )
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _questions(request: EditRequest) -> list[tuple[str, ...]]:
    """What two requests must share to ask the same: a prompt, or subject and relation where both are given."""
    prompts = [request.prompt, *(probe.prompt for probe in request.probes_of("generalization"))]
    asked: dict[tuple[str, ...], None] = {("prompt", _plain(prompt)): None for prompt in prompts}
    if request.relation is not None:
        asked["relation", _plain(request.subject), _plain(request.relation)] = None
    return list(asked)


def _with_probes(found: Sequence[Reviewed]) -> str:
    """How many questions judge the edits besides their own prompts; none may be a misspelt column."""
    counts = [sum(len(r.request.probes_of(kind)) for r in found) for kind in ("generalization", "locality")]
    return f"{counts[0]} rephrasings, {counts[1]} locality probes"


def review_line(found: Sequence[Reviewed], most: int = 3) -> str:
    """What deserves a look, in one line; of the contradictions, and of what disturbs, at most ``most`` are named."""
    known, twice = sum(r.known for r in found), sum(r.repeats is not None for r in found)
    odd, against = [r for r in found if r.contradicts], [r for r in found if r.disturbs]
    by_case = {r.request.case_id: r.request for r in found}
    named = [
        f"{_where(r.request)} wants {r.request.target_new!r} for {r.request.prompt!r} where "
        f"{_where(by_case[r.contradicts[-1]])} wants {by_case[r.contradicts[-1]].target_new!r}"
        for r in odd[:most]
    ]
    if len(odd) > most:
        named.append(f"and {len(odd) - most} more, see --dry_run")
    said = (
        f"{counted(len(found), 'fact')} to write ({_with_probes(found)}): {known} already known, {twice} given twice, "
    )
    wins = f" (the later edit wins: {'; '.join(named)})" if odd else ""
    said += f"{len(odd)} contradicting an earlier one{wins}"
    if not against:
        return f"{said}."
    named = [
        f"{r.request.prompt!r} of {_where(r.request)} is to stay as it is for {_where(by_case[r.disturbs[0]])}"
        for r in against[:most]
    ]
    if len(against) > most:
        named.append(f"and {len(against) - most} more, see --dry_run")
    return f"{said}, {len(against)} against a locality probe of another ({'; '.join(named)})."


def _where(request: EditRequest) -> str:
    return request.source or f"case {request.case_id}"


def review_table(found: Sequence[Reviewed], most: int = 20) -> Table:
    """A table for people: first what deserves a look, then the rest, ``most`` rows in all; the caption counts."""
    odd = [r for r in found if r.known or r.repeats or r.contradicts or r.disturbs]
    rows = [*odd, *(r for r in found if r not in odd)][:most]
    left = f" The table shows {len(rows)} of {len(found)}." if len(rows) < len(found) else ""
    table = Table(
        title=f"{counted(len(found), 'fact')} to write ({_with_probes(found)})",
        caption=(
            f"{sum(r.known for r in found)} already known, {sum(r.repeats is not None for r in found)} given twice, "
            f"{sum(bool(r.contradicts) for r in found)} contradicting an earlier one (the later edit wins), "
            f"{sum(bool(r.disturbs) for r in found)} against a locality probe of another.{left}"
        ),
        title_justify="left",
        caption_justify="left",
    )
    for name in ("case", "prompt", "new answer", "edited at", "p(answer) now", "note"):
        table.add_column(name, overflow="fold")
    for r in rows:
        notes = ["known already"] if r.known else []
        notes += [f"same as {r.repeats}"] if r.repeats else []
        notes += [f"contradicts {', '.join(r.contradicts)}"] if r.contradicts else []
        notes += [f"disturbs {', '.join(r.disturbs)}"] if r.disturbs else []
        table.add_row(
            r.request.case_id,
            r.request.prompt,
            r.request.target_new,
            repr(r.edited_token),
            share_text(r.probability),
            "; ".join(notes),
        )
    return table
