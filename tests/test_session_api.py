"""`Session` and `edit`: facts as people write them, one after another, asked and taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.runs import TEXTS, assert_same_weights, quick_editor
from transformers import AutoModelForCausalLM

import lit_edit
from lit_edit import EditRequest, RequestError, Session, edit, load_delta
from lit_edit.api import facts_of

pytestmark = pytest.mark.filterwarnings("ignore:The key covariance was counted over")
FRANCE = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}
PERU = FRANCE | {"prompt": "The capital of Peru is", "subject": "Peru", "rephrases": ["Peru is led from"]}


def opened(family: str = "llama", method: str = "memit", **more: Any) -> Session:
    model, tokenizer = tiny_model(family)
    return Session(model, quick_editor(method, contexts=False), tokenizer=tokenizer, corpus=TEXTS, **more)


def test_facts_are_dictionaries_with_braces_and_no_case_id() -> None:
    (one,) = facts_of(FRANCE, first=4)
    assert (one.case_id, one.prompt, one.subject) == ("4", "The capital of France is", "France")
    given = EditRequest("x", "Oslo is in", "Oslo", "Peru")
    assert facts_of([given, PERU]) == [given, *facts_of(PERU, first=2)]
    assert [probe.kind for probe in facts_of(PERU)[0].probes] == ["generalization"]
    for bad, error, said in (
        ("The capital", TypeError, "not the text 'The capital'"),
        ([FRANCE, 7], TypeError, "Fact 2 is of type int"),
        ([{"prompt": "a", "subject": "b"}], RequestError, "fact 1"),
        ({**FRANCE, "subject": "Spain", "prompt": "The capital of France is"}, RequestError, "fact 1.*subject"),
    ):
        with pytest.raises(error, match=said):
            facts_of(bad)  # type: ignore[arg-type]


def test_a_session_edits_asks_scores_and_takes_back() -> None:
    session = opened()
    before = {name: weight.clone() for name, weight in session.model.state_dict().items()}
    assert repr(session) == "<Session on LlamaForCausalLM with MEMIT: 0 edits in the weights>"
    answers = session.ask(["The capital of France is", "Oslo"], tokens=3)
    assert isinstance(answers, list)
    assert session.ask("The capital of France is", tokens=3) == answers[0]
    (one,) = session.edit(FRANCE)
    (two,) = session.edit([PERU])
    assert (one.case_id, two.case_id) == ("1", "2")
    assert repr(session).endswith("2 edits in the weights>")
    assert {"reliability", "generalization"} <= set(session.evaluate())
    assert session.evaluate()["count/reliability"] == 2
    assert session.evaluate(PERU)["count/reliability"] == 1
    assert session.undo(1) == [1]
    assert session.evaluate()["count/reliability"] == 1
    assert session.undo(to=0) == [2]
    torch.testing.assert_close(dict(session.model.state_dict()), before, rtol=0, atol=0)


def test_statistics_are_collected_once_and_on_the_unedited_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fact by fact as in one call: what an editor knows of the model does not change with the edits."""
    from lit_edit.session import Preparation

    calls = []
    plain = Preparation.statistics
    monkeypatch.setattr(Preparation, "statistics", lambda self, *rest: calls.append(1) or plain(self, *rest))
    model, tokenizer = tiny_model("llama")
    method = quick_editor("memit", contexts=False)
    edit(model, tokenizer, FRANCE, method, corpus=TEXTS)
    _, journal = edit(model, tokenizer, PERU, method, corpus=TEXTS)
    assert len(calls) == 1
    assert [e.number for e in journal] == [1, 2]
    other, _ = tiny_model("llama")
    edit(other, tokenizer, [FRANCE, PERU], quick_editor("memit", contexts=False), corpus=TEXTS)
    assert_same_weights(model, other)


def test_an_edited_model_is_not_taken_for_an_unedited_one() -> None:
    session = opened()
    session.edit(FRANCE)
    with pytest.raises(ValueError, match="holds 1 edit of another session"):
        Session(session.model, quick_editor("rome"), tokenizer=session.tokenizer, corpus=TEXTS)
    with pytest.raises(ValueError, match="holds 1 edit of another session"):
        edit(session.model, session.tokenizer, PERU, quick_editor("rome"), corpus=TEXTS)
    session.undo(to=0)
    again = Session(session.model, quick_editor("rome", False), tokenizer=session.tokenizer, corpus=TEXTS)
    assert len(again.journal) == 0


def test_mistakes_are_one_clear_line() -> None:
    model, _ = tiny_model("llama")
    with pytest.raises(TypeError, match=r"edit\(\) takes a loaded model and its tokenizer, not 'embedded'"):
        edit("embedded", None, FRANCE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs its tokenizer: Session\(model, tokenizer="):
        Session(model)
    session = opened()
    with pytest.raises(ValueError, match="batch_size should be positive"):
        session.edit(FRANCE, batch_size=0)
    with pytest.raises(ValueError, match="Save what"):
        session.save()
    assert len(session.journal) == 0


def test_what_is_saved_is_the_edited_model(tmp_path: Path) -> None:
    session = opened("gpt2")
    session.edit([FRANCE, PERU], batch_size=2)
    header = session.save(tmp_path / "model", delta=tmp_path / "change.safetensors")
    assert header is not None
    assert header.edits == 2
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), session.model)
    fresh, _ = tiny_model("gpt2")
    load_delta(fresh, tmp_path / "change.safetensors")
    assert_same_weights(fresh, session.model)


def test_the_version_is_that_of_the_package() -> None:
    assert lit_edit.__version__.count(".") >= 1
