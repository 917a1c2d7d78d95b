"""What a restraint sees of a layer (`Ground`) and what every restraint is (`Restraint`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_edit.solvers import Solver
from lit_edit.updates import Update


@dataclass(frozen=True, eq=False)
class Ground:
    """One layer as a restraint sees it.

    Args:
        weight: ``W (d, p)`` as it is now; for `Restraint.restrain`, before the update.
        original: ``W_0 (d, p)``, the weight before the first edit of the run; None unless a restraint needs it.
        gradient: ``∇G (d, p)``, the gradient of the language-model loss on a corpus with respect to ``W_0``; likewise.
        edits_here: requests that were written into this layer before this batch.
        edits: requests that were applied before this batch, in whichever layers.
        batch: requests of this batch; 0 at the end of a run.
        layer: the layer's name, for messages and for what a restraint keeps per layer.
    """

    weight: Tensor
    original: Tensor | None = None
    gradient: Tensor | None = None
    edits_here: int = 0
    edits: int = 0
    batch: int = 0
    layer: str = ""


class Restraint:
    """Moderates additive updates. One that works on each update overrides `restrain`, one on their sum `total`.

    Attributes:
        needs_original: whether the layer's weight before the first edit has to be kept.
        needs_gradient: whether the gradient statistic of the layer has to be collected.
    """

    needs_original: bool = False
    needs_gradient: bool = False

    def check(self, solver: Solver) -> None:
        """Refuses solvers whose updates are not added to the weight; asked when an editor is put together.

        Raises:
            ValueError: with the reason.
        """
        if not solver.additive:
            raise ValueError(
                f"{type(self).__name__} restrains what is added to a weight, and {type(solver).__name__} multiplies "
                "the weight by an orthogonal matrix, which would no longer be one. Leave the restraint out, or take "
                "an additive solver (ROME, MEMIT, EMMET, AlphaEdit)."
            )

    def restrain(self, update: Update, ground: Ground) -> Update:
        """The update to apply instead of ``update``."""
        return update

    def total(self, ground: Ground, last: bool) -> Update | None:
        """A further update of the layer, asked for after every batch and once at the end of the run.

        Args:
            ground: the layer after the batch's updates.
            last: whether no more edits follow; ``ground.batch`` is 0 then.

        Returns:
            The update, or None to leave the weight as it is.
        """
        return None
