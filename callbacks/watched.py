"""Which matrices of a module are watched, and what they were before training."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from .every_n import EveryNEdits, count_edits

_NAMES_SHOWN = 8


class Watched(EveryNEdits, ABC):
    """Measures weight matrices every N edits; a subclass says what.

    Args:
        parameters: Names or shell-style patterns (``*`` also matches dots) of the parameters to watch. If None, those
            the module returns from ``edited_parameters()``, a dict of matrices by name; for a module without that
            method, every matrix that requires gradients.
        every_n: Edits between two measurements, or the counts to measure at, see `EveryNEdits`.
        at_start: Also measure before the first edit.
        at_end: Also measure the last count of the run.

    Attributes:
        needs_start: Whether the matrices as they were before the first edit are kept. `lit_edit.LitEdit` has them; for
            a module without ``original_parameter(name)`` a copy is kept here, on the CPU and in checkpoints.

    Raises:
        ValueError: In the constructor if ``parameters`` is empty, or for a bad ``every_n``; when training starts if a
            pattern matches no parameter, or what it matches is no matrix.
    """

    needs_start: bool = True

    def __init__(
        self,
        parameters: list[str] | None = None,
        every_n: int | list[int] = 25,
        at_start: bool = True,
        at_end: bool = True,
    ) -> None:
        super().__init__(every_n=every_n, at_start=at_start, at_end=at_end)
        if isinstance(parameters, str):
            raise ValueError(f"parameters should be a list of patterns, it is the text {parameters!r}.")
        if parameters is not None and not parameters:
            raise ValueError("parameters is an empty list; leave it out to watch the edited matrices.")
        self.parameters = parameters
        self._reference: dict[str, Tensor] = {}  # of what the module does not keep itself

    @property
    @override
    def state_key(self) -> str:
        # Two of these in one run watch different parameters. `every_n` is left out: a run may be resumed with another.
        return self._generate_state_key(parameters=self.parameters)

    @override
    def reset(self) -> None:
        super().reset()
        self._reference = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By now a checkpoint has been restored under every strategy, the reference with it, and no edit has been made.
        matrices = self.select(pl_module)
        if not self.needs_start:
            return
        for name in list(self._reference):  # of a checkpoint that held them although the module keeps them
            if _kept_by_module(pl_module, name) is not None:
                del self._reference[name]
        missing = [name for name in matrices if self.find_start(pl_module, name) is None]
        if missing and count_edits(trainer, pl_module) > 0:
            rank_zero_warn(
                f"No starting weights of {_some(missing)} were saved; drift is measured from the resumed weights.",
                category=UserWarning,
            )
        for name in missing:
            self._reference[name] = matrices[name].detach().cpu().clone()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reference": dict(self._reference)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._reference = {name: weight.cpu() for name, weight in state_dict["reference"].items()}

    def find_start(self, pl_module: LightningModule, name: str) -> Tensor | None:
        """A matrix as it was at the start, kept here or by the module; None where it is not known."""
        own = self._reference.get(name)
        return own if own is not None else _kept_by_module(pl_module, name)

    def start(self, pl_module: LightningModule, name: str, weight: Tensor) -> Tensor:
        """The same on the device of the weight.

        Raises:
            RuntimeError: If it is not known.
        """
        found = self.find_start(pl_module, name)
        if found is None:
            raise RuntimeError(f"The starting weight of {name!r} is missing: `on_train_start` was not called.")
        return found.to(weight.device)

    def select(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """The matrices to watch, by name. Looked up anew each time: a module may replace a parameter object."""
        chosen = self._matching(pl_module) if self.parameters is not None else self._default(pl_module)
        for name, weight in chosen.items():
            if weight.ndim != 2 or weight.numel() == 0:
                raise ValueError(
                    f"{type(self).__name__} watches matrices, {name!r} has the shape {tuple(weight.shape)}."
                )
        return chosen

    def _matching(self, pl_module: LightningModule) -> dict[str, Tensor]:
        available: dict[str, Tensor] = dict(pl_module.named_parameters())
        chosen: dict[str, Tensor] = {}
        for pattern in self.parameters or ():
            found = {name: weight for name, weight in available.items() if fnmatchcase(name, pattern)}
            # A pattern for weights is no mistake because it matches their biases, too.
            found = {name: weight for name, weight in found.items() if weight.ndim == 2} or found
            if not found:
                matrices = [name for name, weight in available.items() if weight.ndim == 2]
                raise ValueError(
                    f"{type(self).__name__}: no parameter of {type(pl_module).__name__} matches {pattern!r}. "
                    f"Its matrices are {_some(matrices)}."
                )
            chosen.update(found)
        return chosen

    def _default(self, pl_module: LightningModule) -> dict[str, Tensor]:
        edited = getattr(pl_module, "edited_parameters", None)
        if callable(edited):
            offered: Mapping[str, Tensor] = edited()
            chosen = dict(offered)
        else:
            chosen = {n: p for n, p in pl_module.named_parameters() if p.ndim == 2 and p.requires_grad}
        if not chosen:
            raise ValueError(
                f"{type(self).__name__}: {type(pl_module).__name__} has no edited or trainable matrix; name some in "
                "`parameters`."
            )
        return chosen


def owner_of(pl_module: LightningModule, weight: Tensor) -> nn.Module | None:
    """The module that holds a matrix as a parameter; None if none does."""
    for module in pl_module.modules():
        if any(own.data_ptr() == weight.data_ptr() and own.numel() for own in module.parameters(recurse=False)):
            return module
    return None


def oriented(pl_module: LightningModule, weight: Tensor, like: Tensor | None = None) -> Tensor:
    """A matrix as ``(d_out, d_in)``: GPT-2's ``Conv1D`` stores the transpose.

    Args:
        pl_module: The module.
        weight: A parameter of it, or a matrix stored like one.
        like: That parameter, where ``weight`` is not it.
    """
    return weight.T if isinstance(owner_of(pl_module, weight if like is None else like), Conv1D) else weight


def _kept_by_module(pl_module: LightningModule, name: str) -> Tensor | None:
    original = getattr(pl_module, "original_parameter", None)
    kept: Tensor | None = original(name) if callable(original) else None
    return kept


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    listed = ", ".join(names[:_NAMES_SHOWN]) or "none"
    return f"{listed} and {more} more" if more > 0 else listed
