"""Edits that hold: mending, earlier facts of a subject, keys of every context, least full layers, values drawn back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.sessions import FACTS, MAKERS, locate, session, values, write
from lit_edit.datamodules import CounterFactDataModule

from lit_edit.editors import Mending
from lit_edit.editors.keys import MeanKey, context_keys
from lit_edit.editors.layers import FixedLayers, LeastFull
from lit_edit.editors.solvers import MEMIT, ROME, Isospectral
from lit_edit.editors.values import NormClamp, NormMatched, ValueProblem
from lit_edit.evaluation.scores import score_targets
from lit_edit.model.loading import embedded_path, load_model
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession, Preparation

pytestmark = pytest.mark.filterwarnings("ignore:The key covariance was counted over")


def sure(opened: EditSession, requests: list[EditRequest]) -> float:
    """Mean log-probability of the targets: a random model is moved by an edit, but hardly to certainty."""
    rows = [opened.workspace.prompter.row(r.prompt, r.target_new) for r in requests]
    return float(score_targets(opened.model, opened.workspace.prompter, rows).log_prob.mean())


def holding(opened: EditSession, requests: list[EditRequest]) -> list[bool]:
    rows = [opened.workspace.prompter.row(r.prompt, r.target_new) for r in requests]
    exact: list[bool] = score_targets(opened.model, opened.workspace.prompter, rows).exact.tolist()
    return exact


@pytest.mark.parametrize("name", MAKERS)
def test_mending_writes_what_slipped_and_nothing_else(name: str) -> None:
    plain = write(session(MAKERS[name]()), FACTS)
    before = holding(plain, FACTS)
    mending = Mending(every_n=6, margin=0.0)
    mended = write(session(MAKERS[name](), mending), FACTS)
    (record,) = mended.journal.events
    assert record.after == 6
    assert record.numbers == [i for i, holds in enumerate(before, start=1) if not holds]
    assert record.seconds > 0
    assert sum(holding(mended, FACTS)) >= sum(before)
    assert mended.workspace.edits == 6  # an edit written again is no new edit
    if not record.numbers:
        for one, other in zip(plain.sites, mended.sites, strict=True):
            torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=0)


def test_an_edit_that_is_written_again_has_one_key() -> None:
    opened = write(session(MAKERS["MEMIT"](), Mending(every_n=3, margin=0.999)), FACTS)
    assert any(record.numbers for record in opened.journal.events)
    for site in opened.sites:
        assert sorted(site.owners) == [1, 2, 3, 4, 5, 6]
        assert site.keys.shape[1] == 6


def test_mending_computes_remembered_keys_anew() -> None:
    opened = write(session(MAKERS["MEMIT"]()), FACTS)
    stale = [site.keys.clone() for site in opened.sites]
    opened.editor.refresh(opened.workspace)
    from lit_edit.editors.keys import compute_keys

    opened.workspace.keys.clear()
    now = compute_keys(opened.workspace, FACTS, [1, 2], MeanKey())
    for site in opened.sites:
        torch.testing.assert_close(site.keys, now[site.layer], rtol=0, atol=0)
    torch.testing.assert_close(opened.sites[0].keys, stale[0])  # below it nothing was edited
    assert float((opened.sites[1].keys - stale[1]).norm()) > 1e-3


def test_a_run_mends_at_its_end_and_only_once() -> None:
    opened = write(session(MAKERS["ROME"](), Mending(every_n=4)), FACTS)
    assert [record.after for record in opened.journal.events] == [4]
    opened.finish()
    opened.finish()
    assert [record.after for record in opened.journal.events] == [4, 6]


@pytest.mark.parametrize("bad", [{"every_n": 0}, {"rounds": 0}, {"batch_size": 0}, {"margin": 1.0}, {"margin": -0.1}])
def test_mending_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Mending needs"):
        Mending(**bad)


# A subject again, on the embedded model: a random one does not answer with certainty


@pytest.fixture(scope="module")
def same() -> list[EditRequest]:
    """Three facts about one subject, whose prompts begin with it: its key is the same in all."""
    data = CounterFactDataModule(str(embedded_path("data", "multifact.json")), n_edits=None)
    data.setup("fit")
    by_subject: dict[str, list[EditRequest]] = {}
    for request in data.requests:
        if request.prompt.startswith(request.subject):
            about = by_subject.setdefault(request.subject, [])
            about.append(request)
            if len(about) == 3:
                return about
    raise LookupError("no such subject")


def embedded(with_earlier: bool) -> EditSession:
    model, tokenizer = load_model("embedded")
    optimiser = values(NormClamp(2.0), steps=30, stop_loss=0.05)
    editor = locate(MEMIT(10.0, memory=True), layers=FixedLayers([4]), values=optimiser, with_earlier=with_earlier)
    return EditSession(model, tokenizer, editor, Preparation(corpus_tokens=10_000))


def test_earlier_facts_of_a_subject_are_kept_with_the_new_one(same: list[EditRequest]) -> None:
    together, apart = (write(embedded(keep), same) for keep in (True, False))
    assert sure(together, same) > sure(apart, same) + 0.1
    assert sum(holding(together, same)) >= max(2, sum(holding(apart, same)))
    for site in together.sites:
        assert site.owners == [3]  # one key for the subject: the latest edit's
    for site in apart.sites:
        assert site.owners == [1, 2, 3]


def test_a_fact_edited_again_replaces_its_first_edit(same: list[EditRequest]) -> None:
    again = replace(same[0], case_id="again", target_new=same[0].target_true or "Rome")
    opened = embedded(True)
    plans = write(opened, [same[0], same[1], again])
    assert sure(plans, [again]) > sure(plans, [same[0]]) + 1
    assert [r.case_id for r in opened.editor._also(opened.workspace, [again])[0]] == [same[1].case_id]  # type: ignore[attr-defined]
    for site in opened.sites:
        assert site.owners == [3]
    mended = Mending(margin=0.999).run(opened.workspace, opened.editor)
    assert 1 not in mended  # its fact has another target now


def test_facts_of_a_subject_in_one_batch_are_kept_together(same: list[EditRequest]) -> None:
    together, apart = (write(embedded(keep), same, batch_size=3) for keep in (True, False))
    assert sure(together, same) > sure(apart, same)


# Parts


def test_every_context_has_its_key_and_their_shares_add_up_to_one() -> None:
    opened = session(locate(MEMIT(1e-3), every_key=True, contexts=3, context_length=4))
    plan = opened.plan(FACTS[:2])
    editor: Any = opened.editor
    site = opened.sites[0]
    targets = torch.stack([plan.data.targets[i][site.layer] for i in range(2)], dim=1)
    keys, wanted = editor._in_contexts(opened.workspace, plan, site, [0, 1], targets)
    found = context_keys(opened.workspace, FACTS[:2], site.layer)
    assert [k.shape[1] for k in found] == [4, 4]
    torch.testing.assert_close(keys, torch.cat(found, dim=1) / 2)  # four contexts: a quarter of the weight each
    torch.testing.assert_close(wanted[:, :4], targets[:, :1].expand(-1, 4) / 2)
    opened.apply(plan)
    assert site.keys.shape[1] == 2  # their average is remembered
    with pytest.raises(ValueError, match="ROME solves for one key"):
        locate(ROME(), every_key=True)


def test_the_least_full_layers_take_turns() -> None:
    opened = session(locate(MEMIT(1e-3), layers=LeastFull([0, 1, 2, 3], 2)))
    write(opened, FACTS[:4])
    assert [edit.layers for edit in opened.journal] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    plan = opened.plan(FACTS[4:])
    assert plan.layers == [(0, 1), (2, 3)]  # within a batch, too
    for bad in ([], [1, 1], [1]):
        with pytest.raises(ValueError, match="cannot be chosen"):
            LeastFull(bad, 2)


@pytest.mark.parametrize("constraint", [NormClamp(40.0), NormMatched()])
def test_values_drawn_back_move_less_and_still_do(constraint: Any) -> None:
    opened = session(locate(MEMIT(1e-3)))
    problems = [ValueProblem(i, (1, 2)) for i in range(4)]
    found = []
    for shrink in (0, 5):
        with torch.enable_grad():
            optimiser = values(constraint, lr=1.0, steps=40, stop_loss=5.0, shrink=shrink)
            found.append(optimiser.optimise(opened.workspace, FACTS[:4], problems, MeanKey()))
    plain, drawn = found
    starts = {layer: opened.workspace.site(layer).weight for layer in (1, 2)}
    from lit_edit.editors.keys import compute_keys

    keys = compute_keys(opened.workspace, FACTS[:4], [1, 2], MeanKey())
    moved = [
        [float((t[layer] - starts[layer] @ keys[layer][:, i]).norm()) for layer in (1, 2)]
        for values_ in found
        for i, t in enumerate(values_.targets)
    ]
    assert all(
        b <= a * 1.0001 for one, two in zip(moved[:4], moved[4:], strict=True) for a, b in zip(one, two, strict=True)
    )
    assert sum(map(sum, moved[4:])) < 0.98 * sum(map(sum, moved[:4]))
    assert plain.loss == drawn.loss  # what the optimisation itself reached


def test_two_sided_rotations_keep_every_singular_value() -> None:
    opened = session(locate(Isospectral(1e-3), NormMatched()))
    before = [torch.linalg.svdvals(site.exact.dense()) for site in opened.sites]
    write(opened, FACTS)
    for site, values_ in zip(opened.sites, before, strict=True):
        torch.testing.assert_close(torch.linalg.svdvals(site.exact.dense()), values_, rtol=1e-6, atol=1e-7)
        assert float((site.weight - site.original).norm()) > 0.1


def test_resuming_goes_on_where_mending_stood() -> None:
    mending = Mending(every_n=2, margin=0.99)
    straight = write(session(locate(MEMIT(1e-3, memory=True), with_earlier=True), mending), FACTS)
    first = write(session(locate(MEMIT(1e-3, memory=True), with_earlier=True), mending), FACTS[:3])
    state = first.state_dict()
    second = session(locate(MEMIT(1e-3, memory=True), with_earlier=True), mending)
    second.load_state_dict(state, FACTS)
    write(second, FACTS[3:])
    assert [m.numbers for m in second.journal.events] == [m.numbers for m in straight.journal.events]
    for one, other in zip(straight.sites, second.sites, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=0)
