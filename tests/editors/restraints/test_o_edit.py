from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import make_workspace, requests
from helpers.sites import edited_site, normal, orthogonal, site_of
from torch import Tensor

from lit_edit.algebra.subspaces import principal_directions
from lit_edit.algebra.updates import Additive, LowRank, Update
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.keys import TypeMeanKey
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import PRUNE, RECT, OEditPlus, Restraint, UpdateKind, check_restraints, o_edit
from lit_edit.editors.restraints.o_edit import ImplicitKnowledge
from lit_edit.editors.solvers import EMMET, MEMIT, ROME, AlphaEdit, Solver
from lit_edit.editors.values import ValueOptimizer
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

D, P = 16, 24
LEFT, RIGHT = normal(D, 2, seed=14), normal(2, P, seed=15)
UPDATES: list[Update] = [LowRank(LEFT, RIGHT), Additive(LEFT @ RIGHT)]
CHANGE = LEFT @ RIGHT


def gradient_of(site: EditedWeight) -> Tensor:
    assert site.gradient is not None
    return site.gradient


def leading(site: EditedWeight, q: int) -> Tensor:
    return torch.linalg.svd(gradient_of(site)).U[:, :q]


def outside(matrix: Tensor, change: Tensor) -> Tensor:
    """``ΔW − A (AᵀA)⁺ Aᵀ ΔW``, as Eq. 12 and 15 are printed: whole matrices, no singular vectors."""
    return change - matrix @ torch.linalg.pinv(matrix.T @ matrix, rtol=1e-9) @ matrix.T @ change


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, from the eigenvectors of ``A Aᵀ``."""
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, matrix.shape[0] - rank :]
    return vectors @ vectors.T @ matrix


@pytest.mark.parametrize("pending", [1, 2])
@pytest.mark.parametrize("share", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("edits", [0, 1, 3])
@pytest.mark.parametrize("update", UPDATES)
def test_it_is_equation_15_on_whole_matrices(edits: int, share: float, pending: int, update: Update) -> None:
    site = edited_site(edits, pending)
    total, gradient = site.weight - site.original, truncated(gradient_of(site), int(share * (edits + pending)))
    expected = outside(total, CHANGE) if edits else CHANGE
    expected = outside(outside(total, gradient) if edits else gradient, expected)
    found = OEditPlus(share).restrain(update, site)
    assert type(found) is type(update)
    delta = found.delta(site.weight)
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-9)
    for taken in (total, gradient):  # nothing of either space is left, and something of the update is
        torch.testing.assert_close(taken.T @ delta, torch.zeros(P, P, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(delta.norm()) > 0.1 * update.norm


def test_cleaning_is_the_one_switch_between_equation_28_and_its_ablations() -> None:
    site = edited_site()
    past, implicit = torch.linalg.svd(site.weight - site.original).U[:, :3], leading(site, 6)
    rest = CHANGE - past @ past.T @ CHANGE
    subtracted = implicit - past @ past.T @ implicit
    expected = {
        "subtract": rest - subtracted @ subtracted.T @ rest,
        "none": rest - implicit @ implicit.T @ rest,
        "orthonormal": outside(subtracted, rest),
    }
    found = {c: OEditPlus(1.5, cleaning=c).restrain(UPDATES[0], site).delta(site.weight) for c in expected}  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    assert float((found["subtract"] - found["orthonormal"]).norm()) > 0.01 * float(CHANGE.norm())
    only_gradient = OEditPlus(1.5, past=False).restrain(UPDATES[0], site).delta(site.weight)
    torch.testing.assert_close(only_gradient, CHANGE - implicit @ implicit.T @ CHANGE)


@pytest.mark.parametrize(
    ("edits", "share", "past"), [(D, 0.0, True), (D - 1, 1.0, True), (3, 4.0, True), (3, 4.0, False)]
)
@pytest.mark.parametrize("cleaning", ["orthonormal", "subtract", "none"])
def test_an_exhausted_space_is_an_error_and_not_a_zero_update(
    edits: int, share: float, past: bool, cleaning: Any
) -> None:
    if edits == D - 1 and cleaning == "subtract":
        return  # keeps a part along the directions, and so always finds room
    for update in UPDATES:
        with pytest.raises(ValueError, match=r"no room for another edit in layer 'h\.0': of 16 output directions \d"):
            OEditPlus(share, past=past, cleaning=cleaning).restrain(update, edited_site(edits))
    zero = LowRank(torch.zeros(D, 1), torch.ones(1, P))
    assert OEditPlus(share, past=past, cleaning=cleaning).restrain(zero, edited_site(edits)).norm == 0


def test_it_asks_for_what_it_needs_and_no_more() -> None:
    site = edited_site()
    assert [OEditPlus(*s).needs_gradient for s in ((), (0.0,), (1.0, None, False))] == [True, False, True]
    site.gradient = None
    OEditPlus(0.0).restrain(UPDATES[0], site)
    with pytest.raises(ValueError, match=r"no gradient of the language-model loss for layer 'h\.0'"):
        OEditPlus(1.0).restrain(UPDATES[0], site)


def test_a_rank_that_was_counted_bounds_the_space_and_not_the_number_of_edits() -> None:
    site = edited_site(edits=6)
    for rank, edits, expected in ((6, 2, 6), (6, 6, 6), (9, 2, 6), (2, 2, 2)):
        site.rank, site.edits = rank, edits
        assert OEditPlus(0.0).spaces(site)[0].shape == (D, expected)


# Implicit knowledge


@pytest.mark.parametrize(
    ("share", "limit", "edits", "expected"),
    [
        (2.5, None, 1, 2),
        (2.5, None, 2, 5),
        (0.5, None, 1, 0),
        (0.29, None, 10, 2),
        (0.1, None, 30, 3),
        (0.0, None, 9, 0),
        (2.0, 3, 1, 2),
        (2.0, 3, 4, 3),
        (2.0, None, 100, 8),
        (2.0, 0, 4, 0),
    ],
)
def test_directions_grow_with_edits_the_batchs_own_included(
    share: float, limit: int | None, edits: int, expected: int
) -> None:
    gradient = normal(12, 8, seed=1) @ normal(8, 20, seed=2)
    site = site_of(normal(12, 20), gradient=gradient)
    for site.edits, site.pending in ((edits, 0), (0, edits)):
        found = ImplicitKnowledge(share, limit).directions(site)
        torch.testing.assert_close(found, principal_directions(gradient)[:, :expected])


def test_a_product_that_rounds_below_a_whole_number_counts_as_it() -> None:
    assert 0.29 * 100 < 29
    site = site_of(normal(40, 50), gradient=normal(40, 50))
    site.edits = 100
    assert ImplicitKnowledge(0.29).directions(site).shape == (40, 29)


def test_a_gradient_is_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(o_edit, "principal_directions", lambda g: seen.append(1) or principal_directions(g))
    sites, implicit = [edited_site(seed=seed) for seed in (0, 10)], ImplicitKnowledge(1.0)
    for _ in range(3):
        for site in sites:
            implicit.directions(site)
            site.write(UPDATES[0])
    assert len(seen) == 2
    sites[0].gradient = gradient_of(sites[1])
    torch.testing.assert_close(implicit.directions(sites[0]), implicit.directions(sites[1]))


# What goes together


def test_bad_settings_are_refused() -> None:
    for settings, message in (
        ({"gradient_share": 0.0, "past": False}, "no space to project out"),
        ({"cleaning": "maybe"}, "'orthonormal', 'subtract' or 'none', not 'maybe'"),
        *(({"gradient_share": share}, "must be at least 0, not") for share in (-0.1, float("nan"), float("inf"))),
        ({"max_directions": -1}, "cannot be -1"),
    ):
        with pytest.raises(ValueError, match=message):
            OEditPlus(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [0.2, 0.99])
def test_updates_of_full_rank_leave_no_room_and_are_refused(keep: float) -> None:
    rome, tuned = UpdateKind("ROME"), UpdateKind("FineTune", dense=True)
    for restraints, kind, full in (
        ([RECT(keep), OEditPlus()], rome, "RECT after ROME"),
        ([RECT(keep), PRUNE(), OEditPlus(0.0)], rome, "RECT after ROME"),
        ([OEditPlus()], tuned, "FineTune"),
        ([RECT(keep), OEditPlus()], tuned, "RECT after FineTune"),
    ):
        with pytest.raises(ValueError, match=f"an update by {full} has full rank: the first one fills the whole space"):
            check_restraints(restraints, kind)
    # Without the edits so far there is room enough.
    site, pair, update = edited_site(), [RECT(keep), OEditPlus(2.0, past=False)], UPDATES[0]
    check_restraints(pair, tuned)
    for restraint in pair:
        update = restraint.restrain(update, site)
    found = update.delta(site.weight)
    assert float((leading(site, 8).T @ found).norm()) < 1e-9 * float(found.norm())


@pytest.mark.parametrize("past", [True, False])
def test_rect_afterwards_would_undo_the_projection_and_is_refused(past: bool) -> None:
    for between in ([], [PRUNE()]):
        with pytest.raises(ValueError, match=r"RECT after O-Edit.* brings it back into the spaces"):
            check_restraints([OEditPlus(1.0, past=past), *between, RECT(0.4)], UpdateKind("ROME"))
    site = edited_site()
    projected = OEditPlus(2.0, past=past).restrain(UPDATES[0], site)
    kept = RECT(0.4).restrain(projected, site).delta(site.weight)
    assert float((leading(site, 8).T @ kept).norm()) > 0.1 * float(kept.norm())  # the reason, in numbers


def test_what_leaves_the_space_alone_goes_with_it() -> None:
    for restraints in ([OEditPlus(), PRUNE()], [PRUNE(), OEditPlus()], [RECT(1.0), OEditPlus(), RECT(1.0)]):
        check_restraints(restraints, UpdateKind("ROME"))


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
    for site in map(workspace.site, range(4)):
        d, p = site.shape
        basis = orthogonal(p, p, seed=5)
        site.covariance, site.gradient = (basis / torch.arange(1, p + 1)) @ basis.T, normal(d, p, seed=6)
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
        for one in editor.apply(workspace, editor.plan(workspace, batch)):
            found.setdefault(one.layer, []).append(one.update.delta(workspace.site(one.layer).weight))
    return found


def overlap(one: Tensor, other: Tensor) -> float:
    return float((one.T @ other).norm() / (one.norm() * other.norm()))


PLACES = ("Oslo", "Rome", "Lima", "Bern", "Cork", "Lyon", "Peru", "Riga", "Graz", "Brno")
ONES = [[request] for request in requests()]
TENS = [[EditRequest(f"{w}{p}", f"{w} {p} lies in", p, "France") for p in PLACES] for w in ("Old", "The small")]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", SOLVERS)
def test_updates_of_a_sequence_are_orthogonal_to_each_other_and_to_the_gradient(family: str, name: str) -> None:
    workspace = prepared(family)
    found = written(editor(name, OEditPlus(1.0)), workspace, ONES)
    assert sorted(found) == SOLVERS[name][2]
    for layer, deltas in found.items():
        assert len(deltas) == 4
        for i, one in enumerate(deltas):
            assert float(one.norm()) > 1e-3
            assert all(overlap(one, other) < 1e-8 for other in deltas[:i])
            assert overlap(leading(workspace.site(layer), i + 1), one) < 1e-8


@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit"])
def test_batches_of_ten_are_orthogonal_to_each_other(name: str) -> None:
    for one, other in written(editor(name, OEditPlus(0.5)), prepared("gpt2"), TENS).values():
        assert int(torch.linalg.matrix_rank(other)) == 10
        assert overlap(one, other) < 1e-8


def test_weights_in_float32_are_orthogonal_to_their_precision_and_without_it_not_at_all() -> None:
    deltas = written(editor("rome", OEditPlus(1.0)), prepared("llama", torch.float32), ONES)[1]
    assert max(overlap(one, other) for i, one in enumerate(deltas) for other in deltas[:i]) < 1e-4
    one, other, *_ = written(editor("rome"), prepared("llama"), ONES)[1]
    assert overlap(one, other) > 1e-2


def test_a_sequence_runs_until_the_space_is_full_and_then_says_so() -> None:
    workspace, limited = prepared("llama"), editor("rome", OEditPlus(3.0))
    many = [[EditRequest(str(i), f"{place} is in", place, "Rome")] for i, place in enumerate(PLACES)]
    with pytest.raises(
        ValueError, match=r"no room for another edit .* of 32 output directions 8 are taken .* and 24 by"
    ):
        written(limited, workspace, many)
    assert workspace.site(1).edits == workspace.edits == 8
