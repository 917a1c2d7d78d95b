from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
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
from safetensors.torch import load, save
from torch import Tensor

from lit_edit.algebra.updates import Additive, Update
from lit_edit.editors import LocateThenEdit, Plan
from lit_edit.editors.keys import BareKey, KeyAverage, MeanKey, TypeMeanKey
from lit_edit.editors.layers import ActivationSelection, Choice, FixedLayers, LayerPolicy, WilKE
from lit_edit.editors.restraints import PRUNE, RECT, Ground, Restraint
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Problem, Solver
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer
from lit_edit.model.families import Architecture
from lit_edit.model.hooks import read_inputs
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession


class Assigned(LayerPolicy):
    """Gives each request the layers set for it."""

    def __init__(self, layers: dict[str, tuple[int, ...]]) -> None:
        self.layers = layers

    def candidates(self, architecture: Architecture) -> list[int]:
        return sorted({layer for layers in self.layers.values() for layer in layers})

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        return [Choice(self.layers[r.case_id], self.layers[r.case_id][-1], {}) for r in requests]


class Recording(Solver):
    """Another solver, and every problem it was given."""

    def __init__(self, inner: Solver) -> None:
        super().__init__(inner.use_memory)
        self.inner, self.problems, self.mixes_keys = inner, list[Problem](), inner.mixes_keys

    def solve(self, problem: Problem) -> Update:
        # The problem holds the weight itself where its dtype allows: keep what it was.
        self.problems.append(replace(problem, weight=problem.weight.clone()))
        return self.inner.solve(problem)


def with_covariances(workspace: Workspace) -> Workspace:
    """Made-up covariances of decaying spectrum, in place of a corpus."""
    generator = torch.Generator().manual_seed(5)
    for part in workspace.architecture.layers:
        p = part.weight.shape[1]
        basis = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64)).Q
        workspace.covariances[part.index] = (basis / torch.arange(1, p + 1)) @ basis.T
    # What a session keeps for restraints on the sum of updates.
    workspace.originals.keep()
    return workspace


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
each_editor = pytest.mark.parametrize("name", EDITORS)
two_families = pytest.mark.parametrize("family", ["gpt2", "llama"])  # stored transposed, and as it is


def edit(editor: LocateThenEdit, workspace: Workspace, batch: Sequence[EditRequest]) -> Plan:
    plan = editor.plan(workspace, batch)
    editor.apply(workspace, plan)
    return plan


# What every combination does


@each_editor
def test_planning_changes_nothing_and_applying_changes_the_editable_weights_only(tiny, name: str) -> None:
    workspace = with_covariances(make_workspace(tiny))
    size, make = EDITORS[name]
    editor, before = make(), weights(workspace.model)
    plan = editor.plan(workspace, requests()[:size])
    assert changed(before, workspace.model) == set()
    assert not any(int(count) for count in editor.state_dict().values())  # no edits, no memory
    applied = editor.apply(workspace, plan)
    edited = {layer for layers in plan.layers for layer in layers}
    assert {item.layer for item in applied} == edited
    assert edited <= set(editor.editable_layers(workspace))
    assert changed(before, workspace.model) == {workspace.architecture[layer].name for layer in edited}
    assert hooks_left(workspace.model) == 0
    for item in applied:
        part = workspace.architecture[item.layer]
        old = before[part.name].T if part.transposed else before[part.name]
        change = float((part.weight - old).norm() / old.norm())
        assert change > 0
        assert item.relative_change == pytest.approx(change, rel=1e-5)
        item.update.undo_(part.weight)
        torch.testing.assert_close(part.weight, old, rtol=0, atol=1e-10)


@each_editor
def test_the_order_of_requests_in_a_batch_does_not_matter(tiny, name: str) -> None:
    size, make = EDITORS[name]
    batch = requests()[:size]
    ends = []
    for order in (batch, batch[::-1]):
        workspace = with_covariances(make_workspace((copy.deepcopy(tiny[0]), tiny[1])))
        edit(make(), workspace, order)
        ends.append(weights(workspace.model))
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=0, atol=1e-4)


@each_editor
def test_keys_are_remembered_by_layer_and_edit_as_the_edited_model_has_them(tiny, name: str) -> None:
    workspace = with_covariances(make_workspace(tiny))
    size, make = EDITORS[name]
    editor = make()
    expected: dict[int, list[Tensor]] = {}
    for batch in (requests()[:size], requests()[-size:]):
        plan = edit(editor, workspace, batch)
        # A layer's key depends on the layers below alone, which were edited before it.
        for layer in sorted({layer for layers in plan.layers for layer in layers}):
            for request, layers in zip(batch, plan.layers, strict=True):
                if layer in layers:
                    keys = editor.keys.average(reference_keys(workspace, request, layer))
                    expected.setdefault(layer, []).append(keys)
    state = editor.state_dict()
    kinds = ("memory", "edits_here", "rank_here")
    own = {name for name in state if not name.startswith("solver.")}
    assert own == {f"{kind}.{layer}" for layer in expected for kind in kinds} | {"edits", "finished_at"}
    assert int(state["edits"]) == 2 * size
    for layer, columns in expected.items():
        assert int(state[f"edits_here.{layer}"]) == len(columns)
    for layer, columns in expected.items():
        found = state[f"memory.{layer}"].double()
        torch.testing.assert_close(found, torch.stack(columns, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["memit", "alphaedit", "mose", "mose-key", "emmet", "rect on memit"])
def test_an_editor_restored_from_its_state_edits_on_as_the_first_one(tiny, name: str) -> None:
    workspace = with_covariances(make_workspace(tiny))
    size, make = EDITORS[name]
    editor = make()
    edit(editor, workspace, requests()[:1])
    kept, model = load(save(editor.state_dict())), copy.deepcopy(workspace.model)
    ends = []
    for state in (None, kept, {}):
        other = workspace if state is None else make_workspace((copy.deepcopy(model), tiny[1]))
        if state is not None:  # make_workspace gives biases of its own: take the very same model
            other.model.load_state_dict(model.state_dict())
            other.covariances = workspace.covariances
        successor = editor if state is None else make()
        if state:
            successor.load_state_dict(state)
        edit(successor, other, requests()[1:size])
        ends.append((weights(other.model), successor.state_dict()))
    (first, remembered), (resumed, remembered_too), (forgetful, _) = ends
    for key, tensor in first.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=0)
    assert set(remembered) == set(remembered_too)
    for key, tensor in remembered.items():
        torch.testing.assert_close(remembered_too[key], tensor, rtol=0, atol=0)
    assert any(not torch.equal(forgetful[key], tensor) for key, tensor in first.items())


# ROME


@pytest.mark.parametrize("layer", [0, 2])
def test_rome_writes_the_value_at_the_recomputed_key(tiny, layer: int) -> None:
    workspace, editor = with_covariances(make_workspace(tiny)), rome(layer)
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
        workspace.covariances[1] = gram + 1e-9 * gram.trace() * torch.eye(len(gram), dtype=torch.float64)
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
    session = EditSession(model, tokenizer, editor, corpus=(), corpus_name="none")
    before = weights(model)
    message = "ROME writes one fact at a time and got 2 in a batch: set batch_size to 1, or use MEMIT"
    for refused in (lambda: editor.check(session.workspace, 2), lambda: session.check(requests(), 2)):
        with pytest.raises(ValueError, match=message):
            refused()
    assert changed(before, model) == set()
    session.check(requests(), 1)
    for name in ("memit", "alphaedit", "mose"):
        EDITORS[name][1]().check(session.workspace, 50)


def test_a_covariance_without_a_null_space_is_found_before_the_first_edit(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny))
    part = workspace.architecture[2]
    editor = LocateThenEdit(FixedLayers([0, 2]), values_at("block"), AlphaEdit(threshold=0.1))
    editor.check(workspace, 1)
    workspace.covariances[2] = torch.eye(part.weight.shape[1], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"no null space in layer '{re.escape(part.name)}'"):
        editor.check(workspace, 1)


# MEMIT


@pytest.mark.parametrize("layer", [0, 2])
def test_one_layer_without_preservation_brings_the_block_to_its_value(tiny, layer: int) -> None:
    workspace = with_covariances(make_workspace(tiny, CONTEXTS[:1]))
    editor = LocateThenEdit(FixedLayers([layer]), values_at("block"), MEMIT(preservation=1e-9), contexts=0)
    plan = edit(editor, workspace, requests()[:3])
    for request, targets in zip(requests(), plan.data.targets[:3], strict=False):
        found = reference_block(workspace, request, layer)
        torch.testing.assert_close(found, targets[layer].double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2), (0, 2)])
@pytest.mark.parametrize("preservation", [1e-9, 0.5])
def test_the_residual_is_spread_over_the_layers_left(tiny, layers: tuple[int, ...], preservation: float) -> None:
    workspace = with_covariances(make_workspace(tiny))
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
        gram = preservation * workspace.covariances[layer] + keys @ keys.T
        delta = torch.linalg.solve(gram, keys @ residual.T).T
        weight = projection_of(model, layer).weight
        weight += delta.T if model.config.model_type == "gpt2" else delta
        found, expected = matrix_of(workspace.model, layer), matrix_of(model, layer)
        assert float((found - expected).norm() / delta.norm()) < 1e-3


# MOSE


def test_twenty_rotations_leave_every_spectrum_as_it_was(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny, CONTEXTS[:2], torch.float32))
    before = weights(workspace.model)
    spectra = [torch.linalg.svdvals(matrix_of(workspace.model, layer).double()) for layer in range(4)]
    values = values_at(constraint=NormMatched(), steps=3, lr=0.3, lr_unit="relative")
    editor = LocateThenEdit(ActivationSelection(steps=1, reach=0.05), values, MOSE(preservation=0.5))
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


@two_families
@pytest.mark.parametrize("layer", [0, 2])
def test_two_keys_are_those_of_the_released_code(tiny, layer: int) -> None:
    workspace = with_covariances(make_workspace(tiny))
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
        u = torch.linalg.inv(workspace.covariances[layer]) @ mean
        expected = before + torch.outer(wanted - before @ bare, u) / torch.dot(u, bare)
        after = matrix_of(workspace.model, layer)
        assert float((after - expected).norm() / (expected - before).norm()) < 1e-4
        torch.testing.assert_close(after @ bare, wanted, rtol=1e-5, atol=1e-5)


@two_families
@torch.no_grad()
def test_values_start_from_the_key_they_are_taken_at(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny))
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


@two_families
def test_without_contexts_two_keys_are_one(tiny) -> None:
    ends = []
    for value_keys in (None, BareKey()):
        workspace = with_covariances(make_workspace((copy.deepcopy(tiny[0]), tiny[1]), CONTEXTS[:1]))
        edit(LocateThenEdit(FixedLayers([1]), values_at(), ROME(), value_keys=value_keys), workspace, requests()[:1])
        ends.append(matrix_of(workspace.model, 1))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-9)


def test_value_keys_need_a_solver_that_can_tell_them_apart() -> None:
    for solver in (MEMIT(), EMMET(), AlphaEdit(), MOSE(), MOSEKey()):
        with pytest.raises(ValueError, match="has one key per request and cannot take `value_keys`"):
            LocateThenEdit(FixedLayers([0]), values_at(), solver, value_keys=BareKey())


# WilKE


@two_families
def test_the_score_of_the_layer_taken_is_the_change_that_is_made(tiny) -> None:
    # No memory, and the editor's own number of steps: what was tried out is what is done.
    workspace = with_covariances(make_workspace(tiny))
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


# The ablations of MOSE


@two_families
@pytest.mark.parametrize("kind", [MOSE, MOSEKey])
def test_the_layers_of_the_papers_three_settings(tiny, kind: Callable[[], Solver]) -> None:
    workspace = with_covariances(make_workspace(tiny))
    values = values_at(constraint=NormMatched(), lr_unit="relative")

    def planned(policy: LayerPolicy) -> tuple[int, ...]:
        model = weights(workspace.model)
        plan = edit(LocateThenEdit(policy, values, kind()), workspace, requests()[:1])
        moved = changed(model, workspace.model)
        assert moved == {workspace.architecture[layer].name for layer in plan.layers[0]}
        workspace.model.load_state_dict({name: model[name] for name in moved}, strict=False)
        return plan.layers[0]

    assert planned(FixedLayers([2])) == (2,)
    (selected,) = planned(ActivationSelection(neighbours=0, steps=3))
    assert planned(ActivationSelection(neighbours=1, steps=3)) == tuple(
        layer for layer in (selected - 1, selected, selected + 1) if 0 <= layer < 4
    )


# Restraints


def pruning(**settings: Any) -> LocateThenEdit:
    """ROME with steps so long that its updates outgrow the weight."""
    values = values_at(lr=3.0, lr_unit="relative", steps=5, weight_decay=0.0)
    return LocateThenEdit(FixedLayers([0, 2]), values, ROME(), contexts=2, restraints=[PRUNE(20.0, **settings)])


def prune_by_hand(original: Tensor, weight: Tensor) -> Tensor:
    """W_0 + ΔW' from all singular values, with the logarithm as it is written."""
    u, sigma, vt = torch.linalg.svd(weight - original, full_matrices=False)
    largest = torch.linalg.svdvals(original)[0]
    base = torch.tensor(20.0, dtype=torch.float64).log()
    cut = torch.where(sigma > largest, sigma.log() / base - largest.log() / base + largest, sigma)
    assert (cut <= sigma).all()
    assert (cut < 0.9 * sigma).any()  # not for want of something to prune
    return original + u @ torch.diag(cut) @ vt


@two_families
def test_every_update_is_restrained_before_it_is_written(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny))
    solver, rect = Recording(MEMIT(preservation=5.0)), RECT(0.3)
    editor = LocateThenEdit(FixedLayers([0, 2]), values_at("block"), solver, TypeMeanKey(), restraints=[rect])
    edit(editor, workspace, requests())
    for layer, problem in zip((0, 2), solver.problems, strict=True):
        delta = solver.inner.solve(problem).delta(problem.weight)
        change = matrix_of(workspace.model, layer) - problem.weight
        kept = change != 0
        assert int(kept.sum()) == round(0.3 * change.numel())
        torch.testing.assert_close(change[kept], delta[kept], rtol=0, atol=1e-12)
        relative = (delta / problem.weight).abs()
        assert relative[kept].min() >= relative[~kept].max()


@two_families
def test_restraints_work_in_the_order_given(tiny) -> None:
    class Double(Restraint):
        def restrain(self, update: Update, ground: Ground) -> Update:
            return Additive(2 * update.delta(ground.weight))

    class Clip(Restraint):
        def restrain(self, update: Update, ground: Ground) -> Update:
            return Additive(update.delta(ground.weight).clamp(-1e-3, 1e-3))

    largest = []
    for restraints in ([Double(), Clip()], [Clip(), Double()]):
        workspace = with_covariances(make_workspace((copy.deepcopy(tiny[0]), tiny[1])))
        editor = LocateThenEdit(FixedLayers([1]), values_at(), ROME(), contexts=2, restraints=restraints)
        edit(editor, workspace, requests()[:1])
        largest.append(float((matrix_of(workspace.model, 1) - workspace.original(1)).abs().max()))
    assert largest == [pytest.approx(1e-3), pytest.approx(2e-3)]


@two_families
def test_what_a_restraint_is_told(tiny) -> None:
    seen: list[tuple[str, Ground]] = []

    class Listening(Restraint):
        needs_original = True

        def restrain(self, update: Update, ground: Ground) -> Update:
            seen.append(("update", replace(ground, original=ground.original.clone())))
            return update

        def total(self, ground: Ground, last: bool) -> Update | None:
            seen.append(("last" if last else "total", replace(ground, original=ground.original.clone())))
            return None

    workspace = with_covariances(make_workspace(tiny))
    before = [matrix_of(workspace.model, layer) for layer in (0, 1)]
    layers: dict[str, tuple[int, ...]] = {"0": (0,), "1": (0, 1), "2": (1,), "3": (1,)}
    editor = LocateThenEdit(Assigned(layers), values_at(), MEMIT(5.0), contexts=2, restraints=[Listening()])
    assert editor.needs_originals
    assert not editor.needs_gradients
    edit(editor, workspace, requests()[:2])
    edit(editor, workspace, requests()[2:])
    editor.finish(workspace)
    names = [workspace.architecture[layer].name for layer in (0, 1)]
    expected = [
        # what, layer, edits there, of this batch there, edits, batch, rank there
        ("update", 0, 0, 2, 0, 2, 0),
        ("update", 1, 0, 1, 0, 2, 0),
        ("total", 0, 0, 2, 0, 2, 2),
        ("total", 1, 0, 1, 0, 2, 1),
        ("update", 1, 1, 2, 2, 2, 1),
        ("total", 0, 2, 0, 2, 2, 2),
        ("total", 1, 1, 2, 2, 2, 3),
        ("last", 0, 2, 0, 4, 0, 2),
        ("last", 1, 3, 0, 4, 0, 3),
    ]
    told = [(what, names.index(g.layer), g.edits_here, g.batch_here, g.edits, g.batch, g.rank_here) for what, g in seen]
    assert told == expected
    for _, ground in seen:
        assert torch.equal(ground.original, before[names.index(ground.layer)])


@two_families
def test_pruned_once_at_the_end(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny))
    plain = with_covariances(make_workspace((copy.deepcopy(tiny[0]), tiny[1])))
    editor = pruning()
    unrestrained = LocateThenEdit(editor.layers, editor.values, ROME(), contexts=2)
    for request in requests()[:3]:
        edit(editor, workspace, [request])
        edit(unrestrained, plain, [request])
    for layer in (0, 2):  # nothing before the end
        torch.testing.assert_close(matrix_of(workspace.model, layer), matrix_of(plain.model, layer), rtol=0, atol=0)
    applied = editor.finish(workspace)
    assert [item.layer for item in applied] == [0, 2]
    for item in applied:
        original, after = workspace.original(item.layer), matrix_of(workspace.model, item.layer)
        expected = prune_by_hand(original, matrix_of(plain.model, item.layer))
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-9)
        change = (after - matrix_of(plain.model, item.layer)).norm() / matrix_of(plain.model, item.layer).norm()
        assert item.relative_change == pytest.approx(float(change), rel=1e-6)


@two_families
def test_the_end_comes_once_unless_more_edits_follow(tiny) -> None:
    workspace, editor = with_covariances(make_workspace(tiny)), pruning()
    assert editor.finish(workspace) == []
    for request in requests()[:2]:
        edit(editor, workspace, [request])
    assert editor.finish(workspace)
    after = weights(workspace.model)
    assert editor.finish(workspace) == []
    assert changed(after, workspace.model) == set()
    # Resumed after the end, without new edits: what was pruned is not pruned again.
    resumed = pruning()
    resumed.load_state_dict(load(save(editor.state_dict())))
    assert resumed.finish(workspace) == []
    assert changed(after, workspace.model) == set()
    # With new ones, it is: the sum as it is now.
    edit(resumed, workspace, requests()[2:3])
    extended = matrix_of(workspace.model, 0)
    assert resumed.finish(workspace)
    expected = prune_by_hand(workspace.original(0), extended)
    torch.testing.assert_close(matrix_of(workspace.model, 0), expected, rtol=0, atol=1e-9)


@two_families
def test_a_run_cut_before_the_end_is_pruned_when_it_gets_there(tiny) -> None:
    workspace, editor = with_covariances(make_workspace(tiny)), pruning()
    for request in requests()[:2]:
        edit(editor, workspace, [request])
    resumed = pruning()
    resumed.load_state_dict(load(save(editor.state_dict())))
    assert len(resumed.finish(workspace)) == 2


@two_families
@pytest.mark.parametrize("size", [1, 3])  # a batch of three crosses a multiple of two without reaching it
def test_pruned_every_two_edits(tiny, size: int) -> None:
    workspace = with_covariances(make_workspace(tiny))
    values = values_at(lr=3.0, lr_unit="relative", weight_decay=0.0)
    solver = Recording(MEMIT(preservation=0.1))
    editor = LocateThenEdit(FixedLayers([1]), values, solver, contexts=2, restraints=[PRUNE(20.0, every_n=2)])
    batch = [*requests(), *requests()][:6]
    before = matrix_of(workspace.model, 1)
    for first in range(0, 6, size):
        edit(editor, workspace, batch[first : first + size])
        problem = solver.problems[-1]
        expected = before + solver.inner.solve(replace(problem, weight=before)).delta(before)
        torch.testing.assert_close(problem.weight, before, rtol=0, atol=0)
        if size == 3 or first % 2:
            expected = prune_by_hand(workspace.original(1), expected)
        before = matrix_of(workspace.model, 1)
        torch.testing.assert_close(before, expected, rtol=0, atol=1e-8)
    assert editor.finish(workspace) == []


@two_families
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_run_resumed_prunes_where_an_uninterrupted_one_does(tiny, cut: int) -> None:
    ends = []
    for pieces in ([requests()], [requests()[:cut], requests()[cut:]]):
        workspace = with_covariances(make_workspace((copy.deepcopy(tiny[0]), tiny[1])))
        state: dict[str, Tensor] = {}
        for piece in pieces:
            editor = pruning(every_n=2)
            if state:
                editor.load_state_dict(load(save(state)))
            for request in piece:
                edit(editor, workspace, [request])
            state = editor.state_dict()
            editor.finish(workspace)
        ends.append((weights(workspace.model), state))
    (whole, state), (resumed, state_too) = ends
    for key, tensor in whole.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=0)
    assert set(state) == set(state_too)
    for key in state:
        torch.testing.assert_close(state_too[key], state[key], rtol=0, atol=0)


@two_families
def test_layers_that_were_never_edited_are_not_pruned(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny))
    before = weights(workspace.model)
    values = values_at(lr=3.0, lr_unit="relative", weight_decay=0.0)
    layers: dict[str, tuple[int, ...]] = {"0": (1,), "1": (3,)}
    editor = LocateThenEdit(Assigned(layers), values, ROME(), contexts=2, restraints=[PRUNE(20.0)])
    edit(editor, workspace, requests()[:1])
    assert [item.layer for item in editor.finish(workspace)] == [1]
    assert changed(before, workspace.model) == {workspace.architecture[1].name}


@two_families
def test_a_session_keeps_the_originals_that_a_restraint_needs_and_finishes(tiny) -> None:
    model, tokenizer = tiny
    values = values_at(lr=3.0, lr_unit="relative", weight_decay=0.0)
    solver, policy = ROME(covariance=False), FixedLayers([1])
    originals, sessions = matrix_of(model, 1), []
    for restraints in ([PRUNE(20.0)], []):
        editor = LocateThenEdit(policy, values, solver, contexts=0, restraints=restraints)
        sessions.append(EditSession(copy.deepcopy(model), tokenizer, editor, corpus=(), corpus_name="none"))
    session, plain = sessions
    assert (session.workspace.originals.keeps, plain.workspace.originals.keeps) == (True, False)
    for one in sessions:
        for request in requests()[:2]:
            (made,) = one.apply(one.plan([request]))
            assert made.change["1"] > 0
        one.finish()
    assert set(session.workspace.originals.copies) == {session.workspace.architecture[1].name}
    assert not plain.workspace.originals.copies
    expected = prune_by_hand(originals.double(), matrix_of(plain.model, 1).double())
    torch.testing.assert_close(matrix_of(session.model, 1).double(), expected, rtol=1e-5, atol=1e-5)


# Layers by request


def test_each_layer_is_edited_with_its_own_requests_only(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny))
    layers = {"0": (0, 1), "1": (1, 2), "2": (2,), "3": (0,)}
    solver = Recording(MEMIT(preservation=5.0))
    editor = LocateThenEdit(Assigned(layers), values_at(), solver, contexts=2)
    plan = edit(editor, workspace, requests())
    assert plan.layers == [layers[r.case_id] for r in requests()]
    assert len(solver.problems) == 3
    for layer, problem in zip((0, 1, 2), solver.problems, strict=True):
        mine = [i for i, r in enumerate(requests()) if layer in layers[r.case_id]]
        keys = torch.stack([reference_keys(workspace, requests()[i], layer).mean(0) for i in mine], dim=1)
        wanted = torch.stack([plan.data.targets[i][layer] for i in mine], dim=1)
        torch.testing.assert_close(problem.keys, keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(problem.targets, wanted.double(), rtol=0, atol=0)
        assert problem.layer == workspace.architecture[layer].name
        assert problem.covariance is workspace.covariances[layer]
        expected = problem.weight + MEMIT(preservation=5.0).solve(problem).delta(problem.weight)
        torch.testing.assert_close(matrix_of(workspace.model, layer), expected, rtol=0, atol=1e-12)


def test_requests_that_choose_different_layers_are_edited_there(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny))
    solver = Recording(MOSE(preservation=1.0))
    policy = ActivationSelection(neighbours=0, steps=3, reach=None)
    values = values_at(constraint=NormMatched(), lr=0.2, lr_unit="relative")
    # A subject at the end of its prompt and one before it: the last layer is of use to the former alone.
    choices = policy.choose(workspace, requests(), values, MeanKey())
    other = next(i for i, choice in enumerate(choices) if choice.center != choices[0].center)
    batch = [requests()[0], requests()[other]]
    before = weights(workspace.model)
    plan = edit(LocateThenEdit(policy, values, solver, contexts=2), workspace, batch)
    centers = [choices[0].center, choices[other].center]
    assert plan.layers == [(center,) for center in centers]
    assert changed(before, workspace.model) == {workspace.architecture[center].name for center in centers}
    for problem in solver.problems:
        layer = next(part.index for part in workspace.architecture.layers if part.name == problem.layer)
        i = centers.index(layer)
        assert problem.keys.shape[1] == 1
        key = reference_keys(workspace, batch[i], layer).mean(0)
        torch.testing.assert_close(problem.keys[:, 0], key, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(problem.targets[:, 0], plan.data.targets[i][layer].double(), rtol=0, atol=0)


def test_a_shared_memory_holds_each_layers_own_past(tiny) -> None:
    workspace = with_covariances(make_workspace(tiny))
    solver = Recording(MEMIT(preservation=5.0, memory=True))
    editor = LocateThenEdit(Assigned({"0": (0,), "1": (0, 1), "2": (1,), "3": (1,)}), values_at(), solver, contexts=2)
    for request in requests():
        edit(editor, workspace, [request])
    sizes = [(p.layer, 0 if p.memory is None else p.memory.shape[1]) for p in solver.problems]
    zero, one = workspace.architecture[0].name, workspace.architecture[1].name
    assert sizes == [(zero, 0), (zero, 1), (one, 0), (one, 1), (one, 2)]
    torch.testing.assert_close(solver.problems[-1].memory, editor.memory[1][:, :2].double(), rtol=0, atol=0)


# Settings


@pytest.mark.parametrize("settings", [{"contexts": -1}, {"context_length": 0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="contexts >= 0 and context_length >= 1"):
        LocateThenEdit(FixedLayers([0]), values_at(), ROME(), **settings)


def test_parts_that_do_not_go_together_are_refused_when_put_together() -> None:
    with pytest.raises(ValueError, match="Selection by activation needs values of `site: mlp`"):
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
