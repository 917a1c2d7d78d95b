"""O-Edit's terms of the loss, and penalties in general."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import (
    bare_loss,
    changed,
    hooks_left,
    make_workspace,
    matrix_of,
    reference_keys,
    requests,
    weights,
)
from helpers.sites import edited_site, normal
from torch import Tensor

from lit_edit.algebra.updates import LowRank
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.keys import MeanKey
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.solvers import MEMIT, MOSE, ROME, MOSEKey
from lit_edit.editors.values import NormClamp, NormMatched, OEdit, Penalty, ValueOptimizer, ValueProblem, Values
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.model.workspace import Workspace

D = 16
PROBLEMS = [ValueProblem(0, (1,)), ValueProblem(1, (0, 1)), ValueProblem(3, (3,)), ValueProblem(2, (1, 2))]
each_site = pytest.mark.parametrize("site", ["mlp", "block"])
each_family = pytest.mark.parametrize("family", ["gpt2", "llama"])


def taken(site: EditedWeight) -> Tensor:
    """All left singular vectors of what was written."""
    return torch.linalg.svd(site.weight.double() - site.original.double()).U


def formula(site: EditedWeight, change: Tensor, settings: OEdit) -> Tensor:
    """Eq. 25 to 27 for one change (d,): a loop over vectors."""
    past, edits = taken(site)[:, : site.edits], site.edits + site.pending
    assert site.gradient is not None
    leading = torch.linalg.svd(site.gradient).U[:, : int(settings.implicit.share * edits)]
    leading = leading - past @ (past.T @ leading)
    total = change.new_zeros(())
    for weight, vectors in ((settings.past_weight, past), (settings.implicit_weight, leading)):
        cosines = [v @ change / (v.norm() * change.norm()) for v in vectors.T]
        if cosines:
            signed = [c.abs() if settings.similarity == "absolute" else c for c in cosines]
            total = total + weight * sum(signed) / len(signed)
    return total


@pytest.mark.parametrize("edits", [0, 1, 3])
@pytest.mark.parametrize("share", [0.0, 1.0, 2.5])
def test_the_terms_are_the_papers_formula(edits: int, share: float) -> None:
    sites = [edited_site(edits, seed=seed) for seed in (0, 10)]
    settings, changes = OEdit(3.0, 7.0, share), normal(4, D, seed=7).requires_grad_(True)
    order = [sites[i] for i in (0, 1, 1, 0)]
    found = settings.prepare(order)(changes)
    expected = torch.stack([formula(site, change, settings) for site, change in zip(order, changes, strict=True)])
    torch.testing.assert_close(found, expected)
    if edits or int(share):
        slopes = [torch.autograd.grad(total.sum(), changes)[0] for total in (found, expected)]
        torch.testing.assert_close(*slopes)


def test_the_plain_cosine_differs_by_the_signs_of_its_vectors_only() -> None:
    site, change = edited_site(1), normal(1, D, seed=7)
    plain, absolute = OEdit(1.0, 0.0, similarity="plain").prepare([site]), OEdit(1.0, 0.0).prepare([site])
    torch.testing.assert_close(plain(change).abs(), absolute(change))
    torch.testing.assert_close(plain(-change), -plain(change))
    torch.testing.assert_close(absolute(-change), absolute(change))


def test_a_change_orthogonal_to_the_edits_costs_nothing_and_one_within_them_the_most() -> None:
    site, other = edited_site(1), normal(D, seed=7)
    direction = taken(site)[:, 0]
    orthogonal = other - direction * (direction @ other)
    found = OEdit(50.0, 0.0).prepare([site] * 3)(torch.stack([orthogonal, 0.1 * direction, -20 * direction]))
    torch.testing.assert_close(found, torch.tensor([0.0, 50.0, 50.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("similarity", ["absolute", "plain"])
def test_it_knows_no_length_and_a_zero_change_has_no_slope(similarity: Any) -> None:
    change = normal(D, seed=7)
    changes = torch.stack([change, 1e-6 * change, 0 * change]).requires_grad_(True)
    found = OEdit(similarity=similarity).prepare([edited_site()] * 3)(changes)
    torch.testing.assert_close(found[1], found[0])
    assert found[2] == 0
    (slope,) = torch.autograd.grad(found.sum(), changes)
    assert torch.isfinite(slope).all()
    assert not slope[2].any()
    assert slope[0].any()


@pytest.mark.parametrize(
    ("penalty", "needs"),
    [
        (OEdit(), True),
        (OEdit(implicit_weight=0.0), False),
        (OEdit(gradient_share=0.0), False),
        (OEdit(past_weight=0.0), True),
        (OEdit(0.0, 0.0), False),
    ],
)
def test_a_gradient_without_weight_is_not_asked_for(penalty: OEdit, needs: bool) -> None:
    site = edited_site()
    assert penalty.needs_gradient == needs
    assert penalty.prepare([site])(normal(1, D)).shape == (1,)
    site.gradient = None
    if needs:
        with pytest.raises(ValueError, match="no gradient of the language-model loss"):
            penalty.prepare([site])
    else:
        assert penalty.prepare([site])(normal(1, D)).shape == (1,)


def test_full_spaces_leave_terms_that_are_still_defined() -> None:
    # As many edits as directions: V_r is a whole basis, and nothing of the gradient is outside of it.
    site, change = edited_site(D), normal(1, D, seed=7)
    found = OEdit(2.0, 3.0).prepare([site])(change)
    torch.testing.assert_close(found, 2.0 * (change @ taken(site)).abs().mean(-1) / change.norm())
    # And more directions wanted than the gradient has.
    assert torch.isfinite(OEdit(2.0, 3.0, 1e6).prepare([edited_site(3)])(change)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"past_weight": -1.0}, "past_weight must be a finite number of at least 0, not -1"),
        ({"implicit_weight": float("nan")}, "implicit_weight must be a finite number"),
        ({"gradient_share": -0.5}, "at least 0, not -0.5"),
        ({"similarity": "dot"}, "'absolute' or 'plain', not 'dot'"),
        ({"max_directions": -1}, "cannot be -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OEdit(**settings)


@pytest.mark.parametrize("solver", [MOSE(preservation=1.0), MOSEKey(preservation=1.0)])
def test_rotations_leave_no_direction_free_and_are_refused(solver: Any) -> None:
    values = ValueOptimizer(penalties=[OEdit()])
    with pytest.raises(ValueError, match=f"{type(solver).__name__} multiplies the weight by an orthogonal matrix"):
        LocateThenEdit(FixedLayers([1]), values, solver)


# In the optimisation


def prepared(family: str, edits: int = 2) -> Workspace:
    """A workspace in whose layers some edits of rank one were written and one is about to be; made-up statistics."""
    workspace = make_workspace(tiny_model(family))
    for layer in range(4):
        site = workspace.site(layer)
        d, p = site.shape
        if edits:
            site.write(LowRank(0.01 * normal(d, edits, seed=layer), normal(edits, p, seed=50 + layer)))
            site.count(edits)
            site.pending = 1
        site.covariance, site.gradient = torch.eye(p, dtype=torch.float64), normal(d, p, seed=90 + layer)
    return workspace


def optimizer(site: Any = "mlp", penalties: Sequence[Penalty] = (), **settings: Any) -> ValueOptimizer:
    defaults = {"lr": 0.1, "steps": 4, "stop_loss": 0.0, "weight_decay": 0.01, "constraint": NormClamp(1.5)}
    return ValueOptimizer(site, penalties=list(penalties), **(defaults | settings))


def optimise(
    workspace: Workspace, values: ValueOptimizer, problems: list[ValueProblem] = PROBLEMS, use: bool = True
) -> Values:
    penalties = values.penalties if use else ()
    return values.optimise(workspace, requests(), problems, MeanKey(), penalties=penalties)


@each_family
@each_site
def test_values_with_penalties_are_those_of_a_plain_loop(family: str, site: str) -> None:
    workspace, layer, settings = prepared(family), 1, OEdit(1.0, 0.5, 1.5)
    workspace.contexts = ["{}"]
    v0, nll = bare_loss(workspace, site, layer, requests()[1])
    delta = torch.zeros(len(v0), requires_grad=True)
    adam = torch.optim.Adam([delta], lr=0.1)
    for step in range(6):
        loss = nll(delta)
        if step:  # a zero change has no direction
            loss = loss + formula(workspace.site(layer), delta.double(), settings)
        if step < 5:
            adam.zero_grad()
            loss.backward()
            adam.step()
    values = optimizer(site, [settings], steps=5, kl_factor=0.0, weight_decay=0.0, constraint=NormClamp(100.0))
    found = optimise(workspace, values, [ValueProblem(1, (layer,))])
    torch.testing.assert_close(found.targets[0][layer].double(), v0 + delta.detach(), rtol=0, atol=1e-4)
    assert found.loss[0] == pytest.approx(float(loss.detach()), abs=1e-4)


@pytest.mark.parametrize(("family", "site"), [("gpt2", "mlp"), ("llama", "block")])
def test_a_batch_is_solved_as_each_problem_on_its_own(family: str, site: str) -> None:
    workspace, values = prepared(family), optimizer(site, [OEdit(0.1, 0.1)])
    values.stop_loss = sorted(optimise(workspace, values).loss)[1] + 1e-3
    together = optimise(workspace, values)
    assert len(set(together.steps)) > 1
    for i, problem in enumerate(PROBLEMS):
        alone = optimise(workspace, values, [problem])
        assert alone.steps == [together.steps[i]]
        assert alone.loss[0] == pytest.approx(together.loss[i], abs=1e-5)
        torch.testing.assert_close(alone.targets[0], together.targets[i], rtol=0, atol=1e-5)


@each_site
def test_penalties_without_weight_and_calls_without_penalties_change_nothing(site: str) -> None:
    workspace = prepared("llama")
    plain = optimise(workspace, optimizer(site))
    for penalty, use in ((OEdit(0.0, 0.0), True), (OEdit(), False)):
        found = optimise(workspace, optimizer(site, [penalty]), use=use)
        assert found.loss == plain.loss
        torch.testing.assert_close(found.targets, plain.targets, rtol=0, atol=0)


def test_a_constant_is_added_to_the_loss_once_per_layer_and_moves_nothing() -> None:
    class Constant(Penalty):
        def prepare(self, sites: Sequence[EditedWeight]) -> Callable[[Tensor], Tensor]:
            prices = torch.tensor([1.0 + site.layer for site in sites])
            return lambda change: prices + 0 * change.sum(-1)

    workspace = prepared("llama")
    plain, found = (optimise(workspace, optimizer(penalties=p)) for p in ([], [Constant()]))
    for i, problem in enumerate(PROBLEMS):
        assert found.loss[i] == pytest.approx(plain.loss[i] + sum(1.0 + layer for layer in problem.layers), abs=1e-5)
        torch.testing.assert_close(found.targets[i], plain.targets[i], rtol=0, atol=1e-6)


def test_where_values_are_matched_the_penalty_sees_the_matched_change() -> None:
    seen: list[Tensor] = []

    class Recording(Penalty):
        def prepare(self, sites: Sequence[EditedWeight]) -> Callable[[Tensor], Tensor]:
            return lambda change: seen.append(change.detach().clone()) or 0 * change.sum(-1)  # type: ignore[func-returns-value]

    workspace = prepared("gpt2")
    values = optimizer(penalties=[Recording()], constraint=NormMatched())
    found = optimise(workspace, values, [ValueProblem(0, (1,))])
    start = matrix_of(workspace.model, 1) @ reference_keys(workspace, requests()[0], 1).mean(0)
    torch.testing.assert_close(seen[-1][0].double(), found.targets[0][1].double() - start, rtol=0, atol=1e-5)
    assert float((start + seen[-1][0]).norm()) == pytest.approx(float(start.norm()), rel=1e-5)


@each_family
@pytest.mark.parametrize(("solver", "site", "layers"), [(ROME, "mlp", [1]), (MEMIT, "block", [0, 1])])
def test_an_editor_hands_penalties_their_layers_as_edited_so_far(
    family: str, solver: Any, site: str, layers: list[int]
) -> None:
    seen: list[tuple[EditedWeight, int, int]] = []

    class Recording(OEdit):
        def prepare(self, sites: Sequence[EditedWeight]) -> Callable[[Tensor], Tensor]:
            seen.extend((site, site.edits, site.pending) for site in sites)
            return super().prepare(sites)

    workspace = prepared(family, edits=0)
    editor = LocateThenEdit(FixedLayers(layers), optimizer(site, [Recording(50.0, 50.0, 1.0)]), solver(), contexts=2)
    assert editor.needs_gradients
    for request in requests()[:3]:
        before = weights(workspace.model)
        plan = editor.plan(workspace, [request])
        assert changed(before, workspace.model) == set()
        assert hooks_left(workspace.model) == 0
        editor.apply(workspace, plan)
    # The last edited layer's subspaces stand for a block's value.
    assert seen == [(workspace.site(layers[-1]), edits, 1) for edits in range(3)]


def test_values_turn_away_from_what_was_written() -> None:
    cosines = {}
    for weight in (0.0, 10.0):
        workspace = prepared("llama", edits=0)
        values = optimizer(penalties=[OEdit(weight, 0.0)], steps=30, lr=0.005)
        editor = LocateThenEdit(FixedLayers([1]), values, ROME(), contexts=2)
        first, second = (editor.apply(workspace, editor.plan(workspace, [requests()[i]]))[0].update for i in (0, 2))
        one, other = (update.delta(workspace.site(1).weight) for update in (first, second))
        cosines[weight] = float((one.T @ other).norm() / (one.norm() * other.norm()))
    assert cosines[0.0] > 0.05
    assert cosines[10.0] < 0.5 * cosines[0.0]
