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


def test_bench_writes_ratios(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    said = run("edit_speed.py", "--requests", "2", "--steps", "2", "--repeats", "1", "--out", str(out))
    ratios = json.loads(out.read_text())["ratios"]
    assert len(said.splitlines()) == len(ratios) == 6
    assert all(ratio > 0 for ratio in ratios.values())
