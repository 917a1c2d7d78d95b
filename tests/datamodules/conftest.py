"""Helpers for the tests of the data modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.records import fact


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
