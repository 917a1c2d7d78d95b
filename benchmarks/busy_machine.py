"""How edits slow down beside one busy process per core: with the package's threads, and with OpenMP's own.

Every run is a process of its own, `train.py fit` on a few edits. Runs alone and beside the busy processes take turns,
so that whatever else the machine does falls on all of them. Prints medians of seconds per edit and their ratio.

    python benchmarks/busy_machine.py --edits 6 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
OWN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_CBWR")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends when this benchmark is killed, too
WAYS: dict[str, dict[str, str]] = {
    "the package's": {},
    f"{CORES} threads that spin": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "ACTIVE", "MKL_CBWR": "AUTO"},
}


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keeps so many cores busy."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_per_edit(config: str, edits: int, environment: dict[str, str], cache: str) -> float:
    """Of a run, the first edit left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(TRAIN), "fit", "--config", config, f"--data.n_edits={edits + 1}"),
            *("--model.corpus_tokens=10000", f"--model.cache_dir={cache}", f"--trainer.default_root_dir={folder}"),
            *("--retention.every_n=100000", "--stability.every_n=100000", "--downstream.n_items=0"),
            *("--export.model=false", "--trainer.enable_progress_bar=false"),
        ]
        own = {name: value for name, value in os.environ.items() if name not in OWN}
        done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        (journal,) = Path(folder).rglob("edits.jsonl")
        return statistics.mean(json.loads(line)["seconds"] for line in journal.read_text().splitlines()[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mose.yaml")
    parser.add_argument("--edits", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/busy_machine.json"))
    args = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "busy": []} for name in WAYS}
    with tempfile.TemporaryDirectory() as cache:
        seconds_per_edit(args.config, 1, {}, cache)  # collects the statistics
        for _ in range(args.repeats):
            for name, environment in WAYS.items():
                found[name]["alone"].append(seconds_per_edit(args.config, args.edits, environment, cache))
                with busy(CORES):
                    found[name]["busy"].append(seconds_per_edit(args.config, args.edits, environment, cache))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1))
    print("| threads | seconds per edit | beside busy processes | ratio |\n|---|---|---|---|")
    for name, times in found.items():
        alone, beside = statistics.median(times["alone"]), statistics.median(times["busy"])
        print(f"| {name} | {alone:.2f} | {beside:.2f} | {beside / alone:.1f} |")


if __name__ == "__main__":
    main()
