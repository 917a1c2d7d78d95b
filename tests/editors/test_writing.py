"""What all editors share: one way to write, restraints, counts, all of a batch or nothing, going on from a state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.parts import Assigned, Recording, continued, prepared, states
from helpers.references import changed, make_workspace, matrix_of, requests, weights
from torch import Tensor

from lit_edit import load_editor
from lit_edit.algebra.updates import Additive, Update
from lit_edit.editors import MEND, Editor, FineTune, LocateThenEdit, MoseOFT, Plan
from lit_edit.editors.keys import TypeMeanKey
from lit_edit.editors.layers import ActivationSelection, FixedLayers
from lit_edit.editors.mend.network import HyperNetwork
from lit_edit.editors.restraints import PRUNE, RECT, OEditPlus, Restraint
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Solver
from lit_edit.editors.values import NormMatched, OEdit, ValueOptimizer
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession, Preparation

LAYERS = [1, 2]
two_families = pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)  # stored transposed, and as it is
llama = pytest.mark.parametrize("family", ["llama"], indirect=True)
each_kind = pytest.mark.parametrize("kind", ["fine-tuning", "mend", "memit"])
Make = Callable[..., Editor]


class Carrying(MEMIT):
    """Keeps something from edit to edit."""

    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> Any:
        site.kept["solved"] = {"times": site.kept.get("solved", {"times": torch.zeros(())})["times"] + 1}
        return super()._solve(site, keys, targets, value_keys)


@pytest.fixture
def make(tiny: tuple[Any, Any], tmp_path: Path) -> Make:
    """Makes an editor of a kind with restraints; the size of its updates by ``rate``."""

    def editor(kind: str, *restraints: Restraint, rate: float = 1.0) -> Editor:
        if kind == "mose-oft":
            return MoseOFT(LAYERS, steps=3, lr=0.05, radius=None)
        if kind == "fine-tuning":
            return FineTune(LAYERS, lr=5e-3 * rate, steps=4, stop_loss=0.0, restraints=list(restraints))
        if kind == "memit":
            values = ValueOptimizer("mlp", lr=0.1 * rate, steps=4, stop_loss=0.0)
            return LocateThenEdit(FixedLayers(LAYERS), values, Carrying(5.0), contexts=2, restraints=list(restraints))
        workspace = make_workspace((copy.deepcopy(tiny[0]), tiny[1]))
        parts = [workspace.architecture[layer] for layer in LAYERS]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = HyperNetwork({part.index: tuple(part.weight.shape) for part in parts}, 4, edit_lr=0.02 * rate)
        network.to(torch.float64).save(tmp_path, workspace.model)
        return MEND(str(tmp_path), restraints=list(restraints))

    return editor


def edit(editor: Editor, workspace: Workspace, batch: Sequence[EditRequest]) -> dict[int, Update]:
    """The updates of a batch by layer."""
    found: dict[int, Update] = {}
    for item in editor.apply(workspace, editor.plan(workspace, batch)):
        found.setdefault(item.layer, item.update)
    return found


def sums(workspace: Workspace) -> dict[int, Tensor]:
    """W − W_0."""
    return {layer: workspace.site(layer).weight - workspace.site(layer).original for layer in LAYERS}


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0])


# Restraints on every additive editor


@two_families
@each_kind
def test_restraints_that_have_nothing_to_do_change_nothing(tiny, make: Make, kind: str) -> None:
    ends = []
    for restraints in ((), (RECT(1.0), PRUNE(1.2, every_n=1), PRUNE(1.2))):
        workspace, editor = prepared(tiny), make(kind, *restraints, rate=0.3)
        assert not editor.needs_gradients
        for request in requests():
            edit(editor, workspace, [request])
        assert editor.finish(workspace) == []
        for layer, total in sums(workspace).items():  # σ_max is far above all there is to prune
            assert 0 < largest(total) < largest(workspace.site(layer).original)
        ends.append(weights(workspace.model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def pruned_by_hand(original: Tensor, total: Tensor) -> Tensor:
    """W_0 + ΔW' from all singular values, with the line as it is written."""
    u, sigma, vt = torch.linalg.svd(total, full_matrices=False)
    most = largest(original)
    cut = torch.where(sigma > most, sigma / 3 + most * 2 / 3, sigma)
    assert (cut < 0.9 * sigma).any()  # not for want of something to prune
    return original + u @ torch.diag(cut) @ vt


STRONG = {"fine-tuning": 40, "mend": 100, "memit": 400}


@two_families
@each_kind
def test_the_sum_is_pruned_once_at_the_end_unless_more_edits_follow(tiny, make: Make, kind: str) -> None:
    rate, prune = STRONG[kind], PRUNE(form="linear", beta=3.0)
    workspace, plain = prepared(tiny), prepared(tiny)
    editor, unrestrained = make(kind, prune, rate=rate), make(kind, rate=rate)
    assert editor.finish(workspace) == []
    for request in requests()[:2]:
        edit(editor, workspace, [request])
        edit(unrestrained, plain, [request])
    assert changed(weights(plain.model), workspace.model) == set()  # nothing before the end
    for piece in ([], requests()[2:3]):  # more edits may follow the end: then the sum as it is now
        if piece:
            edit(editor, workspace, piece)
        before = {layer: workspace.site(layer).weight.clone() for layer in LAYERS}
        applied = editor.finish(workspace)
        assert [item.layer for item in applied] == LAYERS
        for item in applied:
            site, old = workspace.site(item.layer), before[item.layer]
            expected = pruned_by_hand(site.original, old - site.original)
            torch.testing.assert_close(site.weight, expected, rtol=0, atol=1e-8 * largest(site.original))
            change = float((site.weight - old).norm() / old.norm())
            assert item.relative_change == pytest.approx(change, rel=1e-6)
        # The end comes once, also for a run that is resumed after it.
        after = weights(workspace.model)
        again = continued(workspace, tiny)
        for place in (workspace, again):
            assert editor.finish(place) == []
            assert changed(after, place.model) == set()


@llama
@pytest.mark.parametrize("size", [1, 3])  # a batch of three crosses a multiple of two without reaching it
def test_the_sum_is_pruned_whenever_a_count_is_reached_or_crossed(tiny, make: Make, size: int) -> None:
    workspace, plain = prepared(tiny), prepared(tiny)
    restrained = make("fine-tuning", PRUNE(form="linear", beta=3.0, every_n=2), rate=40)
    batches, due = [*requests(), *requests()][:6], 0
    for first in range(0, 6, size):
        for layer in LAYERS:  # both start from the same weights
            plain.site(layer).replace(workspace.site(layer).stored)
        edit(make("fine-tuning", rate=40), plain, batches[first : first + size])
        edit(restrained, workspace, batches[first : first + size])
        for layer in LAYERS:
            site, expected = workspace.site(layer), plain.site(layer).weight
            if (first + size) // 2 > first // 2:
                expected = pruned_by_hand(site.original, expected - site.original)
                due += 1
            torch.testing.assert_close(site.weight, expected, rtol=0, atol=1e-8)
    assert due == {1: 6, 3: 4}[size]
    assert restrained.finish(workspace) == []


@two_families
@each_kind
def test_every_update_keeps_its_largest_relative_changes(tiny, make: Make, kind: str) -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    class Look(Restraint):
        def restrain(self, update: Update, site: EditedWeight) -> Update:
            seen[site.layer] = update.delta(site.weight), site.weight.clone()
            return update

    workspace = prepared(tiny)
    for layer, update in edit(make(kind, Look(), RECT(0.3)), workspace, requests()).items():
        (wanted, weight), change = seen[layer], sums(workspace)[layer]
        kept = change != 0
        assert int(kept.sum()) == round(0.3 * change.numel())
        torch.testing.assert_close(change[kept], wanted[kept], rtol=0, atol=1e-12)
        relative = (wanted / weight).abs()
        assert relative[kept].min() >= relative[~kept].max()
        assert isinstance(update, Additive)


@llama
def test_restraints_work_in_the_order_given(tiny, make: Make) -> None:
    class Double(Restraint):
        def restrain(self, update: Update, site: EditedWeight) -> Update:
            return Additive(2 * update.delta(site.weight))

    class Clip(Restraint):
        def restrain(self, update: Update, site: EditedWeight) -> Update:
            return Additive(update.delta(site.weight).clamp(-1e-3, 1e-3))

    for restraints, most in (([Double(), Clip()], 1e-3), ([Clip(), Double()], 2e-3)):
        workspace = prepared(tiny)
        edit(make("memit", *restraints), workspace, requests()[:1])
        assert float(sums(workspace)[1].abs().max()) == pytest.approx(most)


@two_families
def test_updates_of_many_tokens_are_orthogonal_to_each_other(tiny, make: Make) -> None:
    """MEND's have a rank of many per request: all of it counts as taken."""
    workspace, editor = prepared(tiny), make("mend", OEditPlus(0.0))
    short = [EditRequest(word, f"{word} is", word, "Ro") for word in ("It", "Na")]
    found = [edit(editor, workspace, [request]) for request in short]
    for layer in LAYERS:
        site = workspace.site(layer)
        one, other = (updates[layer].delta(site.original) for updates in found)
        assert min(int(torch.linalg.matrix_rank(delta)) for delta in (one, other)) > 1
        assert float((one.T @ other).norm()) < 1e-8 * float(one.norm() * other.norm())
        assert site.edits == 2
        assert site.rank >= int(torch.linalg.matrix_rank(one + other))


@llama
@pytest.mark.parametrize("kind", ["fine-tuning", "rome"])
def test_a_session_ends_with_what_its_restraints_do_at_the_end(tiny, kind: str) -> None:
    model, tokenizer = tiny
    original, prune = matrix_of(model, 1), [PRUNE(form="linear", beta=3.0)]
    editor: Editor = FineTune([1], lr=0.2, steps=4, stop_loss=0.0, restraints=prune)
    if kind == "rome":
        values = ValueOptimizer("mlp", lr=3.0, lr_unit="relative", steps=5, stop_loss=0.0, weight_decay=0.0)
        editor = LocateThenEdit(FixedLayers([1]), values, ROME(covariance=False), contexts=0, restraints=prune)
    session = EditSession(model, tokenizer, editor, Preparation(corpus=[]))
    site = session.workspace.site(1)
    assert not site.edited
    for request in requests()[:2]:
        (made,) = session.apply(session.plan([request]))
        assert made.change["1"] > 0
    torch.testing.assert_close(site.original, original, rtol=0, atol=0)
    expected = pruned_by_hand(original.double(), matrix_of(model, 1).double() - original.double())
    session.finish()
    torch.testing.assert_close(matrix_of(model, 1).double(), expected, rtol=1e-5, atol=1e-5)


# What they are told, layers by request


@llama
def test_what_a_restraint_is_told(tiny) -> None:
    told: list[tuple[Any, ...]] = []

    class Listening(Restraint):
        def restrain(self, update: Update, site: EditedWeight) -> Update:
            told.append(("update", site.layer, site.edits, site.pending, site.rank))
            return update

        def total(self, site: EditedWeight, before: int, after: int) -> Update | None:
            told.append(("total", site.layer, site.edits, site.pending, site.rank, before, after))
            return None

        def finish(self, site: EditedWeight) -> Update | None:
            told.append(("finish", site.layer, site.edits, site.pending, site.rank))
            return None

    workspace = prepared(tiny)
    layers: dict[str, tuple[int, ...]] = {"0": (0,), "1": (0, 1), "2": (1,), "3": (1,)}
    values = ValueOptimizer("mlp", lr=0.1, steps=2, stop_loss=0.0)
    editor = LocateThenEdit(Assigned(layers), values, MEMIT(5.0), contexts=2, restraints=[Listening()])
    edit(editor, workspace, requests()[:2])
    edit(editor, workspace, requests()[2:])
    editor.finish(workspace)
    assert told == [
        # what, layer, edits there, of this batch still to come there, rank there, edits before and now
        ("update", 0, 0, 2, 0),
        ("update", 1, 0, 1, 0),
        ("total", 0, 2, 0, 2, 0, 2),
        ("total", 1, 1, 0, 1, 0, 2),
        ("update", 1, 1, 2, 1),
        ("total", 0, 2, 0, 2, 2, 4),
        ("total", 1, 3, 0, 3, 2, 4),
        ("finish", 0, 2, 0, 2),
        ("finish", 1, 3, 0, 3),
    ]


@llama
def test_directions_of_the_gradient_are_counted_by_the_layers_own_requests(tiny) -> None:
    """Of a batch of four, one request goes into layer 1 and all go into layer 2."""
    seen: dict[str, list[tuple[int, int]]] = {"penalty": [], "restraint": []}

    class Penalty(OEdit):
        def prepare(self, sites: Sequence[EditedWeight]) -> Callable[[Tensor], Tensor]:
            by_layer = {site.layer: site for site in sites}
            seen["penalty"] += [(site.edits, site.pending) for _, site in sorted(by_layer.items())]
            return super().prepare(sites)

    class Projection(OEditPlus):
        def restrain(self, update: Update, site: EditedWeight) -> Update:
            seen["restraint"].append((site.edits, self.spaces(site)[1].shape[1]))
            return super().restrain(update, site)

    layers: dict[str, tuple[int, ...]] = {"0": (1, 2), "1": (2,), "2": (2,), "3": (2,)}
    values = ValueOptimizer("mlp", lr=0.1, steps=2, stop_loss=0.0, penalties=[Penalty()])
    editor = LocateThenEdit(Assigned(layers), values, MEMIT(5.0), contexts=2, restraints=[Projection(2.0)])
    workspace = prepared(tiny)
    for batch in (requests(), requests()[:1]):
        edit(editor, workspace, batch)
    # A batch may be worked through in parts, each of which looks at the layers.
    assert list(dict.fromkeys(seen["penalty"])) == [(0, 1), (0, 4), (1, 1), (4, 1)]
    assert seen["restraint"] == [(0, 2), (0, 8), (1, 4), (4, 10)]


# All or nothing


class Refusing(Restraint):
    """Ends in an error in one layer, on the update or on the sum of them, as often as told."""

    def __init__(self, layer: int, where: str, times: int = 1, error: type[BaseException] = ValueError) -> None:
        self.layer, self.where, self.times, self.error = layer, where, times, error

    def refuse(self, where: str, site: EditedWeight) -> None:
        if where == self.where and self.layer == site.layer and self.times:
            self.times -= 1
            raise self.error(f"no {where}")

    def restrain(self, update: Update, site: EditedWeight) -> Update:
        self.refuse("update", site)
        return update

    def total(self, site: EditedWeight, before: int, after: int) -> Update | None:
        self.refuse("total", site)
        return Additive(torch.full(site.shape, 1e-3))  # a second write of the layer

    def finish(self, site: EditedWeight) -> Update | None:
        self.refuse("end", site)
        return Additive(torch.full(site.shape, 1e-3))


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)], indirect=["family"])
@pytest.mark.parametrize(("where", "error"), [("update", ValueError), ("total", KeyboardInterrupt)])
@each_kind
def test_an_error_in_a_later_layer_takes_everything_back(
    tiny, make: Make, kind: str, where: str, error: type[BaseException], dtype: torch.dtype
) -> None:
    """Weights, what rounding took, counts, memories, what solvers keep; an interrupt by the keyboard counts."""
    workspace, sound = prepared(tiny, dtype=dtype), prepared(tiny, dtype=dtype)
    refusing, never = Refusing(2, where, 0, error), Refusing(2, where, 0)
    editor, undisturbed = make(kind, refusing), make(kind, never)
    for one, place in ((editor, workspace), (undisturbed, sound)):
        edit(one, place, requests()[:1])
    before, state = weights(workspace.model), states(workspace)
    assert ("remainder" in state[1]) == (dtype == torch.bfloat16)
    plan = editor.plan(workspace, requests()[1:])
    refusing.times = 1
    with pytest.raises(error, match=f"no {where}"):
        editor.apply(workspace, plan)
    assert changed(before, workspace.model) == set()
    assert workspace.edits == 1
    torch.testing.assert_close(states(workspace), state, rtol=0, atol=0)
    # As if nothing had happened.
    editor.apply(workspace, plan)
    edit(undisturbed, sound, requests()[1:])
    torch.testing.assert_close(weights(workspace.model), weights(sound.model), rtol=0, atol=0)
    torch.testing.assert_close(states(workspace), states(sound), rtol=0, atol=0)


@llama
def test_an_error_at_the_end_of_a_run_leaves_it_unfinished(tiny, make: Make) -> None:
    workspace, editor = prepared(tiny), make("fine-tuning", Refusing(2, "end"))
    edit(editor, workspace, requests())
    before = weights(workspace.model)
    with pytest.raises(ValueError, match="no end"):
        editor.finish(workspace)
    assert changed(before, workspace.model) == set()
    assert len(editor.finish(workspace)) == 2


@two_families
@pytest.mark.parametrize("kind", ["fine-tuning", "mose-oft"])
def test_a_result_that_cannot_be_stored_leaves_no_layer_written(tiny, make: Make, kind: str) -> None:
    workspace, plans = make_workspace(tiny, dtype=torch.float16), {}
    before = weights(workspace.model)
    for layer in LAYERS:
        d, p = workspace.architecture[layer].weight.shape
        size = (4, p // 4, p // 4) if kind == "mose-oft" else (d, p)
        plans[layer] = torch.rand(size) if layer == 1 else torch.full(size, torch.inf if kind == "mose-oft" else 1e6)
    with pytest.raises(ValueError, match=r"out of the range of torch\.float16|not finite"):
        make(kind).apply(workspace, Plan(requests()[:1], [tuple(LAYERS)], [0.0], [0.0], [1], plans))
    assert changed(before, workspace.model) == set()


# What rounding takes


@two_families
@pytest.mark.parametrize("kind", ["fine-tuning", "memit", "mose-oft"])
def test_half_precision_weights_are_the_rounded_sum_of_all_changes(tiny, make: Make, kind: str) -> None:
    workspace, editor = prepared(tiny, dtype=torch.bfloat16), make(kind)
    expected = {layer: workspace.site(layer).exact.dense() for layer in LAYERS}
    for request in requests()[:3]:
        for layer, update in edit(editor, workspace, [request]).items():
            expected[layer] = expected[layer] + update.delta(expected[layer])
    for layer in LAYERS:
        found, stored = workspace.site(layer).exact.dense(), matrix_of(workspace.model, layer)
        torch.testing.assert_close(found, expected[layer], rtol=1e-6, atol=1e-7)  # one rounding: 1e-4
        torch.testing.assert_close(stored, found.bfloat16(), rtol=0, atol=0)
        assert float((found - stored).norm()) > 1e-4 * float(found.norm())


@llama
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_solvers_and_restraints_see_the_sum(tiny, site: Any) -> None:
    seen: list[Tensor] = []

    class Looking(Restraint):
        def restrain(self, update: Update, site: EditedWeight) -> Update:
            seen.append(site.exact.dense())
            return update

    values, solver = ValueOptimizer(site, lr=0.5, steps=2, stop_loss=0.0), Recording(MEMIT(5.0))
    editor = LocateThenEdit(FixedLayers([1]), values, solver, contexts=2, restraints=[Looking()])
    workspace = prepared(tiny, dtype=torch.bfloat16)
    edit(editor, workspace, requests()[:1])
    exact = workspace.site(1).exact.dense()
    assert not torch.equal(exact, workspace.site(1).weight.double())
    edit(editor, workspace, requests()[1:2])
    torch.testing.assert_close([solver.asked[-1].exact, seen[-1]], [exact, exact], rtol=0, atol=0)


# Going on from a state


def solving(solver: Solver, *restraints: Restraint, site: Any = "block") -> LocateThenEdit:
    values = ValueOptimizer(site, lr=0.1, steps=2, stop_loss=0.0)
    return LocateThenEdit(FixedLayers(LAYERS), values, solver, TypeMeanKey(), restraints=list(restraints))


def selecting(solver: Solver) -> LocateThenEdit:
    values = ValueOptimizer("mlp", NormMatched(), lr=0.1, steps=2, stop_loss=0.0)
    return LocateThenEdit(ActivationSelection([0, 2], steps=1, reach=0.1), values, solver)


# What edits, its precision, and whether the next edits depend on more than the weights.
RESUMED: dict[str, tuple[Callable[[Make], Editor], torch.dtype, bool]] = {
    "memit": (lambda _: solving(MEMIT(5.0, memory=True)), torch.float64, True),
    "alphaedit": (lambda _: solving(AlphaEdit(0.1, ridge=1.0)), torch.float64, True),
    "emmet": (lambda _: solving(EMMET(2.0, memory=True)), torch.float64, True),
    "mose": (lambda _: selecting(MOSE(1.0)), torch.float64, True),
    "mose in half": (lambda _: solving(MOSE(1.0), site="mlp"), torch.bfloat16, True),
    "mose-key": (lambda _: solving(MOSEKey(1.0), site="mlp"), torch.float64, True),
    "rect on memit": (lambda _: solving(MEMIT(5.0, memory=True), RECT(0.4)), torch.float64, True),
    "rome pruned at the end": (lambda _: solving(ROME(), PRUNE(form="linear"), site="mlp"), torch.float64, False),
    "fine-tuning in half": (lambda make: make("fine-tuning"), torch.bfloat16, True),
    "mose-oft in half": (lambda make: make("mose-oft"), torch.bfloat16, True),
    "pruned every two": (
        lambda make: make("fine-tuning", RECT(0.5), PRUNE(form="linear", every_n=2), rate=40),
        torch.float64,
        True,
    ),
    "mend, pruned at the end": (lambda make: make("mend", PRUNE(form="linear"), rate=100), torch.float64, False),
    "away from the gradient": (lambda make: make("fine-tuning", OEditPlus(2.0, past=False)), torch.float64, True),
    "away from what was written": (lambda make: make("mend", OEditPlus(1.0, max_directions=2)), torch.float64, True),
}


@llama
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_from_the_state_of_its_layers_bit_by_bit(tiny, make: Make, name: str) -> None:
    put_together, dtype, remembers = RESUMED[name]
    ends = []
    for cut in ("never", "after every edit", "with the weights alone"):
        workspace, editor = prepared(tiny, dtype=dtype), put_together(make)
        for word in ("It", "Na", "A"):
            edit(editor, workspace, [EditRequest(word, f"{word} is", word, "Ro")])
            if cut == "after every edit":
                workspace, editor = continued(workspace, tiny), put_together(make)
            elif cut == "with the weights alone" and word == "It":
                fresh = prepared(tiny, dtype=dtype)
                for layer, site in workspace.sites.items():
                    if site.edited:
                        fresh.site(layer).replace(site.stored)
                workspace, editor = fresh, put_together(make)
        editor.finish(workspace)
        ends.append((weights(workspace.model), states(workspace)))
    straight, resumed, forgetful = ends
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
    if remembers:  # so that equality says something
        assert any(not torch.equal(forgetful[0][key], value) for key, value in straight[0].items())


# Put together


def test_what_cannot_be_restrained_is_refused_with_the_reason() -> None:
    for restraint in (RECT(), PRUNE(), OEditPlus()):
        message = f"{type(restraint).__name__} restrains what is added to a weight, and MoseOFT multiplies"
        with pytest.raises(ValueError, match=message):
            MoseOFT([1], restraints=[restraint])
    assert MoseOFT([1], restraints=[]).restraints == ()
    with pytest.raises(ValueError, match="an update by FineTune has full rank"):
        FineTune([1], restraints=[OEditPlus()])
    with pytest.raises(ValueError, match="an update by RECT after MEND has full rank"):
        MEND(restraints=[RECT(), OEditPlus()])
    with pytest.raises(ValueError, match="an update by RECT after MEMIT has full rank"):
        LocateThenEdit(FixedLayers([1]), ValueOptimizer(), MEMIT(), restraints=[RECT(), OEditPlus()])
    with pytest.raises(ValueError, match="RECT after O-Edit"):
        LocateThenEdit(FixedLayers([1]), ValueOptimizer(), MEMIT(), restraints=[OEditPlus(), RECT()])


@pytest.mark.parametrize(("kind", "settings"), [("FineTune", "layers: [1], "), ("MEND", "")])
def test_restraints_come_from_yaml(tmp_path: Path, kind: str, settings: str) -> None:
    path = tmp_path / "method.yaml"
    path.write_text(
        f"model: {{editor: {{class_path: lit_edit.editors.{kind}, init_args: {{{settings}restraints: ["
        "{class_path: lit_edit.editors.restraints.RECT, init_args: {keep: 0.3}}, "
        "{class_path: lit_edit.editors.restraints.PRUNE, init_args: {every_n: 7}}]}}}\n",
        encoding="utf-8",
    )
    editor = load_editor(path)
    assert editor.describe() == f"{kind} + RECT + PRUNE"
    assert [vars(restraint).get("every_n") for restraint in editor.restraints] == [None, 7]
