"""What holds for every restraint, on the update of every solver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_edit.editors import LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import PRUNE, RECT, Ground, Restraint, Source
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Problem, Solver
from lit_edit.editors.values import ValueOptimizer

RESTRAINTS: dict[str, Callable[[], Restraint]] = {
    "rect": lambda: RECT(0.3),
    "prune": lambda: PRUNE(1.5, every_n=1),
    "linear prune": lambda: PRUNE(form="linear", every_n=1),
}
ADDITIVE: dict[str, Solver] = {
    "rome": ROME(),
    "memit": MEMIT(1.0),
    "emmet": EMMET(),
    "alphaedit": AlphaEdit(threshold=None, energy=0.5, ridge=0.1),
}
each_restraint = pytest.mark.parametrize("name", RESTRAINTS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int) -> Problem:
    keys = normal(40, n, seed=1)
    return Problem(normal(12, 40), keys, 20 * normal(12, n, seed=2), torch.diag(1.0 / torch.arange(1, 41)), layer="h.3")


@each_restraint
@pytest.mark.parametrize("solver", ADDITIVE.values(), ids=ADDITIVE)
@pytest.mark.parametrize("n", [1, 10])
def test_every_restraint_works_on_every_additive_solver(name: str, solver: Solver, n: int) -> None:
    n = 1 if isinstance(solver, ROME) else n
    here, restraint = problem(n), RESTRAINTS[name]()
    restraint.check(Source(type(solver).__name__, additive=solver.additive))
    original = here.weight.clone()
    update = solver.solve(here)
    plain = update.delta(original)
    restrained = restraint.restrain(update, Ground(here.weight, original, batch_here=n, batch=n, layer="h.3"))
    weight = original.clone()
    restrained.apply_(weight)
    further = restraint.total(Ground(weight, original, batch_here=n, batch=n, layer="h.3"), last=False)
    if further is not None:
        further.apply_(weight)
    # Less than the solver asked for, but something of it, and in the same direction.
    assert 0 < float((weight - original).norm()) < float(plain.norm())
    assert float(((weight - original) * plain).sum()) > 0
    # All that was done can be undone.
    if further is not None:
        further.undo_(weight)
    restrained.undo_(weight)
    torch.testing.assert_close(weight, original, rtol=0, atol=1e-10)


@each_restraint
@pytest.mark.parametrize("solver", [MOSE(), MOSEKey()], ids=["mose", "mose-key"])
def test_solvers_that_multiply_are_refused_with_the_reason(name: str, solver: Solver) -> None:
    message = f"added to a weight, and {type(solver).__name__} multiplies the weight by an orthogonal matrix"
    with pytest.raises(ValueError, match=message):
        LocateThenEdit(FixedLayers([0]), ValueOptimizer(), solver, restraints=[RESTRAINTS[name]()])
