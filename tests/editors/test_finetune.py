"""Fine-tuning against a plain loop of Adam on a copied model, one unpadded text at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.references import (
    changed,
    hooks_left,
    make_workspace,
    matrix_of,
    projection_of,
    requests,
    target_log_probabilities,
    tokens,
    weights,
)
from helpers.runs import asked
from torch import Tensor

from lit_edit.editors import FineTune
from lit_edit.editors.values import ElasticNet
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

families = pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)


def reference_losses(model: Any, tokenizer: Any, batch: Sequence[EditRequest], last_token: bool) -> list[Tensor]:
    losses = []
    for request in batch:
        ids, start, _ = tokens(tokenizer, "", request)
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses.append(-sum(log_p[start - 1 if last_token else t - 1, ids[t]] for t in range(start, len(ids))))
        losses[-1] = losses[-1] / (len(ids) - start)
    return losses


def reference_matrices(workspace: Workspace, batch: Sequence[EditRequest], editor: FineTune) -> dict[int, Tensor]:
    """The trained matrices (d, p), from a loop that trains a copy's own parameters."""
    model = copy.deepcopy(workspace.model)
    free = [projection_of(model, layer).weight for layer in editor.layers]
    old = [weight.detach().clone() for weight in free]
    for weight in free:
        weight.requires_grad_(True)
    adam = torch.optim.Adam(free, lr=editor.lr, weight_decay=editor.weight_decay)
    for _ in range(editor.steps):
        adam.zero_grad()
        last = editor.objective == "last_token"
        loss = torch.stack(reference_losses(model, workspace.tokenizer, batch, last)).mean()
        if loss < editor.stop_loss:
            break
        net = editor.elastic_net
        if net is not None:
            changes = [weight - start for weight, start in zip(free, old, strict=True)]
            loss = loss + sum(net.l1 * z.abs().sum() + net.l2 * (z**2).sum() for z in changes)
        loss.backward()
        adam.step()
        if editor.norm_constraint is not None:
            with torch.no_grad():
                for weight, start in zip(free, old, strict=True):
                    e = editor.norm_constraint
                    weight.copy_(torch.minimum(torch.maximum(weight, start - e), start + e))
    return {layer: matrix_of(model, layer) for layer in editor.layers}


SETTINGS: dict[str, dict[str, Any]] = {
    "ft": {"objective": "last_token"},
    "ft-l": {"objective": "last_token", "norm_constraint": 6e-3},
    "ft-m": {"objective": "target_tokens"},
    "elastic net": {"objective": "target_tokens", "elastic_net": ElasticNet(l1=0.05, l2=0.5)},
    "decay": {"objective": "target_tokens", "weight_decay": 0.1},
}


def tuner(layers: Sequence[int] = (1, 2), **settings: Any) -> FineTune:
    return FineTune(list(layers), **{"lr": 5e-3, "steps": 5, "stop_loss": 0.0, **settings})


@families
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [1, 10])
def test_it_trains_as_a_plain_loop_does(tiny, name: str, size: int) -> None:
    workspace, editor = make_workspace(tiny), tuner(**SETTINGS[name])
    batch = [*requests(), *asked(6)][-size:]
    wanted = reference_matrices(workspace, batch, editor)
    old = {layer: matrix_of(workspace.model, layer) for layer in editor.layers}
    editor.apply(workspace, editor.plan(workspace, batch))
    for layer in editor.layers:
        assert float((wanted[layer] - old[layer]).abs().max()) > 4e-3
        torch.testing.assert_close(matrix_of(workspace.model, layer), wanted[layer], rtol=0, atol=1e-8)


@families
@torch.no_grad()
def test_the_plan_says_what_the_edited_model_then_does_and_changes_nothing(tiny) -> None:
    for objective in ("last_token", "target_tokens"):
        workspace = make_workspace((copy.deepcopy(tiny[0]), tiny[1]))
        before, editor = weights(workspace.model), tuner(objective=objective)
        with torch.enable_grad():
            plan = editor.plan(workspace, requests())
        assert changed(before, workspace.model) == set()
        assert all(p.grad is None and not p.requires_grad for p in workspace.model.parameters())
        applied = editor.apply(workspace, plan)
        assert hooks_left(workspace.model) == 0
        edited = {workspace.architecture[layer].name for layer in editor.layers}
        assert changed(before, workspace.model) == edited
        assert plan.layers == [(1, 2)] * 4
        assert plan.steps == [5] * 4
        losses = reference_losses(workspace.model, workspace.tokenizer, requests(), objective == "last_token")
        assert plan.loss == pytest.approx([float(x) for x in losses], rel=1e-9)
        for request, p in zip(requests(), plan.probability, strict=True):
            ids, start, _ = tokens(workspace.tokenizer, "", request)
            found = target_log_probabilities(workspace.model, ids, start).sum().exp()
            assert p == pytest.approx(float(found), rel=1e-9)
        for item in applied:
            part = workspace.architecture[item.layer]
            old = before[part.name].T if part.transposed else before[part.name]
            change = float((part.weight - old).norm() / old.norm())
            assert item.relative_change == pytest.approx(change, rel=1e-9)


def test_weights_that_require_gradients_are_left_without_any(tiny) -> None:
    workspace = make_workspace(tiny)
    workspace.model.requires_grad_(True)
    tuner().plan(workspace, requests())
    assert all(p.grad is None for p in workspace.model.parameters())


@families
def test_the_clamp_holds_exactly_and_binds(tiny) -> None:
    workspace, bound = make_workspace(tiny), 0.004
    editor = tuner(norm_constraint=bound, lr=0.01)
    for batch in (requests()[:2], requests()[2:]):  # from where the weight was before each batch
        plan = editor.plan(workspace, batch)
        for change in plan.data.values():
            assert float(change.abs().max()) == pytest.approx(bound, abs=1e-15)
            assert float((change.abs() > 0.999 * bound).double().mean()) > 0.5
        editor.apply(workspace, plan)


@families
def test_nothing_is_trained_below_the_stop_loss(tiny) -> None:
    workspace, before = make_workspace(tiny), weights(tiny[0])
    plan = tuner(objective="target_tokens").plan(workspace, requests())
    already = sum(plan.loss) / len(plan.loss)
    stopped = tuner(objective="target_tokens", steps=50, stop_loss=already * 1.000001).plan(workspace, requests())
    assert stopped.steps == [5] * 4
    for layer, change in plan.data.items():
        torch.testing.assert_close(stopped.data[layer], change, rtol=0, atol=0)
    editor = tuner(stop_loss=1e3, elastic_net=ElasticNet(), weight_decay=0.5)
    none = editor.plan(workspace, requests())
    assert none.steps == [0] * 4
    assert not any(change.any() for change in none.data.values())
    editor.apply(workspace, none)
    assert changed(before, workspace.model) == set()


def test_the_objectives_differ_only_where_a_target_has_several_tokens(tiny) -> None:
    workspace = make_workspace(tiny)
    short = EditRequest("0", "Maria works in", "Maria", "Rome")
    long = requests()[1]
    for request, same in ((short, True), (long, False)):
        ids, start, _ = tokens(workspace.tokenizer, "", request)
        assert (len(ids) - start == 1) == same
        plans = [tuner(objective=objective).plan(workspace, [request]) for objective in ("last_token", "target_tokens")]
        assert torch.equal(plans[0].data[1], plans[1].data[1]) == same


@families
def test_the_elastic_net_makes_the_change_smaller(tiny) -> None:
    workspace = make_workspace(tiny)
    free = tuner(objective="target_tokens", steps=8).plan(workspace, requests())
    held = tuner(objective="target_tokens", steps=8, elastic_net=ElasticNet(1e-3, 1.0)).plan(workspace, requests())
    off = tuner(objective="target_tokens", steps=8, elastic_net=ElasticNet(0.0, 0.0)).plan(workspace, requests())
    for layer, change in free.data.items():
        assert float(held.data[layer].abs().sum()) < 0.7 * float(change.abs().sum())
        torch.testing.assert_close(off.data[layer], change, rtol=0, atol=0)


def test_half_precision_weights_are_trained_in_single_precision(tiny) -> None:
    # Steps of 5e-4 vanish in bfloat16 beside an entry of 0.2 (its spacing there is 1e-3).
    workspace = make_workspace(tiny, dtype=torch.bfloat16)
    editor = FineTune([1], lr=2e-4, steps=8, stop_loss=0.0, objective="target_tokens")
    plan = editor.plan(workspace, requests())
    assert plan.data[1].dtype == torch.float32
    assert float(plan.data[1].abs().max()) > 1e-3
    (applied,) = editor.apply(workspace, plan)
    assert workspace.architecture[1].weight.dtype == torch.bfloat16
    assert applied.relative_change > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, r"distinct layers and at least one, not \[\]"),
        ({"layers": [1, 1]}, r"distinct layers and at least one, not \[1, 1\]"),
        ({"lr": 0.0}, "lr > 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"objective": "all"}, "'last_token' or 'target_tokens', not 'all'"),
        ({"norm_constraint": 0.0}, "must be positive, not 0.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTune(**{"layers": [1], **settings})


def test_a_layer_that_does_not_exist_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="Layer 4 does not exist"):
        tuner([1, 4]).editable_layers(make_workspace(tiny))
