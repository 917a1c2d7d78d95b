"""The benchmark commands run, with small numbers, and leave what they promise."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lit_edit.configs.find import read_config

REPOSITORY = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_bench_writes_figures_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    small = ["--models", "embedded", "llama-4x64", "--batches", "2", "--sizes", "192", "--edits", "10", "--steps", "1"]
    small += ["--whole_edits", "2", "--tokens", "10000", "--scored", "20"]
    said = run("edit_speed.py", *small, "--repeats", "1", "--out", str(out))
    found = json.loads(out.read_text())
    assert [row["model"] for row in found["values"]] == ["embedded", "llama-4x64"]
    for row in found["values"]:
        assert min(row["seconds_per_edit"].values()) > 0.5 * min(row["at_peak"].values()) > 0
    (solved,) = found["solve"]
    assert solved["objective_gap"] < 1e-9
    assert [row["solver"] for row in found["sequence"]] == ["MOSE", "MOSEKey", "ROME", "EMMET", "MEMIT", "AlphaEdit"]
    assert [row["method"] for row in found["edits"]] == ["mose", "memit"]
    for row in found["evaluation"]:
        assert row["package_tokens"] < row["complete_tokens"]
    assert [row["model"] for row in found["evaluation"]] == ["embedded", "llama-4x64"]
    assert said.count("\n|---|") == 6
    for table in re.findall(r"(?:^\|.*\|\n)+", said, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


@pytest.mark.slow
def test_bench_of_layer_selection(tmp_path: Path) -> None:
    out = tmp_path / "layers.json"
    said = run("layer_selection.py", "--edits", "2", "--tokens", "5000", "--out", str(out))
    rows = json.loads(out.read_text())
    assert len(rows) == 2
    for row in rows:
        assert len(row["centers"]) == len(row["seconds"]) == 6
        assert (row["place"] == 1) == (row["centers"]["predicted, all contexts"] == row["centers"]["Eq. 22 in all"])
    assert said.count(" of 2 |") == 6


@pytest.mark.slow
def test_bench_of_a_published_shape(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    asked = ["--only", "large", "--large", "tiny", "--large_edits", "2", "--large_tokens", "2000", "--out", str(out)]
    said = run("edit_speed.py", *asked)
    rows = json.loads(out.read_text())["large"]
    assert [row["method"] for row in rows] == ["MOSE", "MEMIT", "AlphaEdit"]
    for row in rows:
        assert row["edit"] > row["stages"]["values"] > 0.5 * max(row["at_peak"].values()) > 0
    assert said.count("\n| tiny | cpu, float32 |") == 3
    spec = importlib.util.spec_from_file_location("edit_speed", REPOSITORY / "benchmarks" / "edit_speed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit, match=r"no shape .70b.; there are llama-3-8b, qwen2\.5-7b"):
        module.shaped("70b", "cpu", torch.float32)


def test_an_unknown_section_is_named() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "edit_speed.py"), "--only", "speed"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "no section 'speed'; there are values, solve, sequence, edits, evaluation, large" in done.stderr


@pytest.fixture(scope="module")
def search() -> ModuleType:
    spec = importlib.util.spec_from_file_location("search", REPOSITORY / "benchmarks" / "search.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_is_searched_in_nine_settings_around_its_own(search: ModuleType) -> None:
    for name in search.CONFIGS:
        tried = list(search.settings(name))
        assert len({tuple(changed.values()) for changed, _ in tried}) == 9
        assert all(len(changed) == 2 for changed, _ in tried)
        assert tried[search.OWN][1] == read_config(name)["model"], name


def test_the_search_uses_records_that_are_for_choosing(search: ModuleType) -> None:
    records = {str(r["case_id"]): r.get("split") for r in json.loads(search.WORLD.read_text(encoding="utf-8"))}
    chosen = search.chosen(50, seed=0)
    assert {records[request.case_id] for request in chosen} == {"choose"}
    assert len({request.case_id for request in chosen}) == 50


def test_the_search_names_the_best_setting(search: ModuleType) -> None:
    figures = [(4, 0.5), (1, 0.9), (2, 0.7)]
    rows = [
        {"config": "rome", "number": n, "settings": {"values.lr": float(n)}}
        | dict.fromkeys(("reliability", "generalization", "locality"), value)
        for n, value in figures
    ]
    assert "| rome | 3 | 0.50 | 0.90 | 0.90 | 0.90 | 0.90 | `values.lr: 1` |" in search.table(rows)
