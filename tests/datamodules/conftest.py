"""Helpers for the tests of the data modules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_examples import fact


def shared_data() -> Path:
    """Where the real data sets are: `LIT_EDIT_DATA`, or `shared/data` beside the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("LIT_EDIT_DATA", default))


@pytest.fixture
def real_file() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        path = shared_data() / name
        if not path.exists():
            pytest.skip(f"the real data file {name} is not here; set LIT_EDIT_DATA to the folder that has it")
        return path

    return find


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[..., str]:
    def write(value: Any, name: str = "facts.json") -> str:
        path = tmp_path / name
        path.write_text(json.dumps(value), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def facts_file(write_json: Callable[..., str]) -> Callable[[int], str]:
    return lambda count: write_json([fact(number) for number in range(count)])
