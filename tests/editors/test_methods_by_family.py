"""Every described family under every method: two edits each on tiny random models.

In full this is slow; the main suite takes thirty combinations in which every family and every method occur at least
twice. That an edit does what it should is tested elsewhere: here nothing may break.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.models import FAMILIES as MAIN_FAMILIES
from helpers.models import OTHER_FAMILIES, REPOSITORY, tiny_model
from helpers.references import changed, hooks_left, weights
from helpers.runs import FACTS, TEXTS, quick_editor
from helpers.sites import case_of, normal

from lit_edit import edit
from lit_edit.algebra.linalg import fill_silent
from lit_edit.editors.solvers import MEMIT
from lit_edit.model.families import Architecture
from lit_edit.model.workspace import Workspace
from lit_edit.session import EditSession, Preparation

KINDS = (*MAIN_FAMILIES, *OTHER_FAMILIES)
METHODS = (
    "rome", "r-rome", "memit", "emmet", "alphaedit", "mose", "mose-key", "rect", "prune", "wilke", "o-edit-plus-rome",
    "o-edit-rome", "eac-rome", "ft", "mose-oft",
)  # fmt: skip
# Along the families, the methods move on by one each time round, so that every pair is met once.
WALK = [(kind, METHODS[(at + turn) % len(METHODS)]) for turn in range(len(METHODS)) for at, kind in enumerate(KINDS)]
FEW = WALK[:30]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(kind: str, method: str, dtype: torch.dtype) -> None:
    """Two edits: finite, in the editable weights only, recorded, and the model goes on writing."""
    model, tokenizer = tiny_model(kind)
    model.to(dtype)
    before, editor = weights(model), quick_editor(method, contexts=False)
    editable = {Architecture(model)[layer].name for layer in editor.editable_layers(Workspace.of(model, tokenizer))}
    model, journal = edit(model, tokenizer, FACTS, editor, corpus=TEXTS, corpus_tokens=3000)
    touched = changed(before, model)
    assert touched
    assert touched <= editable
    assert all(weight.isfinite().all() for weight in model.state_dict().values() if weight.is_floating_point())
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert [e.case_id for e in journal] == ["1", "2"]
    for entry in journal:
        assert entry.layers
        assert all(math.isfinite(x) for x in (entry.loss, *entry.change.values()))
        assert all(0 <= p <= 1 for p in (entry.p_value, entry.p_target))
        assert entry.rounding.keys() == entry.change.keys()
        assert all(0 <= lost <= 1 + 1e-9 for lost in entry.rounding.values())
    assert hooks_left(model) == 0
    ids = tokenizer("The capital of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2, do_sample=False
        )
    assert said.shape == (1, ids.shape[1] + 2)


def test_the_walk_meets_everything() -> None:
    assert len(set(WALK)) == len(KINDS) * len(METHODS)
    for part, count in ((0, len(KINDS)), (1, len(METHODS))):
        met = [pair[part] for pair in FEW]
        assert len(set(met)) == count
        assert min(met.count(one) for one in met) >= 2
    # MEND needs a network that was trained for the model; the others are settings of methods that are here.
    variants = {"mend", "ft-l", "ft-m", "ft-elastic-net", "eac-memit", "o-edit-memit", "o-edit-plus-memit"}
    variants |= {"mose-paper", "mose-plus", "memit-plus"}
    assert {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} == {*METHODS, *variants}


@pytest.mark.parametrize(("kind", "method"), FEW)
def test_two_edits(kind: str, method: str) -> None:
    check(kind, method, torch.float32)


@pytest.mark.parametrize("method", ["memit", "emmet", "wilke"])
def test_units_that_never_fire_do_not_stop_an_edit(method: str) -> None:
    session = EditSession(*tiny_model("opt"), quick_editor(method, contexts=False), Preparation(TEXTS, 3000))
    silent = [site for site in session.sites if float(site.covariance.diagonal().min()) < 1e-5]  # type: ignore[union-attr]
    assert silent  # a ReLU unit of layer 1, without which this would show nothing
    check("opt", method, torch.float32)


def test_a_silent_unit_is_edited_around() -> None:
    root, solver = normal(12, 30), MEMIT(preservation=3.0)
    plain = root @ root.T
    assert fill_silent(plain) is plain
    with_silent = torch.zeros(13, 13, dtype=torch.float64)
    with_silent[:12, :12] = plain
    filled = fill_silent(with_silent)
    assert float(with_silent[12, 12]) == 0.0
    weight, keys, targets = normal(8, 13, seed=1), normal(13, 2, seed=2), normal(8, 2, seed=3)
    keys[12] = 0
    delta = case_of(weight, keys, targets, filled).delta(solver)
    torch.testing.assert_close(delta[:, :12], case_of(weight[:, :12], keys[:12], targets, plain).delta(solver))
    assert float(delta[:, 12].abs().max()) < 1e-12
    assert fill_silent(torch.zeros(2, 2)).equal(torch.zeros(2, 2))


# Every method once, in families that the thirty above do not pair it with.
@pytest.mark.filterwarnings("ignore:Edit . rounding to .*float16 took:UserWarning")
@pytest.mark.parametrize(("kind", "method"), WALK[30:45])
def test_two_edits_in_bfloat16(kind: str, method: str) -> None:
    check(kind, method, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Edit . rounding to .*float16 took:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_edits_everywhere(kind: str, method: str, dtype: str) -> None:
    check(kind, method, DTYPES[dtype])
