"""The benchmark commands run, with small numbers, and leave what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_compare_writes_a_table_and_a_figure_and_repeats_nothing(tmp_path: Path) -> None:
    arguments = ["--configs", "mose.yaml", "rome.yaml", "--n_edits", "2", "--every_n", "2"]
    arguments += ["--out", str(tmp_path / "runs"), "--figure", str(tmp_path / "figure.png"), "--downstream.n_items=2"]
    run("four_methods.py", *arguments)
    table = (tmp_path / "runs" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["before", "mose", "rome"]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    results = tmp_path / "runs" / "mose" / "results.json"
    before = results.stat().st_mtime_ns
    run("four_methods.py", *arguments)
    assert results.stat().st_mtime_ns == before


def test_bench_writes_ratios(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    said = run("edit_speed.py", "--requests", "2", "--steps", "2", "--repeats", "1", "--out", str(out))
    ratios = json.loads(out.read_text())["ratios"]
    assert len(said.splitlines()) == len(ratios) == 6
    assert all(ratio > 0 for ratio in ratios.values())
