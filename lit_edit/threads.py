"""CPU threads: how many a run computes with, how they wait for one another, and how they share out sums.

Importing this before `torch` sets two variables, unless the user has set them:

* OpenMP's threads sleep while they wait. Threads that spin keep a core from whoever else has work for it, and on a busy
  machine that is the very thread they wait for.
* MKL's matrix products round the same for any number of threads. By default those of the backward pass share out their
  sums over threads; gradients then differ by 1e-6, and a sequence of edits grows apart: after eight MEMIT edits with
  one thread or two the weights' change differed by 23 %. Factorisations still differ (`few_threads` has the small ones
  on one thread), and so do products without MKL.

The number of threads follows from the model's size alone, never from how busy the machine is: what is left of the
difference stays the same from run to run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

for _name, _value in {"OMP_WAIT_POLICY": "PASSIVE", "MKL_CBWR": "AUTO,STRICT"}.items():
    os.environ.setdefault(_name, _value)

NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user says how many threads there are to be."""

_SMALL_MODEL = 2**21  # numbers in the largest edited matrix; below, an edit's products are too small to share out
_SMALL_ALGEBRA = 1024  # rows of a float64 problem


def threads_for(sizes: Iterable[int], available: int, environment: Mapping[str, str]) -> int:
    """How many threads to compute with.

    Args:
        sizes: Of the matrices that edits may touch, in numbers.
        available: As many as torch would take.
        environment: Of the process; a number set there is the user's own choice.

    Returns:
        1 for a small model, else ``available``.

    Example:
        >>> threads_for([320 * 768], 8, {}), threads_for([4096 * 14336], 8, {})
        (1, 8)
        >>> threads_for([320 * 768], 8, {"OMP_NUM_THREADS": "8"})
        8
    """
    if any(environment.get(name) for name in NUMBER):
        return available
    return 1 if max(sizes, default=0) <= _SMALL_MODEL else available


def threads_line(number: int, environment: Mapping[str, str]) -> str:
    """What a run says about its threads.

    Args:
        number: Of the threads it computes with.
        environment: Of the process.

    Example:
        >>> threads_line(1, {})
        'CPU threads: 1, by the size of the model; OMP_NUM_THREADS=2 would take 2.'
    """
    told = next((name for name in NUMBER if environment.get(name)), None)
    if told is not None:
        return f"CPU threads: {number}, by {told}."
    other = 2 if number == 1 else 1
    return f"CPU threads: {number}, by the size of the model; {NUMBER[0]}={other} would take {other}."


@contextmanager
def few_threads(rows: int) -> Iterator[None]:
    """Computes the block with one thread where its matrices have a few hundred rows: there sharing out costs more.

    Args:
        rows: Of the largest square matrix in the block.
    """
    import torch

    before = torch.get_num_threads()
    if before == 1 or rows > _SMALL_ALGEBRA:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
