"""O-Edit's terms of the loss, and penalties in general."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import (
    block_of,
    changed,
    hooked,
    hooks_left,
    make_workspace,
    matrix_of,
    projection_of,
    reference_block,
    reference_keys,
    requests,
    tokens,
    weights,
)
from torch import Tensor

from lit_edit.editors import LocateThenEdit
from lit_edit.editors.keys import MeanKey
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import Ground
from lit_edit.editors.solvers import MEMIT, MOSE, ROME, MOSEKey
from lit_edit.editors.values import NormClamp, NormMatched, OEdit, Penalty, ValueOptimizer, ValueProblem
from lit_edit.model.workspace import Workspace

D, P = 16, 24
PROBLEMS = [ValueProblem(0, (1,)), ValueProblem(1, (0, 1)), ValueProblem(3, (3,)), ValueProblem(2, (1, 2))]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ground(edits: int = 3, batch: int = 1, layer: str = "h", seed: int = 0) -> Ground:
    original = random(D, P, seed=seed)
    total = random(D, edits, seed=seed + 1) @ random(edits, P, seed=seed + 2)
    return Ground(original + total, original, random(D, P, seed=seed + 3), edits, edits, 0, layer, batch)


def formula(layer: Ground, change: Tensor, settings: OEdit) -> Tensor:
    """Eq. 25 to 27 for one change (d,): a loop over vectors."""
    assert layer.original is not None
    assert layer.gradient is not None
    taken = torch.linalg.svd(layer.weight.double() - layer.original.double()).U[:, : layer.edits_here]
    share = settings.implicit.share
    leading = torch.linalg.svd(layer.gradient).U[:, : int(share * (layer.edits_here + layer.batch_here))]
    leading = leading - taken @ (taken.T @ leading)
    total = change.new_zeros(())
    for weight, vectors in ((settings.past_weight, taken), (settings.implicit_weight, leading)):
        cosines = [v @ change / (v.norm() * change.norm()) for v in vectors.T]
        if cosines:
            signed = [c.abs() if settings.similarity == "absolute" else c for c in cosines]
            total = total + weight * sum(signed) / len(signed)
    return total


@pytest.mark.parametrize("edits", [0, 1, 3])
@pytest.mark.parametrize("share", [0.0, 1.0, 2.5])
def test_the_terms_are_the_papers_formula(edits: int, share: float) -> None:
    layers = [ground(edits), ground(edits, layer="i", seed=10)]
    settings = OEdit(3.0, 7.0, share)
    changes = random(4, D, seed=7).requires_grad_(True)
    order = [layers[i] for i in (0, 1, 1, 0)]
    found = settings.prepare(order)(changes)
    expected = torch.stack([formula(layer, change, settings) for layer, change in zip(order, changes, strict=True)])
    torch.testing.assert_close(found, expected)
    if edits or int(share):
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), changes)[0], torch.autograd.grad(expected.sum(), changes)[0]
        )


def test_the_plain_cosine_differs_by_the_signs_of_its_vectors_only() -> None:
    layer, change = ground(1), random(1, D, seed=7)
    plain = OEdit(1.0, 0.0, similarity="plain").prepare([layer])
    absolute = OEdit(1.0, 0.0).prepare([layer])
    torch.testing.assert_close(plain(change).abs(), absolute(change))
    torch.testing.assert_close(plain(-change), -plain(change))
    torch.testing.assert_close(absolute(-change), absolute(change))


def test_a_change_orthogonal_to_the_edits_costs_nothing_and_one_within_them_the_most() -> None:
    layer = ground(1)
    assert layer.original is not None
    direction = torch.linalg.svd(layer.weight - layer.original).U[:, 0]
    other = random(D, seed=7)
    orthogonal = other - direction * (direction @ other)
    penalty = OEdit(50.0, 0.0).prepare([layer] * 3)
    found = penalty(torch.stack([orthogonal, 0.1 * direction, -20 * direction]))
    torch.testing.assert_close(found, torch.tensor([0.0, 50.0, 50.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("similarity", ["absolute", "plain"])
def test_it_knows_no_length_and_a_zero_change_has_no_slope(similarity: Any) -> None:
    penalty = OEdit(similarity=similarity).prepare([ground()] * 3)
    change = random(D, seed=7)
    changes = torch.stack([change, 1e-6 * change, 0 * change]).requires_grad_(True)
    found = penalty(changes)
    torch.testing.assert_close(found[1], found[0])
    assert found[2] == 0
    (slope,) = torch.autograd.grad(found.sum(), changes)
    assert torch.isfinite(slope).all()
    assert not slope[2].any()
    assert slope[0].any()


def test_what_has_no_weight_is_not_asked_for() -> None:
    layer = ground()
    for penalty, needs in (
        (OEdit(), (True, True)),
        (OEdit(implicit_weight=0.0), (True, False)),
        (OEdit(gradient_share=0.0), (True, False)),
        (OEdit(past_weight=0.0), (True, True)),
        (OEdit(0.0, 0.0), (False, False)),
    ):
        assert (penalty.needs_original, penalty.needs_gradient) == needs
        kept = Ground(layer.weight, layer.original if needs[0] else None, layer.gradient if needs[1] else None, 3, 3, 1)
        assert penalty.prepare([kept])(random(1, D)).shape == (1,)
    with pytest.raises(ValueError, match="before the first edit was not kept"):
        OEdit().prepare([Ground(layer.weight, None, layer.gradient, 3, 3, 1)])
    with pytest.raises(ValueError, match="no gradient of the language-model loss"):
        OEdit().prepare([Ground(layer.weight, layer.original, None, 3, 3, 1)])


def test_full_spaces_leave_terms_that_are_still_defined() -> None:
    # As many edits as directions: V_r is a whole basis, and nothing of the gradient is outside of it.
    layer, change = ground(D), random(1, D, seed=7)
    found = OEdit(2.0, 3.0).prepare([layer])(change)
    assert layer.original is not None
    basis = torch.linalg.svd(layer.weight - layer.original).U
    torch.testing.assert_close(found, 2.0 * (change @ basis).abs().mean(-1) / change.norm())
    # And more directions wanted than the gradient has.
    assert torch.isfinite(OEdit(2.0, 3.0, 1e6).prepare([ground(3)])(change)).all()


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


def prepared(tiny: tuple[Any, Any], edits: int = 2) -> Workspace:
    """A workspace in whose layers some edits of rank one were written, with made-up gradients."""
    workspace = make_workspace(tiny)
    workspace.originals.keep()
    for part in workspace.architecture.layers:
        d, p = part.weight.shape
        workspace.originals.before_write(part.name)
        part.weight.add_(0.01 * random(d, edits, seed=part.index) @ random(edits, p, seed=50 + part.index))
        workspace.gradients[part.index] = random(d, p, seed=90 + part.index)
    return workspace


def grounds(workspace: Workspace, edits: int = 2, batch: int = 1) -> dict[int, Ground]:
    return {
        part.index: Ground(
            part.weight,
            workspace.original(part.index),
            workspace.gradients[part.index],
            edits,
            edits,
            batch,
            part.name,
            batch,
        )
        for part in workspace.architecture.layers
    }


def optimizer(site: Any = "mlp", penalties: Sequence[Penalty] = (), **settings: Any) -> ValueOptimizer:
    defaults = {"lr": 0.1, "steps": 4, "stop_loss": 0.0, "weight_decay": 0.01, "constraint": NormClamp(1.5)}
    return ValueOptimizer(site, penalties=list(penalties), **(defaults | settings))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_values_with_penalties_are_those_of_a_plain_loop(family: str, site: str) -> None:
    workspace = prepared(tiny_model(family))
    workspace.contexts = ["{}"]
    model, request, layer, settings = workspace.model, requests()[1], 1, OEdit(1.0, 0.5, 1.5)
    ids, start, last = tokens(workspace.tokenizer, "", request)
    if site == "block":
        v0, module = reference_block(workspace, request, layer), block_of(model, layer)
    else:
        v0 = matrix_of(model, layer) @ reference_keys(workspace, request, layer)[0]
        module = projection_of(model, layer)
    delta = torch.zeros(len(v0), requires_grad=True)
    adam = torch.optim.Adam([delta], lr=0.1)

    def add(_: Tensor, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, last] = output[0, last] + delta
        return output

    for step in range(6):
        with hooked([(module, add)]):
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -torch.stack([log_p[t - 1, ids[t]] for t in range(start, len(ids))]).mean()
        if step:  # a zero change has no direction
            loss = loss + formula(grounds(workspace)[layer], delta.double(), settings)
        if step < 5:
            adam.zero_grad()
            loss.backward()
            adam.step()
    found = optimizer(site, [settings], steps=5, kl_factor=0.0, weight_decay=0.0, constraint=NormClamp(100.0)).optimise(
        workspace, requests(), [ValueProblem(1, (layer,))], MeanKey(), grounds=grounds(workspace)
    )
    torch.testing.assert_close(found.targets[0][layer].double(), v0 + delta.detach(), rtol=0, atol=1e-4)
    assert found.loss[0] == pytest.approx(float(loss.detach()), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_a_batch_is_solved_as_each_problem_on_its_own(family: str, site: str) -> None:
    workspace = prepared(tiny_model(family))
    values, at = optimizer(site, [OEdit(0.1, 0.1)]), grounds(workspace)
    values.stop_loss = sorted(values.optimise(workspace, requests(), PROBLEMS, MeanKey(), grounds=at).loss)[1] + 1e-3
    together = values.optimise(workspace, requests(), PROBLEMS, MeanKey(), grounds=at)
    assert len(set(together.steps)) > 1
    for i, problem in enumerate(PROBLEMS):
        alone = values.optimise(workspace, requests(), [problem], MeanKey(), grounds=at)
        assert alone.steps == [together.steps[i]]
        assert alone.loss[0] == pytest.approx(together.loss[i], abs=1e-5)
        torch.testing.assert_close(alone.targets[0], together.targets[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("site", ["mlp", "block"])
def test_penalties_without_weight_and_calls_without_grounds_change_nothing(site: str) -> None:
    workspace = prepared(tiny_model("llama"))
    plain = optimizer(site).optimise(workspace, requests(), PROBLEMS, MeanKey())
    for penalty, at in ((OEdit(0.0, 0.0), grounds(workspace)), (OEdit(), None)):
        found = optimizer(site, [penalty]).optimise(workspace, requests(), PROBLEMS, MeanKey(), grounds=at)
        assert found.loss == plain.loss
        for one, other in zip(found.targets, plain.targets, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_constant_is_added_to_the_loss_once_per_layer_and_moves_nothing() -> None:
    class Constant(Penalty):
        def prepare(self, grounds: Sequence[Ground]) -> Callable[[Tensor], Tensor]:
            prices = torch.tensor([1.0 + int(g.layer.split(".")[2]) for g in grounds])
            return lambda change: prices + 0 * change.sum(-1)

    workspace = prepared(tiny_model("llama"))
    plain = optimizer().optimise(workspace, requests(), PROBLEMS, MeanKey())
    at = grounds(workspace)
    found = optimizer(penalties=[Constant()]).optimise(workspace, requests(), PROBLEMS, MeanKey(), grounds=at)
    for i, problem in enumerate(PROBLEMS):
        assert found.loss[i] == pytest.approx(plain.loss[i] + sum(1.0 + layer for layer in problem.layers), abs=1e-5)
        torch.testing.assert_close(found.targets[i], plain.targets[i], rtol=0, atol=1e-6)


def test_where_values_are_matched_the_penalty_sees_the_matched_change() -> None:
    seen: list[Tensor] = []

    class Recording(Penalty):
        def prepare(self, grounds: Sequence[Ground]) -> Callable[[Tensor], Tensor]:
            return lambda change: seen.append(change.detach().clone()) or 0 * change.sum(-1)  # type: ignore[func-returns-value]

    workspace = prepared(tiny_model("gpt2"))
    values = optimizer(penalties=[Recording()], constraint=NormMatched())
    problem = [ValueProblem(0, (1,))]
    found = values.optimise(workspace, requests(), problem, MeanKey(), grounds=grounds(workspace))
    start = matrix_of(workspace.model, 1) @ reference_keys(workspace, requests()[0], 1).mean(0)
    torch.testing.assert_close(seen[-1][0].double(), found.targets[0][1].double() - start, rtol=0, atol=1e-5)
    assert float((start + seen[-1][0]).norm()) == pytest.approx(float(start.norm()), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("solver", "site", "layers"), [(ROME, "mlp", [1]), (MEMIT, "block", [0, 1])])
def test_an_editor_hands_penalties_their_layers_as_edited_so_far(
    family: str, solver: Any, site: str, layers: list[int]
) -> None:
    seen: list[list[Ground]] = []

    class Recording(OEdit):
        def prepare(self, grounds: Sequence[Ground]) -> Callable[[Tensor], Tensor]:
            seen.append([replace(g, original=g.original.clone()) for g in grounds])
            return super().prepare(grounds)

    workspace = make_workspace(tiny_model(family))
    workspace.originals.keep()
    start = weights(workspace.model)
    for part in workspace.architecture.layers:
        p = part.weight.shape[1]
        workspace.covariances[part.index] = torch.eye(p, dtype=torch.float64)
        workspace.gradients[part.index] = random(*part.weight.shape)
    penalty = Recording(50.0, 50.0, 1.0)
    editor = LocateThenEdit(FixedLayers(layers), optimizer(site, [penalty]), solver(), contexts=2)
    assert editor.needs_gradients
    assert editor.needs_originals
    for request in requests()[:3]:
        before = weights(workspace.model)
        plan = editor.plan(workspace, [request])
        assert changed(before, workspace.model) == set()
        assert hooks_left(workspace.model) == 0
        editor.apply(workspace, plan)
    assert [(g.edits_here, g.edits, g.batch_here) for (g,) in seen] == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]
    last = workspace.architecture[layers[-1]]  # the last edited layer's subspaces stand for a block's value
    for (g,) in seen:
        assert g.layer == last.name
        assert g.weight.data_ptr() == last.weight.data_ptr()
        assert torch.equal(g.original.T if last.transposed else g.original, start[last.name])
        assert g.gradient is workspace.gradients[last.index]


def test_values_turn_away_from_what_was_written() -> None:
    cosines = {}
    for weight in (0.0, 10.0):
        workspace = make_workspace(tiny_model("llama"))
        for part in workspace.architecture.layers:
            workspace.covariances[part.index] = torch.eye(part.weight.shape[1], dtype=torch.float64)
        workspace.originals.keep()
        values = optimizer(penalties=[OEdit(weight, 0.0)], steps=40, lr=0.005)
        editor = LocateThenEdit(FixedLayers([1]), values, ROME(), contexts=2)
        first, second = (editor.apply(workspace, editor.plan(workspace, [requests()[i]]))[0].update for i in (0, 2))
        one, other = (u.delta(workspace.architecture[1].weight) for u in (first, second))
        cosines[weight] = float((one.T @ other).norm() / (one.norm() * other.norm()))
    assert cosines[0.0] > 0.05
    assert cosines[10.0] < 0.5 * cosines[0.0]
