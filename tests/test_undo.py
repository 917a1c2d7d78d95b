"""Undo: any edit, not only the last, and all of them; the kept updates, and going on from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sessions import FACTS, MAKERS, contents, locate, session, write

from lit_edit.editors import LocateThenEdit, Mending
from lit_edit.editors.restraints import PRUNE
from lit_edit.editors.solvers import MEMIT, ROME, Solver
from lit_edit.files import DamagedFileError
from lit_edit.requests import EditRequest
from lit_edit.runs.updates import UpdateLog, checksum_of
from lit_edit.session import EditSession

pytestmark = pytest.mark.filterwarnings("ignore:The key covariance was counted over")


def assert_equal(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_all_undone_is_bit_by_bit_the_unedited_model(name: str) -> None:
    opened = session(MAKERS[name](), Mending(every_n=3, margin=0.9))
    before = dict(opened.model.state_dict())
    before = {key: weight.clone() for key, weight in before.items()}
    write(opened, FACTS, 2 if opened.editor.max_batch is None else 1)
    opened.finish()
    assert opened.undo(last=6) == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(dict(opened.model.state_dict()), before, rtol=0, atol=0)
    assert not any(site.edited or site.edits or site.owners for site in opened.sites)
    assert opened.workspace.edits == 0
    assert [edit.status for edit in opened.journal] == ["undone"] * 6
    assert opened.journal.standing == []


@pytest.mark.parametrize("name", MAKERS)
def test_undone_from_the_end_one_by_one_is_every_former_state(name: str) -> None:
    opened, states = session(MAKERS[name]()), []
    for request in FACTS:
        states.append(contents(opened))
        opened.apply(opened.plan([request]))
    for number in range(6, 0, -1):
        assert opened.undo(last=1) == [number]
        assert_equal(contents(opened), states[number - 1])
        for site in opened.sites:
            assert site.edits == number - 1
            assert set(site.owners) <= set(range(1, number))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("gone", [[3], [1, 5]])
def test_edits_in_the_middle_leave_what_the_other_updates_make(name: str, gone: list[int]) -> None:
    opened = write(session(MAKERS[name]()), FACTS)
    updates = {w.numbers[0]: opened.updates.steps(w) for w in opened.updates.writes}
    wanted = session(MAKERS[name]())
    for number, steps in updates.items():
        for step in steps if number not in gone else ():
            wanted.workspace.site(step.layer).write(step.update)
    assert opened.undo(gone) == gone
    assert_equal(contents(opened), contents(wanted))
    assert sorted(opened.workspace.history) == [n for n in range(1, 7) if n not in gone]
    for site in opened.sites:
        assert not set(site.owners) & set(gone)
    opened.apply(opened.plan([replace(FACTS[0], case_id="again", target_new="Cork")]))
    assert opened.journal[-1].number == 7  # numbers are never given twice


def test_undoing_one_of_a_batch_writes_the_others_again() -> None:
    opened = write(session(MAKERS["MEMIT"]()), FACTS, batch_size=3)
    assert opened.undo(case_ids=["1"]) == [2]
    assert [event.event for event in opened.journal.events] == ["undone", "rewritten"]
    assert opened.journal.events[-1].numbers == [1, 3]
    assert sorted(opened.workspace.history) == [1, 3, 4, 5, 6]
    assert [edit.status for edit in opened.journal] == ["written", "undone", *["written"] * 4]
    for site in opened.sites:
        assert sorted(site.owners) == [1, 3, 4, 5, 6]
    assert opened.undo(to=0) == [1, 3, 4, 5, 6]
    assert not any(site.edited for site in opened.sites)


@pytest.mark.parametrize("solver", [MEMIT(1e-3, memory=True), ROME()])  # many at a time, and one
def test_an_edit_kept_with_one_that_goes_is_written_again_without_it(solver: Solver) -> None:
    said = {"was born": "Oslo", "lives": "Bonn", "works": "Rome"}
    who = FACTS[0].subject
    same = [EditRequest(verb, f"{who} {verb} in", who, where) for verb, where in said.items()]
    opened = write(session(locate(solver, with_earlier=True)), same)
    assert [write.kept_with for write in opened.updates.writes] == [(), (1,), (1, 2)]
    opened.undo([1])
    assert [event.numbers for event in opened.journal.events] == [[1], [2, 3]]


def test_undo_restrains_anew_what_was_restrained_at_the_end() -> None:
    def made() -> LocateThenEdit:
        return locate(MEMIT(1e-3, memory=True), restraints=[PRUNE()])

    opened = write(session(made()), FACTS)
    opened.finish()
    opened.undo(last=2)
    other = write(session(made()), FACTS[:4])
    other.finish()
    assert [w.kind for w in opened.updates.writes] == ["edit"] * 4 + ["finish"]
    for one, two in zip(opened.sites, other.sites, strict=True):
        torch.testing.assert_close(one.weight, two.weight)


def test_what_cannot_be_undone_is_named() -> None:
    opened = write(session(MAKERS["ROME"]()), FACTS)
    for bad, said in (({"numbers": [9]}, "Edit 9 is not in the weights"), ({"case_ids": ["x"]}, "case id 'x'")):
        with pytest.raises(ValueError, match=said):
            opened.undo(**bad)  # type: ignore[arg-type]
    assert opened.undo(last=0) == []
    opened.undo([2])
    with pytest.raises(ValueError, match=r"Edit 2 is not in the weights.*1 to 6"):
        opened.undo([2])
    with pytest.raises(ValueError, match="0 or more"):
        opened.undo(last=-1)


def test_an_error_amid_undoing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = write(session(MAKERS["MEMIT"]()), FACTS, batch_size=3)
    before, files = contents(opened), len(opened.updates)
    with monkeypatch.context() as patch:
        patch.setattr(type(opened.editor), "plan", lambda *_: (_ for _ in ()).throw(KeyError("stop")))
        with pytest.raises(KeyError, match="stop"):
            opened.undo([2])
    assert_equal(contents(opened), before)
    assert len(opened.updates) == files
    assert len(opened.workspace.history) == 6
    assert opened.undo([2]) == [2]


def small(opened: EditSession, limit: int) -> EditSession:
    opened.updates.limit = limit
    return opened


def test_beyond_the_limit_the_oldest_writes_go_together() -> None:
    opened = small(session(MAKERS["MEMIT"]()), 18_000)
    made = 0
    while opened.updates._base(len(opened.updates)) == 0:
        made += 1
        assert made < 40
        write(opened, [replace(FACTS[made % 6], case_id=str(made))])
    write(opened, [replace(FACTS[0], case_id="last")])
    assert opened.updates.size <= 18_000
    last = made + 1
    assert [number for write in opened.updates.writes for number in write.numbers] == [last]
    with pytest.raises(ValueError, match=r"edit 1 is no longer kept by itself.*--updates.limit"):
        opened.undo([1])
    assert opened.undo(last=1) == [last]
    assert opened.undo(to=0) == list(range(1, last))
    assert not any(site.edited for site in opened.sites)
    write(opened, [replace(FACTS[1], case_id="later")])  # and the log begins anew
    opened.undo(last=1)
    assert not any(site.edited for site in opened.sites)


def test_nothing_is_kept_with_a_limit_of_nothing() -> None:
    opened = write(small(session(MAKERS["MEMIT"]()), 0), FACTS)
    assert len(opened.updates) == 0
    with pytest.raises(ValueError, match="no longer kept"):
        opened.undo(last=1)
    opened.undo(to=0)
    assert not any(site.edited for site in opened.sites)


@pytest.mark.parametrize("name", ["MEMIT", "MOSE"])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_resumed_session_takes_back_what_came_before(name: str, elsewhere: bool, tmp_path: Path) -> None:
    first = session(MAKERS[name]())
    first.keep_in(tmp_path / "first")
    write(first, FACTS[:3])
    state = first.state_dict()
    states = [contents(first)]
    files = [len(first.updates)]
    write(first, FACTS[3:])
    files.append(len(first.updates))
    folder = tmp_path / ("second" if elsewhere else "first")
    again = session(MAKERS[name]())
    again.load_state_dict(state, FACTS)
    again.keep_in(folder, tmp_path / "first")
    assert len(list((tmp_path / "first" / "updates").iterdir())) == (files[1] if elsewhere else files[0])
    write(again, FACTS[3:5])
    assert again.undo(to=3) == [4, 5]
    assert_equal(contents(again), states[0])
    again.undo(to=0)
    assert not any(site.edited for site in again.sites)
    assert [line.count("undone") for line in (folder / "edits.jsonl").read_text().splitlines()] == [1] * 5


def test_a_resumed_session_without_its_updates_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    first = write(session(MAKERS["MEMIT"]()), FACTS[:3])
    again = session(MAKERS["MEMIT"]())
    again.load_state_dict(first.state_dict(), FACTS)
    again.keep_in(tmp_path / "again", tmp_path / "nothing")
    write(again, FACTS[3:])
    with pytest.raises(ValueError, match="edit 2 is no longer kept"):
        again.undo([2])
    again.undo(to=3)
    assert_equal(contents(again), contents(first))


def test_kept_updates_name_what_they_are_and_are_verified(tmp_path: Path) -> None:
    opened = session(MAKERS["MOSE"]())
    opened.keep_in(tmp_path)
    write(opened, FACTS[:2])
    log = UpdateLog(tmp_path / "updates")
    assert [(w.kind, w.numbers, w.edits) for w in log.writes] == [("edit", (1,), 1), ("edit", (2,), 2)]
    assert dict(log.writes[-1].checksums) == {s.layer: checksum_of(s.stored) for s in opened.sites}
    path = log.path(1)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="damaged"):
        log.steps(log.writes[0])
    (tmp_path / "updates" / "000017.safetensors").write_bytes(b"nothing")
    with pytest.raises(DamagedFileError, match="000017"):
        UpdateLog(tmp_path / "updates")
    with pytest.raises(ValueError, match="updates of another session"):
        session(MAKERS["MOSE"](), updates=log)


def test_updates_are_thin(tmp_path: Path) -> None:
    """An edit of two 32 x 48 matrices is four vectors, not two matrices."""
    opened: Any = session(MAKERS["MEMIT"]())
    write(opened, FACTS[:1])
    (step, _) = opened.updates.steps(opened.updates.writes[0])
    assert sum(tensor.numel() for tensor in step.update.state_dict().values()) <= 32 + 48 + 2
