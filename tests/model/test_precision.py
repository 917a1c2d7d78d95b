"""Half precision, from the algebra to what is written; weights that cannot be written to; requests that do not fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import projection_of
from helpers.runs import FACTS, TEXTS, data, quick_editor, trainer, write_corpus
from helpers.sites import case_of, normal
from lit_edit.callbacks import MatrixStability, spectrum_drift
from torch import Tensor, nn

from lit_edit import EditRequest, LitEdit, edit
from lit_edit.algebra.updates import Additive
from lit_edit.editors import FineTune
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Solver
from lit_edit.evaluation.metrics import target_scores
from lit_edit.model.families import Architecture, UnsupportedModelError
from lit_edit.model.trial import last_token_nll, target_nll
from lit_edit.requests import RequestError
from lit_edit.session import EditSession, Preparation

HALF = (torch.bfloat16, torch.float16)
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SOLVERS: dict[str, Callable[[], Solver]] = {
    "rome": lambda: ROME(preservation=5.0),
    "memit": lambda: MEMIT(preservation=20.0),
    "emmet": lambda: EMMET(preservation=5.0),
    "alphaedit": lambda: AlphaEdit(threshold=None, energy=0.2, ridge=0.1),
    "mose": lambda: MOSE(preservation=20.0),
    "mose-key": lambda: MOSEKey(preservation=20.0),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_algebra_sees_stored_numbers_and_nothing_else_of_a_dtype(name: str, dtype: torch.dtype) -> None:
    weight = (normal(16, 40) / 40**0.5).to(dtype)
    keys, targets, root = normal(40, 1, seed=1).to(dtype), normal(16, 1, seed=2).to(dtype), normal(40, 40, seed=3)
    case = case_of(weight, keys, targets, root @ root.T)
    update = case.solve(SOLVERS[name]())
    exact = case_of(weight.double(), keys.double(), targets.double(), root @ root.T).solve(SOLVERS[name]())
    assert all(tensor.dtype in (torch.float64, torch.bool) for tensor in update.state_dict().values())
    wanted = weight.double() + exact.delta(weight.double())
    torch.testing.assert_close(update.delta(weight), exact.delta(weight.double()), rtol=0, atol=0)
    lost = case.site.write(update).rounding
    stored = case.site.weight.double()
    torch.testing.assert_close(stored, wanted.to(dtype).double(), rtol=0, atol=0)
    change = float((wanted - weight.double()).norm())
    assert lost == pytest.approx(float((stored - wanted).norm()) / change, rel=1e-9)
    # Each entry is rounded by at most the unit of its size.
    assert 0 < lost <= UNIT[dtype] * float(wanted.norm()) / change


@pytest.mark.parametrize("dtype", UNIT)
def test_rounding_takes_all_of_a_change_at_most_and_nothing_of_none(dtype: torch.dtype) -> None:
    for size in (0.0, 1e-9, 1e-4, 1e-2, 1.0, 30.0):
        change, before = size * normal(12, 20, seed=5), normal(12, 20, seed=9).to(dtype)
        weight = before.clone()
        lost = Additive(change).apply_(weight).rounding
        stored, wanted = float((weight.double() - before.double()).norm()), float(change.norm())
        slack = 1e-6  # of float64 itself, in which the smallest change is next to nothing beside the weight
        assert (1 - lost - slack) * wanted <= stored <= (1 + lost + slack) * wanted
        assert 0 <= lost <= 1 + slack
        assert lost == pytest.approx(0.0 if not size else 1.0 if torch.equal(weight, before) else lost)


@pytest.mark.parametrize("method", ["memit", "mose", "ft"])
def test_the_journal_says_what_rounding_took(method: str) -> None:
    taken = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model, tokenizer = tiny_model("qwen2")
        model.to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Edit . rounding to", UserWarning)
            _, journal = edit(
                model, tokenizer, FACTS, quick_editor(method, contexts=False), corpus=TEXTS, corpus_tokens=3000
            )
        assert all(set(e.rounding) == {str(layer) for layer in e.layers} for e in journal)
        taken[dtype] = max(max(e.rounding.values()) for e in journal)
        assert all(math.isfinite(e.p_target) for e in journal)
    assert taken[torch.float64] < 1e-12 < taken[torch.float32] < 1e-3
    assert taken[torch.float32] < taken[torch.float16] < taken[torch.bfloat16] <= 1 + 1e-9


def test_edits_that_are_lost_to_rounding_are_reported_once() -> None:
    model, tokenizer = tiny_model("gpt2")
    editor = FineTune([1], lr=1e-7, steps=1)
    session = EditSession(model.to(torch.bfloat16), tokenizer, editor, Preparation(corpus=[]))
    before = projection_of(model, 1).weight.clone()
    facts = [*FACTS, EditRequest("3", "Oslo is in", "Oslo", "France")]
    with pytest.warns(UserWarning, match=r"Edit 1: rounding to bfloat16 took \d+% of the change of layer 1") as seen:
        applied = [session.apply(session.plan([fact])) for fact in facts]
    assert len(seen) == 1 < len(applied)
    assert "it is kept, and stored with the next edits" in str(seen[0].message)
    assert min(e.rounding["1"] for e in session.journal) > 0.9
    assert float((projection_of(model, 1).weight - before).norm() / before.norm()) < 1e-3
    model, tokenizer = tiny_model("gpt2")
    edit(model, tokenizer, facts, FineTune([1], lr=1e-7, steps=1), corpus=[])  # in float32 nothing is said


def test_what_rounding_leaves_for_the_next_edit_is_not_reported_later() -> None:
    """It is of the sum of all edits by then: that a single one is small beside it says nothing."""
    model, tokenizer = tiny_model("gpt2")
    editor = FineTune([1], lr=1e-2, steps=1)
    session = EditSession(model.to(torch.bfloat16), tokenizer, editor, Preparation(corpus=[]))
    session.apply(session.plan(FACTS[:1]))
    assert max(session.journal[0].rounding.values()) < 0.5
    editor.lr = 1e-7
    session.apply(session.plan(FACTS[1:2]))  # warnings are errors
    assert max(session.journal[1].rounding.values()) > 0.5


@pytest.fixture
def mose_run(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[[str], tuple[LitEdit, MatrixStability]]:
    def run(dtype: str) -> tuple[LitEdit, MatrixStability]:
        corpus = str(write_corpus(tmp_path))
        module = LitEdit(quick_editor("mose"), str(tiny_folder("llama")), dtype=dtype, corpus=corpus)
        watch = MatrixStability(every_n=1)
        trainer(tmp_path / dtype, watch).fit(module, datamodule=data(tmp_path, 3))
        return module, watch

    return run


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
@pytest.mark.filterwarnings("ignore:Edit . rounding to bfloat16 took:UserWarning")
def test_a_run_of_rotations_shows_how_far_rounding_moved_the_spectrum(
    mose_run: Callable[[str], tuple[LitEdit, MatrixStability]],
) -> None:
    found = {}
    for dtype, least, most in (("float32", 1e-9, 1e-6), ("bfloat16", 1e-5, 2e-2)):
        module, watch = mose_run(dtype)
        drifts = {name: watch.latest[f"stability/{name}/spectrum_drift"] for name in module.edited_parameters()}
        found[dtype] = watch.latest["stability/worst_spectrum_drift"]
        assert found[dtype] == max(drifts.values())
        assert least < found[dtype] < most
        assert watch.latest["stability/mean_relative_drift"] > 3 * found[dtype]
        original = tiny_model("llama")[0].to(getattr(torch, dtype)).state_dict()
        for name, weight in module.edited_parameters().items():
            start = original[name.removeprefix("model.") if name not in original else name]
            assert drifts[name] == pytest.approx(spectrum_drift(weight, start), rel=1e-6, abs=1e-12)
    assert found["bfloat16"] > 100 * found["float32"]


@pytest.mark.parametrize("dtype", HALF)
def test_scores_of_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (normal(3, 7, 11) * 2e4).clamp(-6e4, 6e4).to(dtype)  # their exponentials overflow any of the two
    labels = torch.full((3, 7), -100)
    labels[:, 4:] = torch.randint(11, (3, 3), generator=torch.Generator().manual_seed(0))
    for loss in (target_nll, last_token_nll):
        torch.testing.assert_close(loss(logits, labels).double(), loss(logits.double(), labels), rtol=1e-5, atol=1e-3)
    found, exact = target_scores(logits, labels), target_scores(logits.double(), labels)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-3)


class Packed(nn.Parameter):
    """What bitsandbytes' parameters look like from outside: any dtype for storage, and how to unpack beside it."""

    quant_state: Any = None
    SCB: Any = None


def packed(dtype: torch.dtype, **beside: Any) -> nn.Parameter:
    made = Packed(torch.zeros(32, 48).to(dtype), requires_grad=False)
    for name, value in beside.items():
        setattr(made, name, value)
    return made


class Disguised(Tensor):
    """A tensor class of a library's own, as torchao's, that calls itself float32."""


def unwritable() -> dict[str, tuple[Any, dict[str, Any], str]]:
    plain = nn.Parameter(torch.zeros(32, 48))
    other = nn.Parameter(torch.zeros(32, 48).as_subclass(Disguised))
    return {
        "4 bits as uint8": (packed(torch.uint8, quant_state=object()), {}, "quantised: Linear keeps 'quant_state'"),
        "4 bits as bfloat16": (
            packed(torch.bfloat16, quant_state=object()),
            {},
            "quantised: Linear keeps 'quant_state'",
        ),
        "8 bits": (packed(torch.int8, SCB=torch.ones(32)), {}, "quantised: Linear keeps 'SCB'"),
        "int8 without more": (packed(torch.int8), {}, "quantised: its dtype is torch.int8"),
        "8 bits with a point": (packed(torch.float8_e4m3fn), {}, "quantised: its dtype is torch.float8_e4m3fn"),
        "scaled": (plain, {"weight_scale": torch.ones(1)}, "quantised: Linear keeps 'weight_scale'"),
        "of another class": (other, {}, "it is a Disguised, not an ordinary tensor"),
    }


@pytest.mark.parametrize("case", unwritable())
def test_quantised_weights_are_refused_with_the_reason(case: str) -> None:
    model, tokenizer = tiny_model("qwen2")
    weight, beside, reason = unwritable()[case]
    projection = projection_of(model, 1)
    projection.weight = weight
    for name, value in beside.items():
        setattr(projection, name, value)
    message = rf"layer 1 holds no plain floating-point matrix \({reason}\) and cannot be edited: load the model in"
    with pytest.raises(UnsupportedModelError, match=message):
        Architecture(model)
    with pytest.raises(UnsupportedModelError, match=message):
        edit(model, tokenizer, FACTS, "rome")


class Unread:
    """A corpus that must not be asked for."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("statistics were collected")


def test_a_request_that_does_not_fit_is_reported_before_statistics_are_collected() -> None:
    model, tokenizer = tiny_model("gpt2")
    long = EditRequest("9", "Maria " * 200 + "is", "Maria", "x", source="facts.json, record 5")
    with pytest.raises(RequestError, match=r"facts\.json, record 5, field 'prompt': \d+ tokens"):
        edit(model, tokenizer, [*FACTS, long], quick_editor("memit", contexts=False), corpus=Unread())
    with pytest.raises(AssertionError, match="statistics were collected"):
        edit(model, tokenizer, FACTS, quick_editor("memit", contexts=False), corpus=Unread())


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
def test_so_it_is_under_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("gpt2")
    model.config.max_position_embeddings = 4

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("statistics were collected")

    monkeypatch.setattr("lit_edit.session.Preparation.statistics", refuse)
    module = LitEdit(quick_editor("memit", contexts=False), model, tokenizer, corpus=str(write_corpus(tmp_path)))
    with pytest.raises(RequestError, match="the model takes 4"):
        trainer(tmp_path).fit(module, datamodule=data(tmp_path, 2))
