"""How many CPU threads a run computes with, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers.models import REPOSITORY
from lit_edit.datamodules import CounterFactDataModule

from lit_edit import load_model
from lit_edit.editors.prediction import output_slopes
from lit_edit.model.workspace import Workspace
from lit_edit.threads import few_threads, threads_for, threads_line

# Ends where torch would be imported, and says what its threads would be told.
UNTIL_TORCH = """
import importlib.abc, os, sys
class Torch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("MKL_CBWR"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch())
import {module}
"""


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("module", ["lit_edit.api", "lit_edit.cli"])
@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, ["PASSIVE", "AUTO,STRICT"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "AUTO,STRICT"]),
        ({"MKL_CBWR": "AVX2"}, ["PASSIVE", "AVX2"]),
    ],
)
def test_threads_are_told_how_to_wait_and_sum_unless_the_user_has(
    module: str, told: dict[str, str], expected: list[str]
) -> None:
    own = ("OMP_WAIT_POLICY", "MKL_CBWR")
    environment = {name: value for name, value in os.environ.items() if name not in own} | told
    command = [sys.executable, "-c", UNTIL_TORCH.format(module=module)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_small_models_take_one_thread_unless_the_user_says_otherwise() -> None:
    small, large = [320 * 768] * 8, [320 * 768, 1600 * 6400]
    for available in (1, 2, 16):
        assert threads_for(small, available, {}) == 1
        assert threads_for(large, available, {}) == available
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            assert threads_for(small, available, {name: "7"}) == available  # which torch has taken from there
            assert threads_for(small, available, {name: ""}) == 1


def test_what_is_said_names_who_decided() -> None:
    assert "1, by the size of the model; OMP_NUM_THREADS=2" in threads_line(1, {})
    assert "8, by the size of the model; OMP_NUM_THREADS=1" in threads_line(8, {})
    assert threads_line(3, {"OMP_NUM_THREADS": "3"}) == "CPU threads: 3, by OMP_NUM_THREADS."
    assert threads_line(3, {"MKL_NUM_THREADS": "3"}) == "CPU threads: 3, by MKL_NUM_THREADS."


@pytest.mark.usefixtures("two_threads")
def test_small_algebra_runs_on_one_thread_and_leaves_the_number_as_it_was() -> None:
    with few_threads(320):
        assert torch.get_num_threads() == 1
        with few_threads(320):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with few_threads(4096):
        assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError), few_threads(320):
        raise RuntimeError
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(
    not torch.backends.mkl.is_available() or os.environ.get("MKL_CBWR") != "AUTO,STRICT",
    reason="products round by the number of threads",
)
def test_gradients_are_the_same_with_one_thread_and_with_two() -> None:
    """On the embedded model: products of a tiny one are not shared out."""
    workspace = Workspace.of(*load_model(), contexts=["{}", "It is said. {}", "In other news. {}"])
    data = CounterFactDataModule(n_edits=1, seed=5)
    data.setup("fit")
    layers = range(len(workspace.architecture))
    found, before = [], torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(output_slopes(workspace, data.requests, layers, 64))
    torch.set_num_threads(before)
    (loss, slopes), (other, others) = found
    assert torch.equal(loss, other)
    assert all(torch.equal(slopes[layer], others[layer]) for layer in layers)
