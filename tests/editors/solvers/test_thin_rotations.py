"""MOSE's thin solutions against the dense ones, along sequences of edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_edit.algebra.exact import no_remainder
from lit_edit.algebra.krylov import Preserved
from lit_edit.algebra.linalg import orthogonality_error
from lit_edit.algebra.updates import Rotation, ThinRotation, Update
from lit_edit.editors.solvers import MOSE, MOSEKey, Problem, Solver

D, P = 128, 200
SOLVERS: dict[str, Callable[[str], Solver]] = {
    "mose": lambda method: MOSE(preservation=5.0, method=method),  # type: ignore[arg-type]
    "mose without memory": lambda method: MOSE(preservation=5.0, memory=False, method=method),  # type: ignore[arg-type]
    "mose-key": lambda method: MOSEKey(preservation=5.0, method=method),  # type: ignore[arg-type]
    "mose-key, least change": lambda method: MOSEKey(5.0, target="least_change", method=method),  # type: ignore[arg-type]
}
each_solver = pytest.mark.parametrize("name", SOLVERS)


class Sequence:
    """Edits of one layer, one after another, in float64 or in a dtype of a model."""

    def __init__(self, dtype: torch.dtype = torch.float64, carry: bool = False) -> None:
        self.g = torch.Generator().manual_seed(0)
        root = torch.randn(P, P, generator=self.g, dtype=torch.float64) * torch.logspace(0, -2.5, P).double()
        self.covariance = root @ root.T / P
        self.weight = torch.randn(D, P, generator=self.g, dtype=torch.float64).to(dtype)
        self.past = torch.zeros(P, 0, dtype=torch.float64)
        self.remainder = no_remainder(self.weight) if carry else None

    def problem(self, n: int = 1) -> Problem:
        keys = torch.linalg.cholesky(self.covariance) @ torch.randn(P, n, generator=self.g, dtype=torch.float64) * 8
        out = self.weight.double() @ keys
        targets = torch.randn(D, n, generator=self.g, dtype=torch.float64)
        targets = targets / targets.norm(dim=0) * out.norm(dim=0)
        return Problem(self.weight, keys, targets, self.covariance, self.past, "layer", remainder=self.remainder)

    def apply(self, problem: Problem, update: Update) -> None:
        update.apply_(self.weight, self.remainder)
        self.past = torch.cat([self.past, problem.keys], dim=1)


def dense(update: Update) -> tuple[Tensor, bool]:
    """Q, and whether it stands on the side of the outputs."""
    left = isinstance(update, (Rotation, ThinRotation))
    identity = torch.eye(D if left else P, dtype=torch.float64)
    return identity + update.delta(identity), left


def objective(solver: Solver, problem: Problem, q: Tensor, left: bool) -> float:
    """What Q is to make small, summed term by term: ‖Q X − Y‖² over preserved and new columns."""
    root = torch.linalg.cholesky(problem.covariance) * solver.preservation**0.5  # type: ignore[attr-defined]
    kept = torch.cat([root, solver.remembered(problem)], dim=1)
    new = problem.keys
    if left:
        kept, new, wanted = problem.outputs(kept), problem.outputs(new), problem.targets
    else:
        wanted = wanted_keys(solver, problem)
    return float((q @ kept - kept).square().sum() + (q @ new - wanted).square().sum())


def wanted_keys(solver: Solver, problem: Problem) -> Tensor:
    from lit_edit.editors.solvers.mose_key import least_changed_keys, matched_keys

    if solver.target == "exact":  # type: ignore[attr-defined]
        return matched_keys(problem.exact.dense(), problem.keys, problem.targets)
    return least_changed_keys(problem.exact.dense(), problem.keys, problem.targets, problem.covariance)


@each_solver
@pytest.mark.parametrize("n", [1, 2])
def test_every_edit_of_a_sequence_is_as_good_as_the_dense_solution(name: str, n: int) -> None:
    run, thin, exact = Sequence(), SOLVERS[name]("krylov"), SOLVERS[name]("svd")
    start = torch.linalg.svdvals(run.weight)
    for _ in range(20):
        problem = run.problem(n)
        update = thin.solve(problem)
        q, left = dense(update)
        assert type(update).__name__.startswith("Thin")
        assert orthogonality_error(q) < 1e-12
        best, _ = dense(exact.solve(problem))
        reached, least = objective(exact, problem, q, left), objective(exact, problem, best, left)
        nothing = objective(exact, problem, torch.eye(len(q), dtype=torch.float64), left)
        assert reached - least < 1e-7 * nothing
        assert least < 0.99 * nothing
        run.apply(problem, update)
    torch.testing.assert_close(torch.linalg.svdvals(run.weight), start, rtol=1e-10, atol=0)


@each_solver
def test_a_solution_that_was_not_applied_does_not_count(name: str) -> None:
    run, solver = Sequence(), SOLVERS[name]("krylov")
    first = run.problem()
    run.apply(first, solver.solve(first))
    second = run.problem()
    alone, _ = dense(SOLVERS[name]("krylov").solve(second))
    solver.solve(run.problem())  # looked at and dropped, as a layer policy does
    again, _ = dense(solver.solve(second))
    torch.testing.assert_close(again, alone, rtol=0, atol=1e-6)


@each_solver
def test_a_weight_that_others_changed_is_seen_anew(name: str) -> None:
    run, solver = Sequence(), SOLVERS[name]("krylov")
    for _ in range(3):
        problem = run.problem()
        run.apply(problem, solver.solve(problem))
    run.weight += 0.3 * torch.randn(D, P, generator=run.g, dtype=torch.float64)
    problem = run.problem()
    q, left = dense(solver.solve(problem))
    best, _ = dense(SOLVERS[name]("svd").solve(problem))
    exact = SOLVERS[name]("svd")
    reached, least = objective(exact, problem, q, left), objective(exact, problem, best, left)
    assert reached - least < 1e-7 * objective(exact, problem, torch.eye(len(q), dtype=torch.float64), left)


def follow(run: Sequence, solver: Solver, edits: int = 3) -> Problem:
    """Some edits, and the problem that comes next."""
    for _ in range(edits):
        problem = run.problem()
        run.apply(problem, solver.solve(problem))
    return run.problem()


@each_solver
@pytest.mark.parametrize("restored", [False, True])
def test_another_weight_of_what_is_preserved_counts_at_once(name: str, restored: bool) -> None:
    run, solver = Sequence(), SOLVERS[name]("krylov")
    problem = follow(run, solver)
    other = SOLVERS[name]("krylov") if restored else solver  # a run that goes on with another configuration
    other.load_state_dict(solver.state_dict())
    other.preservation = 0.5  # type: ignore[attr-defined]
    fresh = SOLVERS[name]("krylov")
    fresh.preservation = 0.5  # type: ignore[attr-defined]
    torch.testing.assert_close(dense(other.solve(problem))[0], dense(fresh.solve(problem))[0], rtol=0, atol=1e-4)


@each_solver
@pytest.mark.parametrize("in_place", [False, True])
def test_another_covariance_counts_at_once(name: str, in_place: bool) -> None:
    run, solver = Sequence(), SOLVERS[name]("krylov")
    problem = follow(run, solver)
    if in_place:
        problem.covariance.diagonal().add_(0.5)
    else:
        problem = replace(problem, covariance=problem.covariance + 0.5 * torch.eye(P, dtype=torch.float64))
    fresh = SOLVERS[name]("krylov").solve(problem)
    torch.testing.assert_close(dense(solver.solve(problem))[0], dense(fresh)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "carry", "most"),
    [
        (torch.float32, False, 1),
        (torch.float16, False, 4),
        (torch.bfloat16, False, 12),
        (torch.float16, True, 1),
        (torch.bfloat16, True, 1),
    ],
)
def test_eigenvectors_are_computed_anew_when_rounding_has_added_up_and_is_not_carried(
    dtype: torch.dtype, carry: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    real = Preserved.of.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Preserved], gram: Tensor) -> Preserved:
        computed.append(1)
        return real(cls, gram)

    monkeypatch.setattr(Preserved, "of", classmethod(counting))
    follow(Sequence(dtype, carry), MOSE(5.0), edits=12)
    assert most / 4 <= len(computed) <= most


@each_solver
@pytest.mark.parametrize(("dtype", "carry"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_rounded_weights_do_as_well(name: str, dtype: torch.dtype, carry: bool) -> None:
    run, solver, exact = Sequence(dtype, carry), SOLVERS[name]("krylov"), SOLVERS[name]("svd")
    for _ in range(12):
        problem = run.problem()
        update = solver.solve(problem)
        q, left = dense(update)
        best, _ = dense(exact.solve(problem))
        reached, least = objective(exact, problem, q, left), objective(exact, problem, best, left)
        assert reached - least < 1e-6 * objective(exact, problem, torch.eye(len(q), dtype=torch.float64), left)
        run.apply(problem, update)


@each_solver
def test_a_solver_restored_from_its_state_goes_on_to_the_last_bit(name: str) -> None:
    run, solver = Sequence(torch.float32), SOLVERS[name]("krylov")
    for _ in range(5):
        problem = run.problem()
        run.apply(problem, solver.solve(problem))
    other = SOLVERS[name]("krylov")
    other.load_state_dict({key: tensor.clone() for key, tensor in solver.state_dict().items()})
    problem = run.problem()
    for one, two in zip(
        solver.solve(problem).state_dict().values(), other.solve(problem).state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@each_solver
def test_many_remembered_keys_are_folded_in_and_stay_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mose", "mose_key"):
        monkeypatch.setattr(f"lit_edit.editors.solvers.{module}.FOLD_AT", 4)
    run, solver, exact = Sequence(), SOLVERS[name]("krylov"), SOLVERS[name]("svd")
    for _ in range(15):
        problem = run.problem()
        update = solver.solve(problem)
        run.apply(problem, update)
    problem = run.problem()
    q, left = dense(solver.solve(problem))
    best, _ = dense(exact.solve(problem))
    reached, least = objective(exact, problem, q, left), objective(exact, problem, best, left)
    assert reached - least < 1e-7 * objective(exact, problem, torch.eye(len(q), dtype=torch.float64), left)


@pytest.mark.parametrize("make", [MOSE, MOSEKey])
def test_an_unknown_method_is_refused(make: type[MOSE] | type[MOSEKey]) -> None:
    with pytest.raises(ValueError, match="is 'krylov' or 'svd', not 'qr'"):
        make(method="qr")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: MOSE(5.0), lambda: MOSE(5.0, memory=False)])
def test_bases_stay_orthonormal_over_a_long_run(make: Callable[[], MOSE]) -> None:
    run, solver = Sequence(torch.float32), make()
    for _ in range(400):
        problem = run.problem()
        update = solver.solve(problem)
        assert isinstance(update, ThinRotation)
        run.apply(problem, update)
    vectors = solver._carried["layer"].vectors
    assert orthogonality_error(vectors) < 1e-12
    assert orthogonality_error(dense(update)[0]) < 1e-13


@pytest.mark.parametrize("name", ["mose", "mose-key"])
def test_what_nothing_is_known_of_is_turned_least(name: str) -> None:
    run = Sequence()
    few = torch.linalg.cholesky(run.covariance)[:, :40]
    problem = replace(run.problem(), covariance=few @ few.T)
    thin, exact = (dense(SOLVERS[name](method).solve(problem))[0] for method in ("krylov", "svd"))
    torch.testing.assert_close(thin, exact, rtol=0, atol=1e-5)


def test_keys_are_matched_with_a_triangle_of_the_weight_before_rounding() -> None:
    run, solver = Sequence(torch.float32), MOSEKey(5.0)
    for _ in range(30):
        problem = run.problem()
        torch.testing.assert_close(solver._matched(problem), wanted_keys(solver, problem), rtol=0, atol=1e-9)
        run.apply(problem, solver.solve(problem))
    triangle = solver._triangles["layer"]
    run.weight += 0.5 * torch.randn(D, P, generator=run.g, dtype=torch.float64)
    problem = run.problem()
    torch.testing.assert_close(solver._matched(problem), wanted_keys(solver, problem), rtol=0, atol=1e-9)
    assert solver._triangles["layer"] is not triangle
    run.weight[1] = run.weight[0]  # no full row rank
    problem = run.problem()
    torch.testing.assert_close(solver._matched(problem), wanted_keys(solver, problem), rtol=0, atol=1e-9)
