"""What a restraint sees of a layer (`Ground`), of what it restrains (`Source`), and what every restraint is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lit_edit.algebra.exact import ExactWeight
from lit_edit.algebra.updates import Update


@dataclass(frozen=True, eq=False)
class Ground:
    """One layer as a restraint sees it.

    Args:
        weight: ``W (d, p)`` as it is now; for `Restraint.restrain`, before the update.
        original: ``W_0 (d, p)``, the weight before the first edit of the run, on the CPU; where the layer was never
            edited it is ``weight`` itself. None unless a restraint needs it.
        gradient: ``∇G (d, p)``, the gradient of the language-model loss on a corpus with respect to ``W_0``; likewise.
        edits_here: requests that were written into this layer before this batch.
        edits: requests that were applied before this batch, in whichever layers.
        batch: requests of this batch, in whichever layers; 0 at the end of a run.
        layer: the layer's name, for messages and for what a restraint keeps per layer.
        batch_here: requests of this batch that go into this layer; 0 at the end of a run.
        rank_here: what the rank of ``W − W_0`` is at most, but for rounding; None where nobody counted, which is taken
            for one per request.
        remainder: ``(d, p)``, what rounding took of the weight (`lit_edit.algebra.exact`); restraints take the sum of
        both for
            the weight. None where it is not known.
    """

    weight: Tensor
    original: Tensor | None = None
    gradient: Tensor | None = None
    edits_here: int = 0
    edits: int = 0
    batch: int = 0
    layer: str = ""
    batch_here: int = 0
    rank_here: int | None = None
    remainder: Tensor | None = None

    @property
    def exact(self) -> ExactWeight:
        """The weight, for computations in float64."""
        return ExactWeight(self.weight, self.remainder)


@dataclass(frozen=True)
class Source:
    """Where the updates that are restrained come from.

    Args:
        name: of the solver or editor, for messages.
        additive: whether its updates are added to the weight.
        dense: whether a single update is of full rank.
    """

    name: str
    additive: bool = True
    dense: bool = False


class Restraint:
    """Moderates additive updates. One that works on each update overrides `restrain`, one on their sum `total`.

    Attributes:
        needs_original: whether the layer's weight before the first edit has to be kept.
        needs_gradient: whether the gradient statistic of the layer has to be collected.
        spreads: whether `restrain` makes updates of full rank, whose columns leave the space of those it was given.
    """

    needs_original: bool = False
    needs_gradient: bool = False
    spreads: bool = False

    def check(self, source: Source, before: Sequence[Restraint] = (), after: Sequence[Restraint] = ()) -> None:
        """Refuses what cannot be restrained; asked when an editor is put together.

        Args:
            source: where the updates come from.
            before: restraints that have worked on an update before this one sees it.
            after: those that work on it afterwards.

        Raises:
            ValueError: with the reason.
        """
        if not source.additive:
            raise ValueError(
                f"{type(self).__name__} restrains what is added to a weight, and {source.name} multiplies "
                "the weight by an orthogonal matrix, which would no longer be one. Leave the restraint out, or take "
                "an additive method (ROME, MEMIT, EMMET, AlphaEdit, FineTune, MEND)."
            )

    def restrain(self, update: Update, ground: Ground) -> Update:
        """The update to apply instead of ``update``."""
        return update

    def total(self, ground: Ground, last: bool) -> Update | None:
        """A further update of the layer, asked for after every batch and once at the end of the run.

        It must not lead out of the column space of ``W − W_0``, whose rank `Ground.rank_here` goes on to bound.

        Args:
            ground: the layer after the batch's updates.
            last: whether no more edits follow; ``ground.batch`` is 0 then.

        Returns:
            The update, or None to leave the weight as it is.
        """
        return None


def check_restraints(restraints: Sequence[Restraint], source: Source) -> None:
    """Refuses restraints that cannot work on the updates of a source, or not in this order.

    Args:
        restraints: in the order in which they work.
        source: where the updates come from.

    Raises:
        ValueError: with the reason.
    """
    for place, restraint in enumerate(restraints):
        restraint.check(source, restraints[:place], restraints[place + 1 :])
