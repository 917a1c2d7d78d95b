"""What holds for every solver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Solver

SHAPES = [(12, 24), (16, 48), (40, 96), (24, 24)]

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
each_shape = pytest.mark.parametrize(("d", "p"), SHAPES)


def batch_size(name: str) -> int:
    return 1 if name.startswith("rome") else 10


@each_solver
@each_shape
@pytest.mark.parametrize("m", [0, 7])
def test_undo_restores(make_problem, name: str, d: int, p: int, m: int) -> None:
    problem = make_problem(d, p, batch_size(name), m)
    weight = problem.weight.clone()
    update = SOLVERS[name](True).solve(problem)
    torch.testing.assert_close(weight, problem.weight, rtol=0, atol=0)  # solving leaves it alone
    update.apply_(weight)
    assert float((weight - problem.weight).norm()) > 1e-3
    update.undo_(weight)
    torch.testing.assert_close(weight, problem.weight, rtol=0, atol=1e-11)


@each_solver
@each_shape
def test_order_of_requests_does_not_matter(make_problem, name: str, d: int, p: int) -> None:
    problem, solver = make_problem(d, p, batch_size(name), 6), SOLVERS[name](True)
    order = torch.randperm(batch_size(name), generator=torch.Generator().manual_seed(3))
    shuffled = make_problem(
        d, p, keys=problem.keys[:, order], targets=problem.targets[:, order], memory=problem.memory.flip(1)
    )
    delta = solver.solve(problem).delta(problem.weight)
    other = solver.solve(
        make_problem(
            d,
            p,
            weight=problem.weight,
            keys=shuffled.keys,
            targets=shuffled.targets,
            memory=shuffled.memory,
            covariance=problem.covariance,
        )
    ).delta(problem.weight)
    torch.testing.assert_close(other, delta, rtol=1e-8, atol=1e-10)


@each_solver
@each_shape
def test_float32_inputs_agree_with_float64(make_problem, name: str, d: int, p: int) -> None:
    problem, solver = make_problem(d, p, batch_size(name), 6), SOLVERS[name](True)
    tensors = ("weight", "keys", "targets", "covariance", "memory")
    single = make_problem(d, p, **{tensor: getattr(problem, tensor).float() for tensor in tensors})
    exact = solver.solve(problem).delta(problem.weight)
    rough = solver.solve(single).delta(single.weight)
    assert rough.dtype == torch.float64
    assert float((rough - exact).norm() / exact.norm()) < 2e-3


@each_solver
def test_memory_lowers_the_change_on_remembered_keys(make_problem, name: str) -> None:
    kept, forgotten = 0.0, 0.0
    for seed in range(20):
        problem = make_problem(16, 48, batch_size(name), 8, seed=seed)
        changes = [
            float((SOLVERS[name](memory).solve(problem).delta(problem.weight) @ problem.memory).norm())
            for memory in (True, False)
        ]
        assert changes[0] < changes[1]
        kept, forgotten = kept + changes[0], forgotten + changes[1]
    assert kept < 0.9 * forgotten


@each_solver
def test_an_unused_or_empty_memory_changes_nothing(make_problem, name: str) -> None:
    problem = make_problem(n=batch_size(name), m=5)
    plain = make_problem(
        weight=problem.weight, keys=problem.keys, targets=problem.targets, covariance=problem.covariance, memory=None
    )
    empty = make_problem(
        weight=problem.weight,
        keys=problem.keys,
        targets=problem.targets,
        covariance=problem.covariance,
        memory=torch.zeros(48, 0),
    )
    reference = SOLVERS[name](False).solve(plain).delta(plain.weight)
    for solver, given in [
        (SOLVERS[name](False), problem),
        (SOLVERS[name](True), plain),
        (SOLVERS[name](True), empty),
    ]:
        torch.testing.assert_close(solver.solve(given).delta(plain.weight), reference, rtol=0, atol=0)


@each_solver
def test_a_missing_covariance_is_named_where_it_is_needed(make_problem, name: str) -> None:
    problem, solver = make_problem(n=batch_size(name), covariance=None), SOLVERS[name](False)
    if not solver.needs_covariance:
        solver.solve(problem)
        return
    with pytest.raises(ValueError, match=r"needs the key covariance of layer 'blocks.0'; collect it with"):
        solver.solve(problem)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ROME(preservation=0.0), "ROME's preservation must be positive and finite, got 0.0"),
        (lambda: MEMIT(preservation=-1.0), "MEMIT's preservation must be positive"),
        (lambda: MOSE(preservation=float("nan")), "MOSE's preservation must be positive and finite, got nan"),
        (lambda: AlphaEdit(ridge=0.0), "AlphaEdit's ridge must be positive"),
        (lambda: EMMET(preservation=0.0), "EMMET's preservation must be positive"),
        (lambda: EMMET(ridge=-0.1), "EMMET's ridge must be positive and finite, got -0.1"),
        (lambda: MOSEKey(preservation=-1.0), "MOSEKey's preservation must be positive"),
        (lambda: AlphaEdit(energy=0.1), "set the other to null; got threshold=0.02, energy=0.1"),
        (lambda: AlphaEdit(threshold=None), "threshold=None, energy=None"),
        (lambda: AlphaEdit(threshold=None, energy=2.0), "between 0 and 1, got 2.0"),
    ],
)
def test_bad_settings_are_refused_at_once(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"class_path": "lit_edit.editors.solvers.ROME", "init_args": {"covariance": False}}, ROME),
        ({"class_path": "lit_edit.editors.solvers.MEMIT", "init_args": {"preservation": 20, "memory": True}}, MEMIT),
        (
            {"class_path": "lit_edit.editors.solvers.AlphaEdit", "init_args": {"threshold": None, "energy": 0.1}},
            AlphaEdit,
        ),
        ({"class_path": "lit_edit.editors.solvers.MOSE", "init_args": {"preservation": 2.0}}, MOSE),
        ({"class_path": "lit_edit.editors.solvers.EMMET", "init_args": {"ridge": 0.1}}, EMMET),
        ({"class_path": "lit_edit.editors.solvers.MOSEKey", "init_args": {"target": "least_change"}}, MOSEKey),
    ],
)
def test_solvers_are_made_from_a_config(config, kind: type[Solver]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--solver", type=Solver)
    parsed = parser.parse_object({"solver": config})
    assert type(parser.instantiate(parsed).solver) is kind
