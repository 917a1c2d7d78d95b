"""How well conditioned the edited matrices stay, and how far they have moved."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lit_edit.algebra.linalg import singular_values
from lit_edit.runs.spectra import FILE_NAME, write_spectra

from .every_n import run_folder
from .watched import Watched


def _in_double(matrix: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return matrix.detach().to(device="cpu" if matrix.device.type == "mps" else matrix.device, dtype=torch.float64)


def matrix_figures(weight: Tensor) -> dict[str, float]:
    """Norms and conditioning of one matrix, computed in float64.

    Args:
        weight: shape ``(d_out, d_in)``, of any floating dtype; its transpose has the same figures.

    Returns:
        ``frobenius_norm``; ``l1_norm``, the sum of absolute entries; ``spectral_norm``, the largest singular value;
        ``smallest_singular_value``; and ``condition_number``, their ratio, which is infinite for a singular matrix. A
        matrix with an entry that is not finite has no spectrum: all its figures are NaN, so that a run whose weights
        have diverged can still be recorded.

    Raises:
        ValueError: if ``weight`` is not a matrix or is empty.

    Example:
        >>> matrix_figures(torch.diag(torch.tensor([4.0, 2.0])))["condition_number"]
        2.0
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"A matrix with at least one entry is needed, the shape is {tuple(weight.shape)}.")
    return _figures(weight, _spectrum(weight))


def _spectrum(weight: Tensor) -> Tensor:
    """Singular values in float64, on the CPU; all NaN for a matrix with an entry that is not finite."""
    matrix = _in_double(weight)
    if not bool(torch.isfinite(matrix).all()):
        return torch.full((min(matrix.shape),), math.nan, dtype=torch.float64)
    return singular_values(matrix).cpu()


def _figures(weight: Tensor, singular_values: Tensor) -> dict[str, float]:
    matrix = _in_double(weight)
    names = ("frobenius_norm", "l1_norm", "spectral_norm", "smallest_singular_value", "condition_number")
    if bool(singular_values.isnan().any()):
        return dict.fromkeys(names, math.nan)
    largest, smallest = singular_values[0].item(), singular_values[-1].item()
    condition = largest / smallest if smallest > 0 else math.inf
    frobenius, l1 = torch.linalg.norm(matrix).item(), matrix.abs().sum().item()
    return dict(zip(names, (frobenius, l1, largest, smallest, condition), strict=True))


def relative_drift(weight: Tensor, reference: Tensor) -> float:
    """How far a matrix has moved: ``‖weight − reference‖_F / ‖reference‖_F``, in float64.

    Args:
        weight: shape ``(d_out, d_in)``.
        reference: the same shape, on any device.

    Returns:
        The ratio. From a reference of zeros it is 0 for no movement and infinite for any; NaN where an entry of one
        of the two is.

    Raises:
        ValueError: if the shapes differ.
    """
    if weight.shape != reference.shape:
        raise ValueError(f"The shapes differ: {tuple(weight.shape)} and {tuple(reference.shape)}.")
    now = _in_double(weight)
    return _relative_distance(now, _in_double(reference.to(now.device)))


def spectrum_drift(weight: Tensor, reference: Tensor) -> float:
    """How far the singular values have moved: ``‖σ(weight) − σ(reference)‖₂ / ‖σ(reference)‖₂``, in float64.

    Never more than `relative_drift` (Mirsky 1960), and 0 for a matrix that was turned: what is left after rotations is
    the rounding of the weights' dtype, of every edit so far.

    Args:
        weight: shape ``(d_out, d_in)``.
        reference: the same shape, on any device.

    Returns:
        The ratio, NaN where one of the two has an entry that is not finite.

    Raises:
        ValueError: if the shapes differ or are no matrix's.
    """
    if weight.shape != reference.shape or weight.ndim != 2:
        raise ValueError(f"Two matrices of one shape are needed, not {tuple(weight.shape)}, {tuple(reference.shape)}.")
    return _relative_distance(_spectrum(weight), _spectrum(reference))


def _relative_distance(now: Tensor, start: Tensor) -> float:
    moved, size = torch.linalg.norm(now - start).item(), torch.linalg.norm(start).item()
    if math.isnan(moved):
        return math.nan
    if size > 0:
        return moved / size
    return 0.0 if moved == 0 else math.inf


class MatrixStability(Watched):
    """Logs norms, conditioning and drift of weight matrices every N edits.

    For every matrix the figures of `matrix_figures`, `relative_drift` and `spectrum_drift`, as
    ``stability/<parameter>/<figure>``, and over all of them ``stability/worst_condition_number``,
    ``stability/worst_spectrum_drift``, ``stability/mean_frobenius_norm`` and ``stability/mean_relative_drift``.

    The singular values before the first edit and at the last measurement go to ``spectra.json`` in the run's folder
    (`lit_edit.runs.spectra`), where the report finds them.

    Drift is measured from the weights before the first edit. `lit_edit.LitEdit` keeps those that are edited, and finds
    them again in the unedited model when a run is resumed. For a module without ``original_parameter(name)`` a copy of
    the watched matrices is kept here, on the CPU, and saved in checkpoints, which grow by as much. Where a checkpoint
    holds no copy, because the callback was added later, drift starts at the resumed weights, with a warning.

    Args:
        parameters: names or shell-style patterns (``*`` also matches dots) of the parameters to watch. By default
            those the module returns from ``edited_parameters()``, a dict of matrices by name; for a module without
            that method, every matrix that requires gradients.
        every_n: edits between two measurements, or the counts to measure at, see `EveryNEdits`.
        at_start: also measure before the first edit.
        at_end: also measure the last count of the run.

    Raises:
        ValueError: in the constructor if ``parameters`` is empty or ``every_n`` is neither a positive whole number
            nor a list of such; when training starts if a pattern matches no parameter, or what it matches is no matrix.

    Example:
        >>> callback = MatrixStability(parameters=["*.mlp.down_proj.weight"], every_n=100)
    """

    def __init__(
        self,
        parameters: list[str] | None = None,
        every_n: int | list[int] = 25,
        at_start: bool = True,
        at_end: bool = True,
    ) -> None:
        super().__init__(parameters, every_n, at_start, at_end)
        self._spectra: dict[str, Tensor] = {}  # of the starting weights
        self._now: dict[str, Tensor] = {}

    @property
    def spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Singular values by matrix, largest first, in float64: before the first edit, and at the last measurement."""
        return {name: (self._spectra[name], now) for name, now in self._now.items()}

    @override
    def reset(self) -> None:
        super().reset()
        self._spectra, self._now = {}, {}

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, edits: int) -> dict[str, float]:
        tagged: dict[str, float] = {}
        by_figure: dict[str, list[float]] = {}
        spectra: dict[str, Tensor] = {}
        for name, weight in self.select(pl_module).items():
            spectrum, start = _spectrum(weight), self.start(pl_module, name, weight)
            if name not in self._spectra:
                self._spectra[name] = spectrum if torch.equal(start, weight) else _spectrum(start)
            spectra[name] = spectrum
            figures = _figures(weight, spectrum)
            figures["relative_drift"] = relative_drift(weight, start)
            figures["spectrum_drift"] = _relative_distance(spectrum, self._spectra[name])
            for figure, value in figures.items():
                tagged[f"stability/{name}/{figure}"] = value
                by_figure.setdefault(figure, []).append(value)
        self._now = spectra
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            write_spectra(folder / FILE_NAME, self._spectra, spectra)
        # Through tensors, because Python's `max` loses a NaN unless it comes first.
        over_all = {figure: torch.tensor(values, dtype=torch.float64) for figure, values in by_figure.items()}
        tagged["stability/worst_condition_number"] = over_all["condition_number"].max().item()
        tagged["stability/worst_spectrum_drift"] = over_all["spectrum_drift"].max().item()
        tagged["stability/mean_frobenius_norm"] = over_all["frobenius_norm"].mean().item()
        tagged["stability/mean_relative_drift"] = over_all["relative_drift"].mean().item()
        return tagged

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._spectra = {}
