"""How updates get into a model's weights: restrained, counted, and all of a batch or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lit_edit.algebra.updates import Update
from lit_edit.editors.base import Applied, Plan
from lit_edit.editors.remainders import Remainders
from lit_edit.editors.restraints import Ground, Restraint, Source, check_restraints
from lit_edit.model.originals import Former
from lit_edit.model.workspace import Workspace

_EDITS_HERE, _RANK_HERE = "edits_here.", "rank_here."


@contextmanager
def all_or_nothing(
    workspace: Workspace, remainders: Remainders | None = None
) -> Iterator[Callable[[int, Update], Applied]]:
    """Gives a function that writes an update into a layer; where the block ends in an error, nothing was written.

    Layers that were written get their former weights back, bit by bit; they are kept until the block ends. The
    workspace's originals are told of every write.

    Args:
        workspace: the model.
        remainders: what rounding takes goes there, and back again with the weights.
    """
    carried = Remainders(on=False) if remainders is None else remainders
    before = carried.all()
    kept: dict[str, Former] = {}

    def write(layer: int, update: Update) -> Applied:
        part = workspace.architecture[layer]
        if part.name not in kept:
            kept[part.name] = workspace.originals.former(part.name)
        remainder = carried.to_write(layer, part.weight)
        applied = Applied.write(layer, update, part.weight, remainder)
        carried.keep(layer, remainder, part.weight)
        return applied

    try:
        yield write
    except BaseException:  # an interrupt by the keyboard, too
        for name, former in kept.items():
            workspace.originals.take_back(name, former)
        carried.restore(before)
        raise


class RestrainedWriting:
    """Writes additive updates under restraints, and counts what was written.

    Args:
        restraints: what is done to every update, or to their sum, in this order.
        source: where the updates come from.
        carry_rounding: whether what rounding to 16 bits takes of a weight is kept for the next edit (`Remainders`).

    Attributes:
        restraints: as given.
        remainders: what rounding took so far.
        edits: requests applied so far.

    Raises:
        ValueError: if a restraint cannot work on such updates, or not in this order.
    """

    def __init__(self, restraints: Sequence[Restraint] | None, source: Source, carry_rounding: bool = True) -> None:
        self.restraints = list(restraints or [])
        check_restraints(self.restraints, source)
        self.remainders = Remainders(carry_rounding)
        self.edits = 0
        self._finished_at = 0
        self._edits_here: dict[int, int] = {}  # requests by layer
        self._rank_here: dict[int, int] = {}  # of their updates' sum, at most

    @property
    def needs_gradients(self) -> bool:
        """Whether a restraint needs the gradient statistics."""
        return any(restraint.needs_gradient for restraint in self.restraints)

    @property
    def needs_originals(self) -> bool:
        """Whether a restraint needs the weights before the first edit."""
        return any(restraint.needs_original for restraint in self.restraints)

    def ground(self, workspace: Workspace, layer: int, batch: int, batch_here: int) -> Ground:
        """A layer as restraints see it.

        Args:
            workspace: the model.
            layer: index of a block.
            batch: requests of this batch.
            batch_here: those of them that go into this layer.
        """
        part = workspace.architecture[layer]
        return Ground(
            part.weight,
            original=workspace.original(layer),
            gradient=workspace.gradients.get(layer),
            edits_here=self._edits_here.get(layer, 0),
            batch_here=batch_here,
            edits=self.edits,
            batch=batch,
            rank_here=self._rank_here.get(layer, 0),
            layer=part.name,
            remainder=self.remainders.of(layer, part.weight),
        )

    def apply(
        self, workspace: Workspace, plan: Plan, editable: Sequence[int], update_of: Callable[[int], Update]
    ) -> list[Applied]:
        """Writes the updates of a batch layer by layer, ascending, then lets the restraints work on their sums.

        Args:
            workspace: the model.
            plan: says which requests go into which layers.
            editable: all layers that edits may touch.
            update_of: gives a layer's update; asked when the layers below are written.

        Returns:
            What was written, the updates first. On an error the weights and counts are as they were.
        """
        watch, batch = workspace.stopwatch, len(plan.requests)
        here = Counter(layer for layers in plan.layers for layer in layers)
        ranks: dict[int, int] = {}
        with all_or_nothing(workspace, self.remainders) as write:
            applied = []
            for layer in sorted(here):
                update, ground = update_of(layer), self.ground(workspace, layer, batch, here[layer])
                with watch.measure("restrain"):
                    for restraint in self.restraints:
                        update = restraint.restrain(update, ground)
                with watch.measure("write"):
                    applied.append(write(layer, update))
                ranks[layer] = min(self._rank_here.get(layer, 0) + update.rank(ground.weight), *ground.weight.shape)
            with watch.measure("restrain"):
                for layer in editable:
                    applied += self._total(workspace, layer, batch, here[layer], ranks.get(layer), write)
        for layer, count in here.items():
            self._edits_here[layer] = self._edits_here.get(layer, 0) + count
        self._rank_here |= ranks
        self.edits += batch
        return applied

    def finish(self, workspace: Workspace, editable: Sequence[int]) -> list[Applied]:
        """What restraints do once, at the end; nothing if that was done at this count already."""
        if self._finished_at == self.edits:
            return []
        applied = []
        with all_or_nothing(workspace, self.remainders) as write:
            for layer in editable:
                applied += self._total(workspace, layer, 0, 0, None, write)
        self._finished_at = self.edits
        return applied

    def _total(
        self,
        workspace: Workspace,
        layer: int,
        batch: int,
        batch_here: int,
        rank: int | None,
        write: Callable[[int, Update], Applied],
    ) -> list[Applied]:
        """Lets every restraint work on the sum of a layer's updates; ``batch`` is 0 at the end of a run."""
        applied = []
        for restraint in self.restraints:
            ground = self.ground(workspace, layer, batch, batch_here)
            if rank is not None:
                ground = replace(ground, rank_here=rank)
            update = restraint.total(ground, last=not batch)
            if update is not None:
                applied.append(write(layer, update))
        return applied

    def state_dict(self) -> dict[str, Tensor]:
        """Requests applied, in all and by layer, ranks, the count at the last end of a run, and the remainders."""
        counts = {"edits": self.edits, "finished_at": self._finished_at}
        counts |= {f"{_EDITS_HERE}{layer}": count for layer, count in self._edits_here.items()}
        counts |= {f"{_RANK_HERE}{layer}": rank for layer, rank in self._rank_here.items()}
        return {name: torch.tensor(count) for name, count in counts.items()} | self.remainders.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave; other names are passed over."""
        self.edits, self._finished_at = int(state["edits"]), int(state["finished_at"])
        self._edits_here = _by_layer(state, _EDITS_HERE)
        self._rank_here = _by_layer(state, _RANK_HERE)
        self.remainders.load_state_dict(state)


def _by_layer(state: dict[str, Tensor], prefix: str) -> dict[int, int]:
    return {int(name.removeprefix(prefix)): int(count) for name, count in state.items() if name.startswith(prefix)}
