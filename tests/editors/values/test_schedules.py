"""Schedules and the elastic net: EAC's two stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import bare_loss, make_workspace, matrix_of, reference_keys, requests
from helpers.sites import normal
from torch import Tensor

from lit_edit.editors.keys import MeanKey
from lit_edit.editors.values import (
    EAC,
    ElasticNet,
    NormClamp,
    NormMatched,
    ValueOptimizer,
    ValueProblem,
    Values,
    anchors,
)
from lit_edit.model.workspace import Workspace

PROBLEMS = [ValueProblem(0, (1,)), ValueProblem(1, (0, 1)), ValueProblem(3, (3,)), ValueProblem(2, (1, 2))]
each_site = pytest.mark.parametrize("site", ["mlp", "block"])
each_family = pytest.mark.parametrize("family", ["gpt2", "llama"])


def optimizer(site: Any, schedule: EAC | None, **settings: Any) -> ValueOptimizer:
    defaults = {"lr": 0.1, "steps": 7, "stop_loss": 0.0, "weight_decay": 0.01, "constraint": NormClamp(1.5)}
    return ValueOptimizer(site, schedule=schedule, **(defaults | settings))


def optimise(workspace: Workspace, values: ValueOptimizer, problems: list[ValueProblem] = PROBLEMS) -> Values:
    return values.optimise(workspace, requests(), problems, MeanKey())


def changes(workspace: Workspace, site: str, found: Values) -> list[Tensor]:
    """δ of every slot: the target without what the same optimiser gives when it may not move."""
    still = optimise(workspace, optimizer(site, None, stop_loss=1e9), found.problems)
    return [t[layer] - s[layer] for t, s in zip(found.targets, still.targets, strict=True) for layer in t]


def assert_same(one: Values, other: Values, atol: float = 0.0) -> None:
    assert one.loss == pytest.approx(other.loss, abs=atol)
    for a, b in zip(one.targets, other.targets, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The elastic net


def test_the_net_is_its_formula_and_so_is_its_slope() -> None:
    z, score = normal(3, 5).requires_grad_(True), normal(3, 5, seed=1).abs()
    found = ElasticNet(0.3, 0.7, 0.01)(z, score)
    expected = [
        sum(0.3 * abs(x) / (s + 0.01) + 0.7 * x**2 for x, s in zip(row, weights, strict=True))
        for row, weights in zip(z.detach().tolist(), score.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    (slope,) = torch.autograd.grad(found.sum(), z)
    torch.testing.assert_close(slope, 0.3 * z.detach().sign() / (score + 0.01) + 1.4 * z.detach())
    plain = ElasticNet(0.3, 0.7)(z.detach().flatten())
    torch.testing.assert_close(plain, 0.3 * z.detach().abs().sum() + 0.7 * z.detach().square().sum())


def test_the_net_has_no_slope_at_zero_and_stays_finite_without_a_score() -> None:
    z = torch.zeros(1, 4, requires_grad=True)
    found = ElasticNet(1.0, 1.0)(z, torch.zeros(1, 4))
    assert found.item() == 0
    assert not torch.autograd.grad(found.sum(), z)[0].any()
    assert torch.isfinite(ElasticNet(1.0, 1.0)(torch.ones(1, 4), torch.zeros(1, 4))).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1": -1e-9}, "l1 must be a finite number"),
        ({"l2": float("inf")}, "l2 must be a finite number"),
        ({"eps": 0.0}, "eps must be positive"),
    ],
)
def test_nets_and_schedules_refuse_bad_settings(settings: dict[str, Any], message: str) -> None:
    for made in (ElasticNet, EAC):
        with pytest.raises(ValueError, match=message):
            made(**settings)


def test_what_keeps_nothing_or_rescales_everything_is_refused() -> None:
    for percentile in (-1.0, 100.0, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and below 100"):
            EAC(percentile)
    with pytest.raises(ValueError, match="NormMatched rescales all of them"):
        ValueOptimizer(constraint=NormMatched(), schedule=EAC())


@pytest.mark.parametrize(("size", "percentile"), [(320, 95.0), (320, 80.0), (1601, 80.0), (7, 50.0), (1, 99.0)])
def test_anchors_are_the_scores_from_the_percentile_up(size: int, percentile: float) -> None:
    score = normal(4, size).abs()
    found = anchors(score, percentile)
    bound = score.quantile(percentile / 100, dim=-1, keepdim=True)
    assert torch.equal(found.bool(), score >= bound - 1e-12)
    expected = size - math.ceil(round(percentile / 100 * (size - 1), 9))
    assert found.sum(-1).tolist() == [expected] * 4
    assert anchors(score, 0.0).all()


# The two stages


def reference(workspace: Workspace, site: str, schedule: EAC, steps: int) -> tuple[Tensor, Tensor, float]:
    """(v0, v*, loss) of one request in layer 1 under the bare prompt, by two plain loops."""
    v0, nll = bare_loss(workspace, site, 1, requests()[1])
    delta, slopes = torch.zeros(len(v0), dtype=torch.float64, requires_grad=True), []
    adam = torch.optim.Adam([delta], lr=0.1)
    for _ in range(steps // 2):
        adam.zero_grad()
        nll(delta).backward()
        assert delta.grad is not None
        slopes.append(delta.grad.clone())
        adam.step()
    score = (torch.stack(slopes).mean(0) * delta.detach()).abs()
    chosen = list(range(len(v0)))
    if schedule.saliency:
        slope, size = torch.stack(slopes).mean(0).abs(), delta.detach().abs()
        merit = {"weighted_gradient": score, "gradient": slope, "magnitude": size}[schedule.rule]
        bound = merit.quantile(schedule.percentile / 100)
        chosen = [i for i in chosen if merit[i] >= bound]
    free = delta.detach()[chosen].clone().requires_grad_(True)  # only these exist as parameters
    adam = torch.optim.Adam([free], lr=0.1)
    loss = torch.zeros(())
    for step in range(steps - steps // 2 + 1):
        whole = torch.zeros(len(v0), dtype=torch.float64).index_put((torch.tensor(chosen),), free)
        loss = nll(whole)
        if schedule.elastic_net:
            net = schedule.net
            loss = loss + net.l1 * (free.abs() / (score[chosen] + net.eps)).sum() + net.l2 * (free**2).sum()
        if step < steps - steps // 2:
            adam.zero_grad()
            loss.backward()
            adam.step()
    whole = torch.zeros(len(v0), dtype=torch.float64).index_put((torch.tensor(chosen),), free.detach())
    return v0, v0 + whole, float(loss.detach())


@each_family
@each_site
@pytest.mark.parametrize(
    "schedule",
    [EAC(80.0, 1e-5, 1e-2), EAC(80.0, elastic_net=False), EAC(80.0, 1e-5, 1e-2, saliency=False), EAC(50.0, 0.0, 0.1)],
    ids=["whole", "no net", "no map", "no l1"],
)
def test_values_are_those_of_two_plain_loops(family: str, site: str, schedule: EAC) -> None:
    workspace = make_workspace(tiny_model(family))
    workspace.contexts = ["{}"]
    v0, expected, loss = reference(workspace, site, schedule, 9)
    values = optimizer(site, schedule, steps=9, kl_factor=0.0, weight_decay=0.0, constraint=NormClamp(100.0))
    found = optimise(workspace, values, [ValueProblem(1, (1,))])
    assert found.steps == [9]
    assert found.loss[0] == pytest.approx(loss, abs=1e-3)
    torch.testing.assert_close(found.targets[0][1].double(), expected, rtol=0, atol=1e-3)
    assert float((expected - v0).norm()) > 0.1


@pytest.mark.parametrize("rule", ["gradient", "magnitude"])
def test_anchors_by_other_rules_are_those_of_two_plain_loops(rule: Any) -> None:
    test_values_are_those_of_two_plain_loops("llama", "mlp", EAC(80.0, 1e-5, 1e-2, rule=rule))


def test_random_anchors_are_as_many_and_repeat() -> None:
    workspace = make_workspace(tiny_model("llama"))
    masks: dict[str, list[Tensor]] = {}
    for rule in ("random", "random again", "weighted_gradient"):
        schedule = EAC(80.0, rule=rule.removesuffix(" again"))  # type: ignore[arg-type]
        found = changes(workspace, "mlp", optimise(workspace, optimizer("mlp", schedule)))
        masks[rule] = [change != 0 for change in found]
    assert [int(mask.sum()) for mask in masks["random"]] == [32 - math.ceil(0.8 * 31)] * 6
    assert all(map(torch.equal, masks["random"], masks["random again"]))
    assert not any(map(torch.equal, masks["random"], masks["weighted_gradient"]))
    assert len({tuple(mask.tolist()) for mask in masks["random"]}) == 6
    with pytest.raises(
        ValueError, match="chooses anchors by weighted_gradient, gradient, magnitude, random, not by 'best'"
    ):
        EAC(rule="best")  # type: ignore[arg-type]


@each_family
@each_site
def test_unselected_coordinates_stay_exactly_as_they_are(family: str, site: str) -> None:
    workspace = make_workspace(tiny_model(family))
    found = changes(workspace, site, optimise(workspace, optimizer(site, EAC(80.0))))
    masks = [(change != 0) for change in found]
    assert [int(mask.sum()) for mask in masks] == [32 - math.ceil(0.8 * 31)] * 6
    assert len({tuple(mask.tolist()) for mask in masks}) > 3  # a map of its own for every slot
    plain = changes(workspace, site, optimise(workspace, optimizer(site, None)))
    assert all((change != 0).all() for change in plain)


@each_family
@each_site
def test_a_batch_is_solved_as_each_problem_on_its_own(family: str, site: str) -> None:
    workspace = make_workspace(tiny_model(family))
    values = optimizer(site, EAC(60.0, 1e-6, 1e-3))
    values.stop_loss = sorted(optimise(workspace, values).loss)[2] + 1e-3
    together = optimise(workspace, values)
    assert len(set(together.steps)) > 1
    for i, problem in enumerate(PROBLEMS):
        alone = optimise(workspace, values, [problem])
        assert alone.steps == [together.steps[i]]
        assert alone.loss[0] == pytest.approx(together.loss[i], abs=1e-5)
        torch.testing.assert_close(alone.targets[0], together.targets[i], rtol=0, atol=1e-5)


def test_settings_that_mean_the_same_do_the_same() -> None:
    workspace = make_workspace(tiny_model("llama"))

    def found(schedule: EAC) -> Values:
        return optimise(workspace, optimizer("mlp", schedule), PROBLEMS[:2])

    assert_same(found(EAC(0.0, 1e-6, 1e-3)), found(EAC(90.0, 1e-6, 1e-3, saliency=False)))
    assert_same(found(EAC(70.0, 0.0, 0.0)), found(EAC(70.0, elastic_net=False)))
    assert found(EAC(70.0, 0.0, 1e-3)).loss != found(EAC(70.0, 1e-3, 1e-3)).loss


@each_site
def test_without_map_and_net_it_is_the_plain_schedule_begun_anew_halfway(site: str) -> None:
    # With a single step in the second stage, that one is Adam's first: lr in every coordinate.
    workspace = make_workspace(tiny_model("llama"))
    kind = EAC(0.0, elastic_net=False)
    half = changes(workspace, site, optimise(workspace, optimizer(site, None, steps=1)))
    both = changes(workspace, site, optimise(workspace, optimizer(site, kind, steps=2)))
    for one, other in zip(half, both, strict=True):
        assert float((other - one).abs().max()) == pytest.approx(0.1, rel=1e-2)


def test_a_problem_that_stops_early_is_compressed_all_the_same() -> None:
    workspace = make_workspace(tiny_model("llama"))
    steps = {"plain": optimizer("mlp", None, steps=20), "eac": optimizer("mlp", EAC(80.0), steps=40)}
    bound = sorted(optimise(workspace, optimizer("mlp", None, steps=3)).loss)[1] + 1e-3
    for values in steps.values():
        values.stop_loss = bound
    plain, found = (optimise(workspace, values) for values in steps.values())
    early = [i for i, n in enumerate(plain.steps) if 0 < n <= 3]
    assert early
    slots = [i for i, p in enumerate(PROBLEMS) for _ in p.layers]
    for p, change in zip(slots, changes(workspace, "mlp", found), strict=True):
        if p in early:
            assert int((change != 0).sum()) == 7
            assert plain.steps[p] <= found.steps[p] <= plain.steps[p] + 20


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_fewest_steps_still_make_two_stages(steps: int) -> None:
    workspace = make_workspace(tiny_model("gpt2"))
    settings = {"steps": steps} if steps else {"stop_loss": 1e9}  # done at once: the present output is kept
    found = optimise(workspace, optimizer("mlp", EAC(80.0), **settings))
    assert found.steps == [steps] * len(PROBLEMS)
    assert [int((c != 0).sum()) for c in changes(workspace, "mlp", found)] == [7 if steps else 0] * 6


def test_relative_learning_rates_do_not_change_what_a_score_is() -> None:
    # score = |g ⊙ δ| has no unit of its own; an lr of ‖v0‖ / √d times as much is the same optimisation.
    workspace = make_workspace(tiny_model("llama"))
    problem = [ValueProblem(0, (1,))]
    start = matrix_of(workspace.model, 1) @ reference_keys(workspace, requests()[0], 1).mean(0)
    unit = float(start.norm()) / 32**0.5
    relative = optimise(workspace, optimizer("mlp", EAC(70.0), lr_unit="relative"), problem)
    absolute = optimise(workspace, optimizer("mlp", EAC(70.0), lr=0.1 * unit), problem)
    torch.testing.assert_close(relative.targets[0][1], absolute.targets[0][1], rtol=1e-3, atol=1e-4)
