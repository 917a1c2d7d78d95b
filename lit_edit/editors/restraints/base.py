"""What every restraint is, and what it has to know of the updates it restrains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_edit.algebra.updates import Update
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.settings import Configured


@dataclass(frozen=True)
class UpdateKind:
    """What kind of updates a solver or editor makes.

    Args:
        name: Of the solver or editor, for messages.
        additive: Whether its updates are added to the weight.
        dense: Whether a single update is of full rank.
    """

    name: str
    additive: bool = True
    dense: bool = False


class Restraint(Configured):
    """Moderates additive updates: each of them (`restrain`), or their sum (`total`, `finish`).

    Attributes:
        needs_gradient: Whether layers must come with their gradient statistic.
        spreads: Whether `restrain` makes updates of full rank, whose columns leave the space of those it was given.
    """

    needs_gradient: bool = False
    spreads: bool = False

    def check(self, kind: UpdateKind, before: Sequence[Restraint] = (), after: Sequence[Restraint] = ()) -> None:
        """Refuses what cannot be restrained; asked when an editor is put together.

        Args:
            kind: The updates.
            before: Restraints that have worked on an update before this one sees it.
            after: Those that work on it afterwards.

        Raises:
            ValueError: With the reason.
        """
        if not kind.additive:
            raise ValueError(
                f"{type(self).__name__} restrains what is added to a weight, and {kind.name} multiplies the weight by "
                "an orthogonal matrix, which would no longer be one. Leave the restraint out, or take an additive "
                "method (ROME, MEMIT, EMMET, AlphaEdit, FineTune, MEND)."
            )

    def restrain(self, update: Update, site: EditedWeight) -> Update:
        """The update to write instead of ``update``; the layer is as it was before."""
        return update

    def total(self, site: EditedWeight, before: int, after: int) -> Update | None:
        """A further update of a layer, asked for after every batch.

        It must not lead out of the column space of ``W − W_0``, whose rank `EditedWeight.rank` goes on to bound.

        Args:
            site: The layer after the batch's updates.
            before: Requests applied in the run before the batch, in whichever layers.
            after: Requests applied now.

        Returns:
            The update, or None to leave the weight as it is.
        """
        return None

    def finish(self, site: EditedWeight) -> Update | None:
        """The same, asked for once when no more edits follow, and for a copy at every evaluation before."""
        return None


def check_restraints(restraints: Sequence[Restraint], kind: UpdateKind) -> None:
    """Refuses restraints that cannot work on such updates, or not in this order.

    Args:
        restraints: In the order in which they work.
        kind: The updates.

    Raises:
        ValueError: With the reason.
    """
    for place, restraint in enumerate(restraints):
        restraint.check(kind, restraints[:place], restraints[place + 1 :])
