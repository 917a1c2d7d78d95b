"""`LocateThenEdit`: layers, keys, values and a solver put together, against references one text at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.parts import Assigned, Recording, prepared
from helpers.references import (
    CONTEXTS,
    changed,
    hooks_left,
    make_workspace,
    matrix_of,
    projection_of,
    reference_block,
    reference_keys,
    requests,
    target_log_probabilities,
    tokens,
    weights,
)
from torch import Tensor

from lit_edit.editors import LocateThenEdit, Plan
from lit_edit.editors.keys import BareKey, TypeMeanKey
from lit_edit.editors.layers import ActivationSelection, FixedLayers, WilKE
from lit_edit.editors.restraints import RECT
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer
from lit_edit.model.hooks import read_inputs
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession, Preparation


def values_at(site: Any = "mlp", **settings: Any) -> ValueOptimizer:
    return ValueOptimizer(site, **{"lr": 0.1, "steps": 5, "stop_loss": 0.0, "weight_decay": 0.01, **settings})


def rome(layer: int = 1, **settings: Any) -> LocateThenEdit:
    return LocateThenEdit(FixedLayers([layer]), values_at(**settings), ROME(), contexts=2)


EDITORS: dict[str, tuple[int, Callable[[], LocateThenEdit]]] = {  # the largest batch, the editor
    "rome": (1, rome),
    "memit": (
        4,
        lambda: LocateThenEdit(
            FixedLayers([0, 1, 2]), values_at("block"), MEMIT(preservation=5.0, memory=True), TypeMeanKey()
        ),
    ),
    "alphaedit": (
        4,
        lambda: LocateThenEdit(
            FixedLayers([0, 2]), values_at("block"), AlphaEdit(threshold=0.1, ridge=1.0), TypeMeanKey()
        ),
    ),
    "mose": (
        4,
        lambda: LocateThenEdit(
            ActivationSelection(steps=2, reach=0.1), values_at(constraint=NormMatched()), MOSE(preservation=1.0)
        ),
    ),
    "mose-key": (
        4,
        lambda: LocateThenEdit(
            ActivationSelection(steps=2, reach=0.1), values_at(constraint=NormMatched()), MOSEKey(preservation=1.0)
        ),
    ),
    "emmet": (
        4,
        lambda: LocateThenEdit(
            FixedLayers([0, 2]), values_at("block"), EMMET(preservation=2.0, memory=True), TypeMeanKey()
        ),
    ),
    "rome with two keys": (
        1,
        lambda: LocateThenEdit(FixedLayers([1]), values_at(), ROME(memory=True), value_keys=BareKey()),
    ),
    "wilke": (
        4,
        lambda: LocateThenEdit(WilKE([0, 1, 2], MEMIT(5.0), steps=2), values_at(), MEMIT(5.0, memory=True)),
    ),
    "rect on memit": (
        4,
        lambda: LocateThenEdit(
            FixedLayers([0, 2]), values_at("block"), MEMIT(5.0, memory=True), TypeMeanKey(), restraints=[RECT(0.4)]
        ),
    ),
}


@pytest.fixture(params=["gpt2", "llama"])  # stored transposed, and as it is
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def edit(editor: LocateThenEdit, workspace: Workspace, batch: Sequence[EditRequest]) -> Plan:
    plan = editor.plan(workspace, batch)
    editor.apply(workspace, plan)
    return plan


# What every combination does


@pytest.mark.parametrize("name", EDITORS)
def test_two_batches_one_after_the_other(tiny, name: str) -> None:
    """Planning changes nothing, applying the chosen layers alone; keys are remembered as the edited model has them."""
    workspace = prepared(tiny)
    size, make = EDITORS[name]
    editor = make()
    expected: dict[int, list[Tensor]] = {}
    for batch in (requests()[:size], requests()[-size:]):
        before = weights(workspace.model)
        plan = editor.plan(workspace, batch)
        assert changed(before, workspace.model) == set()
        applied = editor.apply(workspace, plan)
        edited = sorted({layer for layers in plan.layers for layer in layers})
        assert [item.layer for item in applied] == edited
        assert set(edited) <= set(editor.editable_layers(workspace))
        assert changed(before, workspace.model) == {workspace.architecture[layer].name for layer in edited}
        assert hooks_left(workspace.model) == 0
        for item in applied:
            part = workspace.architecture[item.layer]
            old = before[part.name].T if part.transposed else before[part.name]
            change = float((part.weight - old).norm() / old.norm())
            assert change > 0
            assert item.relative_change == pytest.approx(change, rel=1e-5)
        # A layer's key depends on the layers below alone, which were edited before it.
        for layer in edited:
            for request, layers in zip(batch, plan.layers, strict=True):
                if layer in layers:
                    keys = editor.keys.average(reference_keys(workspace, request, layer))
                    expected.setdefault(layer, []).append(keys)
    assert workspace.edits == 2 * size
    for layer, site in workspace.sites.items():
        columns = expected.get(layer, [])
        assert site.edits == len(site.owners) == len(columns)
        if columns:
            torch.testing.assert_close(site.keys.double(), torch.stack(columns, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, (size, _) in EDITORS.items() if size > 1])
def test_the_order_of_requests_in_a_batch_does_not_matter(tiny, name: str) -> None:
    ends = []
    for order in (requests(), requests()[::-1]):
        workspace = prepared(tiny)
        edit(EDITORS[name][1](), workspace, order)
        ends.append(weights(workspace.model))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-4)


# ROME


@pytest.mark.parametrize("layer", [0, 2])
def test_rome_writes_the_value_at_the_recomputed_key(tiny, layer: int) -> None:
    workspace, editor = prepared(tiny), rome(layer)
    for request in requests():
        plan = edit(editor, workspace, [request])
        key = reference_keys(workspace, request, layer).mean(0)
        wanted = plan.data.targets[0][layer].double()
        torch.testing.assert_close(matrix_of(workspace.model, layer) @ key, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_edited_model_answers_as_the_optimisation_said(tiny) -> None:
    # The optimisation changes one position, the weight all of them. With a covariance of exactly the other positions of
    # the text, the least change leaves those alone, and both must agree.
    workspace = make_workspace(tiny, CONTEXTS[:1])
    for request in requests():
        ids, start, last = tokens(workspace.tokenizer, "", request)
        with read_inputs({1: projection_of(workspace.model, 1)}) as seen:
            workspace.model(input_ids=torch.tensor([ids]))
        others = seen[1][0, [t for t in range(len(ids)) if t != last]]
        gram = others.T @ others
        workspace.site(1).covariance = gram + 1e-9 * gram.trace() * torch.eye(len(gram), dtype=torch.float64)
        editor = LocateThenEdit(FixedLayers([1]), values_at(constraint=NormClamp(4.0)), ROME(), contexts=0)
        before = float(target_log_probabilities(workspace.model, ids, start).sum().exp())
        with torch.enable_grad():
            plan = editor.plan(workspace, [request])
        editor.apply(workspace, plan)
        after = float(target_log_probabilities(workspace.model, ids, start).sum().exp())
        assert after == pytest.approx(plan.probability[0], rel=1e-3, abs=1e-7)
        assert after > 1.05 * before


def test_rome_refuses_a_batch_before_anything_happens(tiny) -> None:
    model, tokenizer = tiny
    editor = LocateThenEdit(FixedLayers([1]), values_at(), ROME(covariance=False), contexts=0)
    session = EditSession(model, tokenizer, editor, Preparation(corpus=[]))
    before = weights(model)
    message = "ROME writes one fact at a time and got 2 in a batch: set batch_size to 1, or use MEMIT"
    for refused in (lambda: editor.check(session.workspace, 2), lambda: session.check(requests(), 2)):
        with pytest.raises(ValueError, match=message):
            refused()
    assert changed(before, model) == set()
    session.check(requests(), 1)
    for name in ("memit", "alphaedit", "mose"):
        EDITORS[name][1]().check(prepared(tiny), 50)


def test_a_covariance_without_a_null_space_is_found_before_the_first_edit(tiny) -> None:
    workspace = prepared(tiny)
    part = workspace.architecture[2]
    editor = LocateThenEdit(FixedLayers([0, 2]), values_at("block"), AlphaEdit(threshold=0.1))
    editor.check(workspace, 1)
    workspace.site(2).covariance = torch.eye(part.weight.shape[1], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"no null space in layer '{re.escape(part.name)}'"):
        editor.check(workspace, 1)


# MEMIT


@pytest.mark.parametrize("layer", [0, 2])
def test_one_layer_without_preservation_brings_the_block_to_its_value(tiny, layer: int) -> None:
    workspace = prepared(tiny, CONTEXTS[:1])
    editor = LocateThenEdit(FixedLayers([layer]), values_at("block"), MEMIT(preservation=1e-9), contexts=0)
    plan = edit(editor, workspace, requests()[:3])
    for request, targets in zip(requests(), plan.data.targets[:3], strict=False):
        found = reference_block(workspace, request, layer)
        torch.testing.assert_close(found, targets[layer].double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2), (0, 2)])
@pytest.mark.parametrize("preservation", [1e-9, 0.5])
def test_the_residual_is_spread_over_the_layers_left(tiny, layers: tuple[int, ...], preservation: float) -> None:
    workspace = prepared(tiny)
    model: Any = copy.deepcopy(workspace.model)
    batch = requests()
    editor = LocateThenEdit(FixedLayers(list(layers)), values_at("block"), MEMIT(preservation), TypeMeanKey())
    plan = edit(editor, workspace, batch)

    plain = Workspace.of(model, workspace.tokenizer, CONTEXTS)
    share = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    wanted = torch.stack([targets[layers[-1]].double() for targets in plan.data.targets], dim=1)
    for done, layer in enumerate(layers):
        keys = torch.stack([share @ reference_keys(plain, r, layer) for r in batch], dim=1)
        now = torch.stack([reference_block(plain, r, layers[-1]) for r in batch], dim=1)
        residual = (wanted - now) / (len(layers) - done)
        gram = preservation * workspace.site(layer).covariance + keys @ keys.T
        delta = torch.linalg.solve(gram, keys @ residual.T).T
        weight = projection_of(model, layer).weight
        weight += delta.T if model.config.model_type == "gpt2" else delta
        found, expected = matrix_of(workspace.model, layer), matrix_of(model, layer)
        assert float((found - expected).norm() / delta.norm()) < 1e-3


# MOSE


def test_twenty_rotations_leave_every_spectrum_as_it_was(tiny) -> None:
    workspace = prepared(tiny, CONTEXTS[:2], torch.float32)
    before = weights(workspace.model)
    spectra = [torch.linalg.svdvals(matrix_of(workspace.model, layer).double()) for layer in range(4)]
    values = values_at(constraint=NormMatched(), steps=2, lr=0.4, lr_unit="relative")
    editor = LocateThenEdit(ActivationSelection([0, 2], steps=1, reach=0.05), values, MOSE(preservation=0.5))
    edited: dict[int, float] = {}
    for i in range(20):
        plan = editor.plan(workspace, [requests()[i % 4]])
        for item in editor.apply(workspace, plan):
            edited[item.layer] = edited.get(item.layer, 0.0) + item.relative_change
    assert sum(edited.values()) > 1  # not for want of rotation
    assert changed(before, workspace.model) == {workspace.architecture[layer].name for layer in edited}
    for layer, spectrum in enumerate(spectra):
        found = torch.linalg.svdvals(matrix_of(workspace.model, layer).double())
        torch.testing.assert_close(found, spectrum, rtol=0, atol=1e-6 * float(spectrum[0]))


# ROME's two keys


@pytest.mark.parametrize("layer", [0, 2])
def test_two_keys_are_those_of_the_released_code(tiny, layer: int) -> None:
    workspace = prepared(tiny)
    editor = LocateThenEdit(FixedLayers([layer]), values_at(), ROME(), value_keys=BareKey())
    for request in requests():
        before = matrix_of(workspace.model, layer)
        keys = reference_keys(workspace, request, layer)
        mean, bare = keys.mean(0), keys[0]
        plan = edit(editor, workspace, [request])
        wanted = plan.data.targets[0][layer].double()
        # The optimisation started from the bare prompt's output.
        alone = editor.values.optimise(workspace, [request], plan.data.problems, BareKey())
        assert alone.targets[0][layer].shape == wanted.shape
        u = torch.linalg.inv(workspace.site(layer).covariance) @ mean
        expected = before + torch.outer(wanted - before @ bare, u) / torch.dot(u, bare)
        after = matrix_of(workspace.model, layer)
        assert float((after - expected).norm() / (expected - before).norm()) < 1e-4
        torch.testing.assert_close(after @ bare, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_values_start_from_the_key_they_are_taken_at(tiny) -> None:
    workspace = prepared(tiny)
    nothing = values_at(lr=1e-12, steps=1)
    for value_keys, pick in ((BareKey(), 0), (None, slice(None))):
        editor = LocateThenEdit(FixedLayers([1]), nothing, ROME(), value_keys=value_keys)
        with torch.enable_grad():
            plan = editor.plan(workspace, requests()[:1])
        keys = reference_keys(workspace, requests()[0], 1)[pick].reshape(-1, keys_width(workspace)).mean(0)
        start = matrix_of(workspace.model, 1) @ keys
        torch.testing.assert_close(plan.data.targets[0][1].double(), start, rtol=1e-4, atol=1e-5)


def keys_width(workspace: Workspace) -> int:
    return int(workspace.architecture[1].weight.shape[1])


def test_without_contexts_two_keys_are_one(tiny) -> None:
    ends = []
    for value_keys in (None, BareKey()):
        workspace = prepared(tiny, CONTEXTS[:1])
        edit(LocateThenEdit(FixedLayers([1]), values_at(), ROME(), value_keys=value_keys), workspace, requests()[:1])
        ends.append(matrix_of(workspace.model, 1))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-9)


def test_value_keys_need_a_solver_that_can_tell_them_apart() -> None:
    for solver in (MEMIT(), EMMET(), AlphaEdit(), MOSE(), MOSEKey()):
        with pytest.raises(ValueError, match="has one key per request and cannot take `value_keys`"):
            LocateThenEdit(FixedLayers([0]), values_at(), solver, value_keys=BareKey())


# WilKE


def test_the_score_of_the_layer_taken_is_the_change_that_is_made(tiny) -> None:
    # No memory, and the editor's own number of steps: what was tried out is what is done.
    workspace = prepared(tiny)
    policy = WilKE([0, 1, 2])
    for value_keys in (None, BareKey()):
        editor = LocateThenEdit(policy, values_at(), ROME(), value_keys=value_keys)
        for request in requests()[:2]:
            with torch.enable_grad():
                (choice,) = policy.choose(workspace, [request], editor.values, editor.keys, editor.value_keys)
                plan = editor.plan(workspace, [request])
            (item,) = editor.apply(workspace, plan)
            assert item.layer == choice.center
            assert item.relative_change == pytest.approx(choice.scores[item.layer], rel=1e-4)


def test_wilke_asks_for_what_its_own_solver_needs() -> None:
    plain = ROME(covariance=False)
    assert LocateThenEdit(WilKE([0, 1]), values_at(), plain).needs_covariances
    assert not LocateThenEdit(WilKE([0, 1], plain), values_at(), plain).needs_covariances
    with pytest.raises(ValueError, match="WilKE needs values of `site: mlp`"):
        LocateThenEdit(WilKE([0, 1]), values_at("block"), MEMIT())


# Layers by request


def test_each_layer_is_edited_with_its_own_requests_and_remembers_its_own_past(tiny) -> None:
    workspace, layers = prepared(tiny), {"0": (0, 1), "1": (1, 2), "2": (2,), "3": (0,)}
    solver = Recording(MEMIT(preservation=5.0, memory=True))
    editor = LocateThenEdit(Assigned(layers), values_at(), solver, contexts=2)
    past: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for batch in (requests()[:3], requests()[3:]):
        solver.asked.clear()
        plan = edit(editor, workspace, batch)
        assert plan.layers == [layers[r.case_id] for r in batch]
        assert [asked.layer for asked in solver.asked] == sorted(plan.counts)
        for asked in solver.asked:
            layer, before = asked.layer, torch.stack(past[asked.layer], dim=1) if past[asked.layer] else None
            mine = [i for i, r in enumerate(batch) if layer in layers[r.case_id]]
            keys = torch.stack([reference_keys(workspace, batch[i], layer).mean(0) for i in mine], dim=1)
            wanted = torch.stack([plan.data.targets[i][layer] for i in mine], dim=1)
            torch.testing.assert_close(asked.keys, keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(asked.targets, wanted.double(), rtol=0, atol=0)
            assert asked.remembered.shape[1] == len(past[layer])
            if before is not None:
                torch.testing.assert_close(asked.remembered, before, rtol=1e-5, atol=1e-5)
            gram = 5 * workspace.site(layer).covariance + asked.remembered @ asked.remembered.T
            delta = torch.linalg.solve(gram + keys @ keys.T, keys @ (wanted.double() - asked.weight @ keys).T).T
            torch.testing.assert_close(matrix_of(workspace.model, layer), asked.weight + delta, rtol=0, atol=1e-5)
            past[layer] += list(keys.T)


# Settings


@pytest.mark.parametrize("settings", [{"contexts": -1}, {"context_length": 0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="contexts >= 0 and context_length >= 1"):
        LocateThenEdit(FixedLayers([0]), values_at(), ROME(), **settings)


def test_parts_that_do_not_go_together_are_refused_when_put_together() -> None:
    with pytest.raises(ValueError, match="ActivationSelection needs values of `site: mlp`"):
        LocateThenEdit(ActivationSelection(), values_at("block"), MEMIT())


def test_an_editor_says_what_it_needs(tiny) -> None:
    workspace = make_workspace(tiny)
    assert rome().needs_covariances
    assert not LocateThenEdit(FixedLayers([1]), values_at(), ROME(covariance=False)).needs_covariances
    assert LocateThenEdit(FixedLayers([1]), values_at(), ROME(), contexts=3, context_length=4).context_sampling == (
        3,
        4,
    )
    assert LocateThenEdit(FixedLayers([2, 0]), values_at(), ROME()).editable_layers(workspace) == [0, 2]
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        LocateThenEdit(FixedLayers([2, 9]), values_at(), ROME()).editable_layers(workspace)
