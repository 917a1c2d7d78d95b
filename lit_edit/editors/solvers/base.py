"""What a solver sees of a layer (`Problem`) and what every solver is (`Solver`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edit.algebra.exact import ExactWeight
from lit_edit.algebra.linalg import NotPositiveDefiniteError, solve_spd
from lit_edit.algebra.updates import Update
from lit_edit.editors.solvers.kept import KeptGram

_NEWEST = 64  # keys of past edits, more than a batch usually has


@dataclass(frozen=True, eq=False)
class Problem:
    """One batch of edits in one layer: find a change of ``weight`` under which ``keys`` give ``targets``.

    Keys, targets and memory are kept detached, in float64 and on the weight's device. The weight is kept as it is
    stored: solvers compute with `exact`, or ask for `outputs`. The covariance is kept as given, because all problems of
    a layer share it and solvers recognise it by identity.

    Args:
        weight: ``W (d, p)``, the projection to edit.
        keys: ``K (p, n)``, the inputs of the projection at the edited tokens, one column per request; ``n`` ≥ 1.
        targets: ``V (d, n)``, the outputs wanted for them.
        covariance: ``C = E[k kᵀ] (p, p)``, mean over the tokens of a corpus; ``None`` for solvers without one.
        memory: ``(p, m)``, the keys of past edits in this layer, or ``None`` if there are none.
        layer: the name of the layer, for messages and for what a solver keeps per layer.
        value_keys: ``(p, n)``, the keys that the targets were optimised at, where these are not ``keys``.
        remainder: ``(d, p)``, what rounding took of the weight (`lit_edit.algebra.exact`), kept as it is; solvers
        take the sum
            of both for the weight. None where it is not known.

    Raises:
        ValueError: if a shape does not fit or a value is not finite; the message names the tensor and the layer. Of the
            memory the newest keys are looked at; others that are not finite are refused by the solvers.
    """

    weight: Tensor
    keys: Tensor
    targets: Tensor
    covariance: Tensor | None = None
    memory: Tensor | None = None
    layer: str = ""
    value_keys: Tensor | None = None
    remainder: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "keys", "targets", "covariance", "memory", "value_keys"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tensor.ndim != 2:
                raise ValueError(f"{self._where}: {name} must be a matrix, got shape {tuple(tensor.shape)}.")
            # Keys of past edits were looked at when they came in: there may be thousands of them.
            if not _finite(tensor.detach()[:, -_NEWEST:] if name == "memory" else tensor.detach()):
                raise ValueError(
                    f"{self._where}: {name} of shape {tuple(tensor.shape)} holds values that are not finite."
                )
            if name == "weight":
                object.__setattr__(self, name, tensor.detach())
            elif name != "covariance":
                held = tensor.detach().to(device=self.weight.device, dtype=torch.float64)
                object.__setattr__(self, name, held)
        (d, p), n = self.weight.shape, self.keys.shape[1]
        if n == 0:
            raise ValueError(f"{self._where}: there are no keys to edit.")
        self._expect("keys", self.keys, (p, n))
        self._expect("targets", self.targets, (d, n))
        if self.covariance is not None:
            self._expect("covariance", self.covariance, (p, p))
        if self.memory is not None:
            self._expect("memory", self.memory, (p, self.memory.shape[1]))
        if self.value_keys is not None:
            self._expect("value_keys", self.value_keys, (p, n))
        if self.remainder is not None:
            self._expect("remainder", self.remainder, (d, p))

    @property
    def _where(self) -> str:
        return f"Layer {self.layer!r}" if self.layer else "Edit problem"

    def _expect(self, name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{self._where}: {name} must have shape {shape} for a weight of shape {tuple(self.weight.shape)} "
                f"and {self.keys.shape[1]} keys, got {tuple(tensor.shape)}."
            )

    @property
    def residual(self) -> Tensor:
        """``R = V − W K``, ``(d, n)`` in float64: what the edit has to add to the outputs, at the value keys if any."""
        return self.targets - self.outputs(self.keys if self.value_keys is None else self.value_keys)

    @property
    def exact(self) -> ExactWeight:
        """The weight, for products in float64."""
        return ExactWeight(self.weight, self.remainder)

    def outputs(self, keys: Tensor) -> Tensor:
        """``W K``, ``(d, n)`` in float64, for any keys ``(p, n)``."""
        return self.exact @ keys


def _finite(tensor: Tensor) -> bool:
    # The extremes are found without a copy in float64, which a sum that cannot overflow would take.
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def preserved_gram(covariance: Tensor, memory: Tensor, preservation: float) -> Tensor:
    """``λ C + M Mᵀ``: the Gram matrix of all that an edit should leave alone.

    Args:
        covariance: ``C (p, p)``, a mean over tokens.
        memory: ``M (p, m)``, keys of past edits; ``m`` may be 0.
        preservation: ``λ``, how many tokens' worth of the mean weighs against one edited key.

    Returns:
        ``(p, p)`` in float64, on the memory's device.
    """
    covariance = covariance.detach().to(device=memory.device, dtype=torch.float64)
    return torch.addmm(covariance, memory, memory.T, beta=preservation)


class Solver(ABC):
    """A closed form from keys and targets to an update of the weight.

    Args:
        memory: whether the keys of past edits count as preserved knowledge too.

    Attributes:
        needs_covariance: whether a problem must come with the key covariance of its layer.
        additive: whether updates are added to the weight; restraints work on such updates only.
        mixes_keys: whether a problem may come with value keys of its own.
        use_memory: the ``memory`` argument.
    """

    needs_covariance: bool = True
    additive: bool = True
    mixes_keys: bool = False

    def __init__(self, memory: bool) -> None:
        self.use_memory = memory
        self._grams: dict[str, KeptGram] = {}

    @abstractmethod
    def solve(self, problem: Problem) -> Update:
        """The update for one problem; the problem's weight is left as it is.

        Raises:
            ValueError: if the problem lacks what the solver needs or has no solution.
        """

    def check_batch_size(self, batch_size: int) -> None:  # noqa: B027 - most solvers take any
        """Raises ValueError if batches of this size cannot be solved; asked before the first edit."""

    def check_covariance(  # noqa: B027 - most solvers take any
        self, covariance: Tensor, layer: str, device: torch.device
    ) -> None:
        """Raises ValueError if a layer with this key covariance cannot be edited; asked before the first edit.

        Args:
            covariance: ``C (p, p)``, the tensor that the problems of this layer will come with.
            layer: its name, likewise.
            device: where its weight lies.
        """

    def kept_size(self, d: int, p: int) -> int:
        """How many float64 numbers are kept between edits for a layer with ``W (d, p)``; for estimates of memory."""
        return 0

    def passing_size(self, d: int, p: int) -> int:
        """How many float64 numbers a solution for ``W (d, p)`` takes for a while, beside those of size ``p²``."""
        return 0

    def state_dict(self) -> dict[str, Tensor]:
        """What later solutions depend on, to the last bit, besides their problems."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - there may be no state
        """Restores `state_dict`'s result."""

    def remembered(self, problem: Problem) -> Tensor:
        """Keys of past edits to preserve, ``(p, m)``; ``m`` is 0 when there are none or the memory is off."""
        if self.use_memory and problem.memory is not None:
            return problem.memory
        return problem.keys[:, :0]

    def preserved(self, problem: Problem, preservation: float) -> KeptGram:
        """``λ C + M Mᵀ`` of the problem's layer, ready to solve systems with; kept from edit to edit.

        Raises:
            ValueError: if the covariance is missing.
            NotPositiveDefiniteError: if it is singular.
        """
        covariance, remembered = self.covariance(problem), self.remembered(problem)
        kept = self._grams.get(problem.layer)
        fits = kept is not None and kept.preservation == preservation and kept.begins(remembered)
        if kept is None or not fits or not kept.is_of(covariance, problem.keys.device):
            kept = KeptGram.of(covariance, preservation, problem.keys)
        kept = self._grams[problem.layer] = kept.with_all(remembered)
        return kept

    def whitened_keys(self, problem: Problem, preservation: float) -> Tensor:
        """``(λ C + M Mᵀ)⁻¹ K``, ``(p, n)``.

        Raises:
            ValueError: if the covariance is missing.
            NotPositiveDefiniteError: if the matrix is singular.
        """
        try:
            return self.preserved(problem, preservation).solve(problem.keys)
        except NotPositiveDefiniteError:  # few tokens leave C singular; remembered keys may make the sum definite
            gram = preserved_gram(self.covariance(problem), self.remembered(problem), preservation)
            return solve_spd(gram, problem.keys)

    def covariance(self, problem: Problem) -> Tensor:
        """The key covariance ``(p, p)`` of the problem, exactly the tensor it was given.

        Raises:
            ValueError: if the problem has none.
        """
        if problem.covariance is None:
            raise ValueError(
                f"{type(self).__name__} needs the key covariance of layer {problem.layer!r}; collect it with "
                "lit_edit.statistics.covariances."
            )
        return problem.covariance


def check_positive(value: float, name: str) -> float:
    """Return ``value`` if it is positive and finite.

    Raises:
        ValueError: otherwise, naming ``name``.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    return float(value)
