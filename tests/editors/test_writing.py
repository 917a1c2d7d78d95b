"""What the additive editors share: restraints on their updates, the counts these go by, all of a batch or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.references import changed, make_workspace, matrix_of, requests, weights
from safetensors.torch import load, save
from torch import Tensor

from lit_edit import load_editor
from lit_edit.algebra.exact import ExactWeight
from lit_edit.algebra.updates import Additive, Update
from lit_edit.cli import describe
from lit_edit.editors import MEND, Editor, FineTune, LocateThenEdit, MoseOFT, Plan
from lit_edit.editors.keys import KeyAverage
from lit_edit.editors.layers import Choice, FixedLayers, LayerPolicy
from lit_edit.editors.mend.network import HyperNetwork
from lit_edit.editors.remainders import Remainders
from lit_edit.editors.restraints import PRUNE, RECT, Ground, OEditPlus, Restraint
from lit_edit.editors.solvers import MEMIT, MOSE, Problem
from lit_edit.editors.values import OEdit, ValueOptimizer
from lit_edit.editors.writing import all_or_nothing
from lit_edit.model.families import Architecture
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession

LAYERS = [1, 2]
two_families = pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)  # stored transposed, and as it is
Make = Callable[..., Editor]


def prepared(tiny: tuple[Any, Any], dtype: torch.dtype = torch.float64) -> Workspace:
    """A workspace with what a session keeps, and made-up statistics."""
    workspace = make_workspace((copy.deepcopy(tiny[0]), tiny[1]), dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for part in workspace.architecture.layers:
        d, p = part.weight.shape
        workspace.covariances[part.index] = torch.diag(1.0 / torch.arange(1, p + 1, dtype=torch.float64))
        workspace.gradients[part.index] = torch.randn(d, p, generator=generator, dtype=torch.float64)
    workspace.originals.keep()
    return workspace


@pytest.fixture
def make(tiny: tuple[Any, Any], tmp_path: Path) -> Make:
    """Makes an additive editor of a kind with restraints; the size of its updates by ``rate``."""

    def editor(kind: str, *restraints: Restraint, rate: float = 1.0) -> Editor:
        if kind == "fine-tuning":
            return FineTune(LAYERS, lr=5e-3 * rate, steps=4, stop_loss=0.0, restraints=list(restraints))
        if kind == "memit":
            values = ValueOptimizer("mlp", lr=0.1 * rate, steps=4, stop_loss=0.0)
            return LocateThenEdit(FixedLayers(LAYERS), values, MEMIT(5.0), contexts=2, restraints=list(restraints))
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
    applied = editor.apply(workspace, editor.plan(workspace, batch))
    return {item.layer: item.update for item in applied[: len(LAYERS)]}


def sums(workspace: Workspace) -> dict[int, Tensor]:
    """W − W_0."""
    return {layer: matrix_of(workspace.model, layer) - workspace.original(layer) for layer in LAYERS}


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0])


# Restraints on every additive editor


@two_families
@pytest.mark.parametrize("kind", ["fine-tuning", "mend"])
def test_restraints_that_have_nothing_to_do_change_nothing(tiny, make: Make, kind: str) -> None:
    ends = []
    for restraints in ((), (RECT(1.0), PRUNE(1.2, every_n=1), PRUNE(1.2))):
        workspace, editor = prepared(tiny), make(kind, *restraints, rate=0.3)
        assert editor.needs_originals == bool(restraints)
        assert not editor.needs_gradients
        for request in requests():
            edit(editor, workspace, [request])
        assert editor.finish(workspace) == []
        for layer, total in sums(workspace).items():  # σ_max is far above all there is to prune
            assert 0 < largest(total) < largest(workspace.original(layer))
        ends.append(weights(workspace.model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@two_families
@pytest.mark.parametrize("kind", ["fine-tuning", "mend", "memit"])
def test_the_sum_is_pruned_once_at_the_end(tiny, make: Make, kind: str) -> None:
    rate = {"fine-tuning": 40, "mend": 100, "memit": 400}[kind]
    workspace, plain = prepared(tiny), prepared(tiny)
    editor, unrestrained = make(kind, PRUNE(form="linear", beta=3.0), rate=rate), make(kind, rate=rate)
    for request in requests()[:3]:
        edit(editor, workspace, [request])
        edit(unrestrained, plain, [request])
    assert changed(weights(plain.model), workspace.model) == set()  # nothing before the end
    applied = editor.finish(workspace)
    assert [item.layer for item in applied] == LAYERS
    for layer, total in sums(plain).items():
        u, sigma, vt = torch.linalg.svd(total, full_matrices=False)
        most = largest(plain.original(layer))
        cut = torch.where(sigma > most, sigma / 3 + most * 2 / 3, sigma)
        assert (cut < 0.9 * sigma).any()
        torch.testing.assert_close(sums(workspace)[layer], u @ torch.diag(cut) @ vt, rtol=0, atol=1e-8 * most)
    after = weights(workspace.model)
    assert editor.finish(workspace) == []
    assert changed(after, workspace.model) == set()


@two_families
@pytest.mark.parametrize("kind", ["fine-tuning", "mend"])
def test_every_update_keeps_its_largest_relative_changes(tiny, make: Make, kind: str) -> None:
    workspace, editor = prepared(tiny), make(kind, RECT(0.3))
    plain = edit(make(kind), prepared(tiny), requests())
    for layer, total in edit(editor, workspace, requests()).items():
        change = sums(workspace)[layer]
        kept, wanted = change != 0, plain[layer].delta(workspace.original(layer))
        assert int(kept.sum()) == round(0.3 * change.numel())
        torch.testing.assert_close(change[kept], wanted[kept], rtol=0, atol=1e-12)
        relative = (wanted / workspace.original(layer)).abs()
        assert relative[kept].min() >= relative[~kept].max()
        assert isinstance(total, Additive)


RESUMED: dict[str, tuple[str, Callable[[], list[Restraint]], float]] = {
    "pruned every two": ("fine-tuning", lambda: [RECT(0.5), PRUNE(form="linear", every_n=2)], 40),
    "pruned at the end": ("mend", lambda: [PRUNE(form="linear")], 100),
    "away from the gradient": ("fine-tuning", lambda: [OEditPlus(2.0, past=False)], 1),
    "away from what was written": ("mend", lambda: [OEditPlus(1.0, max_directions=2)], 1),
}


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("name", RESUMED)
def test_an_editor_restored_from_its_state_goes_on_as_an_uninterrupted_one(tiny, make: Make, name: str) -> None:
    kind, restraints, rate = RESUMED[name]
    short = [EditRequest(word, f"{word} is", word, "Ro") for word in ("It", "Na", "A")]
    ends: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for cut, forget in ((0, False), (1, False), (2, False), (3, False), (1, True)):
        workspace, editor = prepared(tiny), make(kind, *restraints(), rate=rate)
        for done, request in enumerate(short):
            edit(editor, workspace, [request])
            if done + 1 == cut:
                state = load(save(editor.state_dict()))
                editor = make(kind, *restraints(), rate=rate)
                if not forget:
                    editor.load_state_dict(state)
        editor.finish(workspace)
        ends.append((weights(workspace.model), editor.state_dict()))
    for found in ends[1:-1]:
        torch.testing.assert_close(found, ends[0], rtol=0, atol=0)
    if name != "pruned at the end":  # whose end comes once, whatever the count
        assert any(not torch.equal(ends[-1][0][key], value) for key, value in ends[0][0].items())


@two_families
def test_updates_of_many_tokens_are_orthogonal_to_each_other(tiny, make: Make) -> None:
    """MEND's have a rank of many per request: all of it counts as taken."""
    workspace, editor = prepared(tiny), make("mend", OEditPlus(0.0))
    short = [EditRequest(word, f"{word} is", word, "Ro") for word in ("It", "Na")]
    found = [edit(editor, workspace, [request]) for request in short]
    for layer in LAYERS:
        one, other = (updates[layer].delta(workspace.original(layer)) for updates in found)
        assert min(int(torch.linalg.matrix_rank(delta)) for delta in (one, other)) > 1
        assert float((one.T @ other).norm()) < 1e-8 * float(one.norm() * other.norm())
        assert int(editor.state_dict()[f"edits_here.{layer}"]) == 2
        assert int(editor.state_dict()[f"rank_here.{layer}"]) >= int(torch.linalg.matrix_rank(one + other))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_session_keeps_what_the_restraints_of_fine_tuning_need(tiny) -> None:
    model, tokenizer = tiny
    original = matrix_of(model, 1)
    editor = FineTune([1], lr=0.2, steps=4, stop_loss=0.0, restraints=[PRUNE(form="linear")])
    session = EditSession(model, tokenizer, editor, corpus=(), corpus_name="none")
    assert session.workspace.originals.copies == {}  # nothing was written
    session.apply(session.plan(requests()[:2]))
    torch.testing.assert_close(session.workspace.original(1), original, rtol=0, atol=0)
    before = largest(matrix_of(model, 1) - original)
    session.finish()
    most = largest(original)
    assert before > most
    assert largest(matrix_of(model, 1) - original) == pytest.approx((before + most) / 2, rel=1e-4)


# Layers by request


class Assigned(LayerPolicy):
    """Gives each request the layers set for it."""

    def __init__(self, layers: dict[str, tuple[int, ...]]) -> None:
        self.layers = layers

    def candidates(self, architecture: Architecture) -> list[int]:
        return LAYERS

    def choose(
        self,
        workspace: Workspace,
        requests: Sequence[EditRequest],
        values: ValueOptimizer,
        average: KeyAverage,
        value_average: KeyAverage | None = None,
    ) -> list[Choice]:
        return [Choice(self.layers[r.case_id], self.layers[r.case_id][-1], {}) for r in requests]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_directions_of_the_gradient_are_counted_by_the_layers_own_requests(tiny) -> None:
    """Of a batch of four, one request goes into layer 1 and all go into layer 2."""
    seen: dict[str, list[tuple[int, int]]] = {"penalty": [], "restraint": []}

    class Penalty(OEdit):
        def prepare(self, grounds: Sequence[Ground]) -> Callable[[Tensor], Tensor]:
            by_layer = {ground.layer: ground for ground in grounds}
            seen["penalty"] += [(g.edits_here, g.batch_here) for _, g in sorted(by_layer.items())]
            return super().prepare(grounds)

    class Projection(OEditPlus):
        def restrain(self, update: Update, ground: Ground) -> Update:
            seen["restraint"].append((ground.edits_here, self.spaces(ground)[1].shape[1]))
            return super().restrain(update, ground)

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

    def __init__(self, layer: int, where: str, times: int = 1) -> None:
        self.name, self.where, self.times = f".{layer}.", where, times

    def refuse(self, where: str, ground: Ground) -> None:
        if where == self.where and self.name in ground.layer and self.times:
            self.times -= 1
            raise ValueError(f"no {where} in {ground.layer}")

    def restrain(self, update: Update, ground: Ground) -> Update:
        self.refuse("update", ground)
        return update

    def total(self, ground: Ground, last: bool) -> Update | None:
        self.refuse("end" if last else "total", ground)
        return Additive(torch.full_like(ground.weight, 1e-3))


@two_families
@pytest.mark.parametrize("where", ["update", "total"])
@pytest.mark.parametrize("kind", ["fine-tuning", "mend", "memit"])
def test_an_error_in_a_later_layer_takes_the_earlier_ones_back(tiny, make: Make, kind: str, where: str) -> None:
    workspace, sound = prepared(tiny, torch.float32), prepared(tiny, torch.float32)
    editor, never = make(kind, Refusing(2, where, times=0)), make(kind, Refusing(2, where, times=0))
    for one, place in ((editor, workspace), (never, sound)):
        edit(one, place, requests()[:1])
    before, state = weights(workspace.model), editor.state_dict()
    plan = editor.plan(workspace, requests()[1:])
    editor.restraints[0].times = 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=f"no {where} in .*2"):
        editor.apply(workspace, plan)
    assert changed(before, workspace.model) == set()
    torch.testing.assert_close(editor.state_dict(), state, rtol=0, atol=0)
    # As if nothing had happened.
    editor.apply(workspace, plan)
    edit(never, sound, requests()[1:])
    torch.testing.assert_close(weights(workspace.model), weights(sound.model), rtol=0, atol=0)
    torch.testing.assert_close(editor.state_dict(), never.state_dict(), rtol=0, atol=0)


class Carrying(MEMIT):
    """A solver that carries something from edit to edit, and cannot solve layer 2 the first time."""

    def __init__(self) -> None:
        super().__init__(5.0)
        self.solved, self.failed = torch.zeros(()), False

    def solve(self, problem: Problem) -> Update:
        if ".2." in problem.layer and not self.failed:
            self.failed = True
            raise ValueError("no solution")
        self.solved = self.solved + 1
        return super().solve(problem)

    def state_dict(self) -> dict[str, Tensor]:
        return {"solved": self.solved}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.solved = state["solved"]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_what_a_solver_carries_goes_back_too(tiny) -> None:
    values = ValueOptimizer("mlp", lr=0.1, steps=2, stop_loss=0.0)
    workspace, editor = prepared(tiny), LocateThenEdit(FixedLayers(LAYERS), values, Carrying(), contexts=2)
    before, plan = weights(workspace.model), editor.plan(workspace, requests())
    with pytest.raises(ValueError, match="no solution"):
        editor.apply(workspace, plan)
    assert changed(before, workspace.model) == set()
    assert editor.state_dict()["solver.solved"] == 0
    assert not editor.memory
    editor.apply(workspace, plan)
    assert editor.state_dict()["solver.solved"] == 2


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_error_at_the_end_of_a_run_leaves_it_unfinished(tiny, make: Make) -> None:
    workspace, editor = prepared(tiny, torch.float32), make("fine-tuning", Refusing(2, "end"))
    edit(editor, workspace, requests())
    before = weights(workspace.model)
    with pytest.raises(ValueError, match="no end in"):
        editor.finish(workspace)
    assert changed(before, workspace.model) == set()
    assert len(editor.finish(workspace)) == 2


@two_families
@pytest.mark.parametrize("kind", ["fine-tuning", "mose-oft"])
def test_a_result_that_cannot_be_stored_leaves_no_layer_written(tiny, kind: str) -> None:
    workspace = make_workspace(tiny, dtype=torch.float16)
    editor = FineTune(LAYERS) if kind == "fine-tuning" else MoseOFT(LAYERS, blocks=4)
    before, plans = weights(workspace.model), {}
    for layer in LAYERS:
        d, p = workspace.architecture[layer].weight.shape
        size = (4, p // 4, p // 4) if kind == "mose-oft" else (d, p)
        plans[layer] = torch.rand(size) if layer == 1 else torch.full(size, torch.inf if kind == "mose-oft" else 1e6)
    with pytest.raises(ValueError, match=r"out of the range of torch\.float16|not finite"):
        editor.apply(workspace, Plan(requests()[:1], [tuple(LAYERS)], [0.0], [0.0], [1], plans))
    assert changed(before, workspace.model) == set()


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_a_layer_written_twice_goes_back_to_the_beginning_and_an_interrupt_counts(tiny) -> None:
    workspace = make_workspace(tiny, dtype=torch.bfloat16)
    before, change = weights(workspace.model), torch.rand(32, 48)
    with pytest.raises(KeyboardInterrupt), all_or_nothing(workspace) as write:  # noqa: PT012 - two writes, then the end
        write(1, Additive(change))
        write(1, Additive(-change))
        assert changed(before, workspace.model)
        raise KeyboardInterrupt
    assert changed(before, workspace.model) == set()
    with all_or_nothing(workspace) as write:
        assert write(1, Additive(change)).relative_change > 0
    assert changed(before, workspace.model) == {workspace.architecture[1].name}


# What rounding takes


def half(tiny: tuple[Any, Any]) -> Workspace:
    workspace = prepared(tiny, torch.bfloat16)
    workspace.covariances = {layer: c.double() for layer, c in workspace.covariances.items()}
    return workspace


def carrying(kind: str, make: Make, on: bool = True) -> Editor:
    if kind == "mose-oft":
        return MoseOFT(LAYERS, blocks=4, steps=3, lr=0.05, radius=None, carry_rounding=on)
    if kind == "mose":
        values = ValueOptimizer("mlp", lr=0.1, steps=3, stop_loss=0.0)
        return LocateThenEdit(FixedLayers(LAYERS), values, MOSE(5.0), contexts=2, carry_rounding=on)
    if kind == "fine-tuning":
        return FineTune(LAYERS, lr=5e-3, steps=3, stop_loss=0.0, carry_rounding=on)
    return make(kind)


def exact_of(editor: Any, workspace: Workspace) -> dict[int, Tensor]:
    """The weights with what rounding took of them."""
    remainders: Remainders = getattr(editor, "writing", editor).remainders
    parts = [workspace.architecture[layer] for layer in LAYERS]
    return {p.index: ExactWeight(p.weight, remainders.of(p.index, p.weight)).dense() for p in parts}


@two_families
@pytest.mark.parametrize("kind", ["fine-tuning", "memit", "mose-oft"])
def test_half_precision_weights_are_the_rounded_sum_of_all_changes(tiny, make: Make, kind: str) -> None:
    workspace, editor = half(tiny), carrying(kind, make)
    expected = exact_of(editor, workspace)
    for request in requests()[:3]:
        for layer, update in edit(editor, workspace, [request]).items():
            expected[layer] = expected[layer] + update.delta(expected[layer])
    for layer, found in exact_of(editor, workspace).items():
        torch.testing.assert_close(found, expected[layer], rtol=1e-6, atol=1e-7)  # one rounding: 1e-4
        torch.testing.assert_close(matrix_of(workspace.model, layer), found.bfloat16(), rtol=0, atol=0)
        assert float((found - matrix_of(workspace.model, layer)).norm()) > 1e-4 * float(found.norm())


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("kind", ["fine-tuning", "mose-oft"])
def test_carrying_can_be_switched_off_and_is_not_for_wide_weights(tiny, make: Make, kind: str) -> None:
    for editor, workspace in ((carrying(kind, make, on=False), half(tiny)), (carrying(kind, make), prepared(tiny))):
        edit(editor, workspace, requests()[:1])
        assert not [name for name in editor.state_dict() if name.startswith("remainder")]


@two_families
@pytest.mark.parametrize("kind", ["fine-tuning", "mose", "mose-oft"])
def test_a_run_in_half_precision_goes_on_from_its_state(tiny, make: Make, kind: str, tmp_path: Path) -> None:
    straight, going = half(tiny), carrying(kind, make)
    for request in requests()[:2]:
        edit(going, straight, [request])
    path = tmp_path / "state.pt"
    torch.save({"editor": going.state_dict(), "model": weights(straight.model)}, path)
    state, resumed, other = torch.load(path, weights_only=True), half(tiny), carrying(kind, make)
    other.load_state_dict(state["editor"])  # before the weights, as Lightning does
    for part in resumed.architecture.layers:
        resumed.originals.before_write(part.name)
    resumed.model.load_state_dict(state["model"])
    for editor, workspace in ((going, straight), (other, resumed)):
        edit(editor, workspace, requests()[2:3])
    torch.testing.assert_close(weights(resumed.model), weights(straight.model), rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), going.state_dict(), rtol=0, atol=0)
    assert "remainder.1" in other.state_dict()


@two_families
def test_what_rounding_took_of_a_weight_that_others_changed_is_dropped(tiny) -> None:
    workspace, remainders = half(tiny), Remainders()
    weight = workspace.architecture[1].weight
    with all_or_nothing(workspace, remainders) as write:
        write(1, Additive(torch.rand(weight.shape)))
    assert remainders.of(1, weight) is not None
    assert remainders.of(2, weight) is None
    written = weight.clone()
    weight.data[3, 5] += 1  # without a trace in its version
    assert remainders.of(1, weight) is None
    weight.copy_(written)
    assert remainders.of(1, weight) is None
    assert remainders.state_dict() == {}


@two_families
def test_an_error_takes_back_what_rounding_took_with_the_weights(tiny) -> None:
    workspace, remainders = half(tiny), Remainders()
    change = torch.rand(workspace.architecture[1].weight.shape)
    with all_or_nothing(workspace, remainders) as write:
        write(1, Additive(change))
    before, state = weights(workspace.model), {name: t.clone() for name, t in remainders.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), all_or_nothing(workspace, remainders) as write:  # noqa: PT012
        write(1, Additive(0.3 * change))
        write(2, Additive(change))
        write(1, Additive(0.3 * change))
        assert set(remainders.state_dict()) > set(state)
        raise KeyboardInterrupt
    assert changed(before, workspace.model) == set()
    torch.testing.assert_close(remainders.state_dict(), state, rtol=0, atol=0)
    assert remainders.of(1, workspace.architecture[1].weight) is not None


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_solvers_and_restraints_see_the_sum(tiny) -> None:
    seen: dict[str, list[Tensor]] = {"problem": [], "ground": []}

    class Solving(MEMIT):
        def solve(self, problem: Problem) -> Update:
            seen["problem"].append(problem.exact.dense())
            return super().solve(problem)

    class Looking(Restraint):
        def restrain(self, update: Update, ground: Ground) -> Update:
            seen["ground"].append(ground.exact.dense())
            return update

    for site in ("mlp", "block"):
        values = ValueOptimizer(site, lr=0.5, steps=2, stop_loss=0.0)  # type: ignore[arg-type]
        editor = LocateThenEdit(FixedLayers([1]), values, Solving(5.0), contexts=2, restraints=[Looking()])
        workspace = half(tiny)
        editor.apply(workspace, editor.plan(workspace, requests()[:1]))
        exact = ExactWeight(part := workspace.architecture[1].weight, editor.writing.remainders.of(1, part)).dense()
        assert not torch.equal(exact, part.double())
        editor.apply(workspace, editor.plan(workspace, requests()[1:2]))
        torch.testing.assert_close([seen["problem"][-1], seen["ground"][-1]], [exact, exact], rtol=0, atol=0)


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


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("FineTune", "layers: [1], ", "FineTune + RECT + PRUNE"),
        ("MEND", "", "MEND + RECT + PRUNE"),
    ],
)
def test_restraints_come_from_yaml(tmp_path: Path, kind: str, settings: str, name: str) -> None:
    path = tmp_path / "method.yaml"
    path.write_text(
        f"model: {{editor: {{class_path: lit_edit.editors.{kind}, init_args: {{{settings}restraints: ["
        "{class_path: lit_edit.editors.restraints.RECT, init_args: {keep: 0.3}}, "
        "{class_path: lit_edit.editors.restraints.PRUNE, init_args: {every_n: 7}}]}}}\n",
        encoding="utf-8",
    )
    editor = load_editor(path)
    assert describe(editor) == name
    assert [vars(restraint).get("every_n") for restraint in editor.restraints] == [None, 7]
