from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import make_workspace, requests
from torch import Tensor

from lit_edit.algebra.updates import Additive, LowRank, Update
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.keys import TypeMeanKey
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import PRUNE, RECT, Ground, OEditPlus, Restraint, Source, check_restraints
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, Solver
from lit_edit.editors.values import NormMatched, ValueOptimizer
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

D, P = 16, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ground(edits: int = 3, batch: int = 1) -> Ground:
    """A layer after some edits of rank one."""
    original = random(D, P)
    total = random(D, edits, seed=1) @ random(edits, P, seed=2)
    return Ground(original + total, original, random(D, P, seed=3), edits_here=edits, batch_here=batch)


def outside(matrix: Tensor, change: Tensor) -> Tensor:
    """``ΔW − A (AᵀA)⁺ Aᵀ ΔW``, as Eq. 12 and 15 are printed: whole matrices, no singular vectors."""
    return change - matrix @ torch.linalg.pinv(matrix.T @ matrix, rtol=1e-9) @ matrix.T @ change


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, from the eigenvectors of ``A Aᵀ``."""
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, matrix.shape[0] - rank :]
    return vectors @ vectors.T @ matrix


def updates() -> list[Update]:
    left, right = random(D, 2, seed=4), random(2, P, seed=5)
    return [LowRank(left, right), Additive(left @ right)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("share", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("edits", [0, 1, 3])
def test_it_is_equation_15_on_whole_matrices(edits: int, share: float, batch: int) -> None:
    layer = ground(edits, batch)
    assert layer.original is not None
    assert layer.gradient is not None
    total = layer.weight - layer.original
    for update in updates():
        expected = outside(total, update.delta(layer.weight)) if edits else update.delta(layer.weight)
        gradient = truncated(layer.gradient, int(share * (edits + batch)))
        expected = outside(outside(total, gradient) if edits else gradient, expected)
        found = OEditPlus(share).restrain(update, layer)
        torch.testing.assert_close(found.delta(layer.weight), expected, rtol=0, atol=1e-9)
        assert type(found) is type(update)


def test_nothing_of_either_space_is_left_in_an_update() -> None:
    layer = ground()
    assert layer.original is not None
    assert layer.gradient is not None
    for update in updates():
        found = OEditPlus(2.0).restrain(update, layer).delta(layer.weight)
        for taken in (layer.weight - layer.original, truncated(layer.gradient, 8)):
            torch.testing.assert_close(taken.T @ found, torch.zeros(P, P, dtype=torch.float64), rtol=0, atol=1e-9)
        assert float(found.norm()) > 0.1 * update.norm  # and not because nothing is left at all


def test_cleaning_is_the_one_switch_between_equation_28_and_its_ablations() -> None:
    layer = ground()
    assert layer.original is not None
    assert layer.gradient is not None
    written = torch.linalg.svd(layer.weight - layer.original).U[:, :3]
    leading = torch.linalg.svd(layer.gradient).U[:, :6]
    change = updates()[0].delta(layer.weight)
    rest = change - written @ written.T @ change
    subtracted = leading - written @ written.T @ leading
    expected = {
        "subtract": rest - subtracted @ subtracted.T @ rest,
        "none": rest - leading @ leading.T @ rest,
        "orthonormal": outside(subtracted, rest),
    }
    found = {c: OEditPlus(1.5, cleaning=c).restrain(updates()[0], layer).delta(layer.weight) for c in expected}  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    assert float((found["subtract"] - found["orthonormal"]).norm()) > 0.01 * float(change.norm())
    only_gradient = OEditPlus(1.5, past=False).restrain(updates()[0], layer).delta(layer.weight)
    torch.testing.assert_close(only_gradient, change - leading @ leading.T @ change)


def test_the_limit_bounds_the_gradients_directions() -> None:
    layer = ground()
    limited = OEditPlus(4.0, max_directions=2).spaces(layer)[1]
    assert limited.shape == (D, 2)
    torch.testing.assert_close(limited, OEditPlus(0.5).spaces(layer)[1])


@pytest.mark.parametrize(
    ("edits", "share", "past"), [(D, 0.0, True), (D - 1, 1.0, True), (3, 4.0, True), (3, 4.0, False)]
)
def test_an_exhausted_space_is_an_error_and_not_a_zero_update(edits: int, share: float, past: bool) -> None:
    for cleaning in ("orthonormal", "subtract", "none"):
        restraint = OEditPlus(share, past=past, cleaning=cleaning)  # type: ignore[arg-type]
        if edits == D - 1 and cleaning == "subtract":
            continue  # keeps a part along the directions, and so always finds room
        for update in updates():
            with pytest.raises(ValueError, match=r"no room for edit 1 in layer 'h': of 16 output directions"):
                restraint.restrain(update, Ground(**(vars(ground(edits)) | {"layer": "h"})))


def test_an_update_that_was_zero_stays_zero() -> None:
    zero = LowRank(torch.zeros(D, 1), random(1, P))
    assert OEditPlus(1.0).restrain(zero, ground()).norm == 0


def test_it_asks_for_what_it_needs_and_no_more() -> None:
    assert (OEditPlus().needs_original, OEditPlus().needs_gradient) == (True, True)
    assert (OEditPlus(0.0).needs_original, OEditPlus(0.0).needs_gradient) == (True, False)
    assert (OEditPlus(1.0, past=False).needs_original, OEditPlus(1.0, past=False).needs_gradient) == (False, True)
    layer = ground()
    OEditPlus(0.0).restrain(updates()[0], Ground(layer.weight, layer.original, edits_here=3, batch_here=1))
    OEditPlus(1.0, past=False).restrain(updates()[0], Ground(layer.weight, gradient=layer.gradient, batch_here=1))
    with pytest.raises(ValueError, match="weight of layer 'h' before the first edit was not kept"):
        OEditPlus(0.0).restrain(updates()[0], Ground(layer.weight, edits_here=3, batch_here=1, layer="h"))
    with pytest.raises(ValueError, match="no gradient of the language-model loss for layer 'h'"):
        OEditPlus(1.0).restrain(updates()[0], Ground(layer.weight, layer.original, batch_here=1, layer="h"))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="no space to project out"):
        OEditPlus(0.0, past=False)
    with pytest.raises(ValueError, match="'orthonormal', 'subtract' or 'none', not 'maybe'"):
        OEditPlus(cleaning="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0, not -1"):
        OEditPlus(-1.0)
    values = ValueOptimizer(constraint=NormMatched())
    with pytest.raises(ValueError, match="OEditPlus restrains what is added to a weight, and MOSE multiplies"):
        LocateThenEdit(FixedLayers([1]), values, MOSE(preservation=1.0), restraints=[OEditPlus()])


@pytest.mark.parametrize("keep", [0.2, 0.99])
def test_updates_of_full_rank_leave_no_room_and_are_refused(keep: float) -> None:
    rome, tuned = Source("ROME"), Source("FineTune", dense=True)
    for restraints, source, full in (
        ([RECT(keep), OEditPlus()], rome, "RECT after ROME"),
        ([RECT(keep), PRUNE(), OEditPlus(0.0)], rome, "RECT after ROME"),
        ([OEditPlus()], tuned, "FineTune"),
        ([RECT(keep), OEditPlus()], tuned, "RECT after FineTune"),
    ):
        with pytest.raises(ValueError, match=f"an update by {full} has full rank: the first one fills the whole space"):
            check_restraints(restraints, source)
    # Without the edits so far there is room enough.
    layer = ground()
    assert layer.gradient is not None
    pair = [RECT(keep), OEditPlus(2.0, past=False)]
    check_restraints(pair, tuned)
    update = updates()[0]
    for restraint in pair:
        update = restraint.restrain(update, layer)
    found, leading = update.delta(layer.weight), torch.linalg.svd(layer.gradient).U[:, :8]
    assert float((leading.T @ found).norm()) < 1e-9 * float(found.norm())


@pytest.mark.parametrize("past", [True, False])
def test_rect_afterwards_would_undo_the_projection_and_is_refused(past: bool) -> None:
    for between in ([], [PRUNE()]):
        with pytest.raises(ValueError, match=r"RECT after O-Edit.* brings it back into the spaces"):
            check_restraints([OEditPlus(1.0, past=past), *between, RECT(0.4)], Source("ROME"))
    layer, update = ground(), updates()[0]
    projected = OEditPlus(2.0, past=past).restrain(update, layer)
    leading = torch.linalg.svd(layer.gradient).U[:, :8]  # the reason, in numbers
    kept = RECT(0.4).restrain(projected, layer).delta(layer.weight)
    assert float((leading.T @ kept).norm()) > 0.1 * float(kept.norm())


def test_what_leaves_the_space_alone_goes_with_it() -> None:
    for restraints in ([OEditPlus(), PRUNE()], [PRUNE(), OEditPlus()], [RECT(1.0), OEditPlus(), RECT(1.0)]):
        check_restraints(restraints, Source("ROME"))


def test_a_rank_that_was_counted_bounds_the_space_and_not_the_number_of_edits() -> None:
    layer = ground(edits=6)
    for rank, edits in ((6, 2), (6, 6), (9, 2)):
        past, _ = OEditPlus(0.0).spaces(replace(layer, edits_here=edits, rank_here=rank))
        assert past.shape == (D, 6)
    assert OEditPlus(0.0).spaces(replace(layer, edits_here=2))[0].shape == (D, 2)


# On models


SOLVERS: dict[str, tuple[Callable[[], Solver], Any, list[int]]] = {
    "rome": (ROME, "mlp", [1]),
    "memit": (lambda: MEMIT(preservation=5.0), "block", [0, 1]),
    "emmet": (EMMET, "mlp", [1]),
    "alphaedit": (lambda: AlphaEdit(threshold=0.1, ridge=1.0), "block", [0, 1]),
}


def prepared(family: str, dtype: torch.dtype = torch.float64) -> Workspace:
    """A workspace with made-up covariances of decaying spectrum and made-up gradients."""
    workspace = make_workspace(tiny_model(family), dtype=dtype)
    workspace.originals.keep()
    for part in workspace.architecture.layers:
        d, p = part.weight.shape
        basis = torch.linalg.qr(random(p, p, seed=5)).Q
        workspace.covariances[part.index] = (basis / torch.arange(1, p + 1)) @ basis.T
        workspace.gradients[part.index] = random(d, p, seed=6)
    return workspace


def editor(name: str, *restraints: Restraint) -> LocateThenEdit:
    solver, site, layers = SOLVERS[name]
    values = ValueOptimizer(site, lr=0.1, steps=3, stop_loss=0.0)
    return LocateThenEdit(FixedLayers(layers), values, solver(), TypeMeanKey(), restraints=list(restraints), contexts=2)


def written(
    editor: LocateThenEdit, workspace: Workspace, batches: Sequence[list[EditRequest]]
) -> dict[int, list[Tensor]]:
    """The dense updates of every layer, batch after batch."""
    found: dict[int, list[Tensor]] = {}
    for batch in batches:
        for applied in editor.apply(workspace, editor.plan(workspace, batch)):
            found.setdefault(applied.layer, []).append(
                applied.update.delta(workspace.architecture[applied.layer].weight)
            )
    return found


PLACES = ("Oslo", "Rome", "Lima", "Bern", "Cork", "Lyon", "Peru", "Riga", "Graz", "Brno")
TENS = [[EditRequest(f"{w}{p}", f"{w} {p} lies in", p, "France") for p in PLACES] for w in ("Old", "The small")]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", SOLVERS)
def test_updates_of_a_sequence_are_orthogonal_to_each_other_and_to_the_gradient(family: str, name: str) -> None:
    workspace = prepared(family)
    found = written(editor(name, OEditPlus(1.0)), workspace, [[r] for r in requests()])
    assert sorted(found) == SOLVERS[name][2]
    for layer, deltas in found.items():
        assert len(deltas) == 4
        leading = torch.linalg.svd(workspace.gradients[layer]).U
        for i, one in enumerate(deltas):
            assert float(one.norm()) > 1e-3
            for other in deltas[:i]:
                assert float((one.T @ other).norm()) < 1e-8 * float(one.norm() * other.norm())
            assert float((leading[:, : i + 1].T @ one).norm()) < 1e-8 * float(one.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit"])
def test_batches_of_ten_are_orthogonal_to_each_other(family: str, name: str) -> None:
    for deltas in written(editor(name, OEditPlus(0.5)), prepared(family), TENS).values():
        one, other = deltas
        assert int(torch.linalg.matrix_rank(other)) == 10
        assert float((one.T @ other).norm()) < 1e-8 * float(one.norm() * other.norm())


def test_without_it_they_are_not() -> None:
    one, other, *_ = written(editor("rome"), prepared("llama"), [[r] for r in requests()])[1]
    assert float((one.T @ other).norm()) > 1e-2 * float(one.norm() * other.norm())


def test_weights_in_float32_are_orthogonal_to_their_precision() -> None:
    deltas = written(editor("rome", OEditPlus(1.0)), prepared("llama", torch.float32), [[r] for r in requests()])[1]
    for i, one in enumerate(deltas):
        for other in deltas[:i]:
            assert float((one.T @ other).norm()) < 1e-4 * float(one.norm() * other.norm())


def test_a_sequence_runs_until_the_space_is_full_and_then_says_so() -> None:
    workspace, limited = prepared("llama"), editor("rome", OEditPlus(3.0))
    many = [[EditRequest(str(i), f"{place} is in", place, "Rome")] for i, place in enumerate(PLACES)]
    with pytest.raises(ValueError, match=r"no room for edit 9 .* of 32 output directions 8 are taken .* and 24 by"):
        written(limited, workspace, many)
