"""Which layers a request is edited in: fixed, by MOSE's score, by WilKE's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.parts import prepared
from helpers.references import CONTEXTS, changed, make_workspace, matrix_of, reference_keys, requests, weights
from torch import Tensor, nn

from lit_edit.algebra.linalg import spectral_norm
from lit_edit.algebra.updates import Additive
from lit_edit.editors.keys import BareKey, KeyAverage, MeanKey, compute_keys
from lit_edit.editors.layers import ActivationSelection, Choice, FixedLayers, WilKE, selection_score
from lit_edit.editors.solvers import MEMIT, ROME, AlphaEdit
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer, ValueProblem, Values
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

llama = pytest.mark.parametrize("family", ["llama"])  # where nothing of a family's own is looked at


@pytest.fixture(params=["gpt2", "llama"])  # stored transposed, and as it is
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def by_hand(weight: Tensor, key: Tensor, target: Tensor) -> float:
    """Eq. 22 with the norm of the activation in its denominator."""
    largest = torch.linalg.svdvals(weight.double()).max()
    return float((target.double() - weight.double() @ key.double()).norm() / (largest * key.double().norm()))


class Told(ValueOptimizer):
    """Gives values at a set distance from W k, with a set loss, instead of optimising."""

    def __init__(self, distance: dict[int, float], loss: dict[int, float] | None = None) -> None:
        super().__init__()
        self.distance, self.told_loss, self.asked = distance, loss or {}, dict[str, Any]()

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
        layers = sorted({layer for problem in problems for layer in problem.layers})
        keys = compute_keys(workspace, requests, layers, average)
        targets, loss = [], []
        for problem in problems:
            (layer,), weight = problem.layers, matrix_of(workspace.model, problem.layers[0])
            key = keys[layer][:, problem.request].to(weight)
            unit = torch.linalg.matrix_norm(weight, 2) * key.norm()
            direction = nn.functional.normalize(torch.ones_like(weight[:, 0]), dim=0)
            targets.append({layer: (weight @ key + float(self.distance[layer] * unit) * direction).float()})
            loss.append(self.told_loss.get(layer, 0.0))
        n = len(problems)
        return Values(list(problems), targets, loss, [0.5] * n, [1] * n)


def choose(policy: Any, workspace: Workspace, values: ValueOptimizer, count: int = 2) -> list[Choice]:
    found: list[Choice] = policy.choose(workspace, requests()[:count], values, MeanKey())
    return found


@llama
@pytest.mark.parametrize("layers", [[2], [3, 0, 1]])
def test_fixed_layers_are_the_same_for_every_request(tiny, layers: list[int]) -> None:
    workspace, policy = make_workspace(tiny), FixedLayers(layers)
    assert policy.candidates(workspace.architecture) == sorted(layers)
    expected = Choice(tuple(sorted(layers)), max(layers), {})
    assert choose(policy, workspace, Told({}), 3) == [expected] * 3


@llama
@pytest.mark.parametrize("kind", [FixedLayers, ActivationSelection, WilKE])
@pytest.mark.parametrize("wrong", [-1, 4])
def test_layers_the_model_does_not_have_are_refused(tiny, kind: Any, wrong: int) -> None:
    workspace = make_workspace(tiny)
    with pytest.raises(ValueError, match=rf"Layer {wrong} does not exist: the model has layers 0 to 3"):
        kind([1, wrong]).candidates(workspace.architecture)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (FixedLayers, {"layers": []}, "distinct and at least one"),
        (FixedLayers, {"layers": [2, 0, 2]}, "distinct and at least one"),
        (ActivationSelection, {"neighbours": -1}, "neighbours >= 0"),
        (ActivationSelection, {"steps": 0}, "needs steps, contexts >= 1"),
        (ActivationSelection, {"contexts": 0}, "contexts >= 1"),
        (ActivationSelection, {"reach": -0.1}, r"cannot be negative \(-0\.1\)"),
        (ActivationSelection, {"layers": []}, "at least one candidate"),
        (ActivationSelection, {"tries": 0}, "at least one candidate, or all with null, not 0"),
        (WilKE, {"layers": []}, "at least one candidate layer"),
        (WilKE, {"layers": [1], "steps": 0}, "steps, contexts >= 1 .* not 0, None and 0"),
        (WilKE, {"layers": [1], "reach": -1.0}, r"cannot be negative \(-1\.0\)"),
    ],
)
def test_bad_settings_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_values_of_blocks_cannot_be_compared_with_the_projections_output() -> None:
    for policy in (ActivationSelection(), WilKE([1])):
        with pytest.raises(ValueError, match="needs values of `site: mlp`"):
            policy.check(ValueOptimizer("block"))
        policy.check(ValueOptimizer("mlp"))
    FixedLayers([1]).check(ValueOptimizer("block"))


# MOSE's selection


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
    policy = ActivationSelection([0, 2], neighbours=0, steps=3, contexts=2, reach=None)
    before = weights(workspace.model)
    choices = policy.choose(workspace, requests(), values, MeanKey())
    assert changed(before, workspace.model) == set()
    for request, choice in zip(requests(), choices, strict=True):
        expected = {}
        for layer in (0, 2):
            key = reference_keys(workspace, request, layer).mean(0)
            alone = values.optimise(
                workspace, [request], [ValueProblem(0, (layer,))], MeanKey(), steps=3, contexts=CONTEXTS[:2]
            )
            expected[layer] = by_hand(matrix_of(workspace.model, layer), key, alone.targets[0][layer])
        assert choice.scores == pytest.approx(expected, rel=1e-4)
        assert choice.center == min(expected, key=lambda layer: expected[layer])
        assert choice.layers == (choice.center,)


@llama
def test_neighbours_are_clipped_at_the_ends_and_stand_among_the_candidates(tiny) -> None:
    """Statistics are gathered for the candidates: no choice may fall on another layer."""
    workspace = make_workspace(tiny)
    for layers in (None, [0], [3], [2, 0]):
        for neighbours in (0, 1, 2, 9):
            policy = ActivationSelection(layers, neighbours)
            around: set[int] = set()
            for center in range(4) if layers is None else layers:
                distance = {layer: 0.5 if layer == center else 1.0 for layer in range(4)}
                (choice,) = choose(policy, workspace, Told(distance), 1)
                assert choice.center == center
                assert choice.layers == tuple(layer for layer in range(4) if abs(layer - center) <= neighbours)
                assert choice.scores == pytest.approx({layer: distance[layer] for layer in choice.scores}, rel=1e-4)
                around |= set(choice.layers)
            assert policy.candidates(workspace.architecture) == sorted(around)


@pytest.mark.parametrize("kind", [ActivationSelection, WilKE])
def test_reach_keeps_the_choice_off_the_last_layer_where_no_value_can_help(tiny, kind: Any) -> None:
    # The subject stands before the end of the prompt: nothing reads the last layer there, so its value never moves.
    workspace = make_workspace(tiny)
    values = ValueOptimizer(lr=0.1, stop_loss=0.0, weight_decay=0.0)
    subjects = [r for r in requests() if not r.prompt.endswith(r.subject)]
    assert len(subjects) == 3
    own = {"neighbours": 0} if kind is ActivationSelection else {"solver": ROME(covariance=False)}
    to_the_letter, reaching = (
        kind([0, 1, 2, 3], reach=reach, steps=8, **own).choose(workspace, subjects, values, MeanKey())
        for reach in (None, 0.01)
    )
    for choice, other in zip(to_the_letter, reaching, strict=True):
        assert choice.scores == other.scores
        assert set(choice.scores) == {0, 1, 2, 3}
        assert choice.scores[3] < 1e-5
        assert choice.center == 3
        assert other.center != 3


DISTANCE, LOSS = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, {0: 5.0, 1: 2.0, 2: 1.5, 3: 1.0}
FAR = {0: 0.01, 1: 0.5, 2: 20.0, 3: 900.0}  # so that the order of the relative changes is the order of the distances


@llama
def test_candidates_too_far_from_the_answer_are_passed_over(tiny) -> None:
    workspace = make_workspace(tiny)
    centers = {None: 0, 10.0: 0, 4.0: 0, 3.9: 1, 1.0: 1, 0.9: 2, 0.5: 2, 0.4: 3, 0.0: 3}
    for reach, center in centers.items():
        selection = ActivationSelection([0, 1, 2, 3], neighbours=0, reach=reach)
        wilke = WilKE([0, 1, 2, 3], ROME(covariance=False), reach=reach)
        for choice in [*choose(selection, workspace, Told(DISTANCE, LOSS)), *choose(wilke, workspace, Told(FAR, LOSS))]:
            assert sorted(choice.scores, key=choice.scores.__getitem__) == [0, 1, 2, 3]
            assert choice.center == center


@llama
def test_all_candidates_and_requests_are_optimised_in_one_batch(tiny) -> None:
    workspace, problems = make_workspace(tiny), [ValueProblem(i, (layer,)) for i in (0, 1) for layer in (0, 2)]
    values = Told(DISTANCE)
    choose(ActivationSelection([2, 0], steps=7, contexts=2), workspace, values)
    assert values.asked == {"steps": 7, "contexts": list(CONTEXTS[:2]), "problems": problems}
    for steps in (None, 7):  # the editor's own number, and another
        choose(WilKE([2, 0, 2], ROME(covariance=False), steps=steps), workspace, values)
        assert values.asked == {"steps": steps, "contexts": None, "problems": problems}


@pytest.mark.parametrize("family", ["gpt2"])
def test_scores_follow_the_weights_through_edits_and_from_model_to_model(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, norms = ActivationSelection([1], neighbours=0), list[float]()

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

    monkeypatch.setattr("lit_edit.editors.prediction.spectral_norm", counted)
    workspace, other = prepared(tiny), prepared(tiny)
    first = score(workspace)
    assert score(workspace) == first
    assert len(norms) == 1  # kept while the weight stays
    for times, space in ((2, workspace), (6, other)):  # both are at their first write then
        space.site(1).write(Additive(times * space.site(1).weight))
    second, third = score(workspace), score(other)
    assert norms == pytest.approx([norms[0], 3 * norms[0], 7 * norms[0]], rel=1e-5)
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


@pytest.mark.parametrize("value_average", [None, BareKey()])
@pytest.mark.parametrize("kind", [ROME, MEMIT])
def test_wilke_takes_the_layer_whose_weight_its_solver_changes_least(
    tiny, kind: Any, value_average: KeyAverage | None
) -> None:
    workspace = prepared(tiny)
    values = ValueOptimizer(lr=0.2, lr_unit="relative", stop_loss=0.0, steps=3)
    policy = WilKE([2, 0], None if kind is ROME else MEMIT(preservation=2.0))
    before = weights(workspace.model)
    choices = policy.choose(workspace, requests(), values, MeanKey(), value_average)
    assert changed(before, workspace.model) == set()
    for request, choice in zip(requests(), choices, strict=True):
        expected = {}
        for layer in (0, 2):
            keys, weight = reference_keys(workspace, request, layer), matrix_of(workspace.model, layer)
            key, covariance = keys.mean(0), workspace.site(layer).covariance
            # MEMIT has one key: those of the values do not reach it.
            value_key = keys[0] if value_average is not None and kind is ROME else key
            problem = [ValueProblem(0, (layer,))]
            target = values.optimise(workspace, [request], problem, value_average or MeanKey()).targets[0][layer]
            left = target.double() - weight @ value_key
            if kind is ROME:
                u = torch.linalg.inv(covariance) @ key
                delta = torch.outer(left, u) / torch.dot(u, value_key)
            else:
                delta = torch.outer(left, torch.linalg.inv(2 * covariance + torch.outer(key, key)) @ key)
            expected[layer] = float(delta.norm() / weight.norm())
        assert choice.scores == pytest.approx(expected, rel=1e-3)
        assert choice.center == min(expected, key=lambda layer: expected[layer])
        assert choice.layers == (choice.center,)


@llama
def test_wilke_needs_a_covariance_as_its_solver_does(tiny) -> None:
    assert WilKE([0]).needs_covariance
    assert WilKE([0], AlphaEdit()).needs_covariance
    assert not WilKE([0], ROME(covariance=False)).needs_covariance
    workspace = make_workspace(tiny)
    choose(WilKE([0, 1], ROME(covariance=False)), workspace, Told({0: 1.0, 1: 2.0}))
    with pytest.raises(ValueError, match="ROME needs the key covariance of layer"):
        choose(WilKE([0, 1]), workspace, Told({0: 1.0, 1: 2.0}))
