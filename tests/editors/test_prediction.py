"""Scores of layer selection predicted from one backward pass: against one text at a time, and what they lead to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.references import (
    changed,
    hooked,
    make_workspace,
    matrix_of,
    projection_of,
    reference_keys,
    requests,
    tokens,
    weights,
)
from torch import Tensor

from lit_edit.editors.keys import BareKey, MeanKey
from lit_edit.editors.layers import ActivationSelection
from lit_edit.editors.prediction import output_slopes, predicted_scores
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

LAYERS = [0, 1, 2, 3]
MIDDLE = requests()[:3]  # the subject stands before the prompt's end


@pytest.fixture(params=["gpt2", "llama"])  # stored transposed, and as it is
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def loss_when_moved(workspace: Workspace, request: EditRequest, layer: int, move: Tensor) -> Tensor:
    """The mean over contexts of the target's mean negative log-likelihood, one complete text at a time."""
    found = []
    for context in workspace.contexts:
        ids, start, last = tokens(workspace.tokenizer, context[: context.index("{}")], request)

        def moved(_: Tensor, output: Tensor, last: int = last) -> Tensor:
            at = torch.zeros_like(output)
            at[0, last] = 1
            return output + at * move

        with hooked([(projection_of(workspace.model, layer), moved)]):
            log_p = workspace.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # type: ignore[operator]
        found.append(-torch.stack([log_p[t - 1, ids[t]] for t in range(start, len(ids))]).mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize("rows_at_once", [1, 8, 100])  # a pass for each request, for two, for all
def test_one_pass_gives_every_layers_loss_and_gradient(tiny, rows_at_once: int) -> None:
    workspace = make_workspace(tiny)
    before = weights(workspace.model)
    losses, slopes = output_slopes(workspace, requests(), LAYERS, rows_at_once)
    assert changed(before, workspace.model) == set()
    assert all(parameter.grad is None for parameter in workspace.model.parameters())
    for i, request in enumerate(requests()):
        for layer in LAYERS:
            move = torch.zeros(matrix_of(workspace.model, layer).shape[0], dtype=torch.float64, requires_grad=True)
            loss = loss_when_moved(workspace, request, layer, move)
            (slope,) = torch.autograd.grad(loss, move)
            assert losses[i].item() == pytest.approx(loss.item(), rel=1e-5)
            torch.testing.assert_close(slopes[layer][i].double(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("average", [MeanKey(), BareKey()])
@pytest.mark.parametrize("constraint", [NormClamp(), NormMatched()])
def test_the_score_is_equation_22_of_the_way_down_the_slope(tiny, constraint: Any, average: Any) -> None:
    workspace = make_workspace(tiny)
    values = ValueOptimizer(constraint=constraint, stop_loss=0.5)
    losses, slopes = output_slopes(workspace, MIDDLE, LAYERS, 100)
    for i, scores in enumerate(predicted_scores(workspace, MIDDLE, values, average, LAYERS)):
        assert list(scores) == LAYERS
        for layer in LAYERS[:-1]:
            weight, keys = matrix_of(workspace.model, layer), reference_keys(workspace, MIDDLE[i], layer)
            key = keys[0] if isinstance(average, BareKey) else keys.mean(0)
            slope, start = slopes[layer][i].double(), weight @ key
            if constraint.replaces:  # along the sphere
                slope = slope - start * torch.dot(slope, start) / start.square().sum()
            way = (float(losses[i]) - 0.5) / float(slope.norm())
            expected = way / float(torch.linalg.svdvals(weight)[0] * key.norm())
            assert scores[layer] == pytest.approx(expected, rel=1e-3)
        assert scores[3] == float("inf")  # nothing reads the last layer there


def test_the_predicted_way_is_the_one_that_a_nearly_reached_loss_takes(tiny) -> None:
    """Where little is left to lose, the first order is all there is."""
    workspace, request = make_workspace(tiny, ("{}",)), MIDDLE[0]
    (loss,), slopes = output_slopes(workspace, [request], [1], 100)
    aim = float(loss) - 1e-3
    scores = predicted_scores(workspace, [request], ValueOptimizer(stop_loss=aim), MeanKey(), [1])[0]
    weight, key = matrix_of(workspace.model, 1), reference_keys(workspace, request, 1)[0]
    way = scores[1] * float(torch.linalg.svdvals(weight)[0] * key.norm())
    slope = slopes[1][0].double()
    reached = loss_when_moved(workspace, request, 1, -way * slope / slope.norm())
    assert float(loss) - float(reached) == pytest.approx(1e-3, rel=0.05)


def test_a_fact_that_is_known_already_is_ranked_all_the_same(tiny) -> None:
    workspace = make_workspace(tiny)
    scores = predicted_scores(workspace, MIDDLE, ValueOptimizer(stop_loss=1e3), MeanKey(), LAYERS)
    reference = predicted_scores(workspace, MIDDLE, ValueOptimizer(stop_loss=0.0), MeanKey(), LAYERS)
    for known, unknown in zip(scores, reference, strict=True):
        assert sorted(known, key=known.__getitem__) == sorted(unknown, key=unknown.__getitem__)
        assert known[3] == float("inf")


def test_one_try_takes_what_is_predicted_and_optimises_nothing(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, values = make_workspace(tiny), ValueOptimizer()
    predicted = predicted_scores(workspace, MIDDLE, values, BareKey(), LAYERS)
    monkeypatch.setattr(ValueOptimizer, "optimise", lambda *_, **__: pytest.fail("a value was optimised"))
    policy = ActivationSelection(neighbours=1, contexts=9, tries=1)
    for choice, scores in zip(policy.choose(workspace, MIDDLE, values, MeanKey(), BareKey()), predicted, strict=True):
        assert choice.center == min(scores, key=scores.__getitem__)
        assert choice.scores == scores
        assert choice.layers == tuple(layer for layer in LAYERS if abs(layer - choice.center) <= 1)


def test_two_tries_take_the_better_of_the_two_that_come_first(tiny) -> None:
    workspace = make_workspace(tiny)
    values = ValueOptimizer(constraint=NormMatched(), lr=0.3, lr_unit="relative", stop_loss=0.0)
    settings: dict[str, Any] = {"neighbours": 0, "steps": 4, "contexts": 2, "reach": None}
    predicted = predicted_scores(workspace, MIDDLE, values, MeanKey(), [0, 1, 2], workspace.contexts[:2])
    every = ActivationSelection([0, 1, 2], **settings).choose(workspace, MIDDLE, values, MeanKey())
    both = ActivationSelection([0, 1, 2], tries=2, **settings).choose(workspace, MIDDLE, values, MeanKey())
    for choice, full, scores in zip(both, every, predicted, strict=True):
        first = sorted(scores, key=scores.__getitem__)[:2]
        assert set(choice.scores) == set(first)
        assert choice.scores == pytest.approx({layer: full.scores[layer] for layer in first}, rel=1e-4)
        assert choice.center == min(first, key=full.scores.__getitem__)


@pytest.mark.parametrize("tries", [3, 9])
def test_as_many_tries_as_candidates_are_the_papers_rule(tiny, tries: int) -> None:
    workspace, values = make_workspace(tiny), ValueOptimizer(lr=0.1)
    settings: dict[str, Any] = {"steps": 2, "contexts": 1}
    every, same = (
        ActivationSelection([0, 1, 2], tries=n, **settings).choose(workspace, MIDDLE, values, MeanKey())
        for n in (None, tries)
    )
    assert every == same
