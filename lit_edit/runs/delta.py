"""What edits changed, as a small file that turns the original model into the edited one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.algebra.linalg import thin_svd
from lit_edit.files import load_tensors, save_tensors
from lit_edit.model.fingerprint import model_fingerprint
from lit_edit.program import program

FORMAT_VERSION = 2
_METADATA_KEY = "delta"
_LEFT, _RIGHT = "left:", "right:"


class DeltaError(ValueError):
    """A delta that cannot be read, or belongs to another model."""


@dataclass(frozen=True)
class DeltaHeader:
    """What a delta belongs to.

    Attributes:
        original: `lit_edit.model.fingerprint.model_fingerprint` of the model it is applied to.
        edited: Digest of the model it gives; None where it is stored with a loss, or is the original's.
        parameters: Names of the weights that change.
        error: Largest relative error ``‖W_given − W_edited‖_F / ‖W_edited‖_F`` over the weights; 0 where exact.
        method, edits: For people.
        format_version: Version of the file's format.
    """

    original: str
    edited: str | None
    parameters: tuple[str, ...]
    error: float
    method: str = ""
    edits: int = 0
    format_version: int = FORMAT_VERSION


def save_delta(
    path: str | os.PathLike[str],
    model: nn.Module,
    originals: Mapping[str, Tensor],
    *,
    original: str,
    tolerance: float = 0.0,
    method: str = "",
    edits: int = 0,
) -> DeltaHeader:
    """Writes what differs between a model and its original, whole or not at all.

    Args:
        path: The file (safetensors); its folder is made if missing.
        model: Edited model.
        originals: Weights that edits may have touched, as they were, by parameter name. Those that did not change
            are left out.
        original: `lit_edit.model.fingerprint.model_fingerprint` of the model before the first edit.
        tolerance: 0 keeps the changed weights themselves, exact bit by bit. Otherwise each change is kept as two thin
            factors with at most this relative error in the weight, where that is smaller: a few additive edits then
            take kilobytes.
        method: For people.
        edits: For people.

    Raises:
        ValueError: if the tolerance is negative, or the model lacks one of the weights.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it is a relative error and cannot be negative.")
    present = dict(model.named_parameters())
    missing = sorted(set(originals) - set(present))
    if missing:
        raise ValueError(f"The model has no parameter {missing[0]!r}.")
    tensors: dict[str, Tensor] = {}
    names, worst = [], 0.0
    for name, before in originals.items():
        now = present[name].detach().cpu()
        before = before.detach().cpu()
        if torch.equal(now, before):
            continue
        names.append(name)
        factors = _thin(before, now, tolerance) if tolerance else None
        if factors is None:
            tensors[name] = now.contiguous()
            continue
        left, right, error = factors
        tensors[_LEFT + name], tensors[_RIGHT + name] = left, right
        worst = max(worst, error)
    broken = [name for name in names if not torch.isfinite(present[name]).all()]
    if broken:
        raise ValueError(f"The edited weight {broken[0]!r} is not finite: there is nothing to export.")
    exact = not any(name.startswith(_LEFT) for name in tensors)
    edited = model_fingerprint(model) if exact and names else None
    if edited == original:  # a fingerprint that cannot tell the two models apart says nothing about either
        edited = None
    header = DeltaHeader(original, edited, tuple(names), worst, method, edits)
    save_tensors(path, tensors, {_METADATA_KEY: json.dumps(asdict(header), sort_keys=True)})
    return header


def load_delta(model: nn.Module, path: str | os.PathLike[str]) -> DeltaHeader:
    """Turns the original model into the edited one, in place.

    Args:
        model: Model the edits were made on, as it was before the first.
        path: A file by `save_delta`.

    Returns:
        The header of the file.

    Raises:
        DeltaError: if there is no such file, it cannot be read, or the model is not the one it was made from (already
            edited, of another precision, or another model altogether). The model is then unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise DeltaError(f"There is no delta at {path}.")
    try:
        tensors, metadata = load_tensors(path)
        header = _header(metadata.get(_METADATA_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"The delta at {path} cannot be read: {error}") from error
    found = model_fingerprint(model)
    if header.edited is not None and found == header.edited:
        raise DeltaError(f"The delta at {path} is in this model already.")
    if found != header.original:
        raise DeltaError(
            f"The delta at {path} belongs to another model: it was made from one with the fingerprint "
            f"{header.original[:12]}..., this one has {found[:12]}.... Load the original, unedited, in the precision "
            "it was edited in."
        )
    parameters = dict(model.named_parameters())
    new: dict[str, Tensor] = {}
    for name in header.parameters:  # all is checked before anything is written
        if name not in parameters:
            raise DeltaError(f"The delta at {path} changes a weight {name!r} that the model lacks.")
        before = parameters[name].detach()
        new[name] = _changed(path, name, before, tensors)
        if new[name].shape != before.shape or new[name].dtype != before.dtype:
            raise DeltaError(
                f"The delta at {path} has {name!r} as {new[name].dtype} of shape {tuple(new[name].shape)}; the model's "
                f"is {before.dtype} of shape {tuple(before.shape)}."
            )
        if not torch.isfinite(new[name]).all():
            raise DeltaError(f"The delta at {path} makes {name!r} hold values that are not finite.")
    for name, weight in new.items():
        parameters[name].detach().copy_(weight)
    return header


def _changed(path: Path, name: str, before: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A weight after the edits: stored whole, or as the two factors of its change."""
    if name in tensors:
        return tensors[name]
    left, right = tensors.get(_LEFT + name), tensors.get(_RIGHT + name)
    if left is None or right is None:
        raise DeltaError(f"The delta at {path} lacks the weight {name!r} that its header names.")
    if left.ndim != 2 or right.ndim != 2 or (len(left), right.shape[1], left.shape[1]) != (*before.shape, len(right)):
        raise DeltaError(
            f"The delta at {path} changes {name!r} by factors of shapes {tuple(left.shape)} and {tuple(right.shape)}, "
            f"which do not make up its shape {tuple(before.shape)}."
        )
    return _applied(before.cpu(), left, right)


# The types of a header's fields as JSON gives them.
_TYPES: dict[str, tuple[type, ...]] = {
    "original": (str,),
    "edited": (str, type(None)),
    "parameters": (list,),
    "error": (float, int),
    "method": (str,),
    "edits": (int,),
    "format_version": (int,),
}


def _header(text: str) -> DeltaHeader:
    values: Any = json.loads(text)
    names = {field.name for field in fields(DeltaHeader)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"its header has not exactly the fields {', '.join(sorted(names))}.")
    for name, types in _TYPES.items():
        if not isinstance(values[name], types):
            raise ValueError(f"its header says {name} is {str(values[name])[:80]!r}.")
    if not all(isinstance(name, str) for name in values["parameters"]):
        raise ValueError("its header names weights by something else than strings.")
    if values["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"its format is version {values['format_version']}, this program reads {FORMAT_VERSION}. Make "
            f"it again from the run, with `{program()} export --delta`."
        )
    return DeltaHeader(**{**values, "parameters": tuple(values["parameters"])})


def _applied(before: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (before.double() + left.double() @ right.double()).to(before.dtype)


def _thin(before: Tensor, now: Tensor, tolerance: float) -> tuple[Tensor, Tensor, float] | None:
    """The change as float32 factors of the least rank within the tolerance, or None where they take more room."""
    u, s, vt = thin_svd(now.double() - before.double())
    length = float(now.double().norm())
    left_out = s.square().flip(0).cumsum(0).flip(0).sqrt()  # what all singular values from each on amount to
    rank = int((left_out > 0.5 * tolerance * length).sum())  # the other half is for rounding
    if rank * sum(now.shape) * 4 >= now.numel() * now.element_size():
        return None
    left, right = (u[:, :rank] * s[:rank]).float().contiguous(), vt[:rank].float().contiguous()
    error = float((_applied(before, left, right).double() - now.double()).norm()) / length
    return (left, right, error) if error <= tolerance else None
