"""Guards: edits that explode are never left in the weights; those that fail become what the user chose."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.sessions import FACTS, MAKERS, contents, locate, session, write
from torch import Tensor

from lit_edit.algebra.updates import Additive
from lit_edit.editors import FailedEditError, Guard, Mending
from lit_edit.editors.solvers import ROME
from lit_edit.model.edited_weight import EditedWeight

pytestmark = pytest.mark.filterwarnings("ignore:The key covariance was counted over")


class Spoiled(ROME):
    """ROME whose update is spoiled for one fact, known by its targets' count of calls."""

    def __init__(self, at: int, factor: float) -> None:
        super().__init__()
        self.at, self.factor, self.calls = at, factor, 0

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> Any:
        self.calls += 1
        update = super()._solve(site, keys, targets, value_keys)
        return Additive(update.delta(site.weight) * self.factor) if self.calls == self.at else update


@pytest.mark.parametrize(("factor", "said"), [(1e6, "times the norm of its weight"), (math.nan, "not finite")])
@pytest.mark.parametrize("how", ["keep", "retry", "skip", "undo"])
def test_an_edit_that_explodes_is_not_left_in_the_weights(factor: float, said: str, how: Any) -> None:
    opened = session(locate(Spoiled(3, factor)), guard=Guard(how, margin=0.0))  # the first layer of the second edit
    write(opened, FACTS[:1])
    before, kept = contents(opened), len(opened.updates)
    write(opened, FACTS[1:2])
    torch.testing.assert_close(contents(opened), before, rtol=0, atol=0)
    assert len(opened.updates) == kept
    edit = opened.journal[-1]
    assert (edit.status, edit.number, edit.change, edit.layers, edit.tries) == ("refused", 2, {}, [], 0)
    assert said in edit.reason
    write(opened, FACTS[2:])
    assert [e.number for e in opened.journal] == [1, 2, 3, 4, 5, 6]
    assert sorted(opened.workspace.history) == [1, 3, 4, 5, 6]
    assert opened.journal.counts() == {"written": 5, "refused": 1}
    assert len(opened.journal.standing) == 6  # what was refused counts, as a failure


def test_one_that_explodes_does_not_take_its_batch_with_it() -> None:
    class Far(type(MAKERS["MEMIT"]().solver)):  # type: ignore[misc]
        def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> Any:
            update = super()._solve(site, keys, targets, value_keys)
            here = (targets - (site.weight.double() @ keys.double())).norm(dim=0)
            return Additive(update.delta(site.weight) * (1e9 if bool((here > 1e3).any()) else 1))

    opened = session(locate(Far(1e-3)))
    plain = opened.editor.values.optimise  # type: ignore[attr-defined]

    def one_far(workspace: Any, requests: Any, *rest: Any, **more: Any) -> Any:
        found = plain(workspace, requests, *rest, **more)
        for i, request in enumerate(requests):
            if request.case_id == "1":
                found.targets[i] = {layer: target * 1e6 for layer, target in found.targets[i].items()}
        return found

    opened.editor.values.optimise = one_far  # type: ignore[attr-defined]
    write(opened, FACTS[:4], batch_size=4)
    assert [edit.status for edit in opened.journal] == ["written", "refused", "written", "written"]
    assert sorted(opened.workspace.history) == [1, 3, 4]
    assert all(sorted(site.owners) == [1, 3, 4] for site in opened.sites)


def test_failed_edits_stay_by_default_as_in_the_papers() -> None:
    opened = write(session(MAKERS["ROME"](), guard=Guard(margin=0.999)), FACTS[:2])
    assert opened.journal.counts() == {"written": 2}


@pytest.mark.parametrize("how", ["skip", "undo"])
def test_failed_edits_are_not_written_or_taken_back(how: Any) -> None:
    opened = session(MAKERS["ROME"](), guard=Guard(how, margin=0.9999))
    before = contents(opened)
    write(opened, FACTS[:3])
    torch.testing.assert_close(contents(opened), before, rtol=0, atol=0)
    assert opened.journal.counts() == {"refused": 3}
    assert all("below the margin" in edit.reason for edit in opened.journal)


def test_of_a_batch_those_that_fail_after_writing_are_taken_back() -> None:
    plain = write(session(MAKERS["MEMIT"]()), FACTS, batch_size=6)
    sure = sorted(edit.p_target for edit in plain.journal)
    margin = (sure[2] + sure[3]) / 2
    opened = session(MAKERS["MEMIT"](), guard=Guard("undo", margin=margin))
    opened.guard = Guard("undo", margin=margin)
    write(opened, FACTS, batch_size=6)
    refused = [edit for edit in opened.journal if edit.status == "refused"]
    assert 0 < len(refused) < 6
    assert all(edit.p_target >= margin for edit in opened.journal if edit.status == "written")
    assert set(opened.workspace.history) == {e.number for e in opened.journal if e.status == "written"}


def test_failed_edits_are_tried_again_on_top() -> None:
    once = write(session(MAKERS["ROME"]()), FACTS[:2])
    margin = max(edit.p_target for edit in once.journal) + 1e-3
    opened = write(session(MAKERS["ROME"](), guard=Guard("retry", margin=margin, tries=3)), FACTS[:2])
    for edit in opened.journal:
        again = [w for w in opened.updates.writes if w.kind == "mend" and w.numbers == (edit.number,)]
        assert (edit.status, edit.tries) == ("written", 1 + len(again))
        assert "below the margin" in edit.reason
        assert 1 <= len(again) <= 3
        assert edit.p_target >= margin or len(again) == 3
    assert opened.journal.counts() == {"written": 2, "retried": 2}
    assert all(sorted(site.owners) == [1, 2] for site in opened.sites)
    opened.undo([1])
    opened.undo([2])
    assert not any(site.edited for site in opened.sites)


def test_a_run_can_stop_at_the_first() -> None:
    opened = session(MAKERS["ROME"](), guard=Guard("stop", margin=0.9999))
    before = contents(opened)
    with pytest.raises(FailedEditError, match=r"Edit 1 \('0'\) failed and is not in the weights"):
        write(opened, FACTS)
    torch.testing.assert_close(contents(opened), before, rtol=0, atol=0)
    assert len(opened.journal) == 0


def test_an_error_while_scoring_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = write(session(MAKERS["MEMIT"](), Mending(every_n=50)), FACTS[:2])
    before, kept = contents(opened), len(opened.updates)
    plan = opened.plan(FACTS[2:3])
    with monkeypatch.context() as patch:
        patch.setattr("lit_edit.session.score_targets", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            opened.apply(plan)
    torch.testing.assert_close(contents(opened), before, rtol=0, atol=0)
    assert (len(opened.updates), len(opened.journal), opened.workspace.edits) == (kept, 2, 2)
    opened.apply(opened.plan(FACTS[2:3]))
    assert opened.journal[-1].number == 3


@pytest.mark.parametrize("bad", [{"margin": 1.0}, {"margin": -0.1}, {"max_change": 0.0}, {"tries": 0}])
def test_a_guard_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="A guard needs"):
        Guard(**bad)
