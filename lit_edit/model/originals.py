"""The weights of a model as they were before the first edit: one copy for all who ask, made when one is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_edit.algebra.linalg import version_of


@dataclass(frozen=True, eq=False)
class Former:
    """A weight as it was before a write, to take the write back.

    Attributes:
        weight: a copy, oriented as the model stores it; the store's own where it has just made one.
        first: whether nobody had written to the weight before.
    """

    weight: Tensor
    first: bool


class Originals:
    """The parameters of a model as they are when this is made, by name (copy on write).

    Whoever writes to a weight says so before (`before_write`, `former`); `lit_edit.editors.writing.all_or_nothing` does
    it for all editors. What is copied then is kept on the CPU and in the weight's dtype, and only after somebody has
    asked for originals with `keep`. A weight that was never written is its own original and is not copied.

    PyTorch counts the changes of a tensor in place. By this count a weight that was changed without a word is found
    out: `changed` says so, and `get` refuses to give it out as an original. What is written to ``parameter.data``, or
    to a tensor made in inference mode, is not counted.

    Args:
        model: before its first edit.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._versions = {name: version_of(parameter) for name, parameter in model.named_parameters()}
        self._keeps = False
        self._written: set[str] = set()
        self._copies: dict[str, Tensor] = {}

    @property
    def keeps(self) -> bool:
        """Whether somebody has asked for originals."""
        return self._keeps

    @property
    def copies(self) -> dict[str, Tensor]:
        """The originals of all weights that were written since `keep`, on the CPU, by name."""
        return dict(self._copies)

    def keep(self) -> None:
        """Asks for originals: from now on each weight is copied before its first write.

        Raises:
            ValueError: if a weight was changed before anybody asked.
        """
        late = [] if self._keeps else [name for name in self._versions if self.changed(name)]
        if late:
            raise ValueError(
                f"{len(late)} weights were written before anybody asked for the originals ({late[0]!r} is one): ask "
                "before the first edit."
            )
        self._keeps = True

    def changed(self, name: str) -> bool:
        """Whether a weight was written, or may have been."""
        return name in self._written or version_of(self._parameter(name)) != self._versions.get(name)

    def get(self, name: str) -> Tensor | None:
        """A weight before its first write, oriented as the model stores it; None where nobody has asked for originals.

        Returns:
            The copy, on the CPU; for a weight that was never written the weight itself, wherever it lies. Not to be
            changed, and not to be held across an edit.

        Raises:
            ValueError: if the weight was changed past this store, so that its original is lost.
        """
        if not self._keeps:
            return None
        if name not in self._copies:
            self._check(name)
        return self._copies.get(name, self._parameter(name))

    def before_write(self, name: str) -> bool:
        """To be called before a weight is written: copies it the first time, if somebody has asked for originals.

        Returns:
            Whether it is the first time.

        Raises:
            ValueError: as `get`, where somebody has asked.
        """
        if name in self._written:
            return False
        if self._keeps:
            self._check(name)
            self._copies[name] = self._parameter(name).to("cpu", copy=True)
        first = not self.changed(name)
        self._written.add(name)
        return first

    def former(self, name: str) -> Former:
        """The same, and a copy of the weight for `take_back`: the original itself where it was copied just now."""
        first = self.before_write(name)
        copied = self._copies.get(name) if first else None
        return Former(self._parameter(name).clone() if copied is None else copied, first)

    @torch.no_grad()
    def take_back(self, name: str, former: Former) -> None:
        """Gives a weight its former values, bit by bit. After a first write it counts as never written again."""
        weight = self._parameter(name)
        weight.copy_(former.weight)
        if former.first:
            self._written.discard(name)
            self._copies.pop(name, None)
            self._versions[name] = version_of(weight)

    def _check(self, name: str) -> None:
        if self.changed(name):
            raise ValueError(
                f"The weight {name!r} was changed past the editor, its original is lost: write with "
                "`lit_edit.editors.writing.all_or_nothing`, or call `before_write` of the workspace's originals first."
            )

    def _parameter(self, name: str) -> Tensor:
        return self._model.get_parameter(name).detach()
