"""Ten edits with every shipped configuration, as hashes: `python benchmarks/golden_record.py record.json [--compare
old.json]`.

Run before and after a change that should leave behaviour alone, on one CPU thread. Each method runs through the command
line in a process of its own; its record is the SHA-256 of every edited weight and the journal without its timings.
Differences are listed by the first field that differs, with both values.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "stages")


def run(config: Path, folder: Path, edits: int) -> dict[str, Any]:
    """The record of one configuration."""
    command = [
        *(sys.executable, str(REPOSITORY / "train.py"), "fit", "--config", str(config)),
        *(f"--data.n_edits={edits}", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"),
        *(
            "--retention.every_n=1000",
            "--stability.every_n=1000",
            "--downstream.n_items=0",
            "--checkpoint.every_n=1000",
        ),
        "--trainer.enable_progress_bar=false",
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    import torch

    log = folder / config.stem / "version_0"
    content = torch.load(log / "checkpoints" / "edits.ckpt", map_location="cpu", weights_only=True)
    weights = {
        str(layer): hashlib.sha256(site["stored"].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for layer, site in content["lit_edit"]["sites"].items()
        if "stored" in site
    }
    journal = [json.loads(line) for line in (log / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"weights": weights, "journal": [{k: v for k, v in e.items() if k not in TIMES} for e in journal]}


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Every place in which two records differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [d for name in names for d in differences(old.get(name), new.get(name), f"{where}.{name}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where.lstrip('.')}: {old} -> {new}"]


def main() -> int:
    """Writes the record, and compares it with an older one. Returns 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--compare", type=Path, help="a record from before")
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--configs", nargs="*", help="names without their ending; all if not given")
    args = parser.parse_args()
    old = json.loads(args.compare.read_text(encoding="utf-8")) if args.compare else {}
    record: dict[str, Any] = {}
    worst = 0
    for config in sorted((REPOSITORY / "configs").glob("*.yaml")):
        if args.configs and config.stem not in args.configs:
            continue
        with tempfile.TemporaryDirectory() as folder:
            record[config.stem] = run(config, Path(folder), args.edits)
        args.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
        found = differences(old[config.stem], record[config.stem]) if config.stem in old else []
        worst |= bool(found) or "failed" in record[config.stem]
        state = "failed" if "failed" in record[config.stem] else f"{len(found)} differences" if old else "recorded"
        print(f"{config.stem}: {state}", *found[:3], sep="\n  ", flush=True)
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
