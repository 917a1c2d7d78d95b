from __future__ import annotations

import pytest
import torch
from helpers.sites import normal, orthogonal
from torch import Tensor

from lit_edit.algebra.subspaces import cleaned, orthonormal, principal_directions, without, written_basis

D, P = 12, 20


def assert_orthonormal(basis: Tensor) -> None:
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)


def projector(columns: Tensor) -> Tensor:
    """Onto the space of some columns, by the pseudo-inverse."""
    return columns @ torch.linalg.pinv(columns)


@pytest.mark.parametrize("edits", [1, 4, D, D + 5])
def test_the_basis_spans_exactly_what_was_written(edits: int) -> None:
    original, left = normal(D, P), normal(D, edits, seed=1)
    weight = original + left @ normal(edits, P, seed=2)
    basis = written_basis(weight, original, edits)
    assert basis.shape == (D, min(edits, D))
    assert_orthonormal(basis)
    torch.testing.assert_close(basis @ basis.T, projector(left), rtol=0, atol=1e-9)


def test_repeated_directions_and_transposed_storage_make_no_difference() -> None:
    original, left = normal(P, D).T, normal(D, 3, seed=1)
    weight = original + left[:, [0, 1, 0, 2, 1, 1]] @ normal(6, P, seed=2)
    basis = written_basis(weight, original, 6)
    assert basis.shape == (D, 3)
    torch.testing.assert_close(basis, written_basis(weight.contiguous(), original.contiguous(), 6))


@pytest.mark.parametrize(("dtype", "size", "tolerance"), [(torch.float32, 0.1, 1e-4), (torch.bfloat16, 30.0, 1e-1)])
def test_rounding_of_the_stored_weight_is_not_taken_for_an_edit(
    dtype: torch.dtype, size: float, tolerance: float
) -> None:
    d, p, edits = 48, 96, 40
    original = normal(d, p).to(dtype)
    left = orthogonal(d, 5, seed=1)
    weight = original.clone()
    for i in range(edits):  # forty writes, rounded each time, into five directions
        step = size * left[:, i % 5, None] @ normal(1, p, seed=10 + i) / p**0.5
        weight = (weight.double() + step).to(dtype)
    total = weight.double() - original.double()
    assert int(torch.linalg.matrix_rank(total)) == d  # to the letter it has full rank
    basis = written_basis(weight, original, edits)
    assert basis.shape == (d, 5)
    assert float(without(basis, left).norm()) < tolerance
    # Where the edits' number is known to be less, it is the bound.
    assert written_basis(weight, original, 3).shape == (d, 3)


def test_nothing_written_is_an_empty_basis() -> None:
    weight = normal(D, P)
    assert written_basis(weight, weight.clone(), 7).shape == (D, 0)
    assert written_basis(weight + 1, weight, 0).shape == (D, 0)


def test_unfit_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(12, 20\) cannot be compared with one of shape \(20, 12\)"):
        written_basis(normal(D, P), normal(P, D), 1)
    with pytest.raises(ValueError, match="cannot be -1"):
        written_basis(normal(D, P), normal(D, P), -1)


def test_principal_directions_are_the_best_subspaces_of_every_rank() -> None:
    matrix = normal(D, 5, seed=1) @ normal(5, P, seed=2)
    found = principal_directions(matrix)
    assert found.shape == (D, 5)
    assert_orthonormal(found)
    sizes = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0)
    for q in range(6):  # Eckart-Young: what the first q leave over is the sum of the other eigenvalues
        torch.testing.assert_close(without(matrix, found[:, :q]).square().sum(), sizes[q:].sum())
    torch.testing.assert_close(principal_directions(-matrix), found)
    assert principal_directions(torch.zeros(D, P)).shape == (D, 0)


def test_cleaned_directions_have_nothing_in_the_other_space() -> None:
    basis, directions = orthonormal(normal(D, 4, seed=1) / 10), principal_directions(normal(D, P))[:, :6]
    found = cleaned(directions, basis)
    torch.testing.assert_close(found, directions - projector(basis) @ directions)
    torch.testing.assert_close(basis.T @ found, torch.zeros(4, 6, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(cleaned(directions, basis[:, :0]), directions, rtol=0, atol=0)
    whole = orthonormal(found)
    assert_orthonormal(whole)
    both = projector(torch.cat([basis, directions], dim=1))
    torch.testing.assert_close(basis @ basis.T + whole @ whole.T, both)


def test_directions_within_the_other_space_are_dropped() -> None:
    basis = orthonormal(normal(D, 4, seed=1) / 10)
    inside = basis @ orthogonal(4, 2, seed=2)
    outside = normal(D, 1, seed=3)
    assert cleaned(inside, basis).shape == (D, 0)
    assert cleaned(torch.cat([inside, outside / outside.norm()], dim=1), basis).shape == (D, 1)
    full = principal_directions(normal(D, P))
    assert cleaned(inside, full).shape == orthonormal(cleaned(inside, full)).shape == (D, 0)
    # 12 directions cleaned of 4 are 12 vectors of an 8-dimensional space.
    assert orthonormal(cleaned(full, basis)).shape == (D, 8)
