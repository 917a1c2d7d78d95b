"""The world, its corpus and the recipe's tokenizer, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_edit.world.corpus import Corpus
from lit_edit.world.files import write_files
from lit_edit.world.relations import World, build_world
from lit_edit.world.train import make_tokenizer


@pytest.fixture(scope="session")
def world() -> World:
    return build_world()


@pytest.fixture(scope="session")
def corpus(world: World) -> Corpus:
    return Corpus(world)


@pytest.fixture(scope="session")
def tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    return make_tokenizer(corpus)


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
