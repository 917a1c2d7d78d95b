"""What holds for every restraint, on the update of every solver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.sites import case_of, normal

from lit_edit.editors import LocateThenEdit
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.restraints import (
    PRUNE,
    RECT,
    OEditPlus,
    RandomDeletion,
    RandomSubspace,
    Restraint,
    Scaling,
    UpdateKind,
)
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey, Solver
from lit_edit.editors.values import ValueOptimizer

RESTRAINTS: dict[str, Callable[[], Restraint]] = {
    "rect": lambda: RECT(0.3),
    "prune": lambda: PRUNE(1.5, every_n=1),
    "linear prune": lambda: PRUNE(form="linear", every_n=1),
    "prune at the end": lambda: PRUNE(form="linear"),
    "o-edit+": lambda: OEditPlus(1.0, max_directions=3),
    "scaling": lambda: Scaling(0.5),
    "random deletion": lambda: RandomDeletion(0.5),
    "random subspace": lambda: RandomSubspace(1.0, max_directions=4),
}
ADDITIVE: list[Solver] = [ROME(), MEMIT(1.0), EMMET(), AlphaEdit(threshold=None, energy=0.5, ridge=0.1)]
each_restraint = pytest.mark.parametrize("name", RESTRAINTS)


@each_restraint
@pytest.mark.parametrize("solver", ADDITIVE, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("n", [1, 10])
def test_every_restraint_works_on_every_additive_solver(name: str, solver: Solver, n: int) -> None:
    n, restraint = 1 if isinstance(solver, ROME) else n, RESTRAINTS[name]()
    case = case_of(
        normal(12, 40), normal(40, n, seed=1), 20 * normal(12, n, seed=2), torch.diag(1 / torch.arange(1, 41))
    )
    site, original, plain = case.site, case.weight.clone(), case.delta(solver)
    site.gradient, site.pending = normal(12, 40, seed=3), n
    restraint.check(UpdateKind(type(solver).__name__, additive=solver.additive))
    written = [site.write(restraint.restrain(case.solve(solver), site))]
    site.count(n)
    for further in (restraint.total(site, 0, n), restraint.finish(site)):
        if further is not None:
            written.append(site.write(further))
    # Less than the solver asked for, but something of it, and in the same direction.
    change = case.weight - original
    assert 0 < float(change.norm()) < float(plain.norm())
    assert float((change * plain).sum()) > 0
    # All that was done can be undone.
    for one in reversed(written):
        site.write(one.update.inverse())
    torch.testing.assert_close(case.weight, original, rtol=0, atol=1e-10)


@each_restraint
@pytest.mark.parametrize("solver", [MOSE(), MOSEKey()], ids=["mose", "mose-key"])
def test_solvers_that_multiply_are_refused_with_the_reason(name: str, solver: Solver) -> None:
    message = f"added to a weight, and {type(solver).__name__} multiplies the weight by an orthogonal matrix"
    with pytest.raises(ValueError, match=message):
        LocateThenEdit(FixedLayers([0]), ValueOptimizer(), solver, restraints=[RESTRAINTS[name]()])
