"""What rounding took of weights of 16 bits, carried from edit to edit."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_edit.algebra.exact import can_have_remainder, no_remainder, stored_along

_REMAINDER, _MARKS = "remainder.", "remainder_marks."


class Remainders:
    """The remainders (`lit_edit.algebra.exact`) of all layers that were written, for as long as nobody else changes a
    weight.

    A change that is too small for a weight's dtype is not lost: it is in the remainder until others have added up with
    it. And what one write rounds is known to the next, so that errors do not add up: what is stored is the rounded sum
    of all changes, not a sum of rounded changes. The model computes, and is exported, with what is stored.

    A remainder takes as much memory as its weight. Weights of more than 16 bits have none.

    Args:
        on: whether any are kept.
    """

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: the remainder, and the marks of its weight

    def of(self, layer: int, weight: Tensor) -> Tensor | None:
        """The remainder of a layer's weight (d, p); None where there is none, or none of the weight as it is now."""
        if layer not in self._kept:
            return None
        remainder, marks = self._kept[layer]
        fits = remainder.shape == weight.shape and remainder.device == weight.device
        if self.on and fits and torch.equal(marks, _marks(weight)):
            return remainder
        del self._kept[layer]
        return None

    def to_write(self, layer: int, weight: Tensor) -> Tensor | None:
        """A remainder to write a layer with, a copy; None for a weight that needs none. `keep` it afterwards."""
        if not (self.on and can_have_remainder(weight.dtype)):
            return None
        found = self.of(layer, weight)
        return no_remainder(weight.detach()) if found is None else found.clone()

    def keep(self, layer: int, remainder: Tensor | None, weight: Tensor) -> None:
        """Takes the remainder of a weight that was written just now."""
        if remainder is not None:
            self._kept[layer] = remainder, _marks(weight)

    def all(self) -> dict[int, tuple[Tensor, Tensor]]:
        """All that is kept, for `restore`; later edits leave it alone."""
        return dict(self._kept)

    def restore(self, kept: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Goes back to what was kept once."""
        self._kept = dict(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The remainders by layer, and by what their weights are known again."""
        state: dict[str, Tensor] = {}
        for layer, (remainder, marks) in self._kept.items():
            state |= {f"{_REMAINDER}{layer}": remainder, f"{_MARKS}{layer}": marks}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave; other names are passed over."""
        layers = [int(name.removeprefix(_REMAINDER)) for name in state if name.startswith(_REMAINDER)]
        self._kept = {layer: (state[f"{_REMAINDER}{layer}"], state[f"{_MARKS}{layer}"]) for layer in layers}


def _marks(weight: Tensor) -> Tensor:
    """Sums over the bits of every row and every column: integers, the same wherever they are computed."""
    weight = weight.detach()
    rows = (weight.T if stored_along(weight) else weight).contiguous()
    if rows.storage_offset() % 4:
        rows = rows.clone()
    bits = rows.view(torch.int16)
    if bits.shape[1] % 4 == 0:  # four numbers at a time: many times as fast
        bits = bits.view(torch.int64)
    return torch.cat([bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)])
