"""Fixtures: tiny random models, saved to disk as `transformers` checkpoints, where real data lie, a private cache."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import FAMILIES, REPOSITORY, tiny_model
from transformers import PreTrainedTokenizerFast


def shared_data() -> Path:
    """The folder of real data files: `LIT_EDIT_DATA`, or `../shared/data` beside the repository."""
    return Path(os.environ.get("LIT_EDIT_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """Shells start background jobs with Ctrl-C ignored; those of the tests that press it mean a terminal."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Matrices this small only lose time to threads, a lot of it on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(family: str) -> tuple[Any, PreTrainedTokenizerFast]:
    return tiny_model(family)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a tiny model of a family once a session and gives its folder."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"tiny-{name}")
            model, tokenizer = tiny_model(name)
            model.save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture
def real_file() -> Callable[[str], Path]:
    """Finds a real data file, or skips the test."""

    def find(name: str) -> Path:
        path = shared_data() / name
        if not path.exists():
            pytest.skip(f"the real data file {name} is not here; set LIT_EDIT_DATA to the folder that has it")
        return path

    return find


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics go to a folder of this session: shared by its tests, never the user's cache."""
    root = tmp_path_factory.getbasetemp() / "cache"
    root.mkdir(exist_ok=True)
    monkeypatch.setenv("LIT_EDIT_CACHE", str(root))
