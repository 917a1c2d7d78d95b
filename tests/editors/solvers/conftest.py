"""Random edit problems with a covariance whose spectrum decays as a real one's does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edit.editors.solvers import Problem

ProblemFactory = Callable[..., Problem]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose time to threads, a lot of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_problem() -> ProblemFactory:
    def make(d: int = 16, p: int = 48, n: int = 1, m: int = 0, *, seed: int = 0, **changes: Any) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis = torch.linalg.qr(normal(p, p)).Q
        values = 4.0 / torch.arange(1, p + 1, dtype=torch.float64) ** 2
        root = basis * values.sqrt()
        tensors = {
            "weight": normal(d, p) / p**0.5,
            "keys": root @ normal(p, n) + 0.1 * normal(p, n),
            "targets": normal(d, n),
            "covariance": root @ root.T,
            "memory": root @ normal(p, m) + 0.1 * normal(p, m) if m else None,
            "layer": "blocks.0",
        }
        return Problem(**{**tensors, **changes})

    return make
