"""The world, its corpus and the recipe's tokenizer, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_edit.world.recipe.corpus import Corpus
from lit_edit.world.recipe.files import write_files
from lit_edit.world.recipe.train import make_tokenizer
from lit_edit.world.recipe.world import SIZES, World, build_world


@pytest.fixture(scope="session")
def world() -> World:
    return build_world()


@pytest.fixture(scope="session")
def corpus(world: World) -> Corpus:
    return Corpus(world)


@pytest.fixture(scope="session")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return make_tokenizer(world, SIZES["base"].vocabulary)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the files of the world have just been made."""
    folder = tmp_path_factory.mktemp("world")
    write_files(folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums come out in the same order, and models this small only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
