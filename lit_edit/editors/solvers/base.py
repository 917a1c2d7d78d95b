"""What every solver is: a closed form from a layer, keys and targets to an update."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lit_edit.algebra.linalg import NotPositiveDefiniteError, solve_spd
from lit_edit.algebra.updates import UnwritableError, Update
from lit_edit.editors.solvers.preserved import PreservedGram
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.program import program
from lit_edit.settings import Configured


class Solver(Configured, ABC):
    """A closed form: find a change of ``W (d, p)`` under which ``K (p, n)`` give ``V (d, n)``.

    A solver holds settings only. What it keeps for a layer from edit to edit lies in `EditedWeight.kept`, so that one
    solver can serve several models.

    Args:
        memory: Whether the keys of past edits count as preserved knowledge too.

    Attributes:
        needs_covariance: Whether layers must come with their key covariance.
        additive: Whether updates are added to the weight; restraints work on such updates only.
        mixes_keys: Whether value keys of their own are understood.
        max_batch: Requests that can be solved for together at most; None for any number.
        use_memory: The ``memory`` argument.
    """

    needs_covariance: bool = True
    additive: bool = True
    mixes_keys: bool = False
    max_batch: int | None = None

    def __init__(self, memory: bool) -> None:
        self.use_memory = memory

    @torch.no_grad()
    def solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None = None) -> Update:
        """The update for one batch of edits in one layer; the weight is left as it is.

        Args:
            site: The layer.
            keys: ``K (p, n)``, inputs of the projection at the edited tokens, one column per request; ``n`` ≥ 1.
            targets: ``V (d, n)``, the outputs wanted for them.
            value_keys: ``(p, n)``, the keys that the targets were optimised at, where these are not ``keys``.

        Raises:
            ValueError: If a shape does not fit, a value is not finite, the layer lacks what the solver needs, or there
                is no solution; the message names the layer.
        """
        (d, p), n = site.shape, keys.shape[-1]
        if not n:
            raise ValueError(f"Layer {site.name!r}: there are no keys to edit.")
        if self.max_batch is not None and n > self.max_batch:
            raise ValueError(
                f"{type(self).__name__} writes one fact at a time and got {n} in a batch: set batch_size to 1, or use "
                "MEMIT."
            )
        keys, targets = _checked(site, "keys", keys, (p, n)), _checked(site, "targets", targets, (d, n))
        if value_keys is not None:
            value_keys = _checked(site, "value keys", value_keys, (p, n))
        return self._solve(site, keys, targets, value_keys)

    @abstractmethod
    def _solve(self, site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None) -> Update:
        """`solve` with tensors that fit, in float64 and on the weight's device."""

    def written(self, site: EditedWeight, update: Update) -> None:
        """Told of the solver's update once it is in the weight, to bring along what it keeps."""

    def check(self, site: EditedWeight) -> None:
        """Raises ValueError if a layer cannot be edited; asked before the first edit."""

    def kept_size(self, d: int, p: int) -> int:
        """Float64 numbers kept between edits for a layer with ``W (d, p)``; for estimates of memory."""
        return 0

    def remembered(self, site: EditedWeight) -> Tensor:
        """Keys of past edits to preserve, ``(p, m)`` in float32; ``m`` is 0 when there are none or memory is off."""
        return site.keys if self.use_memory else site.keys[:, :0]

    def preserved(self, site: EditedWeight, preservation: float) -> PreservedGram:
        """``λ C + M Mᵀ`` of a layer, ready to solve systems with; kept from edit to edit.

        Raises:
            ValueError: If the covariance is missing.
            NotPositiveDefiniteError: If it is singular.
        """
        covariance, remembered, name = self.covariance(site), self.remembered(site), f"{type(self).__name__}.gram"
        known = site.kept.get(name)
        if not (
            isinstance(known, PreservedGram) and known.preservation == preservation and known.fits(site, remembered)
        ):
            known = PreservedGram.of(covariance, preservation, site)
        known = site.kept[name] = known.with_all(remembered, site)
        return known

    def whitened_keys(self, site: EditedWeight, keys: Tensor, preservation: float) -> Tensor:
        """``(λ C + M Mᵀ)⁻¹ K``, ``(p, n)``.

        Raises:
            ValueError: If the covariance is missing.
            NotPositiveDefiniteError: If the matrix is singular.
        """
        try:
            return self.preserved(site, preservation).solve(keys)
        except NotPositiveDefiniteError:  # few tokens leave C singular; remembered keys may make the sum definite
            return solve_spd(preserved_gram(self.covariance(site), self.remembered(site), preservation), keys)

    def covariance(self, site: EditedWeight) -> Tensor:
        """The key covariance ``(p, p)`` of a layer.

        Raises:
            ValueError: If it has none.
        """
        if site.covariance is None:
            raise ValueError(
                f"{type(self).__name__} needs the key covariance of layer {site.name!r}; collect it with "
                f"`{program()} statistics`."
            )
        return site.covariance


def residual(site: EditedWeight, keys: Tensor, targets: Tensor, value_keys: Tensor | None = None) -> Tensor:
    """``R = V − W K``, ``(d, n)`` in float64: what the edit has to add to the outputs, at the value keys if any."""
    return targets - site.exact @ (keys if value_keys is None else value_keys)


def preserved_gram(covariance: Tensor, memory: Tensor, preservation: float) -> Tensor:
    """``λ C + M Mᵀ``: the Gram matrix of all that an edit should leave alone.

    Args:
        covariance: ``C (p, p)``, a mean over tokens.
        memory: ``M (p, m)``, keys of past edits; ``m`` may be 0.
        preservation: ``λ``, how many tokens' worth of the mean weighs against one edited key.

    Returns:
        ``(p, p)`` in float64, on the memory's device.
    """
    memory = memory.to(torch.float64)
    covariance = covariance.detach().to(device=memory.device, dtype=torch.float64)
    return torch.addmm(covariance, memory, memory.T, beta=preservation)


def check_positive(value: float, name: str) -> float:
    """Return ``value`` if it is positive and finite.

    Raises:
        ValueError: Otherwise, naming ``name``.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    return float(value)


def _checked(site: EditedWeight, name: str, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"Layer {site.name!r}: {name} must have shape {shape} for a weight of shape {site.shape}, got "
            f"{tuple(tensor.shape)}."
        )
    if not torch.isfinite(tensor).all():
        raise UnwritableError(f"Layer {site.name!r}: {name} of shape {shape} hold values that are not finite.")
    return tensor.detach().to(device=site.device, dtype=torch.float64)
