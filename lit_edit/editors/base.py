"""What an editor is: from edit requests to weight updates, in two halves as Lightning calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lit_edit.algebra.updates import Update
from lit_edit.editors.restraints import Restraint
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest


@dataclass(frozen=True)
class Applied:
    """One update as it was applied to one layer's weight."""

    layer: int
    update: Update
    relative_change: float  # ‖ΔW‖_F / ‖W‖_F
    rounding: float = 0.0  # what the weight's dtype took of it, see `Update.apply_`

    @classmethod
    def write(cls, layer: int, update: Update, weight: Tensor, remainder: Tensor | None = None) -> Applied:
        """Applies an update to a layer's weight (d, p), and its remainder if there is one, in place."""
        return cls(layer, update, *update.write_(weight, remainder))


@dataclass(frozen=True)
class Plan:
    """What the gradient half found: per request the layers, loss and p(target) reached, and the editor's own data."""

    requests: list[EditRequest]
    layers: list[tuple[int, ...]]
    loss: list[float]
    probability: list[float]
    steps: list[int]
    data: Any = field(default=None, repr=False)


class Editor(ABC):
    """Turns a batch of requests into weight updates.

    `plan` is the gradient half (run by ``training_step``), `apply` the closed-form half (``on_train_batch_end``).
    Between runs an editor holds only what `state_dict` returns.

    Attributes:
        restraints: what is done to updates, or to their sum; editors whose updates are not added have none.
    """

    restraints: Sequence[Restraint] = ()

    @abstractmethod
    def editable_layers(self, workspace: Workspace) -> list[int]:
        """Every layer that edits may touch.

        Raises:
            ValueError: if a layer was asked for that the model does not have.
        """

    @property
    @abstractmethod
    def needs_covariances(self) -> bool:
        """Whether key covariances of the editable layers must be in the workspace."""

    @property
    def needs_gradients(self) -> bool:
        """Whether gradient statistics of the editable layers must be in the workspace."""
        return False

    @property
    def needs_originals(self) -> bool:
        """Whether the workspace must keep the weights as they were before the first edit."""
        return False

    @property
    def carries_rounding(self) -> bool:
        """Whether what rounding takes of weights of 16 bits is kept from edit to edit."""
        return False

    @property
    def context_sampling(self) -> tuple[int, int]:
        """(number, length in tokens) of generated context prefixes; (0, 0) for none."""
        return (0, 0)

    def check(self, workspace: Workspace, batch_size: int) -> None:  # noqa: B027 - an editor may take anything
        """Finds what will not work before the first edit; the workspace is complete by then.

        Raises:
            ValueError: if batches of this size cannot be edited, or the statistics do not serve.
        """

    @abstractmethod
    def plan(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        """The gradient half. Needs gradients enabled; does not change the model."""

    @abstractmethod
    def apply(self, workspace: Workspace, plan: Plan) -> list[Applied]:
        """The closed-form half: changes the model's weights in place and says how.

        Where it ends in an error, weights and state are as they were.
        """

    def finish(self, workspace: Workspace) -> list[Applied]:
        """What remains to be done to the weights when no more edits follow. A second call in a row does nothing."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """What later edits depend on."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - there may be no state
        """Restores `state_dict`'s result."""
