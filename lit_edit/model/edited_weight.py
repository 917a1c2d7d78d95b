"""`EditedWeight`: the one owner, and the only writer, of an editable layer's weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_edit.algebra.exact import ExactWeight, can_have_remainder, no_remainder
from lit_edit.algebra.updates import Update

T = TypeVar("T")
_KEPT = "kept."


@dataclass(frozen=True, eq=False)
class Written:
    """What one write did to a layer.

    Attributes:
        layer: Index of the block.
        update: The change as it was applied.
        relative_change: ``‖ΔW‖_F / ‖W‖_F``, before rounding.
        rounding: Share of the change that rounding to the weight's dtype took, see `Update.apply_`.
        requests: Number of requests it wrote; 0 for what restrains a sum.
    """

    layer: int
    update: Update
    relative_change: float
    rounding: float
    requests: int = 0


@dataclass(frozen=True, eq=False)
class _Before:
    """All that a failed batch has to give back."""

    stored: Tensor | None
    remainder: Tensor | None
    original: Tensor | None
    state: tuple[Any, ...]


class EditedWeight:
    """The weight of one layer, and all that edits need to know of it.

    `write` is the only way to change the weight. It counts up `version`, and whatever is computed from the weight is
    kept under that count (`cached`), so that nobody has to find out whether a tensor changed.

    A weight of 16 bits has a *remainder*: what rounding took of the edits so far. It is counted with the weight at the
    next edit, so that small changes add up and rounding errors do not (`lit_edit.algebra.exact`). The model computes,
    and is exported, with what is stored.

    Args:
        stored: The parameter as the model holds it. Written to in place.
        name: Its name in the model.
        layer: Index of its block.
        transposed: Whether the model stores ``(p, d)`` instead of ``(d, p)``.

    Attributes:
        version: Number of the write that made the weight what it is; 0 before the first edit. Never used twice for
            different content.
        covariance: ``C = E[k kᵀ] (p, p)`` over a corpus, for editors that need it.
        gradient: ``∇G (d, p)`` of the language-model loss on a corpus with respect to ``W_0``, likewise.
        keys: ``(p, m)``, keys of the edits written here, in float32, oldest first.
        targets: ``(d, m)``, the outputs that these edits asked for.
        owners: Numbers of the edits that the columns belong to.
        forgotten: How often columns were taken out or replaced; what is grown key by key starts anew then.
        edits: Requests written here so far.
        pending: Requests of the batch being written that go here.
        rank: Bound on the rank of ``W − W_0``, rounding aside.
        kept: What a solver keeps for this layer from edit to edit, by a name of its own. Mappings of names to tensors
            go into checkpoints; a field ``version`` says which weight they belong to.
    """

    def __init__(self, stored: Tensor, name: str = "weight", layer: int = 0, transposed: bool = False) -> None:
        self._stored, self._transposed = stored, transposed
        self.name, self.layer = name, layer
        self.version = 0
        self.edits = self.pending = self.rank = self.forgotten = 0
        self.kept: dict[str, Any] = {}
        self._writes = 0  # never goes back, so that no version comes twice
        self._counted = _changes_of(stored)
        self._remainder: Tensor | None = None
        self._original: Tensor | None = None
        self._covariance: Tensor | None = None
        self._gradient: Tensor | None = None
        self._cached: dict[str, tuple[int, Any]] = {}
        self._before: list[_Before] = []  # of every block that gives everything back, the outermost first
        self.keys, self.targets = self._no_columns()
        self.owners: list[int] = []

    # What the weight is

    @property
    def weight(self) -> Tensor:
        """``W (d, p)`` in the model's dtype, detached; to look at, not to write to.

        Raises:
            ValueError: If the weight was changed by other means than an edit.
        """
        stored = self.stored
        return stored.T if self._transposed else stored

    @property
    def stored(self) -> Tensor:
        """The same, oriented as the model stores it."""
        self._check_unchanged()
        return self._stored.detach()

    def _check_unchanged(self) -> None:
        if _changes_of(self._stored) != self._counted:
            raise ValueError(
                f"The weight {self.name!r} was changed by other means than an edit, so that what is known of it "
                "no longer holds. Open a new session on the model as it is."
            )

    @property
    def exact(self) -> ExactWeight:
        """The weight with what rounding took of it, for products in float64."""
        return ExactWeight(self.weight, self._remainder)

    @property
    def original(self) -> Tensor:
        """``W_0 (d, p)``, the weight before the first edit: a copy on the CPU, or the weight itself while unedited."""
        stored = self.original_stored
        return stored.T if self._transposed else stored

    @property
    def original_stored(self) -> Tensor:
        """The same, oriented as the model stores it."""
        return self.stored if self._original is None else self._original

    @property
    def edited(self) -> bool:
        """Whether the weight may differ from the original."""
        return self._original is not None

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, p)``."""
        d, p = self._stored.shape
        return (p, d) if self._transposed else (d, p)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self._stored.device

    # What is computed from it

    def cached(self, name: str, make: Callable[[], T]) -> T:
        """A value that depends on the weight as it is, computed anew after a write."""
        return self._known(name, self.version, make)

    def derived(self, name: str, make: Callable[[], T]) -> T:
        """A value that depends on the layer's statistics or original only, computed once."""
        return self._known(name, -1, make)

    def _known(self, name: str, version: int, make: Callable[[], T]) -> T:
        found = self._cached.get(name)
        if found is None or found[0] != version:
            found = self._cached[name] = version, make()
        value: T = found[1]
        return value

    @property
    def covariance(self) -> Tensor | None:
        """``C (p, p)``; setting it forgets all that solvers kept."""
        return self._covariance

    @covariance.setter
    def covariance(self, found: Tensor | None) -> None:
        if found is not None:
            self._check_statistic(found, "key covariance", (self.shape[1], self.shape[1]))
        self._covariance = found
        self.kept.clear()
        self._cached.clear()

    @property
    def gradient(self) -> Tensor | None:
        """``∇G (d, p)``."""
        return self._gradient

    @gradient.setter
    def gradient(self, found: Tensor | None) -> None:
        if found is not None:
            self._check_statistic(found, "gradient", self.shape)
        self._gradient = found
        self._cached.clear()

    def _check_statistic(self, found: Tensor, kind: str, shape: tuple[int, int]) -> None:
        if tuple(found.shape) != shape:
            raise ValueError(
                f"Layer {self.name!r}: the {kind} must have shape {shape} for a weight of shape {self.shape}, it has "
                f"{tuple(found.shape)}."
            )
        # The extremes are found without a copy in float64, which a sum that cannot overflow would take.
        if found.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(found)):
            raise ValueError(f"Layer {self.name!r}: the {kind} holds values that are not finite.")

    # Writing

    def write(self, update: Update) -> Written:
        """Applies an update.

        Raises:
            ValueError: If it does not fit the shape, or leads out of the range of the dtype. Nothing is written then.
        """
        weight = self.weight
        self._keep_former()
        remainder = self._remainder
        if can_have_remainder(weight.dtype):
            remainder = no_remainder(weight) if remainder is None else remainder.clone()
        original = self._stored.detach().to("cpu", copy=True) if self._original is None else self._original
        try:
            change, rounding = update.apply_(weight, remainder)
        finally:  # an update that fails puts back what it has written, which counts as a change, too
            self._counted = _changes_of(self._stored)
        self._remainder, self._original = remainder, original
        self._after_write()
        return Written(self.layer, update, change, rounding)

    def replace(self, stored: Tensor) -> None:
        """Puts other content in place of the weight, oriented as the model stores it, and forgets the remainder."""
        self._keep_former()
        if self._original is None:
            self._original = self.stored.to("cpu", copy=True)
        with torch.no_grad():
            self._stored.copy_(stored)
        self._remainder = None
        self._after_write()

    def restore(self) -> None:
        """Takes the weight back to the original, bit by bit, and forgets all edits."""
        if self._original is not None:
            self.replace(self._original)
            self._original = None
        self.edits = self.rank = 0
        self.keys, self.targets = self._no_columns()
        self.owners = []
        self.forgotten += 1
        self.kept.clear()

    def go_to(self, state: Mapping[str, Tensor]) -> None:
        """Puts the weight back to an earlier point; remembered keys stay.

        Args:
            state: ``stored``, ``remainder`` and ``counts`` of `state_dict` at that point; empty for the original.
        """
        if self._original is not None:
            self.replace(state.get("stored", self._original))
            self._original = self._original if "stored" in state else None
        remainder = state.get("remainder")
        self._remainder = None if remainder is None else remainder.to(self.device)
        self.edits, self.rank = (int(count) for count in state["counts"][:2]) if state else (0, 0)
        self.kept.clear()

    def _after_write(self) -> None:
        self._writes += 1
        self.version = self._writes
        self._counted = _changes_of(self._stored)

    # Edits that were written here

    def remember(self, numbers: Sequence[int], keys: Tensor, targets: Tensor, rank: int | None = None) -> None:
        """Notes edits that were written.

        Args:
            numbers: Their numbers in the run.
            keys: ``(p, n)``.
            targets: ``(d, n)``.
            rank: Bound on the rank of their update; ``n`` if None.
        """
        self.keys = torch.cat([self.keys, keys.detach().to(self.keys)], dim=1)
        self.targets = torch.cat([self.targets, targets.detach().to(self.targets)], dim=1)
        self.owners = [*self.owners, *numbers]
        self.count(len(numbers), rank)

    def count(self, requests: int, rank: int | None = None) -> None:
        """Counts requests that were written, without keys."""
        self.edits += requests
        self.rank = min(self.rank + (requests if rank is None else rank), *self.shape)

    def forget(self, numbers: Sequence[int]) -> None:
        """Takes the keys of edits out of the memory, so that they no longer count as preserved."""
        gone = set(numbers)
        left = [i for i, owner in enumerate(self.owners) if owner not in gone]
        if len(left) == len(self.owners):
            return
        at = torch.tensor(left, dtype=torch.long, device=self.keys.device)
        self.keys, self.targets = self.keys[:, at], self.targets[:, at]
        self.owners = [self.owners[i] for i in left]
        self.forgotten += 1

    def rekey(self, keys: Tensor) -> None:
        """Puts keys ``(p, m)``, computed anew, in place of the remembered ones."""
        if keys.shape != self.keys.shape:
            raise ValueError(
                f"{tuple(keys.shape)} keys do not replace {tuple(self.keys.shape)} of layer {self.name!r}."
            )
        self.keys = keys.detach().to(self.keys)
        self.forgotten += 1

    def _no_columns(self) -> tuple[Tensor, Tensor]:
        d, p = self.shape
        return (
            torch.empty(p, 0, dtype=torch.float32, device=self.device),
            torch.empty(d, 0, dtype=torch.float32, device=self.device),
        )

    # All or nothing

    def _keep_former(self) -> None:
        """Copies the weight before the first write of a block."""
        waiting = [i for i, before in enumerate(self._before) if before.stored is None]
        if waiting:
            # What a solver keeps may have changed since a block began: its state stays that of the beginning.
            stored = self._stored.detach().clone()
            for i in waiting:
                self._before[i] = _Before(stored, self._remainder, self._original, self._before[i].state)

    def _state(self) -> tuple[Any, ...]:
        counts = (self.version, self.edits, self.rank, self.forgotten)
        return (*counts, self.keys, self.targets, self.owners, dict(self.kept))

    def _begin(self) -> None:
        self._check_unchanged()
        self._before.append(_Before(None, None, None, self._state()))

    @torch.no_grad()
    def _roll_back(self) -> None:
        before = self._before[-1]
        if before.stored is not None:
            self._stored.copy_(before.stored)
            self._remainder, self._original = before.remainder, before.original
            self._counted = _changes_of(self._stored)
            self._cached.clear()
        self.version, self.edits, self.rank, self.forgotten = before.state[:4]
        self.keys, self.targets, self.owners, self.kept = before.state[4:]
        self.kept = dict(self.kept)  # an outer block may have to give the same back

    def _end(self) -> None:
        self._before.pop()

    # Checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """All that later edits depend on, but for statistics and the original, as tensors on the CPU.

        Tensors that solvers keep are part of it: computed anew they would differ in their last bits.

        Raises:
            ValueError: If the weight was changed by other means than an edit.
        """
        stored = self.stored
        counts = torch.tensor([self.edits, self.rank, self.forgotten])
        state = {"counts": counts, "keys": self.keys, "targets": self.targets, "owners": torch.tensor(self.owners)}
        if self.edited:
            state["stored"] = stored
        if self._remainder is not None:
            state["remainder"] = self._remainder
        for name, value in self.kept.items():
            if isinstance(value, Mapping) and int(value.get("version", self.version)) == self.version:
                state |= {f"{_KEPT}{name}.{field}": tensor for field, tensor in value.items()}
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`'s result on the unedited model, or on one edited since.

        Raises:
            ValueError: If the state is not that of a weight of this shape and dtype.
        """
        self.check_state(state)
        self.restore()
        if "stored" in state:
            self.replace(state["stored"])
        remainder = state.get("remainder")
        self._remainder = None if remainder is None else remainder.to(self.device)
        self.edits, self.rank, self.forgotten = (int(count) for count in state["counts"])
        self.keys, self.targets = state["keys"].to(self.device), state["targets"].to(self.device)
        self.owners = [int(number) for number in state["owners"]]
        by_name: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith(_KEPT):
                owner, field = name.removeprefix(_KEPT).rsplit(".", 1)
                by_name.setdefault(owner, {})[field] = tensor.to(self.device)
        for kept in by_name.values():
            if "version" in kept:  # the same content has another number here
                kept["version"] = torch.tensor(self.version)
        self.kept = dict(by_name)

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless a state is one of a weight of this shape and dtype."""
        d, p = self.shape
        m = len(state["owners"]) if "owners" in state else -1
        wanted = {"counts": (3,), "keys": (p, m), "targets": (d, m), "owners": (m,)}
        for name, shape in wanted.items():
            if name not in state or tuple(state[name].shape) != shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"The state of layer {self.name!r} has {found} for {name}, not {shape}.")
        for name, tensor in state.items():
            if name not in (*wanted, "stored", "remainder") and not name.startswith(_KEPT):
                raise ValueError(f"The state of layer {self.name!r} has {name}, which belongs to no layer.")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"The state of layer {self.name!r} holds values of {name} that are not finite.")
        stored = state.get("stored")
        if stored is not None and (stored.shape != self._stored.shape or stored.dtype != self._stored.dtype):
            raise ValueError(
                f"The state holds {self.name!r} as {stored.dtype} of shape {tuple(stored.shape)}, the model has it as "
                f"{self._stored.dtype} of shape {tuple(self._stored.shape)}."
            )
        remainder = state.get("remainder")
        if remainder is not None and not (
            stored is not None
            and can_have_remainder(stored.dtype)
            and tuple(remainder.shape) == (d, p)
            and remainder.dtype == no_remainder(stored[:0]).dtype
        ):
            raise ValueError(f"The state's remainder of layer {self.name!r} does not belong to its weight.")


@contextmanager
def all_or_nothing(sites: Sequence[EditedWeight]) -> Iterator[None]:
    """Gives weights, memories and all that is kept their former content, bit by bit, where the block ends in an error.

    Blocks can be nested; an inner one that ends in an error leaves what the outer one has written before it.

    Raises:
        ValueError: If a weight was changed by other means than an edit.
    """
    begun: list[EditedWeight] = []
    try:
        for site in sites:
            site._begin()
            begun.append(site)
        yield
    except BaseException:  # an interrupt by the keyboard, too
        for site in begun:
            site._roll_back()
        raise
    finally:
        for site in begun:
            site._end()


def _changes_of(tensor: Tensor) -> int:
    """PyTorch's count of changes in place; inference tensors have none, and cannot be changed by mistake."""
    return 0 if tensor.is_inference() else tensor._version
