"""Runs the methods over the same edits and writes one table and one figure: `make compare`.

Each configuration is a run of `train.py fit` of its own under ``runs/compare``. A run that is complete is not repeated,
so an interrupted comparison goes on where it stopped; ``--fresh`` starts over.

    python benchmarks/four_methods.py --n_edits 100 --every_n 25
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lit_edit.results import Results, read_results

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "reliability": "reliability",
    "generalization": "generalization",
    "locality": "locality",
    "downstream": "general abilities",
    "stability/mean_frobenius_norm": "norm",
    "stability/worst_condition_number": "condition number",
    "stability/mean_relative_drift": "drift",
}
LINES = ("reliability", "generalization", "locality", "downstream", "stability/worst_condition_number")


def complete(folder: Path, n_edits: int) -> Results | None:
    """The results of a finished run, or None."""
    if not (folder / "results.json").is_file():
        return None
    results = read_results(folder)
    done = results.records and results.records[-1]["edits"] == n_edits and "seconds" in results.run
    return results if done else None


def run(config: str, folder: Path, n_edits: int, every_n: int, extra: list[str]) -> None:
    """One fit, in a process of its own, its output shown."""
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", config]
    command += [f"--data.init_args.n_edits={n_edits}"]
    command += [f"--{group}.every_n={every_n}" for group in ("retention", "stability", "downstream")]
    command += ["--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger"]
    command += [f"--trainer.logger.save_dir={folder.parent}", f"--trainer.logger.name={folder.name}"]
    command += ["--trainer.logger.version="]
    subprocess.run([*command, *extra], check=True, cwd=ROOT)


def with_means(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the mean of its downstream scores."""
    scores = [v for k, v in record.items() if k.startswith("downstream/")]
    return {**record, "downstream": sum(scores) / len(scores)} if scores else record


def table(results: dict[str, Results]) -> str:
    """Markdown: one row per method, at its last evaluation, and the unedited model."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows = {"before": next(iter(results.values())).records[0]}
    rows |= {name: result.records[-1] for name, result in results.items()}
    for name, record in rows.items():
        figures = with_means(record)
        lines.append(f"| {name} | " + " | ".join(f"{figures[c]:.3g}" for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Results], path: Path) -> None:
    """Curves over the number of edits, a panel per figure."""
    fig, axes = plt.subplots(1, len(LINES), figsize=(3.1 * len(LINES), 2.9), constrained_layout=True)
    for axis, line in zip(axes, LINES, strict=True):
        for name, result in results.items():
            points = [(r["edits"], with_means(r).get(line)) for r in result.records]
            if line in ("reliability", "generalization"):
                points = points[1:]  # at 0 edits there is nothing to retain
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set_title(COLUMNS[line], fontsize=10)
        axis.set_xlabel("edits", fontsize=9)
        if line.startswith("stability"):
            axis.set_yscale("log")
        else:
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["mose.yaml", "rome.yaml", "memit.yaml", "alphaedit.yaml"])
    parser.add_argument("--n_edits", type=int, default=100)
    parser.add_argument("--every_n", type=int, default=25)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare", help="folder of the runs and the table")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "four-methods.png")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are complete")
    args, extra = parser.parse_known_args()
    results: dict[str, Results] = {}
    for config in args.configs:
        name = Path(config).stem
        folder = args.out.resolve() / name
        if args.fresh or complete(folder, args.n_edits) is None:
            run(config, folder, args.n_edits, args.every_n, extra)
        found = complete(folder, args.n_edits)
        if found is None:
            raise SystemExit(f"The run of {config} left no complete results in {folder}.")
        results[name] = found
    text = table(results)
    (args.out / "table.md").write_text(text)
    figure(results, args.figure)
    print(text)
    print(f"figure: {args.figure}   table: {args.out / 'table.md'}")


if __name__ == "__main__":
    main()
