"""What holds for every solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.sites import Case, least_change, normal, random_case, site_of
from jsonargparse import ArgumentParser

from lit_edit.algebra.linalg import NotPositiveDefiniteError
from lit_edit.algebra.updates import Additive
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Solver
from lit_edit.model.edited_weight import all_or_nothing

SOLVERS: dict[str, Callable[[bool], Solver]] = {
    "rome": lambda memory: ROME(memory=memory, preservation=5.0),
    "rome without covariance": lambda memory: ROME(covariance=False, memory=memory),
    "memit": lambda memory: MEMIT(preservation=20.0, memory=memory),
    "alphaedit": lambda memory: AlphaEdit(threshold=None, energy=0.2, ridge=0.1, memory=memory),
    "mose": lambda memory: MOSE(preservation=20.0, memory=memory),
    "emmet": lambda memory: EMMET(preservation=5.0, memory=memory),
    "emmet with a ridge": lambda memory: EMMET(preservation=5.0, ridge=0.1, memory=memory),
    "mose-key": lambda memory: MOSEKey(preservation=20.0, memory=memory),
    "mose-key of least change": lambda memory: MOSEKey(preservation=20.0, memory=memory, target="least_change"),
}
each_solver = pytest.mark.parametrize("name", SOLVERS)


def batch_size(name: str) -> int:
    return 1 if name.startswith("rome") else 10


def assert_equal(one: Case, other: Case, solver: Solver, with_other: Solver | None = None) -> None:
    """The same solution to the last bit."""
    found, expected = one.solve(solver).state_dict(), other.solve(with_other or solver).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_close(one: Case, other: Case, solver: Solver) -> None:
    """The same solution but for rounding, which a Krylov space and small eigenvalues make larger."""
    expected = other.delta(solver)
    assert float((one.delta(solver) - expected).norm()) < 1e-5 * float(expected.norm())


@each_solver
@pytest.mark.parametrize(("d", "p"), [(12, 24), (40, 96), (24, 24)])
def test_neither_order_nor_precision_of_what_is_given_matters(name: str, d: int, p: int) -> None:
    case, solver = random_case(d, p, batch_size(name), 6), SOLVERS[name](True)
    before = case.weight.clone()
    delta = case.delta(solver)
    assert torch.equal(case.weight, before)
    assert float(delta.norm()) > 1e-3
    order = torch.randperm(batch_size(name), generator=torch.Generator().manual_seed(3))
    other = case.fresh(keys=case.keys[:, order], targets=case.targets[:, order], memory=case.memory.flip(1))
    torch.testing.assert_close(other.delta(solver), delta, rtol=1e-8, atol=1e-10)
    single = {n: getattr(case, n).float() for n in ("weight", "keys", "targets", "covariance", "memory")}
    rough = case.fresh(**single).delta(solver)
    assert rough.dtype == torch.float64
    assert float((rough - delta).norm() / delta.norm()) < 2e-3


@each_solver
def test_memory_lowers_the_change_on_remembered_keys(name: str) -> None:
    kept, forgotten = 0.0, 0.0
    for seed in range(10):
        case = random_case(16, 48, batch_size(name), 8, seed=seed)
        changes = [float((case.delta(SOLVERS[name](memory)) @ case.memory).norm()) for memory in (True, False)]
        assert changes[0] < changes[1]
        kept, forgotten = kept + changes[0], forgotten + changes[1]
    assert kept < 0.9 * forgotten


@each_solver
def test_an_unused_or_empty_memory_changes_nothing(name: str) -> None:
    case = random_case(n=batch_size(name), m=5)
    plain = case.fresh(memory=None)
    assert_equal(case, plain, SOLVERS[name](False))
    assert_equal(plain, plain.fresh(memory=torch.zeros(48, 0)), SOLVERS[name](True), SOLVERS[name](False))


# What is kept from edit to edit. The layer is wide enough for rotations without a dense decomposition.


def edited(solver: Solver, seed: int = 0, edits: int = 4) -> Case:
    """The next edit of a layer after some."""
    case = random_case(72, 96, m=3, seed=seed)
    for i in range(1, edits + 1):
        case.then(i).write(solver)
    return case.then(9)


@each_solver
def test_one_solver_serves_two_models_as_two_would(name: str) -> None:
    found = []
    shared = SOLVERS[name](True)
    for solvers in ((shared, shared), (SOLVERS[name](True), SOLVERS[name](True))):
        cases = [random_case(72, 96, m=3, seed=seed) for seed in (0, 1)]
        for i in range(1, 4):
            for case, solver in zip(cases, solvers, strict=True):
                case.then(i).write(solver)
        found.append([case.weight for case in cases])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@each_solver
def test_what_was_forgotten_no_longer_counts(name: str) -> None:
    solver = SOLVERS[name](True)
    case = edited(solver)
    before = case.delta(solver)
    case.site.forget([2, 5])
    case.site.remember([20, 21], case.then(20, 2).keys, torch.zeros(72, 2))  # as many as before
    assert_close(case, case.fresh(), solver)
    assert float((case.delta(solver) - before).norm()) > 1e-4 * float(before.norm())
    case.site.forget([1, 20])
    assert case.memory.shape[1] == 5
    assert_close(case, case.fresh(), solver)
    original = case.site.original.clone()
    case.site.restore()
    assert_equal(case, case.fresh(weight=original, memory=None), solver)


@each_solver
def test_another_weight_covariance_or_setting_counts_at_once(name: str) -> None:
    solver = SOLVERS[name](True)
    case = edited(solver)
    case.site.write(Additive(0.1 * normal(72, 96)))  # by nobody the solver knows of
    assert_close(case, case.fresh(), solver)
    case.site.covariance = case.covariance + 0.1 * torch.eye(96)
    assert_close(case, case.fresh(), solver)
    case.write(solver)
    case = case.then(10)
    other = SOLVERS[name](True)
    for weight in ("preservation", "ridge"):
        if getattr(other, weight, 0):
            setattr(other, weight, 30 * getattr(other, weight))
    for changed in (SOLVERS[name](False), solver, other, solver):
        assert_close(case, case.fresh(), changed)


@each_solver
def test_looking_and_failing_leave_no_trace(name: str) -> None:
    def fail(case: Case, solver: Solver) -> None:
        with all_or_nothing([case.site]):
            case.then(7).write(solver)
            case.site.forget([1])
            raise KeyError("stop")

    solver = SOLVERS[name](True)
    case, straight = edited(solver), edited(SOLVERS[name](True))
    case.then(6).solve(solver)
    with pytest.raises(KeyError, match="stop"):
        fail(case, solver)
    assert_equal(case, straight, solver)
    case.write(solver)
    straight.write(solver)
    assert_equal(case.then(10), straight.then(10), solver)


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_after_a_checkpoint_is_the_same_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    solver = SOLVERS[name](True)
    start = random_case(72, 96)
    case, again = (replace(start, site=site_of(start.weight.to(dtype), start.covariance)) for _ in range(2))
    for i in range(1, 5):
        case.then(i).write(solver)
        if i % 2:
            again.site.load_state_dict(case.site.state_dict())
    again.then(4).write(solver)
    assert torch.equal(again.weight, case.weight)
    assert_equal(case.then(9), again.then(9), solver, SOLVERS[name](True))


# What is refused


@each_solver
def test_a_missing_covariance_is_named_where_it_is_needed(name: str) -> None:
    case, solver = random_case(n=batch_size(name), covariance=None), SOLVERS[name](False)
    if not solver.needs_covariance:
        case.solve(solver)
        return
    with pytest.raises(ValueError, match=r"needs the key covariance of layer 'h.3'; collect it with"):
        case.solve(solver)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.ones(5, 1)}, r"'h.3': keys must have shape \(3, 1\) .* shape \(2, 3\), got \(5, 1\)"),
        ({"keys": torch.ones(3)}, r"'h.3': keys must have shape \(3, 3\) .* got \(3,\)"),
        ({"keys": torch.ones(3, 0), "targets": torch.ones(2, 0)}, "'h.3': there are no keys to edit"),
        ({"targets": torch.ones(2, 2)}, r"targets must have shape \(2, 1\) .* got \(2, 2\)"),
        ({"value_keys": torch.ones(3, 2)}, r"value keys must have shape \(3, 1\) .* got \(3, 2\)"),
        ({"keys": torch.full((3, 1), math.nan)}, "keys of shape .* not finite"),
        ({"targets": torch.full((2, 1), math.inf)}, "targets of shape .* not finite"),
    ],
)
def test_keys_and_targets_that_do_not_fit_are_refused(changes: dict[str, torch.Tensor], message: str) -> None:
    case = Case(site_of(torch.ones(2, 3), torch.eye(3)), torch.ones(3, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match=message):
        replace(case, **changes).solve(MEMIT())


@pytest.mark.parametrize("solver", [ROME(), EMMET(), EMMET(ridge=0.1), MOSEKey()], ids=lambda s: type(s).__name__)
def test_a_zero_key_that_would_have_to_move_is_refused(solver: Solver) -> None:
    case = random_case(n=1 if isinstance(solver, ROME) else 3)
    case.keys[:, -1] = 0
    with pytest.raises(ValueError, match=r"key of layer 'h.3' is zero"):
        case.solve(solver)


@pytest.mark.parametrize("solver", [ROME(memory=True), EMMET(memory=True), MEMIT(1.0, memory=True)])
def test_a_covariance_of_too_few_tokens_needs_remembered_keys(solver: Solver) -> None:
    tokens = normal(48, 20)
    case = random_case(covariance=tokens @ tokens.T / 20)
    with pytest.raises(NotPositiveDefiniteError, match="more tokens than its 48 dimensions"):
        case.solve(solver)
    case = case.fresh(memory=normal(48, 40, seed=1))
    gram = case.covariance + case.memory @ case.memory.T
    if isinstance(solver, MEMIT):
        gram = gram + case.keys @ case.keys.T
        expected = torch.linalg.solve(gram, case.keys @ case.residual.T).T
    else:
        expected = least_change(gram, case.keys, case.residual)
    torch.testing.assert_close(case.delta(solver), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ROME(preservation=0.0), "ROME's preservation must be positive and finite, got 0.0"),
        (lambda: MEMIT(preservation=-1.0), "MEMIT's preservation must be positive"),
        (lambda: MOSE(preservation=float("nan")), "MOSE's preservation must be positive and finite, got nan"),
        (lambda: MOSE(method="qr"), "'krylov' or 'svd', not 'qr'"),  # type: ignore[arg-type]
        (lambda: AlphaEdit(ridge=0.0), "AlphaEdit's ridge must be positive"),
        (lambda: AlphaEdit(energy=0.1), "set the other to null; got threshold=0.02, energy=0.1"),
        (lambda: AlphaEdit(threshold=None), "threshold=None, energy=None"),
        (lambda: AlphaEdit(threshold=None, energy=2.0), "between 0 and 1, got 2.0"),
        (lambda: EMMET(preservation=0.0), "EMMET's preservation must be positive"),
        (lambda: EMMET(ridge=-0.1), "EMMET's ridge must be positive and finite, got -0.1"),
        (lambda: MOSEKey(preservation=-1.0), "MOSEKey's preservation must be positive"),
        (lambda: MOSEKey(method="qr"), "'krylov' or 'svd', not 'qr'"),  # type: ignore[arg-type]
        (lambda: MOSEKey(target="nearest"), "'exact' or 'least_change', not 'nearest'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_refused_at_once(make: Callable[[], Solver], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ROME, {"covariance": False}),
        (MEMIT, {"preservation": 20, "memory": True}),
        (AlphaEdit, {"threshold": None, "energy": 0.1}),
        (MOSE, {"preservation": 2.0}),
        (EMMET, {"ridge": 0.1}),
        (MOSEKey, {"target": "least_change"}),
    ],
)
def test_solvers_are_made_from_a_config(kind: type[Solver], settings: dict[str, object]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--solver", type=Solver)
    class_path = f"lit_edit.editors.solvers.{kind.__name__}"
    parsed = parser.parse_object({"solver": {"class_path": class_path, "init_args": settings}})
    assert type(parser.instantiate(parsed).solver) is kind
