from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.references import CONTEXTS, changed, make_workspace, matrix_of, reference_keys, requests, weights
from torch import Tensor, nn

from lit_edit.algebra.linalg import spectral_norm
from lit_edit.editors.keys import BareKey, KeyAverage, MeanKey
from lit_edit.editors.layers import ActivationSelection, Choice, FixedLayers, WilKE, selection_score
from lit_edit.editors.solvers import MEMIT, ROME, AlphaEdit
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer, ValueProblem, Values
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest


def by_hand(weight: Tensor, key: Tensor, target: Tensor) -> float:
    """Eq. 22 with the norm of the activation in its denominator."""
    largest = torch.linalg.svdvals(weight.double()).max()
    return float((target.double() - weight.double() @ key.double()).norm() / (largest * key.double().norm()))


class Told(ValueOptimizer):
    """Gives values at a set distance from W k, with a set loss, instead of optimising."""

    def __init__(self, distance: dict[int, float], loss: dict[int, float] | None = None) -> None:
        super().__init__()
        self.distance, self.told_loss, self.asked = distance, loss or {}, dict[str, Any]()
        self.told: dict[tuple[str, int], Tensor] = {}

    def optimise(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        problems: Sequence[ValueProblem],
        average: KeyAverage,
        steps: int | None = None,
        contexts: Sequence[str] | None = None,
    ) -> Values:
        self.asked = {"steps": steps, "contexts": contexts, "problems": list(problems)}
        starts = self._starts(workspace, requests, problems, average)
        targets, loss = [], []
        for problem, start in zip(problems, starts, strict=True):
            (layer,) = problem.layers
            key = reference_keys(workspace, requests[problem.request], layer).mean(0)
            unit = torch.linalg.matrix_norm(matrix_of(workspace.model, layer), 2) * key.norm()
            direction = nn.functional.normalize(torch.ones_like(start), dim=0)
            targets.append({layer: start + float(self.distance[layer] * unit) * direction})
            self.told[requests[problem.request].case_id, layer] = targets[-1][layer]
            loss.append(self.told_loss.get(layer, 0.0))
        n = len(problems)
        return Values(list(problems), targets, loss, [0.5] * n, [1] * n)


def choose(policy: Any, workspace: Workspace, values: ValueOptimizer, count: int = 2) -> list[Choice]:
    found: list[Choice] = policy.choose(workspace, requests()[:count], values, MeanKey())
    return found


@pytest.mark.parametrize("layers", [[2], [3, 0, 1]])
def test_fixed_layers_are_the_same_for_every_request(tiny, layers: list[int]) -> None:
    workspace, policy = make_workspace(tiny), FixedLayers(layers)
    assert policy.candidates(workspace.architecture) == sorted(layers)
    expected = Choice(tuple(sorted(layers)), max(layers), {})
    assert choose(policy, workspace, Told({}), 3) == [expected] * 3


@pytest.mark.parametrize("layers", [[], [1, 1], [2, 0, 2]])
def test_fixed_layers_must_be_distinct_and_some(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct and at least one"):
        FixedLayers(layers)


@pytest.mark.parametrize("kind", [FixedLayers, ActivationSelection, WilKE])
@pytest.mark.parametrize("wrong", [-1, 4])
def test_layers_the_model_does_not_have_are_refused(tiny, kind: Any, wrong: int) -> None:
    workspace = make_workspace(tiny)
    with pytest.raises(ValueError, match=rf"Layer {wrong} does not exist: the model has layers 0 to 3"):
        kind([1, wrong]).candidates(workspace.architecture)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": -1}, "neighbours >= 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"contexts": 0}, "contexts >= 1"),
        ({"reach": -0.1}, r"cannot be negative \(-0\.1\)"),
        ({"layers": []}, "at least one candidate"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationSelection(**settings)


def test_values_of_blocks_cannot_be_compared_with_the_projections_output() -> None:
    with pytest.raises(ValueError, match="needs values of `site: mlp`"):
        ActivationSelection().check(ValueOptimizer("block"))
    ActivationSelection().check(ValueOptimizer("mlp"))
    FixedLayers([1]).check(ValueOptimizer("block"))


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_equation_22_and_has_no_scale(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, key, target = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 9), (9,), (6,))
    )
    score = selection_score(weight, key, target)
    assert score == pytest.approx(by_hand(weight, key, target), rel=1e-12)
    known = float(torch.linalg.svdvals(weight)[0])
    assert selection_score(weight, key, target, known) == pytest.approx(score, rel=1e-12)
    assert selection_score(weight, key, target, 2 * known) == pytest.approx(score / 2, rel=1e-12)
    assert selection_score(3 * weight, key, 3 * target) == pytest.approx(score, rel=1e-12)
    assert selection_score(weight, 5 * key, 5 * target) == pytest.approx(score, rel=1e-12)
    assert selection_score(weight, key, weight @ key) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("constraint", [NormClamp, NormMatched])
def test_the_layer_of_the_least_score_is_chosen_for_each_request(tiny, constraint: Any) -> None:
    workspace = make_workspace(tiny)
    values = ValueOptimizer(constraint=constraint(), lr=0.2, lr_unit="relative", stop_loss=0.0)
    policy = ActivationSelection([0, 1, 2], neighbours=0, steps=4, contexts=2, reach=None)
    before = weights(workspace.model)
    choices = policy.choose(workspace, requests(), values, MeanKey())
    assert changed(before, workspace.model) == set()
    for request, choice in zip(requests(), choices, strict=True):
        expected = {}
        for layer in (0, 1, 2):
            key = reference_keys(workspace, request, layer).mean(0)
            alone = values.optimise(
                workspace, [request], [ValueProblem(0, (layer,))], MeanKey(), steps=4, contexts=CONTEXTS[:2]
            )
            expected[layer] = by_hand(matrix_of(workspace.model, layer), key, alone.targets[0][layer])
        assert choice.scores == pytest.approx(expected, rel=1e-4)
        assert choice.center == min(expected, key=lambda layer: expected[layer])
        assert choice.layers == (choice.center,)


@pytest.mark.parametrize("center", range(4))
@pytest.mark.parametrize("neighbours", [0, 1, 2, 9])
def test_neighbours_are_clipped_at_the_ends(tiny, center: int, neighbours: int) -> None:
    workspace = make_workspace(tiny)
    policy = ActivationSelection([0, 1, 2, 3], neighbours)
    distance = {layer: 0.5 if layer == center else 1.0 for layer in range(4)}
    for choice in choose(policy, workspace, Told(distance)):
        assert choice.center == center
        assert choice.layers == tuple(layer for layer in range(4) if abs(layer - center) <= neighbours)
        assert choice.scores == pytest.approx(distance, rel=1e-4)


def test_candidates_for_statistics_include_the_neighbours(tiny) -> None:
    architecture = make_workspace(tiny).architecture
    assert ActivationSelection([3, 1], neighbours=0).candidates(architecture) == [1, 3]
    assert ActivationSelection([3, 1], neighbours=1).candidates(architecture) == [0, 1, 2, 3]
    assert ActivationSelection([0], neighbours=1).candidates(architecture) == [0, 1]
    assert ActivationSelection(neighbours=0).candidates(architecture) == [0, 1, 2, 3]


def test_no_choice_falls_on_a_layer_that_candidates_do_not_name(tiny) -> None:
    workspace = make_workspace(tiny)
    for layers in (None, [0], [3], [0, 2]):
        for neighbours in (0, 1, 3):
            policy = ActivationSelection(layers, neighbours)
            named = policy.candidates(workspace.architecture)
            for best in range(4) if layers is None else layers:
                distance = {layer: 0.1 if layer == best else 1.0 for layer in range(4)}
                (choice,) = choose(policy, workspace, Told(distance), 1)
                assert choice.center == best
                assert set(choice.layers) <= set(named)


def test_reach_keeps_the_choice_off_the_last_layer_where_no_value_can_help(tiny) -> None:
    # The subject stands before the end of the prompt: nothing reads the last layer there, so its value never moves.
    workspace = make_workspace(tiny)
    values = ValueOptimizer(lr=0.1, stop_loss=0.0, weight_decay=0.0)
    subjects = [r for r in requests() if not r.prompt.endswith(r.subject)]
    assert len(subjects) == 3
    to_the_letter, reaching = (
        ActivationSelection(neighbours=0, reach=reach, steps=8).choose(workspace, subjects, values, MeanKey())
        for reach in (None, 0.01)
    )
    for choice, other in zip(to_the_letter, reaching, strict=True):
        assert choice.scores == other.scores
        assert set(choice.scores) == {0, 1, 2, 3}
        assert choice.scores[3] < 1e-5
        assert choice.center == 3
        assert other.center != 3


DISTANCE, LOSS = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, {0: 5.0, 1: 2.0, 2: 1.5, 3: 1.0}


@pytest.mark.parametrize(
    ("reach", "center"), [(None, 0), (10.0, 0), (4.0, 0), (3.9, 1), (1.0, 1), (0.9, 2), (0.5, 2), (0.4, 3), (0.0, 3)]
)
def test_candidates_too_far_from_the_answer_are_passed_over(tiny, reach: float | None, center: int) -> None:
    workspace = make_workspace(tiny)
    policy = ActivationSelection([0, 1, 2, 3], neighbours=0, reach=reach)
    for choice in choose(policy, workspace, Told(DISTANCE, LOSS)):
        assert choice.center == center
        assert set(choice.scores) == {0, 1, 2, 3}


def test_the_optimisation_runs_on_the_contexts_and_steps_asked_for(tiny) -> None:
    workspace, values = make_workspace(tiny), Told(DISTANCE)
    choose(ActivationSelection([2, 0], steps=7, contexts=2), workspace, values)
    assert values.asked == {
        "steps": 7,
        "contexts": list(CONTEXTS[:2]),
        "problems": [ValueProblem(i, (layer,)) for i in (0, 1) for layer in (0, 2)],
    }


def test_scores_follow_the_weights_through_edits_and_from_model_to_model(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, policy = make_workspace(tiny), ActivationSelection([1], neighbours=0)
    norms: list[float] = []

    def counted(matrix: Tensor) -> float:
        norms.append(spectral_norm(matrix))
        return norms[-1]

    def score(of: Workspace) -> float:
        # A fixed target, so that the reference needs nothing of the policy.
        target, values = torch.ones(32), Told({1: 1.0})
        fixed = Values([ValueProblem(0, (1,))], [{1: target}], [0.0], [0.0], [0])
        values.optimise = lambda *_, **__: fixed  # type: ignore[method-assign]
        (choice,) = choose(policy, of, values, 1)
        key = reference_keys(of, requests()[0], 1).mean(0)
        assert choice.scores[1] == pytest.approx(by_hand(matrix_of(of.model, 1), key, target), rel=1e-4)
        return choice.scores[1]

    monkeypatch.setattr("lit_edit.editors.layers.spectral_norm", counted)
    first = score(workspace)
    assert score(workspace) == first
    assert len(norms) == 1  # kept while the weight stays
    workspace.architecture[1].weight.mul_(3.0)
    second = score(workspace)
    assert len(norms) == 2
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-5)
    other = Workspace.of(copy.deepcopy(workspace.model), workspace.tokenizer, CONTEXTS)
    part: Any = other.architecture[1].projection
    part.weight = nn.Parameter(torch.roll(part.weight.detach(), 1) * 7, requires_grad=False)
    # As many changes as the known weight has seen: the count alone does not tell the two apart.
    while part.weight._version < workspace.architecture[1].projection.weight._version:
        part.weight.mul_(1.0)
    assert part.weight._version == workspace.architecture[1].projection.weight._version
    third = score(other)
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("value_average", [None, BareKey()])
def test_scores_are_taken_at_the_key_the_value_was_optimised_at(tiny, value_average: KeyAverage | None) -> None:
    workspace = make_workspace(tiny)
    values = ValueOptimizer(lr=0.2, stop_loss=0.0)
    policy = ActivationSelection([0, 1], neighbours=0, steps=2, contexts=2, reach=None)
    (choice,) = policy.choose(workspace, requests()[:1], values, MeanKey(), value_average)
    keys = reference_keys(workspace, requests()[0], 0)
    key = keys.mean(0) if value_average is None else keys[0]
    alone = values.optimise(
        workspace, requests()[:1], [ValueProblem(0, (0,))], value_average or MeanKey(), 2, CONTEXTS[:2]
    )
    expected = by_hand(matrix_of(workspace.model, 0), key, alone.targets[0][0])
    assert choice.scores[0] == pytest.approx(expected, rel=1e-4)


# WilKE


def with_covariances(workspace: Workspace) -> Workspace:
    for part in workspace.architecture.layers:
        p = part.weight.shape[1]
        workspace.covariances[part.index] = torch.diag((1 + part.index) / torch.arange(1, p + 1).double())
    return workspace


def rome_by_hand(weight: Tensor, key: Tensor, value_key: Tensor, target: Tensor, covariance: Tensor) -> Tensor:
    u = torch.linalg.inv(covariance) @ key
    return torch.outer(target - weight @ value_key, u) / torch.dot(u, value_key)


@pytest.mark.parametrize("value_average", [None, BareKey()])
def test_wilke_takes_the_layer_whose_weight_rome_changes_least(tiny, value_average: KeyAverage | None) -> None:
    workspace = with_covariances(make_workspace(tiny))
    values = ValueOptimizer(lr=0.2, lr_unit="relative", stop_loss=0.0, steps=4)
    policy = WilKE([2, 0, 1])
    before = weights(workspace.model)
    choices = policy.choose(workspace, requests(), values, MeanKey(), value_average)
    assert changed(before, workspace.model) == set()
    for request, choice in zip(requests(), choices, strict=True):
        expected = {}
        for layer in (0, 1, 2):
            keys, weight = reference_keys(workspace, request, layer), matrix_of(workspace.model, layer)
            value_key = keys.mean(0) if value_average is None else keys[0]
            alone = values.optimise(
                workspace, [request], [ValueProblem(0, (layer,))], value_average or MeanKey()
            ).targets[0][layer]
            delta = rome_by_hand(weight, keys.mean(0), value_key, alone.double(), workspace.covariances[layer])
            expected[layer] = float(delta.norm() / weight.norm())
        assert choice.scores == pytest.approx(expected, rel=1e-3)
        assert choice.center == min(expected, key=lambda layer: expected[layer])
        assert choice.layers == (choice.center,)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_wilke_works_with_any_solver_and_compares_by_it(tiny, best: int) -> None:
    workspace = with_covariances(make_workspace(tiny))
    distance = {layer: 0.5 if layer == best else 5.0 for layer in range(3)}
    policy = WilKE([0, 1, 2], MEMIT(preservation=2.0))
    # MEMIT has one key: those of the values do not reach it.
    values = Told(distance)
    choices = policy.choose(workspace, requests()[:2], values, MeanKey(), BareKey())
    for request, choice in zip(requests(), choices, strict=False):
        for layer in range(3):
            key, weight = reference_keys(workspace, request, layer).mean(0), matrix_of(workspace.model, layer)
            target = values.told[request.case_id, layer].double()
            gram = 2 * workspace.covariances[layer] + torch.outer(key, key)
            delta = torch.outer(target - weight @ key, torch.linalg.inv(gram) @ key)
            assert choice.scores[layer] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
        assert choice.center == best


def test_wilke_needs_a_covariance_as_its_solver_does(tiny) -> None:
    assert WilKE([0]).needs_covariance
    assert WilKE([0], AlphaEdit()).needs_covariance
    assert not WilKE([0], ROME(covariance=False)).needs_covariance
    workspace = make_workspace(tiny)
    choose(WilKE([0, 1], ROME(covariance=False)), workspace, Told({0: 1.0, 1: 2.0}))
    with pytest.raises(ValueError, match="ROME needs the key covariance of layer"):
        choose(WilKE([0, 1]), workspace, Told({0: 1.0, 1: 2.0}))


def test_wilke_to_the_letter_takes_the_last_layer_if_it_may_and_reach_keeps_it_off(tiny) -> None:
    workspace = make_workspace(tiny)
    values = ValueOptimizer(lr=0.1, stop_loss=0.0, weight_decay=0.0)
    subjects = [r for r in requests() if not r.prompt.endswith(r.subject)]
    solver = ROME(covariance=False)
    to_the_letter, reaching = (
        WilKE([0, 1, 2, 3], solver, steps=8, reach=reach).choose(workspace, subjects, values, MeanKey())
        for reach in (None, 0.01)
    )
    for choice, other in zip(to_the_letter, reaching, strict=True):
        assert choice.scores == other.scores
        assert choice.scores[3] < 1e-5
        assert choice.center == 3
        assert other.center != 3


@pytest.mark.parametrize(("reach", "center"), [(None, 0), (4.0, 0), (3.9, 1), (0.9, 2), (0.0, 3)])
def test_wilke_passes_over_candidates_too_far_from_the_answer(tiny, reach: float | None, center: int) -> None:
    workspace = make_workspace(tiny)
    # Far apart, so that the order of the relative changes is the order of the distances.
    policy = WilKE([0, 1, 2, 3], ROME(covariance=False), reach=reach)
    for choice in choose(policy, workspace, Told({0: 0.01, 1: 0.5, 2: 20.0, 3: 900.0}, LOSS)):
        assert sorted(choice.scores, key=choice.scores.__getitem__) == [0, 1, 2, 3]
        assert choice.center == center


@pytest.mark.parametrize("steps", [None, 7])
def test_wilke_optimises_all_candidates_and_requests_in_one_batch(tiny, steps: int | None) -> None:
    workspace, values = make_workspace(tiny), Told(DISTANCE)
    choose(WilKE([2, 0, 2], ROME(covariance=False), steps=steps), workspace, values)
    assert values.asked == {
        "steps": steps,
        "contexts": None,
        "problems": [ValueProblem(i, (layer,)) for i in (0, 1) for layer in (0, 2)],
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, "at least one candidate layer"),
        ({"layers": [1], "steps": 0}, "steps >= 1, or null .* not 0"),
        ({"layers": [1], "reach": -1.0}, r"cannot be negative \(-1\.0\)"),
    ],
)
def test_bad_settings_of_wilke_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WilKE(**settings)


def test_wilke_refuses_values_of_blocks() -> None:
    with pytest.raises(ValueError, match="WilKE needs values of `site: mlp`"):
        WilKE([1]).check(ValueOptimizer("block"))
    WilKE([1]).check(ValueOptimizer("mlp"))
